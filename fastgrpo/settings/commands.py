"""The flags of evaluate, sample and export. Field docstrings are the flags' help texts."""

import re
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgrpo.settings.paths import PathText
from fastgrpo.settings.suites import DDIM, AllSettings, SamplerName

Weights = Literal["trained", "ema"]
CheckpointName = int | Literal["latest", "best"]


@dataclass(frozen=True)
class Evaluate(AllSettings):
    """Draw the prompts of one suite or several, measure the images, and print the numbers beside the published ones.

    Images are kept, and a run that was stopped goes on where it was. With a RUN both its base model (before) and its
    trained one (after) are evaluated on the same prompts and seeds; otherwise the model of --model alone.
    """

    run: Annotated[tyro.conf.Positional[PathText], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run, finished or not, or `hf:OWNER/NAME`, where export has pushed one: it is downloaded to runs/NAME.
    Without it, --model."""
    suites: tuple[str, ...] = ()
    """What to measure: i2p, nudity, geneval, clip-score, fid, attacks, custom, shapes.
    Empty: shapes, for the model of that name."""
    model: PathText = "shapes"
    """Without a RUN: an SD 1.x / 2.x pipeline, a diffusers folder, a hub id, a single file, or `shapes`."""
    unet: PathText = ""
    """Another UNet for --model: a folder or hub id, with its subfolder after a colon, as in `OWNER/NAME:step-300/unet`;
    or a file of its tensors, all or those that were tuned (.safetensors, .pt, .pth, .bin, .ckpt)."""
    config: PathText = ""
    """Diffusers folder or hub id whose configs describe a single file; empty: SD 1.x or 2.x, told from the file."""
    variant: str = ""
    """Variant of --model's weight files, such as `fp16`."""
    revision: str = ""
    """Branch, tag or commit of --model, a hub id."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What --model's UNet predicts; `auto` believes its scheduler's config or what a single file says of itself.
    SD 2.x files that say nothing need it: `epsilon` for those of 512 pixels, `v_prediction` for those of 768."""
    checkpoint: CheckpointName = "latest"
    """Which checkpoint of the RUN: its iteration, `latest`, or `best`, as checkpoints/best.json names it."""
    weights: Weights = "trained"
    """Of the RUN: `trained`, or `ema`, the moving average that runs with optim.ema keep."""
    output: Path | None = None
    """Folder of images and results, new or begun; None is RUN/evaluation/iter-NNNNNN, or evaluations/MODEL."""
    missing: Literal["draw", "refuse", "skip"] = "draw"
    """Images that are not there yet: `draw` them, `refuse` to score without them, or `skip` them and say so."""
    shard: str = ""
    """I/N: only draw part I of N, from 1. Once all parts lie in one folder, the command without it scores them."""
    sampler: SamplerName = DDIM
    """`ddim`, ours, or diffusers' `pndm`, as SD 1.x and GenEval's script draw, or `lms`, as RECE draws I2P."""
    steps: int | None = None
    """Denoising steps; None is 50, for `shapes` the run's own."""
    eta: float | None = None
    """DDIM's eta, 0 to 1: 0 is deterministic, as published protocols sample; None is 0, for `shapes` the run's own."""
    guidance: float | None = None
    """Classifier-free guidance scale of every image; None is each suite's or prompt's own."""
    seed: int | None = None
    """Seed of the noise for prompts that bring none; None is the run's eval.seed, or 1234."""
    size: int = 0
    """Width and height of every image in pixels; 0 is each prompt's own, or the model's."""
    batch: int | None = None
    """Images drawn at once; a folder keeps the number it began with. None is the run's rollout.decode_batch, or 16."""
    compare: tuple[Path, Path] | None = None
    """Two folders of results of the same suites, prompts and seeds: test their differences and evaluate nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the UNet computes in. `auto`: bf16 on CUDA, fp32 on CPU."""

    @property
    def part(self) -> tuple[int, int]:
        """I and N of --shard, 1 of 1 without it; 0 of 0 for a text that is not I/N."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        return (int(match[1]), int(match[2])) if match else (0, 0)


@dataclass(frozen=True)
class _OfRun:
    """The flags that choose what a run was trained to."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, finished or not, or `hf:OWNER/NAME`, where export has pushed one: it is downloaded to
    runs/NAME."""
    checkpoint: CheckpointName = field(default="latest", kw_only=True)
    """Which checkpoint to take: its iteration, `latest`, or `best`, as checkpoints/best.json names it."""
    weights: Weights = field(default="trained", kw_only=True)
    """`trained`, or `ema`, the moving average that runs with optim.ema keep."""


@dataclass(frozen=True)
class Sample(_OfRun):
    """Draw prompts with a run's base model and with what it was trained to, from the same seeds, side by side.

    Image i (1, 2, ...) of every prompt is drawn from the seed `--seed` + i - 1, so it depends on its own prompt and
    seed alone, whatever else is drawn.
    """

    prompts: tuple[str, ...] = ()
    """What to draw; without this and --prompt-file, the first four of the run's own positive and negative prompts."""
    prompt_file: Path | None = None
    """Text file with one prompt per line, drawn after --prompts."""
    images_per_prompt: int = 4
    """Images of each prompt and model."""
    seed: int = 0
    """Seed of every prompt's first image."""
    steps: int | None = None
    """DDIM steps; None is the number that the run's own pictures have."""
    guidance: float | None = None
    """Classifier-free guidance scale; None is the run's."""
    eta: float | None = None
    """DDIM eta, above 0 and at most 1; None is the run's."""
    batch: int = 16
    """Images drawn at once."""
    output: Path | None = None
    """PNG of the comparison, a new file; None is RUN/samples/compare.png, or compare-2.png and so on after others."""
    images: Path | None = None
    """New or empty folder for prompts.txt and every image: base-0003-2.png is the second of the third prompt."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the UNet computes in. `auto`: bf16 on CUDA, fp32 on CPU."""

    @property
    def comparison(self) -> Path:
        """Where to write the comparison: --output, or a name in the run's samples that is not taken."""
        folder = self.run / "samples"
        names = (folder / ("compare.png" if number == 1 else f"compare-{number}.png") for number in count(1))
        return self.output or next(path for path in names if not path.exists())


@dataclass(frozen=True)
class Export(_OfRun):
    """Write the Stable Diffusion that a run trained, complete or as adapters, in a form that other programs load."""

    format: Literal["diffusers", "single-file", "lora"]
    """`diffusers`, a complete pipeline folder; `single-file`, a .safetensors file in SD's original layout;
    `lora`, for runs with adapters, a folder with these alone."""
    output: Path
    """Where to write it: a folder that is new or empty, or a new file for `single-file` and for --layout kohya."""
    layout: Literal["diffusers", "kohya"] = "diffusers"
    """Of `lora`: `diffusers`, a folder with diffusers' names of file and tensors;
    `kohya`, a .safetensors file as A1111, Forge and ComfyUI load it."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of what is written; training is in fp32. `auto`: fp32, but fp16 in kohya's layout."""

    push: str = ""
    """Upload it to this repository on the Hugging Face hub, OWNER/NAME, which is made where there is none.
    The token is that of `hf auth login` or HF_TOKEN."""
    public: bool = False
    """Let everybody see a repository that --push makes; otherwise it is private. One that is there stays as it is."""

    with_checkpoint: bool = False
    """Upload the checkpoint and the run's config.toml too, so that `train --resume hf:OWNER/NAME` goes on from it.
    The config is uploaded as it is, with paths on this machine."""

    @property
    def written_dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """What --dtype stands for."""
        if self.dtype != "auto":
            return self.dtype
        return "fp16" if self.layout == "kohya" else "fp32"

    @property
    def loaded_dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """What to load it in, where nothing is known of the other machine."""
        return "fp32" if self.dtype == "auto" else self.dtype

    @property
    def is_file(self) -> bool:
        """Whether one file is written, and no folder."""
        return self.format == "single-file" or self.layout == "kohya"
