"""`python bench/forecast.py`: PREDICTS how long an iteration of the paper's takes on a GPU that is not there.

    python bench/forecast.py [--pairs N] [--attention NAME] [--out FILE.json] [--measured STEP.json]

A whole iteration is traced at the paper's shapes (workload.py) on tensors without values (absent.py): the rollout,
decoding, scoring and every micro-batch and optimizer step of the update, by the very functions that training calls,
around a UNet that went through torch.compile's stages (generated.py). Then

    waits       an operator that would make the host wait for the device, within a rollout's steps, a micro-batch or an
                optimizer step, is an error that names it and where it was called
    memory      storages that are alive, at the worst, beside what the engine plans
    time        of every kernel by its bytes and FLOP at assumed speeds, summed by phase; the micro-batch is the
                engine's own choice

Everything but the waits is a prediction, and says so. With --measured a run's median (step.json, as
bench/test_iteration.py writes it) stands beside it.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import open_clip
import torch
from absent import H200, absent_device, module_on_device, on_device
from absent_unet import TOKENS, WIDTH, attention_plan, trainable_unet
from generated import CLASSES, SPEEDS, Compiler, Prediction, Speeds
from kept import about_here
from throughput_table import FORETOLD, OURS, median_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from watch import Total, Watch
from workload import REWARD_ARCHITECTURE, altered, paper

from fastgrpo.costs.counting import count_encoders, count_model, sd1_architecture
from fastgrpo.costs.memory import (
    Iteration,
    Memory,
    candidates,
    iteration_of,
    memory_plan,
    predicted_micro_batch,
)
from fastgrpo.engine import setup
from fastgrpo.engine.batch_size import MicroBatchChoice, find_micro_batch
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.engine.record import EngineRecord
from fastgrpo.engine.trainable import Trainable
from fastgrpo.grpo.micro_batch import Experience, Remembered, blank_batch
from fastgrpo.grpo.pairs import Pairs
from fastgrpo.grpo.steps import pairs_per_iteration
from fastgrpo.policy import Policy
from fastgrpo.rewards.encoder import OpenClipEncoder, SharedEncoder
from fastgrpo.rollout import rollout
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.types import Prompt, PromptBatch
from fastgrpo.unet.attention import BACKENDS
from fastgrpo.unet.compilation import replace_upsamplers
from fastgrpo.unet.copies import Network

ROOT = Path(__file__).resolve().parent.parent
GAP = 1e-6
"""Seconds from one kernel of a CUDA graph to the next, assumed."""

_PHASES = ("rollout", "decoding", "reward", "update", "optimizer")
_STAGES = {"rollout": "rollout", "decoding": "decode", "reward": "reward", "update": "update"}  # the plan's names


@dataclass(frozen=True)
class Stage:
    """All that an iteration needs, on the device that is not there."""

    config: TrainConfig
    engine: FixedPasses
    trainable: Trainable
    encoder: SharedEncoder
    prompts: PromptBatch

    def tensors(self) -> list[Tensor]:
        """What is always there."""
        engine, optimizer = self.engine, self.trainable.optimizer
        policy, base = engine.policy, engine.loss.base
        modules = [policy.unet, policy.computing, *([base] if isinstance(base, nn.Module) else [])]
        if self.config.engine.offload != "on":
            modules += [policy.vae, policy.text_encoder, self.encoder.model]
        weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        others = [value for owner in (optimizer, optimizer.weights, engine.schedule) for value in vars(owner).values()]
        return [*weights, *(value for value in others if isinstance(value, Tensor))]


def prepare(config: TrainConfig, pairs: int, backend: str, compiler: Compiler) -> Stage:
    """Inside of `absent_device()`: what `start_engine` makes of settings that leave it nothing to measure."""
    cuda, dtype, about = torch.device("cuda"), torch.bfloat16, sd1_architecture()
    with unset_fake_temporarily():
        parts = about.empty_components()
        vae, text_encoder = (parts[name].to(dtype).eval().requires_grad_(False) for name in ("vae", "text_encoder"))
        setup._patch_vae(SimpleNamespace(vae=vae, device=cuda))  # tensors without values cannot be moved in place
        with torch.device("meta"):
            reward = open_clip.create_model(
                REWARD_ARCHITECTURE, load_weights=False, pretrained_text=False, device="meta"
            )
        schedule = make_schedule(about.scheduler, config.rollout.steps, config.rollout.eta, torch.device("cpu"))
    schedule = replace(schedule, timesteps=on_device(schedule.timesteps), tables=on_device(schedule.tables))
    trainable = trainable_unet(config)
    policy = Policy(
        trainable.unet,
        module_on_device(vae),
        module_on_device(text_encoder),
        None,
        about.scheduler,
        cuda,
        dtype,
        trainable.network,
    )
    embeds = torch.empty(config.prompts_per_iteration, TOKENS, WIDTH, device=cuda)

    def compile_forward(network: nn.Module, *_: Any) -> Network:
        replace_upsamplers(network)
        return torch.compile(network, backend=compiler, dynamic=False, fullgraph=True)

    stand_ins = {
        "choose_backends": lambda wanted, shapes, *_: attention_plan(backend, shapes),
        "fits_within": lambda *_: lambda size: True,
        "compile_forward": compile_forward,
        "_patch_vae": lambda policy: None,
        "_choose_group_norm": lambda *_: None,
    }
    config = altered(
        config,
        engine__graphs="off",
        engine__reuse="off",
        engine__attention=backend,
        engine__gradient_checkpointing="on" if config.engine.gradient_checkpointing == "on" else "off",
        engine__offload="on" if config.engine.offload == "on" else "off",
    )
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(f"fastgrpo.engine.setup.{name}", stand_in))
        engine = setup.start_engine(
            policy, trainable, schedule, config, EngineRecord(), lambda *_: pairs, Ranks(), lambda line: None
        )
    encoder = SharedEncoder(OpenClipEncoder(module_on_device(reward), None, cuda, torch.float32), config.reward.tf32)
    if config.engine.offload == "on":
        encoder.encoder.offload()
    prompts = tuple(Prompt(f"prompt {number}", "positive") for number in range(config.prompts_per_iteration))
    return Stage(config, engine, trainable, encoder, PromptBatch(prompts, embeds))


def iterate(stage: Stage, work: Iteration, watch: Watch) -> None:
    """One iteration under the watch, which holds what is there before it."""
    config, engine, prompts = stage.config, stage.engine, stage.prompts
    decode = Policy.decode

    def decoding(*args: Any, **kwargs: Any) -> Tensor:
        with watch.phase("decoding"):
            return decode(*args, **kwargs)

    def noise(*size: Any, **kwargs: Any) -> Tensor:
        return torch.empty(*size, device=kwargs["device"]).normal_()

    # Of one process, with noise of the device's own; whether images are finite is asked once for a chunk, when it is
    # done.
    with (
        watch.phase("rollout"),
        mock.patch.object(Policy, "decode", decoding),
        mock.patch("torch.randn", noise),
        mock.patch("fastgrpo.rollout.require_finite"),
        mock.patch("fastgrpo.engine.overlap._side_stream"),
        mock.patch("torch.cuda.stream"),
        mock.patch.object(engine, "begin_rollout"),
    ):
        generator = SimpleNamespace(device=torch.device("cuda"))
        trajectory = rollout(engine, prompts, generator)
    with watch.phase("reward"):
        stage.encoder.encode_image(trajectory.images, config.reward.batch)
        stage.encoder.forget_images()
    rewards = torch.empty(len(prompts), config.group_size, device="cuda")
    experience = Experience.of(prompts, trajectory, rewards, config.grpo)
    old = Remembered.of(trajectory, ratio_norm=False)
    for _ in range(work.updates):
        with watch.phase("update"):
            pairs = Pairs(*(torch.zeros(work.pairs, dtype=torch.int64, device="cuda") for _ in range(2)))
            kept = engine.learn(pairs, experience, old, 1.0 / work.pairs)
        with watch.phase("optimizer"):
            engine.weights.collect_gradients()
            stage.trainable.step(config.optim.max_grad_norm)
            del kept
    engine.clear()


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to


def forecast(config: TrainConfig, pairs: int, backend: str, speeds: Speeds = SPEEDS) -> dict[str, Any]:
    """Everything that is predicted of an iteration, for JSON. pairs: of a micro-batch; 0 lets the engine choose."""
    dtype = torch.bfloat16
    about = sd1_architecture()
    model = count_model(about, config.model, dtype, kernels=True)
    encoders, _ = count_encoders(config.reward)
    schedule = make_schedule(about.scheduler, config.rollout.steps, config.rollout.eta, torch.device("cpu"))
    work = iteration_of(config, len(schedule), pairs_per_iteration(config, schedule), 1)
    room = int(config.engine.memory * H200.total_memory)
    largest = predicted_micro_batch(config, model, encoders, dtype, 1, room, candidates(work))

    def chosen(seconds: Callable[[int], float]) -> MicroBatchChoice:
        return find_micro_batch(lambda size: size <= largest, seconds, work, largest)

    size = pairs or chosen(float).size
    compiler = Compiler(speeds)
    watch = traced(config, size, work, backend, compiler)
    forward, backward = compiler.graphs
    predicted = Prediction(forward, backward)
    rows = size * config.rollout.halves
    kernels = [*forward.kernels, *backward.kernels]
    a_row = sum(kernel.seconds for kernel in kernels) / rows
    final = chosen(lambda other: other * config.rollout.halves * a_row + GAP * len(kernels))
    plan = memory_plan(config, model, encoders, dtype, 1, size)
    images = config.prompts_per_iteration * config.group_size
    return {
        "predicted": "for a device that is not there; nothing was measured",
        **{name: about_here()[name] for name in ("torch", "triton", "commit", "date")},
        "device": H200.name,
        "attention": backend,
        "speeds": asdict(speeds) | {"gap": GAP},
        "micro_batch": size,
        "chosen": {
            "size": final.size,
            "largest": final.largest,
            "ms_a_pair": {n: 1e3 * t / n for n, t in final.seconds},
        },
        "passes": work.passes(size),
        "padding": work.padding(size),
        "unet_us_a_row": {
            name: {kind: 1e6 * took for kind, took in kinds.items()} for name, kinds in predicted.classes(rows).items()
        },
        "phases": phases(watch),
        "seconds": sum(row["seconds"] for row in phases(watch)),
        "images": images,
        "memory": memory_rows(watch, plan),
        "waits": {f"{name} at {where}": count for (name, where), count in watch.waits.items()},
    }


def traced(config: TrainConfig, pairs: int, work: Iteration, backend: str, compiler: Compiler) -> Watch:
    """What one iteration does, without anything being computed. Raises DeviceWait."""
    watch = Watch(compiler.speeds)

    def encode(policy: Policy, texts: Sequence[str]) -> Tensor:
        return torch.empty(len(texts), TOKENS, WIDTH, device="cuda")

    with absent_device(), mock.patch.object(Policy, "encode", encode):
        stage = prepare(config, pairs, backend, compiler)
        stage.engine.loss.learn(blank_batch(stage.engine.policy, config, pairs))  # compiles
        compiler.ran = lambda graph: watch.ran(
            graph, "UNet forward" if graph is compiler.graphs[0] else "UNet backward"
        )
        compiler.hold = watch.hold
        watch.hold(stage.tensors())
        with watch:
            stage.engine._prepare()  # what it does once, in the first iteration
            iterate(stage, work, watch)
    if len(compiler.graphs) != 2:
        raise RuntimeError(f"the UNet has {len(compiler.graphs)} graphs; rollout and update are to share two")
    return watch


def phases(watch: Watch) -> list[dict[str, Any]]:
    """A row for each part of each phase, and one for what lies between kernels."""
    rows = [
        {"phase": phase, "part": part} | asdict(total)
        for (phase, part), total in sorted(watch.totals.items(), key=lambda item: (*_PHASES, "start").index(item[0][0]))
        if phase in _PHASES
    ]
    launches = sum(row["launches"] for row in rows)
    return [*rows, {"phase": "all", "part": "gaps between kernels"} | asdict(Total(launches, seconds=GAP * launches))]


def memory_rows(watch: Watch, plan: Sequence[Memory]) -> list[dict[str, Any]]:
    """By stage: gigabytes as traced, and as planned without what CUDA graphs keep for other stages."""
    planned: Counter[str] = Counter()
    for part in plan:
        planned[part.stage] += 0 if part.name.startswith("CUDA graphs") else part.size
    always = planned.pop("always")
    return [
        {"stage": phase, "traced_gb": watch.peaks[phase] / 1e9, "planned_gb": (always + planned[stage]) / 1e9}
        for phase, stage in _STAGES.items()
    ]


def table(found: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> str:
    """Markdown. measured: what a run's step.json holds."""
    chosen = found["chosen"]
    head = [
        "phase",
        "part",
        "predicted launches",
        "predicted TB",
        "predicted TFLOP",
        "predicted s",
        *["measured s"] * bool(measured),
    ]
    lines = [
        f"**PREDICTED, not measured**: one iteration of {found['images']} images on an {found['device']}, "
        f"{found['attention']} attention: {found['seconds']:.1f} s, {found['images'] / found['seconds']:.2f} images/s. "
        f"torch {found['torch']}, triton {found['triton']}, commit {found['commit']}, {found['date']}.",
        "",
        f"Micro-batch of {found['micro_batch']} pairs; by predicted times the engine chooses {chosen['size']} of "
        f"{', '.join(map(str, chosen['ms_a_pair']))}. {found['padding']:.1%} of the passes' work is padding.",
        "",
        *_with_flash(found),
        f"| {' | '.join(head)} |",
        f"|---|---|{'---:|' * (len(head) - 2)}",
    ]
    for row in found["phases"]:
        cells = f"{row['launches']} | {row['bytes'] / 1e12:.2f} | {row['flop'] / 1e12:.0f} | {row['seconds']:.2f}"
        lines.append(f"| {row['phase']} | {row['part']} | {cells} |" + (" |" if measured else ""))
    for stage, parts in FORETOLD.items():
        took = sum(row["seconds"] for row in found["phases"] if row["phase"] in parts)
        beside = f" {median_of(measured['rows'], OURS, f'time/{stage}_s'):.2f} |" if measured else ""
        lines.append(f"| **{stage}** | all | | | | **{took:.2f}** |{beside}")
    lines += ["", f"| UNet, predicted us a row | {' | '.join(CLASSES)} | all |", "|---|" + "---:|" * (len(CLASSES) + 1)]
    for name, kinds in found["unet_us_a_row"].items():
        cells = " | ".join(f"{kinds[kind]:.0f}" for kind in CLASSES)
        lines.append(f"| {name} | {cells} | {sum(kinds.values()):.0f} |")
    lines += ["", "| memory | predicted GB, traced | planned GB |", "|---|---:|---:|"]
    lines += [f"| {row['stage']} | {row['traced_gb']:.1f} | {row['planned_gb']:.1f} |" for row in found["memory"]]
    return "\n".join(lines) + "\n"


def _with_flash(found: Mapping[str, Any]) -> list[str]:
    """What cuDNN's attention is assumed to save."""
    if found["attention"] != "cudnn":
        return []
    more = (found["speeds"]["cudnn"] - 1) * sum(row["attention"] for row in found["phases"])
    return [f"With flash attention, {more:.1f} s more: {found['seconds'] + more:.1f} s.", ""]


def main() -> None:
    options = _options()
    measured = json.loads(options.measured.read_text(encoding="utf-8")) if options.measured else None
    found = forecast(paper(), options.pairs, options.attention)
    text = table(found, measured)
    print(text, end="")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=0, help="of a micro-batch (default: as the engine chooses)")
    parser.add_argument(
        "--attention",
        default="cudnn",
        choices=BACKENDS,
        help="who computes it (default: cudnn, at these speeds the fastest)",
    )
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it, as .md")
    parser.add_argument("--measured", type=Path, help="a run's step.json, to stand beside the prediction")
    return parser.parse_args()


if __name__ == "__main__":
    main()
