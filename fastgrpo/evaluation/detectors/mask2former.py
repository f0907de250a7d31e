"""Mask2Former (Cheng et al., arXiv 2112.01527) finds GenEval's objects: transformers' model, our own post-processing.

An image is resized to a shortest side of 800 pixels, or a longest of 1333 where that is less, and padded with zeros to
multiples of 32. For each of its queries the model says a distribution over the 80 classes and "nothing", and a mask's
logits at a quarter of that size. With p the probability of a class and l the logits, brought back to the image's size:

    mask      l > 0
    quality   mean of sigmoid(l) over the mask
    score     p * quality
    box       (x0, y0, x1, y1) around the mask; x1 and y1 are one beyond its last pixel

Detections are the 100 (query, class) pairs with the largest p, so that one query may be seen as two classes. That is
mmdet's inference, which GenEval's scores rest on, with two differences: transformers' weights are those of
Mask2Former's authors, mmdet's are of its own training, so that single verdicts may differ; and pairs with p at most
`min_score` are left out before their masks are made, which no score above it can notice since quality never exceeds 1.
transformers' post_process_instance_segmentation computes quality on masks of 384 x 384 pixels and not at the image's
size, and gives no boxes; where image and input both have that size, the two agree.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from fastgrpo.evaluation.metrics.geneval_rules import THRESHOLD, Detected
from fastgrpo.models.repository import Repository
from fastgrpo.models.tensor_file import check_content
from fastgrpo.models.whole import load_whole
from fastgrpo.prompts.geneval import CLASSES
from fastgrpo.system.errors import ConfigError, first_sentence
from fastgrpo.system.files import file_sha256

SHORTEST, LONGEST = 800, 1333  # pixels of the resized image
BATCH = 8  # images per forward pass; bounds memory
DIVISOR = 32  # of its padded sides: the backbone's coarsest stride
MAX_DETECTIONS = 100  # an image
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of values 0 ... 255, R, G, B

Size = tuple[int, int]  # height, width


class Mask2Former:
    """Finds objects of GenEval's 80 classes."""

    name = "mask2former"
    protocol = f"mask2former/{SHORTEST}-{LONGEST}/top-{MAX_DETECTIONS}"

    def __init__(self, spec: str, device: torch.device | str = "cpu", field: str = "geneval.detector") -> None:
        """spec: a folder or hub repository of a Mask2Former for COCO's instances; no code of it is run. field: what
        messages call the setting. Raises ConfigError where there is none, or it has other classes.
        """
        repository = Repository(field, spec, layout="folder with its config.json and weights")
        safe = any(file.endswith(".safetensors") for file in repository.files())
        weights = "model*.safetensors" if safe else "pytorch_model*.bin"
        folder = repository.fetch(["config.json", weights, f"{weights}.index.json"])
        _check_config(folder, f"{field} is {spec!r}")
        files = sorted(folder.glob(weights))
        for file in files:
            check_content(file, field)
        model = load_whole(Mask2FormerForUniversalSegmentation, folder, f"{field} is {spec!r}, which", safe)
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.hashes = {file.name: file_sha256(file) for file in files}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, list[Detected]]]:
        """The objects in each image, by class; images are RGB, and only those of one size share a forward pass."""
        by_size: dict[Size, list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.height, image.width].append(index)
        found: list[dict[str, list[Detected]]] = [{} for _ in images]
        for size, indices in by_size.items():
            for start in range(0, len(indices), BATCH):
                chunk = indices[start : start + BATCH]
                padded, resized = prepare(torch.stack([_pixels(images[i]) for i in chunk]).to(self.device))
                output = self.model(pixel_values=padded)
                height, width = padded.shape[-2:]
                logits = output.class_queries_logits, output.masks_queries_logits
                for index, detected in zip(chunk, detect(*logits, (height, width), resized, size), strict=True):
                    for seen in detected:
                        found[index].setdefault(seen.label, []).append(seen)
        return found


def resized_size(height: int, width: int) -> Size:
    """The size of an image when resized: shortest side 800, longest at most 1333, rounded half up as in mmdet."""
    scale = min(LONGEST / max(height, width), SHORTEST / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(pixels: Tensor) -> tuple[Tensor, Size]:
    """Images of one size as the model takes them, and their (height, width) within the padding.

    pixels: [N, 3, h, w] uint8. Returns [N, 3, H, W] float32, normalised, with zeros right and below.
    """
    height, width = resized_size(*pixels.shape[-2:])
    # As OpenCV resizes in mmdet: no antialiasing, and 8 bits again.
    values = F.interpolate(pixels.float(), (height, width), mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    values = (values - mean) / std
    return F.pad(values, (0, -width % DIVISOR, 0, -height % DIVISOR)), (height, width)


def detect(
    class_logits: Tensor, mask_logits: Tensor, padded: Size, resized: Size, original: Size, min_score: float = THRESHOLD
) -> list[list[Detected]]:
    """The detections in N images of one size, with masks and boxes at that size.

    class_logits: [N, Q, C + 1] float, the last being "nothing". mask_logits: [N, Q, h, w] float.
    padded, resized, original: (height, width) of the model's input, of the image in it, and of the image.
    Only detections with score > min_score are returned, those of the likeliest class first.
    """
    images, queries, labels, likely = _candidates(class_logits, min_score)
    # A query that is a candidate twice has one mask.
    pairs, which = torch.unique(torch.stack([images, queries]), dim=1, return_inverse=True)
    masks, quality, boxes = _masks(mask_logits[pairs[0], pairs[1]], padded, resized, original)
    pixels, sides = masks.cpu().numpy(), boxes.tolist()
    detections: list[list[Detected]] = [[] for _ in class_logits]
    rows = (images, labels, which, likely * quality[which])
    for image, label, index, score in zip(*(row.tolist() for row in rows), strict=True):
        if score > min_score:
            detections[image].append(Detected(CLASSES[label], tuple(sides[index]), score, pixels[index]))
    return detections


def _candidates(class_logits: Tensor, min_score: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[K] int64 image, query and class, and [K] float32 probability, of the likeliest pairs of every image."""
    probabilities = class_logits.float().softmax(-1)[..., :-1]
    classes = probabilities.shape[-1]
    values, pairs = probabilities.flatten(1).topk(min(MAX_DETECTIONS, probabilities[0].numel()))
    images, ranks = (values > min_score).nonzero(as_tuple=True)
    pairs = pairs[images, ranks]
    return images, pairs // classes, pairs % classes, values[images, ranks]


def _masks(logits: Tensor, padded: Size, resized: Size, original: Size) -> tuple[Tensor, Tensor, Tensor]:
    """[K, h, w] float logits -> masks [K, H, W] bool, quality [K] and boxes [K, 4] float32, at the original size.

    An empty mask has quality 0 and a box of zeros.
    """
    if not len(logits):
        return logits.new_zeros((0, *original), dtype=torch.bool), logits.new_zeros(0), logits.new_zeros((0, 4))
    logits = F.interpolate(logits[:, None].float(), padded, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)[:, 0]
    masks = logits > 0
    area = masks.sum((1, 2))
    quality = (logits.sigmoid() * masks).sum((1, 2)) / (area + 1e-6)
    (y0, y1), (x0, x1) = _extent(masks.any(2)), _extent(masks.any(1))
    boxes = torch.stack([x0, y0, x1, y1], dim=1) * (area > 0)[:, None]
    return masks, quality, boxes.float()


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """[K, n] bool -> [K] int64 the first place that is occupied and the one after the last."""
    places = occupied.int()
    return places.argmax(1), occupied.shape[1] - places.flip(1).argmax(1)


def _pixels(image: Image.Image) -> Tensor:
    """[3, h, w] uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _check_config(folder: Path, what: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, labels = config.get("model_type"), Mask2FormerConfig.from_dict(config).num_labels
    except (AttributeError, KeyError, OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"{what}, whose config.json cannot be read: {first_sentence(error)}.") from error
    if kind != Mask2FormerConfig.model_type or labels != len(CLASSES):
        raise ConfigError(
            f"{what}, a {kind!r} of {labels} classes; a {Mask2FormerConfig.model_type!r} of COCO's {len(CLASSES)} is "
            "accepted."
        )
