"""Folders of generated images: drawn once, continued where a killed run stopped, measured by any number of suites.

    FOLDER/
      manifest.json      how the images are drawn (weights, sampler) and, of each, its prompt, seed, guidance and size
      images/ID.png      one file per image, each written at once or not at all
      q16.json, ...      what detectors found, by id (judgements.py)

Images are joined with their rows by id, never by position. They are drawn in batches that depend on the rows alone.
A batch of which an image is missing is drawn again as a whole: matrix products of different sizes round differently,
and a run that was killed is to end with the bytes of an undisturbed one.
"""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.system.errors import ConfigError, cut
from fastgrpo.system.files import reading, write_all_atomically, write_atomically
from fastgrpo.system.pictures import to_pil

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw.

    id: unique in its folder, a file's name without suffix. prompt: the prompt's id, which all its images share.
    seed: of the image's own CPU generator, in [0, 2^63). guidance: 0 or more. width, height: pixels; 0 is the model's.
    """

    id: str
    prompt: str
    text: str
    seed: int
    guidance: float
    width: int = 0
    height: int = 0


Requests = Sequence[ImageRequest]

Painter = Callable[[Requests], Tensor]
"""Rows of one size and guidance -> their images, [N, 3, h, w] float32 in [0, 1]."""


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: the model, and what must be equal for two folders to differ in nothing else.

    model: what it is called. weights: part -> sha256. dtype: what the UNet computes in. batch: images at once.
    sampler: as of `drawn_by`.
    """

    model: str
    weights: dict[str, str]
    steps: int
    eta: float
    dtype: str
    batch: int
    sampler: str = "ddim"


def drawn_by(sampler: str, guidance_rescale: float) -> str:
    """Returns what `Drawing.sampler` calls a sampler, which may rescale what is guided."""
    return f"{sampler}, guidance_rescale {guidance_rescale:g}" if guidance_rescale else sampler


@dataclass(frozen=True)
class Shard:
    """One of `count` nearly equal parts of the batches, numbered from 0: what one process or machine draws."""

    index: int = 0
    count: int = 1


class ImageFolder:
    """The images of some rows, as one model draws them."""

    def __init__(self, path: Path, drawing: Drawing, wanted: Requests) -> None:
        """wanted: in any order; they are kept by id. Raises ValueError where two have the same."""
        self.path = path
        self.drawing = drawing
        self.wanted = tuple(sorted(wanted, key=lambda row: row.id))
        if len({row.id for row in self.wanted}) < len(self.wanted):
            raise ValueError("two images have the same id")

    def check(self) -> None:
        """Raise ConfigError where the folder holds the images of another model, protocol or set of prompts."""
        if (self.path / MANIFEST).is_file():
            found = read_manifest(self.path)
            if difference := _difference(found, self._manifest()):
                raise ConfigError(
                    f"{self.path} holds images of another kind ({difference}); to go on with them say the same again, "
                    "else give another --output."
                )
        # A kill may have left the beginning of a manifest.
        elif self.path.exists() and any(file.name != f"{MANIFEST}.partial" for file in self.path.iterdir()):
            raise ConfigError(f"{self.path} is no folder of generated images, and not empty; give another --output.")

    def claim(self) -> None:
        """Make the folder and its manifest, unless they are there. Raises ConfigError as `check` does."""
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / MANIFEST).is_file():
            write_atomically(self.path / MANIFEST, (json.dumps(self._manifest(), indent=1) + "\n").encode())
        (self.path / "images").mkdir(exist_ok=True)  # last: a folder without a manifest is not ours

    def file(self, id: str) -> Path:
        """Where an image is, or will be."""
        return self.path / "images" / f"{id}.png"

    def missing(self) -> list[ImageRequest]:
        """The rows whose images are not there yet."""
        return [row for row in self.wanted if not self.file(row.id).is_file()]

    def present(self) -> list[ImageRequest]:
        """The rows whose images are there."""
        return [row for row in self.wanted if self.file(row.id).is_file()]

    def images(self, rows: Requests) -> ImageFiles:
        """The images of some rows, in their order."""
        return ImageFiles([self.file(row.id) for row in rows])

    def draw(self, paint: Painter, shard: Shard = Shard(), progress: Callable[[int], None] | None = None) -> int:
        """Draw this shard's images that are missing. Returns how many were written.

        progress: called with the number of this shard's images that a batch adds, also for those that were there.
        """
        written = 0
        for number, batch in enumerate(batches(self.wanted, self.drawing.batch)):
            if number % shard.count != shard.index:
                continue
            todo = {row.id for row in batch if not self.file(row.id).is_file()}
            if todo:
                painted = zip(batch, paint(batch), strict=True)
                write_all_atomically({self.file(row.id): _png(image) for row, image in painted if row.id in todo})
                written += len(todo)
            if progress:
                progress(len(batch))
        return written

    def _manifest(self) -> dict:
        return {"format": _FORMAT, "drawing": asdict(self.drawing), "images": [asdict(row) for row in self.wanted]}


def batches(wanted: Requests, size: int) -> Iterator[list[ImageRequest]]:
    """Rows of one size and guidance, up to `size` at a time, in order; groups come as their first rows do."""
    groups: dict[tuple, list[ImageRequest]] = defaultdict(list)
    for row in wanted:
        groups[row.width, row.height, row.guidance].append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder of images. Raises ConfigError where it is damaged or of another version."""
    path = folder / MANIFEST
    with reading(path):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if found == _FORMAT:
            # Made once, so that whoever reads the dict finds what these have: hashes by name, ids to look up.
            dict(**Drawing(**manifest["drawing"]).weights)
            {ImageRequest(**row).id for row in manifest["images"]}
    if found != _FORMAT:
        raise ConfigError(f"{path} is of format {found!r}; {_FORMAT} is accepted.")
    return manifest


def _difference(found: dict, asked: dict) -> str:
    """In what the two manifests differ first, in words, or nothing."""
    for name, value in asked["drawing"].items():
        before = found["drawing"].get(name)
        if name == "weights" and before != value:
            parts = [part for part in value if before.get(part) != value[part]]
            return f"other weights of the {', '.join(parts)}"
        if name != "model" and before != value:  # the same weights may lie in two places
            return f"{name} {before}, not {value}"
    theirs, ours = ({row["id"]: row for row in manifest["images"]} for manifest in (found, asked))
    if theirs.keys() != ours.keys():
        return f"{len(theirs)} images, {len(theirs.keys() & ours.keys())} of them among the {len(ours)} asked for"
    for id, row in ours.items():
        for name, value in row.items():
            if theirs[id][name] != value:
                return f"image {id} with {name} {cut(repr(theirs[id][name]), 40)}, not {cut(repr(value), 40)}"
    return ""


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()
