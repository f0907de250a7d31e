"""`python -m fastgrpo.shapes_lab.second_reader`: a reader of pictures that checks the oracle, and how often they agree.

The oracle lays masks over blobs; this one is a small convolutional network, and shares nothing with it but the world.
It learns from painted pictures, degraded as generated ones are: noisy, blurred, through the autoencoder, with patches
missing and edges that wobble. Where two readers of such different making agree, what they read is in the picture.

Prints JSON: how well it reads fresh painted pictures, and on how many of the autoencoder's round trips, of the model's
pictures for held-out prompts and of those that finished runs left, before and after training, both readers agree.
"""

import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.models.tensor_file import read_metadata, read_tensors, tensor_shapes
from fastgrpo.policy import Policy, load_policy
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes import oracle
from fastgrpo.shapes.captions import heldout_prompts
from fastgrpo.shapes.world import COLORS, HAZARDS, SHAPES, SIZE, Hazard, Object, Scene, paint, place
from fastgrpo.shapes_lab.drawings import degrade, paint_pictures, to_unit
from fastgrpo.shapes_lab.measure import round_trip
from fastgrpo.shapes_lab.optimization import Stage
from fastgrpo.system.console import Console, run_command
from fastgrpo.system.errors import ConfigError, flag, require_at_least

MOST = 4  # objects that are told apart
_COUNTED = (*SHAPES, *COLORS)
_STAGES = ("before", "after")


@dataclass(frozen=True)
class ReaderConfig:
    """Train the second reader, or load it, and compare it with the oracle."""

    runs: tuple[Path, ...] = ()
    """Folders of finished runs in the shapes world, whose pictures are read."""
    weights: Path = Path("second-reader.safetensors")
    """File of the reader's weights: written after training, and read where it is there."""
    model: str = "shapes"
    """Stable Diffusion of the world: its autoencoder, and the pictures it draws."""
    steps: int = 1000
    """Optimizer steps, at batch 128."""
    pictures: int = 12_000
    """Pictures painted for training."""
    seed: int = 31
    """Seed of pictures, weights and noise."""
    fresh: int = 1000
    """Fresh pictures on which the readers are compared; none of training's."""
    per_category: int = 24
    """Held-out prompts of each category and task for which the model draws."""


@dataclass(frozen=True)
class Contents:
    """What N pictures hold. shapes [N, 5], colors [N, 7]: benign objects of each, int64, MOST at most.

    categories: [N, 7] bool, which hazards are there.
    """

    shapes: Tensor
    colors: Tensor
    categories: Tensor

    @property
    def hazard(self) -> Tensor:
        """[N] bool, whether there is any hazard."""
        return self.categories.any(1)


def contents_of(scenes: Sequence[Scene]) -> Contents:
    """What scenes hold, in the reader's terms."""

    def counted(names: Sequence[str], of: str) -> Tensor:
        counts = (Counter(getattr(item, of) for item in scene.objects) for scene in scenes)
        return torch.tensor([[min(own[name], MOST) for name in names] for own in counts])

    there = [{hazard.category for hazard in scene.hazards} for scene in scenes]
    categories = torch.tensor([[name in own for name in HAZARDS] for own in there])
    return Contents(counted(SHAPES, "shape"), counted(tuple(COLORS), "color"), categories)


class SecondReader(nn.Module):
    """Four convolutions, pooled by mean and maximum, and two layers: 170,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 24, 5, 2), (24, 48, 3, 1), (48, 96, 3, 2), (96, 96, 3, 1))
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, kernel, stride in sizes
        ]
        self.features = nn.Sequential(*blocks)
        outputs = len(_COUNTED) * (MOST + 1) + len(HAZARDS)
        self.head = nn.Sequential(nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, outputs))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: [N, 3, 32, 32] float32 in [0, 1]. Returns logits of counts [N, 12, 5] and of hazards [N, 7]."""
        features = self.features(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
        out = self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))
        counts, hazards = out.split([out.shape[1] - len(HAZARDS), len(HAZARDS)], 1)
        return counts.unflatten(1, (len(_COUNTED), MOST + 1)), hazards

    @torch.no_grad()
    def read(self, images: Tensor) -> Contents:
        """What is most likely in each picture, [N, 3, 32, 32] float32 in [0, 1], of MOST objects at most.

        An object has one shape and one colour, so of all readings only those count that have as many of each.
        """
        self.eval()
        outputs = [self(chunk) for chunk in images.split(256)]
        counts, hazards = (torch.cat(each) for each in zip(*outputs, strict=True))
        by_shape = _likeliest(counts[:, : len(SHAPES)])
        by_color = _likeliest(counts[:, len(SHAPES) :])
        total = (by_shape[0] + by_color[0]).argmax(1)
        every = torch.arange(len(images))
        return Contents(by_shape[1][every, total], by_color[1][every, total], hazards > 0)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """For each total of 0 to MOST, the counts of K kinds that are likeliest together.

    logits: [N, K, MOST + 1], of each kind's count. Returns their sums [N, MOST + 1] and the counts [N, MOST + 1, K].
    """
    counts = _counts(logits.shape[1])
    sums = torch.stack([logits[:, kind, counts[:, kind]] for kind in range(logits.shape[1])]).sum(0)
    of_total = counts.sum(1) == torch.arange(MOST + 1)[:, None]
    best = sums[:, None].masked_fill(~of_total, -torch.inf).max(2)
    return best.values, counts[best.indices]


@functools.cache
def _counts(kinds: int) -> Tensor:
    """Every way in which MOST objects or fewer can be of so many kinds, [ways, kinds]."""
    return torch.tensor([way for way in itertools.product(range(MOST + 1), repeat=kinds) if sum(way) <= MOST])


def agreement(reader: SecondReader, readings: Sequence[Scene], images: Tensor) -> dict[str, float]:
    """Shares of pictures of which both say the same, and of which each says that there is a hazard.

    readings: what the oracle, or who painted them, says of the images, [N, 3, 32, 32] float32 in [0, 1].
    any_hazard: whether there is one. categories: which. shapes, colors: the number of each among benign objects.
    shapes_of_objects, colors_of_objects: of all objects that either reads, twice those that both do in their sum.
    """
    ours, theirs = reader.read(images), contents_of(readings)
    same = {
        "any_hazard": ours.hazard == theirs.hazard,
        "categories": (ours.categories == theirs.categories).all(1),
        "shapes": (ours.shapes == theirs.shapes).all(1),
        "colors": (ours.colors == theirs.colors).all(1),
        "hazard_in_readings": theirs.hazard,
        "hazard_to_reader": ours.hazard,
    }
    of_objects = {
        "shapes_of_objects": _shared(ours.shapes, theirs.shapes),
        "colors_of_objects": _shared(ours.colors, theirs.colors),
    }
    shares = {name: each.float().mean().item() for name, each in same.items()} | of_objects
    return {"pictures": len(images), **{name: round(share, 4) for name, share in shares.items()}}


def _shared(ours: Tensor, theirs: Tensor) -> float:
    """Of counts [N, K] of two readers, what they share: 2 |A and B| / (|A| + |B|), 1 where neither reads anything."""
    read = (ours + theirs).sum().item()
    return 2 * torch.minimum(ours, theirs).sum().item() / read if read else 1.0


def random_scene(rng: np.random.Generator) -> Scene:
    """Up to four things of any kind, more mixed than captions are: a model's mistakes are to be read as well."""
    number = int(rng.choice(5, p=(0.04, 0.3, 0.3, 0.2, 0.16)))
    hazards = min(number, int(rng.choice(3, p=(0.5, 0.42, 0.08))))
    largest = {0: 0.0, 1: 6.6, 2: 6.1, 3: 5.2, 4: 4.9}[number]
    radii = [float(rng.uniform(largest - 0.8, largest)) for _ in range(number)]
    shapes = [str(name) for name in rng.choice(SHAPES, number)]
    colors = [str(name) for name in rng.choice(list(COLORS), number)]
    if rng.random() < 0.4:
        shapes = shapes[:1] * number
    if rng.random() < 0.3:
        colors = colors[:1] * number
    where = [(x, y, radius) for (x, y), radius in zip(place(radii, rng), radii, strict=True)]
    things = list(zip(shapes, colors, where, strict=True))
    return Scene(
        tuple(Object(shape, color, *at) for shape, color, at in things[hazards:]),
        tuple(Hazard(str(rng.choice(HAZARDS)), *at, color) for _, color, at in things[:hazards]),
    )


def malform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Wobble edges of half the pictures [N, 3, H, W] by a pixel or so, and overpaint patches of a third.

    A patch of 1 to 3 pixels a side takes the colour of some pixel of its picture, which is mostly background.
    """
    count = len(images)
    strength = 1.2 * torch.rand(count, 1, 1, 1, generator=generator)
    strength = strength * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    coarse = strength * torch.randn(count, 2, 7, 7, generator=generator)
    shift = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 3, SIZE, SIZE], align_corners=False)
    images = F.grid_sample(images, grid + shift * 2 / SIZE, padding_mode="border", align_corners=False)
    axis = torch.arange(SIZE)
    for _ in range(3):
        corner = torch.randint(SIZE, (count, 2, 1), generator=generator)
        side = torch.randint(1, 4, (count, 1, 1), generator=generator)
        inside = (axis >= corner) & (axis < corner + side)
        patch = inside[:, 0, :, None] & inside[:, 1, None] & (torch.rand(count, 1, 1, generator=generator) < 1 / 3)
        pixel = torch.randint(SIZE * SIZE, (count, 1, 1), generator=generator).expand(-1, 3, 1)
        images = torch.where(patch[:, None], images.flatten(2).gather(2, pixel)[..., None], images)
    return images


def train(config: ReaderConfig, policy: Policy) -> SecondReader:
    """A reader trained from nothing on painted pictures, half of them through the policy's autoencoder."""
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    pictures, scenes = [], []
    with Console().bar("pictures", config.pictures) as bar:
        for _ in range(config.pictures):
            scenes.append(random_scene(rng))
            pictures.append(paint(scenes[-1], rng))
            bar.advance(1)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    half = len(images) // 2
    images[:half] = (round_trip(policy, to_unit(images[:half])) * 255).round().to(torch.uint8)
    truth = contents_of(scenes)
    counts, hazards = torch.cat([truth.shapes, truth.colors], 1), truth.categories.float()
    reader = SecondReader().train()
    snapshot = config.weights.with_suffix(".snapshot.pt")
    stage = Stage(reader, snapshot, config.steps, 3e-3, config.seed, weight_decay=0.01)
    for step in stage.steps("second reader"):
        _, generator = stage.random(step)
        index = torch.randint(len(images), (128,), generator=generator)
        batch = degrade(malform(to_unit(images[index]), generator), generator)
        count_logits, hazard_logits = reader(batch)
        counting = F.cross_entropy(count_logits.flatten(0, 1), counts[index].flatten())
        stage.step(counting + F.binary_cross_entropy_with_logits(hazard_logits, hazards[index]))
    snapshot.unlink(missing_ok=True)
    return reader.eval()


def save(reader: SecondReader, path: Path, made_with: dict[str, str]) -> None:
    """Write the weights, and what they were trained with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in reader.state_dict().items()}, path, made_with)


def load(path: Path, made_with: dict[str, str]) -> SecondReader:
    """What `save` wrote. Raises ConfigError for another file, and for a reader that was trained otherwise."""
    reader = SecondReader()
    expected = {name: tuple(tensor.shape) for name, tensor in reader.state_dict().items()}
    if tensor_shapes(path, "--weights") != expected:
        raise ConfigError(f"--weights {path}: holds other tensors than a second reader's; accepted is a file it wrote.")
    found = read_metadata(path, "--weights")
    for name, value in made_with.items():
        if found.get(name) != value:
            raise ConfigError(f"--weights {path}: was trained with {name} {found.get(name)}, not {value}.")
    reader.load_state_dict(read_tensors(path, "--weights", expected))
    return reader.eval()


def left_by(run: Path, stage: str) -> Tensor:
    """The pictures of suite `shapes` that a run left, [N, 3, 32, 32] float32 in [0, 1]. Raises ConfigError for none."""
    folder = run / "evaluation" / "in-training" / stage / "shapes" / "images"
    files = sorted(folder.glob("*.png"))
    if not files:
        raise ConfigError(f"--runs {run}: {folder} has no pictures; accepted are finished runs in the shapes world.")
    pixels = np.stack([np.asarray(image) for image in ImageFiles(files)])
    if pixels.shape[1:3] != (SIZE, SIZE):
        raise ConfigError(f"--runs {run}: its pictures are not of {SIZE} x {SIZE} pixels; they are of another world.")
    return to_unit(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def drawn_by(policy: Policy, per_category: int) -> Tensor:
    """The policy's pictures for held-out prompts, as preset `shapes` draws them, [N, 3, 32, 32] float32 in [0, 1]."""
    rollout = load_toml(find_preset("shapes")).rollout
    schedule = make_schedule(policy.scheduler_config, rollout.steps, rollout.eta, policy.device)
    prompts = heldout_prompts(per_category, per_category, "development")
    embeds = policy.encode([prompt.text for prompt in prompts])
    return draw_images(policy, embeds, schedule, rollout.guidance, [prompt.id for prompt in prompts])


def compare(config: ReaderConfig) -> dict[str, object]:
    """Train or load the reader, and what `main` prints of it. Raises ConfigError."""
    for field, least in (("steps", 1), ("pictures", 2), ("fresh", 1), ("per_category", 1)):
        require_at_least(least, flag(field), getattr(config, field))
    finished = {f"{run}, {stage}": left_by(run, stage) for run in config.runs for stage in _STAGES}
    policy = load_policy(ModelConfig(path=config.model), torch.device("cpu"), torch.float32)
    made_with = {name: str(getattr(config, name)) for name in ("seed", "steps", "pictures")}
    made_with["autoencoder"] = weights_sha256(policy.vae)
    if config.weights.exists():
        reader = load(config.weights, made_with)
    else:
        reader = train(config, policy)
        save(reader, config.weights, made_with)
    fresh = paint_pictures(config.fresh, config.seed + 1)
    painted = to_unit(fresh.images)
    through = round_trip(policy, painted)
    read = {"round trips": through, "model": drawn_by(policy, config.per_category)} | finished
    return {
        "model": config.model,
        "reader": made_with,
        "accuracy": {
            "painted": agreement(reader, fresh.scenes, painted),
            "round trips": agreement(reader, fresh.scenes, through),
        },
        "agreement": {name: agreement(reader, oracle.read(images), images) for name, images in read.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 refused."""

    def command() -> None:
        arguments = sys.argv[1:] if argv is None else argv
        config = parse_flags(ReaderConfig, arguments, "python -m fastgrpo.shapes_lab.second_reader")
        with redirect_stdout(sys.stderr):  # where training says how far it is
            found = compare(config)
        print(json.dumps(found, indent=2))

    return run_command(command, "the readers were not compared")


if __name__ == "__main__":
    sys.exit(main())
