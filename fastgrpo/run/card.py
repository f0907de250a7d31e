"""A model card for what a run's export wrote: README.md of a folder, and of a repository on the Hugging Face hub.

It is for others to read, so places on this machine are left out of it: of a path only the last part is shown. Prompts
and names come from anyone's files: they are shown on one line, and neither as Markdown nor as HTML.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fastgrpo.evaluation.results.summary import PROMPTS_FILE, read_result
from fastgrpo.evaluation.results.tables import LEGEND, PROMPT_WIDTH, escape, markdown_tables
from fastgrpo.models.check import SHAPES_PIPELINE
from fastgrpo.models.repository import is_hub_id
from fastgrpo.models.snippet import snippet
from fastgrpo.run import best
from fastgrpo.run.checkpoint import TrainerState, read_state
from fastgrpo.settings.commands import Export
from fastgrpo.settings.paths import without_folder, without_folders
from fastgrpo.settings.schema import ModelConfig, TrainConfig
from fastgrpo.settings.toml import dump_toml
from fastgrpo.system.code_version import code_version
from fastgrpo.system.files import reading

CARD = "README.md"  # the hub's name

_MARKS = "● trained on, ○ never trained on. Better, worse: by the paired test of a row's own images, p < 0.05."

_OPENRAIL, _OPENRAIL_PP = "creativeml-openrail-m", "openrail++"
_LICENSES = {
    "shapes": "mit",
    **{f"compvis/stable-diffusion-v1-{version}": _OPENRAIL for version in (1, 2, 3, 4)},
    "runwayml/stable-diffusion-v1-5": _OPENRAIL,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _OPENRAIL,
    **{
        f"{owner}/stable-diffusion-{version}": _OPENRAIL_PP
        for owner in ("stabilityai", "sd2-community")
        for version in ("2", "2-base", "2-1", "2-1-base")
    },
}
"""Licence, as the hub names it, of base models by their hub id in lower case: what is trained from them is under it."""


@dataclass(frozen=True)
class Card:
    """text: of README.md. pictures: that it shows, by their names beside it -> where they are now."""

    text: str
    pictures: Mapping[str, Path] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write README.md and the pictures into a folder."""
        (folder / CARD).write_text(self.text, encoding="utf-8")
        for name, picture in self.pictures.items():
            (folder / name).write_bytes(picture.read_bytes())


def model_card(command: Export, config: TrainConfig, folder: Path) -> Card:
    """The card of what `command` exports from the checkpoint in `folder`. config: of the run.

    Raises ConfigError for an evaluation of the run that cannot be read.
    """
    state, pictures = read_state(folder), _pictures(command, config, folder)
    title = command.push or command.output.name
    body = [
        f"# {escape(title, 200)}",
        "",
        *_about(command, config, state),
        *_use(command, config),
        *_results(command, config, state),
        *_shown(command, pictures),
        "",
        "## Configuration",
        "",
        "The run's `config.toml`; paths are shortened to their last part.",
        "",
        "```toml",
        dump_toml(without_folders(replace(config, run=""))).strip(),
        "```",
        "",
        f"Exported with {escape(code_version(), 100)}. Trained with "
        + ", ".join(f"{escape(name)} {escape(version)}" for name, version in state.versions.items())
        + ".",
    ]
    front = _data(command, config, bool(pictures)).to_yaml()
    return Card(str(ModelCard(f"---\n{front}\n---\n\n" + "\n".join(body) + "\n")), pictures)


def _data(command: Export, config: TrainConfig, pictured: bool) -> ModelCardData:
    """What the hub reads of a card."""
    safety, path = _for_safety(config), config.model.path
    tags = ["fastgrpo", "stable-diffusion", *(["lora"] if command.format == "lora" else []), "grpo"]
    tags += ["safety"] if safety else []
    # The hub's word for what pictures of unsafe prompts, drawn by a model of the real world, may be.
    tags += ["not-for-all-audiences"] if safety and pictured and path != "shapes" else []
    optional = {"license": _LICENSES.get(path.lower())}
    if is_hub_id(path):
        optional |= {"base_model": path, "base_model_relation": "adapter" if command.format == "lora" else "finetune"}
    known: dict[str, Any] = {key: value for key, value in optional.items() if value}
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **known)


def _for_safety(config: TrainConfig) -> bool:
    """Whether the run was to draw fewer unsafe images."""
    return config.prompts.negative_fraction > 0 and any(term.startswith("steering") for term in config.reward.terms)


def _about(command: Export, config: TrainConfig, state: TrainerState) -> list[str]:
    kind = "LoRA adapters for" if command.format == "lora" else "A Stable Diffusion trained from"
    goal = " to draw fewer unsafe images and no worse what it is asked for," if _for_safety(config) else ""
    terms = ", ".join(escape(without_folder(term), 100) for term in config.reward.terms)
    weights = "its moving average" if command.weights == "ema" else "as trained"
    chosen = best.read(command.run)
    why = ""
    if chosen and (chosen.iteration, chosen.weights) == (state.iteration, command.weights):
        why = f" This is the best checkpoint of its run: {escape(chosen.why, 400)}."
    return [
        f"{kind} {_base(config.model)}, post-trained online{goal} by a group-relative policy gradient (GRPO): "
        "on images that the model drew itself, without image data.",
        "",
        f"These are the weights after iteration {state.iteration}, {weights}; an iteration draws "
        f"{config.group_size} images for each of {config.prompts_per_iteration} prompts. "
        f"Reward: {terms}. Seed {config.seed}.{why}",
        "",
    ]


def _base(model: ModelConfig) -> str:
    if model.path == "shapes":
        return "`shapes`, the small Stable Diffusion that comes with fastgrpo"
    if is_hub_id(model.path):
        return f"[{model.path}](https://huggingface.co/{model.path})"
    return escape(Path(model.path).name, 200)


def _use(command: Export, config: TrainConfig) -> list[str]:
    """How to load it in diffusers, and what kohya's layout is for."""
    model, name = config.model, command.output.name
    lines = snippet(command.format, command.output, model, command.loaded_dtype)
    lines.append('image = pipe("a photo of a cat").images[0]')
    text = "\n".join(lines).replace(repr(str(command.output)), _place(command))
    if repr(str(SHAPES_PIPELINE)) in text:
        text = text.replace(repr(str(SHAPES_PIPELINE)), "str(SHAPES_PIPELINE)")
        text = text.replace("\npipe = ", "\nfrom fastgrpo.models.check import SHAPES_PIPELINE\npipe = ", 1)
    for own in sorted((model.path, model.unet, model.config), key=len, reverse=True):
        text = text.replace(own, without_folder(own)) if own else text
    elsewhere = (
        [f"For A1111, Forge and ComfyUI: put `{escape(name, 200)}` into their folder of LoRAs.", ""]
        if command.layout == "kohya"
        else []
    )
    return ["## Use", "", *elsewhere, "```python", text, "```", ""]


def _place(command: Export) -> str:
    """The Python arguments that say where the export is, to others."""
    name = command.output.name
    if not command.push:
        return repr(name)
    if command.format == "single-file":
        return repr(f"https://huggingface.co/{command.push}/blob/main/{name}")
    return repr(command.push) + (f", weight_name={name!r}" if command.layout == "kohya" else "")


def _evaluated_weights(config: TrainConfig) -> str:
    """Which weights the run evaluated and pictured itself."""
    return "ema" if config.eval.weights == "ema" and config.optim.ema else "trained"


def _at_the_end(command: Export, config: TrainConfig, iteration: int) -> bool:
    """Whether the export is what the run itself calls `after`, which it writes after its last iteration alone."""
    return iteration == config.iterations and command.weights == _evaluated_weights(config)


def _results(command: Export, config: TrainConfig, state: TrainerState) -> list[str]:
    """The tables of the evaluations of just these weights, or that there is none."""
    average = "-ema" if command.weights == "ema" else ""
    places = [command.run / "evaluation" / f"iter-{state.iteration:06d}{average}"]
    if _at_the_end(command, config, state.iteration):
        places.insert(0, command.run / "evaluation" / "in-training")
    suites: dict[str, Any] = {}
    for file in (place / "evaluation.json" for place in places):
        if file.is_file():
            found = read_result(file)
            with reading(file):
                for name, suite in found["suites"].items():
                    suites[name] = markdown_tables(suite, list(found["stages"]))
    lines = [line for tables in suites.values() for line in tables]
    if not lines:
        return ["## Before and after", "", "These weights have not been evaluated by themselves."]
    return ["## Before and after", "", "Held-out prompts, before and after training.", *lines, "", f"{LEGEND} {_MARKS}"]


def _pictures(command: Export, config: TrainConfig, folder: Path) -> dict[str, Path]:
    """The run's own pictures before and after, where `after` are the weights that are exported."""
    samples, iteration = command.run / "samples", int(folder.name.removeprefix("iter-"))
    both, after = samples / "before_after.png", samples / f"{folder.name}.png"
    if _at_the_end(command, config, iteration) and both.is_file():
        return {both.name: both}
    if command.weights == _evaluated_weights(config) and after.is_file() and (samples / "before.png").is_file():
        return {"before.png": samples / "before.png", "after.png": after}
    return {}


def _shown(command: Export, pictures: Mapping[str, Path]) -> list[str]:
    """The pictures, and which prompts their rows are of."""
    if not pictures:
        return []
    shown = [f"![{name.removesuffix('.png').replace('_', ' and ')}]({name})" for name in pictures]
    lines = ["", "The same prompts and seeds before and after training:", "", *shown]
    file = command.run / "samples" / PROMPTS_FILE
    if file.is_file():
        with reading(file):
            prompts = [str(prompt["text"]) for prompt in json.loads(file.read_text(encoding="utf-8"))]
        lines += ["", "Row by row:", "", *(f"1. {escape(text, PROMPT_WIDTH)}" for text in prompts)]
    return lines
