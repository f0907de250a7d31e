"""`python bench/small_cards.py [PRESET ...]`: what the presets for small cards hold in memory, traced and planned.

An iteration's stages are traced on tensors without values (absent.py), by the functions that training calls: reading
texts, drawing, decoding, scoring, learning from two micro-batches, and an optimizer step. Of what is done again and
again in the same way, the steps of a rollout and the pictures of a decoding, the first is traced and what it leaves is
made for the others. Beside the most bytes alive in each stage stands what `python -m fastgrpo.estimate` plans for it,
without what CUDA graphs keep, which is not there.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import forecast
import torch
from absent import absent_device
from absent_unet import TOKENS
from forecast import Stage
from generated import SPEEDS
from torch import Tensor, nn
from watch import Watch

from fastgrpo.costs.counting import count_encoders, count_model, sd1_architecture
from fastgrpo.costs.memory import iteration_of, memory_plan, peak
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.engine.sampler import Denoise
from fastgrpo.grpo.steps import pairs_per_iteration
from fastgrpo.policy import Policy
from fastgrpo.rewards.encoder import OpenClipEncoder
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.offload import resident

CARDS = {"sd15-8gb": 8, "sd15-12gb": 12, "sd15-24gb": 24, "sd15-24gb-full": 24}
"""Preset -> the card's gigabytes, by which shops mean 2^30 bytes each."""
TAKEN = 0.6 * 2**30
"""Bytes of a card that a training cannot have: CUDA's context, and a desktop's display."""
SPARE = 0.1
"""Share of the rest that the plan leaves: kernels' workspaces, graphs' inputs, what the allocator holds back."""
_DTYPE = torch.bfloat16
_STAGES = {"texts": "texts", "rollout": "rollout", "decoding": "decode", "reward": "reward", "update": "update"}


def usable(preset: str) -> float:
    """Bytes that the preset's plan may come to."""
    return (1 - SPARE) * (CARDS[preset] * 2**30 - TAKEN)


def planned(config: TrainConfig) -> tuple[dict[str, int], int]:
    """Returns the plan's bytes by stage, with what is always there but without CUDA graphs, and the peak with them."""
    checkpointing = config.engine.gradient_checkpointing == "on"
    model = count_model(sd1_architecture(), config.model, _DTYPE, kernels=True, gradient_checkpointing=checkpointing)
    encoders, _ = count_encoders(config.reward)
    plan = memory_plan(config, model, encoders, _DTYPE, 1, config.micro_batch)
    stages: dict[str, int] = {}
    for part in plan:
        if not part.name.startswith("CUDA graphs"):
            stages[part.stage] = stages.get(part.stage, 0) + part.size
    always = stages.pop("always")
    return {stage: always + size for stage, size in stages.items()}, peak(plan)[1]


def traced(config: TrainConfig) -> dict[str, int]:
    """Returns the most bytes that were alive in each stage."""
    watch = Watch(SPEEDS)

    def encode(policy: Policy, texts: Sequence[str]) -> Tensor:
        with resident(policy.text_encoder):
            tokens = torch.zeros(len(texts), TOKENS, dtype=torch.int64, device="cuda")
            return policy.text_encoder(tokens)[0].float()

    def as_it_is(network: nn.Module, **_: Any) -> nn.Module:
        return network

    about = sd1_architecture()
    schedule = make_schedule(about.scheduler, config.rollout.steps, config.rollout.eta, torch.device("cpu"))
    work = iteration_of(config, len(schedule), pairs_per_iteration(config, schedule), 1)
    work = replace(work, updates=1, pairs=2 * config.micro_batch)
    with absent_device(), mock.patch.object(Policy, "encode", encode), mock.patch("torch.compile", as_it_is):
        stage = forecast.prepare(config, config.micro_batch, "flash", mock.MagicMock())
        watch.hold(stage.tensors())
        with watch:
            stage.engine._prepare()
            with _once(stage, watch):
                forecast.iterate(stage, work, watch)
    held = {stage: watch.peaks[phase] for phase, stage in _STAGES.items()}
    if config.engine.offload != "on":
        del held["texts"]  # nothing comes for them, and the plan leaves them out
    else:  # images are first there when the rollout is over; the plan has them all the time
        image = 4 * math.prod(stage.engine.policy.image_shape)
        held["rollout"] += config.prompts_per_iteration * config.group_size * image
    return held


@contextmanager
def _once(stage: Stage, watch: Watch) -> Iterator[None]:
    """Only the first chunk's first step is computed, and only the first picture decoded; texts are read for scoring."""
    denoiser, vae = FixedPasses.denoiser, stage.engine.policy.vae
    encode_image = OpenClipEncoder.encode_image
    decode: Callable[..., Any] = vae.decode

    def first_step(engine: FixedPasses, embeds: Tensor, part: slice, *others: Any) -> Denoise:
        denoise = denoiser(engine, embeds, part, *others)

        def step(index: int, latents: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            if part.start == index == 0:
                return denoise(index, latents, noise)
            return torch.empty_like(latents), torch.empty(len(latents), device="cuda")

        return step

    def first_picture(latents: Tensor, return_dict: bool = True) -> Any:
        vae.decode = made
        return decode(latents, return_dict=return_dict)

    def made(latents: Tensor, return_dict: bool = True) -> Any:
        return (latents.new_empty(len(latents), *stage.engine.policy.image_shape),)

    def after_texts(encoder: OpenClipEncoder, images: Tensor, batch: int) -> Tensor:
        with watch.phase("texts"):
            stage.engine.policy.encode([""])
            with resident(encoder.model):
                encoder.model.encode_text(torch.zeros(1, TOKENS, dtype=torch.int64, device="cuda"))
        return encode_image(encoder, images, batch)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(FixedPasses, "denoiser", first_step))
        stack.enter_context(mock.patch.object(OpenClipEncoder, "encode_image", after_texts))
        vae.decode = first_picture
        stack.callback(vars(vae).pop, "decode", None)
        yield


def main() -> None:
    for preset in sys.argv[1:] or CARDS:
        config = load_toml(find_preset(preset))
        found = traced(config)
        plan, most = planned(config)
        room = f"{usable(preset) / 1e9:.2f} GB of {CARDS[preset]} GiB may be filled"
        print(f"{preset}: {most / 1e9:.2f} GB planned at most; {room}")
        for stage, size in found.items():
            apart = plan[stage] / size - 1
            print(f"  {stage:8} traced {size / 1e9:6.2f} GB  planned {plan[stage] / 1e9:6.2f}  {apart:+.1%}")


if __name__ == "__main__":
    main()
