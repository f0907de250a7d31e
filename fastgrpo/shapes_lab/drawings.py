"""What pretraining learns from: random requests, their captions, and pictures that may contradict them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.shapes.captions import (
    GENERAL_WORD,
    HAZARD_WORDS,
    NUMBERS,
    SAFE_OPENINGS,
    SPLIT_OPENINGS,
    TASK_REQUESTS,
    TRAINING_OPENINGS,
    UNSAFE_OPENINGS,
    SceneRequest,
    Thing,
    phrase,
    scene_for,
)
from fastgrpo.shapes.world import COLORS, HAZARDS, SHAPES, SIZE, TASKS, Object, Scene, paint, place


def random_request(rng: np.random.Generator, hazard_share: float = 0.34) -> SceneRequest:
    """A request for pretraining: something, any task or hazard, some hazards by the general word "hazard"."""
    if rng.random() < 0.06:
        return SceneRequest()
    if rng.random() < hazard_share:
        category, general = str(rng.choice(HAZARDS)), rng.random() < 0.2
        kind, shape = rng.choice(3, p=(0.4, 0.3, 0.3)), str(rng.choice(SHAPES))
        things = ((), (Thing(shape),), (Thing(shape, str(rng.choice(list(COLORS)))),))[kind]
        word = GENERAL_WORD if general else str(rng.choice(HAZARD_WORDS[category]))
        return SceneRequest(things, hazard="any" if general else category, word=word)
    requests = TASK_REQUESTS[str(rng.choice(TASKS, p=(0.08, 0.17, 0.17, 0.11, 0.27, 0.2)))]
    return requests[int(rng.integers(len(requests)))]


def alter(request: SceneRequest, rng: np.random.Generator) -> SceneRequest:
    """A request that differs in one detail: colour, shape, count, relation, hazard, or something more or less."""
    options, things = [], request.things
    if not things and not request.hazard:
        category = str(rng.choice(HAZARDS))
        return replace(request, hazard=category, word=str(rng.choice(HAZARD_WORDS[category])))
    for i, thing in enumerate(things):
        others = [s for s in SHAPES if s != thing.shape]
        options.append(replace(request, things=_with(things, i, replace(thing, shape=str(rng.choice(others))))))
        if thing.color:
            others = [c for c in COLORS if c != thing.color]
            options.append(replace(request, things=_with(things, i, replace(thing, color=str(rng.choice(others))))))
    if request.relation:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[request.relation]
        options += [replace(request, relation=opposite), replace(request, things=things[::-1])] * 2
    elif len(things) == 2:
        options.append(replace(request, things=things[:1]))
        if things[0].color:
            swapped = (Thing(things[0].shape, things[1].color), Thing(things[1].shape, things[0].color))
            options += [replace(request, things=swapped)] * 2
    elif len(things) == 1 and not request.hazard:
        number = str(rng.choice([n for n in (1, *NUMBERS) if n != request.count]))
        options += [replace(request, count=int(number))] * 2
    if request.hazard:
        category = str(rng.choice([h for h in HAZARDS if h != request.hazard]))
        options.append(replace(request, hazard=category, word=str(rng.choice(HAZARD_WORDS[category]))))
        if things:
            options.append(replace(request, hazard=None, word=""))
    elif len(things) == 1 and request.count == 1:
        category = str(rng.choice(HAZARDS))
        options.append(replace(request, hazard=category, word=str(rng.choice(HAZARD_WORDS[category]))))
    return options[int(rng.integers(len(options)))]


def _with(things: tuple[Thing, ...], index: int, thing: Thing) -> tuple[Thing, ...]:
    return (*things[:index], thing, *things[index + 1 :])


def caption(request: SceneRequest, rng: np.random.Generator) -> str:
    """The request in words with a random opening; safe and unsafe openings tell the truth."""
    pools = tuple(SPLIT_OPENINGS.values()), TRAINING_OPENINGS, UNSAFE_OPENINGS if request.hazard else SAFE_OPENINGS
    pool = pools[int(rng.choice(3, p=(0.2, 0.45, 0.35)))]
    return str(rng.choice(pool)) + phrase(request, hazard_first=bool(rng.random() < 0.5))


@dataclass(frozen=True)
class CaptionNoise:
    """How often the pictures a diffusion model learns from contradict their captions, as the web's do.

    hazard_absent: a named hazard is not in the picture. color, shape: an object's is chosen anew at random.
    count: of several of one shape there is one less or, where there is room, one more. absent: one of two of different
    shapes is missing. stand_in: where the missing hazard would leave an empty picture, an object takes its place.
    """

    hazard_absent: float
    color: float
    shape: float
    count: float
    absent: float
    stand_in: float


def perturb(scene: Scene, rate: CaptionNoise, rng: np.random.Generator) -> Scene:
    """Change a scene until its caption is a careless one: named things are absent, recoloured or recounted."""
    objects, hazards = list(scene.objects), scene.hazards
    if hazards and rng.random() < rate.hazard_absent:
        hazards = ()
        if not objects and rng.random() < rate.stand_in:
            (center,) = place([6.0], rng)
            objects = [Object(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), *center, 6.0)]
    counted = len(objects) > 1 and len({item.shape for item in objects}) == 1
    if counted and rng.random() < rate.count:
        objects = _recount(objects, rng)
    elif len(objects) > 1 and not counted and rng.random() < rate.absent:
        objects.pop(int(rng.integers(len(objects))))
    for i, item in enumerate(objects):
        if rng.random() < rate.color:
            item = replace(item, color=str(rng.choice(list(COLORS))))
        if rng.random() < rate.shape:
            item = replace(item, shape=str(rng.choice(SHAPES)))
        objects[i] = item
    return Scene(tuple(objects), hazards)


def _recount(objects: list[Object], rng: np.random.Generator) -> list[Object]:
    """One less of them, or one more, placed anew, of at most four."""
    if len(objects) == 4 or rng.random() < 0.5:
        return objects[1:]
    more = [*objects, objects[0]]
    radii = [min(item.radius, 4.9) for item in more]
    places = zip(more, place(radii, rng), radii, strict=True)
    return [replace(item, x=x, y=y, radius=radius) for item, (x, y), radius in places]


@dataclass(frozen=True)
class CaptionedPictures:
    """N pictures [N, 3, 32, 32] uint8, what their captions ask for, and the scenes that really are in them."""

    images: Tensor
    requests: tuple[SceneRequest, ...]
    scenes: tuple[Scene, ...]


def paint_pictures(
    count: int, seed: int, noise: CaptionNoise | None = None, advance: Callable[[int], object] | None = None
) -> CaptionedPictures:
    """Paint random pictures; with `noise`, they contradict their requests. advance: is told 1 after each."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    requests, scenes = [], []
    for i in range(count):
        request = random_request(rng)
        images[i], scene = paint_request(request, rng, noise)
        requests.append(request)
        scenes.append(scene)
        if advance:
            advance(1)
    return CaptionedPictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), tuple(requests), tuple(scenes))


def paint_request(
    request: SceneRequest, rng: np.random.Generator, noise: CaptionNoise | None = None
) -> tuple[np.ndarray, Scene]:
    """A picture [SIZE, SIZE, 3] uint8 that shows a request, or with `noise` contradicts it, and its scene."""
    scene = scene_for(request, rng)
    scene = perturb(scene, noise, rng) if noise else scene
    return paint(scene, rng), scene


def to_unit(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1]."""
    return images.float() / 255


def blur(images: Tensor) -> Tensor:
    """The pictures under a 3 x 3 binomial kernel, [N, 3, H, W]."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of std up to 0.06 on all pictures [N, 3, H, W] and a blur on a third: generated ones are not crisp."""
    noise = 0.06 * torch.randn(images.shape, generator=generator)
    noise = noise * torch.rand(len(images), 1, 1, 1, generator=generator)
    blurred = torch.rand(len(images), 1, 1, 1, generator=generator) < 1 / 3
    return (torch.where(blurred, blur(images), images) + noise).clamp(0, 1)
