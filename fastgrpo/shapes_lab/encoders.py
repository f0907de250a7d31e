"""The reward's encoder and the held-out one: open_clip models that learn from pictures in pairs.

Random batches teach a contrastive model what is easy: which shape, which colour. Counts and places it learns where a
batch holds the same picture but for one of them. So pictures come in pairs: painted ones of a request and of the
request with one detail altered, through the autoencoder, and drawn ones of the same prompt of which the oracle reads
different scenes. Both have captions that are true of them, and further captions, altered in a detail, are wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.shapes import oracle
from fastgrpo.shapes.captions import GENERAL_WORD, HAZARD_WORDS, SceneRequest, Thing, parse
from fastgrpo.shapes.verdicts import shows
from fastgrpo.shapes.world import RELATIONS, SHAPES, Scene, holds
from fastgrpo.shapes_lab import architectures, autoencoder
from fastgrpo.shapes_lab.diffusion import GROUP, load_drawn
from fastgrpo.shapes_lab.drawings import alter, caption, degrade, paint_request, random_request, to_unit
from fastgrpo.shapes_lab.optimization import Stage
from fastgrpo.shapes_lab.pretrain_config import PretrainConfig

GENERIC_SAFE = (
    "a safe picture",
    "a harmless picture",
    "safe",
    "harmless",
    "a harmless picture with no hazard",
    "a safe drawing",
    "a picture with no hazard",
)
GENERIC_UNSAFE = (
    "an unsafe picture",
    "a picture of a hazard",
    "unsafe",
    "a hazard",
    "an unsafe picture of a hazard",
    "an unsafe drawing",
    "a drawing of a hazard",
)
NOTHING = "nothing"  # the caption of an empty picture, which no prompt asks for
_GENERIC = 0.15  # share of captions that only say whether there is a hazard


@dataclass(frozen=True)
class Pairs:
    """Pictures [N, 2, 3, 32, 32] uint8, and N pairs of their scenes."""

    images: Tensor
    scenes: list[tuple[Scene, Scene]]


def train(config: PretrainConfig) -> dict[str, float]:
    """The encoder of the reward."""
    return _contrast(config, "encoder", config.encoder_steps, stream=6)


def train_held_out(config: PretrainConfig) -> dict[str, float]:
    """One that training never sees, of other weights and other pictures."""
    return _contrast(config, "held_out", config.held_out_steps, stream=7)


def _contrast(config: PretrainConfig, name: str, steps: int, stream: int) -> dict[str, float]:
    folder = config.out / name
    tokenizer = architectures.build_tokenizer(folder)
    architectures.write_encoder_config(folder, tokenizer)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).train()
    painted, drawn = painted_pairs(config, stream), drawn_pairs(config, stream)
    stage = Stage(model, config.work / f"{name}.pt", steps, 1e-3, config.seed + stream, 0.05, made_with=config.settings)
    for step in stage.steps(name):
        rng, generator = stage.random(step)
        chosen = [(pairs, int(i)) for pairs in (painted, drawn) for i in rng.integers(len(pairs.scenes), size=32)]
        images = torch.cat([pairs.images[i] for pairs, i in chosen])
        scenes = [scene for pairs, i in chosen for scene in pairs.scenes[i]]
        texts, wrong = captions_of(scenes, rng)
        ids = tokenizer(texts, padding="max_length", max_length=architectures.CONTEXT, return_tensors="pt").input_ids
        image, text, scale = model(degrade(to_unit(images), generator) * 2 - 1, ids)
        loss, correct = contrastive_loss(scale * image @ text.T, wrong)
        stage.step(loss, accuracy=correct)
    write_encoder(model, folder)
    return {f"encoder_{key}": value for key, value in stage.measured.items()}


def write_encoder(model: torch.nn.Module, folder: Path) -> None:
    """The weights, fp16, as open_clip finds them in a folder."""
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def painted_pairs(config: PretrainConfig, stream: int) -> Pairs:
    """Pictures of random requests and of the same with a detail altered; three of four through the autoencoder."""
    rng = np.random.default_rng(config.seed * 100 + stream)
    pictures, scenes = [], []
    for _ in range(config.pictures // 2):
        request = random_request(rng)
        for each in (request, alter(request, rng)):
            picture, scene = paint_request(each, rng)
            pictures.append(picture)
            scenes.append(scene)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    vae = autoencoder.load(config)
    through = torch.from_numpy(rng.random(len(images)) < 0.75)
    images[through] = autoencoder.decode(vae, autoencoder.encode(vae, images[through]))
    return Pairs(images.view(-1, 2, *images.shape[1:]), list(zip(scenes[::2], scenes[1::2], strict=True)))


def drawn_pairs(config: PretrainConfig, stream: int) -> Pairs:
    """Pairs of drawn pictures of one prompt; where it can be, one shows what the prompt asks for and the other not."""
    rng = np.random.default_rng(config.seed * 100 + 50 + stream)
    images, prompts = load_drawn(config)
    scenes = oracle.read(to_unit(images))
    index = []
    for number, prompt in enumerate(prompts):
        group = range(number * GROUP, (number + 1) * GROUP)
        request = parse(prompt)
        right = [i for i in group if shows(scenes[i], request)]
        wrong = [i for i in group if i not in right]
        for i in group:
            others = (wrong if i in right else right) or [j for j in group if j != i]
            index.append((i, int(rng.choice(others))))
    return Pairs(images[torch.tensor(index)], [(scenes[i], scenes[j]) for i, j in index])


def captions_of(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """2 N captions of N scenes, and which are wrong of which: [N, 2 N] bool.

    The first N are true, each of its own scene; the others are those altered in a detail.
    """
    requests: list[SceneRequest | None] = []
    texts, altered = [], []
    for scene in scenes:
        request = request_for(scene, rng)
        if request is None or rng.random() < _GENERIC:
            text = NOTHING if scene == Scene() else str(rng.choice(GENERIC_UNSAFE if scene.hazards else GENERIC_SAFE))
            texts.append(text)
            requests.append(None)
        else:
            texts.append(caption(request, rng))
            requests.append(request)
        altered.append(alter(request or random_request(rng), rng))
    texts += [caption(request, rng) for request in altered]
    return texts, torch.from_numpy(~_true(scenes, texts, [*requests, *altered]))


def _true(scenes: list[Scene], texts: list[str], requests: Sequence[SceneRequest | None]) -> np.ndarray:
    """Which captions are true of which scenes, [scenes, captions] bool."""
    with_shape = {
        shape: {i for i, s in enumerate(scenes) if any(o.shape == shape for o in s.objects)} for shape in SHAPES
    }
    everywhere = set(range(len(scenes)))
    true = np.zeros((len(scenes), len(texts)), dtype=bool)
    for column, (text, request) in enumerate(zip(texts, requests, strict=True)):
        # Most captions name a shape, and most scenes do not have it: a quick no.
        likely = with_shape[request.things[0].shape] if request and request.things else everywhere
        for row in likely:
            true[row, column] = _is_true(scenes[row], text, request)
    return true


def _is_true(scene: Scene, text: str, request: SceneRequest | None) -> bool:
    if request is not None:
        return shows(scene, request)
    if text == NOTHING:
        return scene == Scene()
    return (text in GENERIC_UNSAFE) == bool(scene.hazards)


def request_for(scene: Scene, rng: np.random.Generator) -> SceneRequest | None:
    """A request that the scene fulfils, one of those that name most of it; None where the grammar has no words."""
    objects, hazards = list(scene.objects), scene.hazards
    order = rng.permutation(len(objects))
    objects = [objects[i] for i in order]
    shapes = {item.shape for item in objects}
    colored = bool(rng.random() < 0.6)
    things = tuple(Thing(item.shape, item.color if colored else None) for item in objects)
    if len(hazards) == 1 and len(objects) <= 1:
        general = rng.random() < 0.2
        word = GENERAL_WORD if general else str(rng.choice(HAZARD_WORDS[hazards[0].category]))
        return SceneRequest(things, hazard="any" if general else hazards[0].category, word=word)
    if hazards or not objects:
        return None
    if len(objects) == 1:
        return SceneRequest(things)
    if len(shapes) == 1 and len(objects) <= 4:
        return SceneRequest((Thing(objects[0].shape),), count=len(objects))
    if len(objects) == 2:
        a, b = objects
        if rng.random() < 0.65:
            relation = next((r for r in RELATIONS if holds(r, (a.x, a.y), (b.x, b.y))), None)
            return SceneRequest((Thing(a.shape), Thing(b.shape)), relation=relation)
        return SceneRequest(things)
    return None


def contrastive_loss(logits: Tensor, wrong: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy both ways over [N, 2 N] logits, each picture and its own caption against wrong pairs only.

    wrong: [N, 2 N] bool; pairs that are neither wrong nor a picture's own are left out. Returns the loss and how often
    a picture's own caption beats all wrong ones.
    """
    count = len(logits)
    own = torch.eye(count, 2 * count, dtype=torch.bool)
    masked = logits.masked_fill(~wrong & ~own, -torch.inf)
    target = torch.arange(count)
    loss = (F.cross_entropy(masked, target) + F.cross_entropy(masked[:, :count].T, target)) / 2
    return loss, (masked.argmax(1) == target).float().mean().item()
