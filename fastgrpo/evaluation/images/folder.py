"""Folders of generated images: drawn once, continued where a killed run stopped, measured by any number of suites.

    FOLDER/
      manifest.json      how the images are drawn (weights, sampler) and, of each, its prompt, seed, guidance and size
      images/ID.png      one file per image, each written at once or not at all
      q16.json, ...      what detectors found, by id (judgements.py)

Images are joined with their rows by id, never by position. They are drawn in batches that depend on the rows alone.
A batch of which an image is missing is drawn again as a whole: matrix products of different sizes round differently,
and a run that was killed is to end with the bytes of an undisturbed one.

Several processes draw a batch each, then the next ones; so they look at images. The first alone has the folder: what
others draw, and what they are to look at, goes over the network, since they may be on machines without its disk.
"""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from fastgrpo.evaluation.images.files import ImageFiles, read_image
from fastgrpo.system.distributed import Ranks
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
    """One of `count` nearly equal parts of the batches, numbered from 0: what one command draws."""

    index: int = 0
    count: int = 1


class ImageFolder:
    """The images of some rows, as one model draws them.

    `present`, `draw` and `look` are to be called by all of its `ranks`; all else is for the first of them.
    """

    def __init__(
        self,
        path: Path,
        drawing: Drawing,
        wanted: Requests,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ) -> None:
        """wanted: in any order; they are kept by id. Raises ValueError where two have the same."""
        self.path, self.ranks = path, ranks
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
        there = [row.id for row in self.wanted if self.file(row.id).is_file()] if self.ranks.first else []
        found = set(json.loads(self.ranks.agree(json.dumps(there))))
        return [row for row in self.wanted if row.id in found]

    def images(self, rows: Requests) -> ImageFiles:
        """The images of some rows, in their order."""
        return ImageFiles([self.file(row.id) for row in rows])

    def draw(self, paint: Painter, shard: Shard = Shard(), progress: Callable[[int], None] | None = None) -> int:
        """Draw this shard's images that are missing. Returns how many were written.

        progress: called with the number of this shard's images that are new, and at first of those that were there.
        """
        there = {row.id for row in self.present()}
        own = [
            each for i, each in enumerate(batches(self.wanted, self.drawing.batch)) if i % shard.count == shard.index
        ]
        todo = [batch for batch in own if not all(row.id in there for row in batch)]
        if progress:
            progress(sum(map(len, own)) - sum(map(len, todo)))
        written, ranks = 0, self.ranks
        for together, mine in rounds(todo, ranks):
            images: Iterable[Tensor] = paint(mine) if mine else ()
            drawn = {row.id: _png(image) for row, image in zip(mine, images, strict=True) if row.id not in there}
            # To the first process alone: the others receive nothing.
            for received in filter(None, ranks.trade([_packed(drawn), *[b""] * (ranks.count - 1)])):
                write_all_atomically({self.file(id): data for id, data in _unpacked(received).items()})
            written += sum(row.id not in there for batch in together for row in batch)
            if progress:
                progress(sum(map(len, together)))
        return written

    def look(
        self, parts: Sequence[Requests], look: Callable[[ImageFiles, Requests], bytes]
    ) -> Iterator[tuple[Requests, bytes]]:
        """What `look` says of the images of each part of the rows, in order, on all processes; each looks at its share.

        Raises ConfigError for a file that is no image.
        """
        ranks = self.ranks
        for together, mine in rounds(parts, ranks):
            sent = [b""] * ranks.count
            if ranks.first:  # which reads its own as it comes to them
                sent[1 : len(together)] = [_packed(self._read(rows)) for rows in together[1:]]
            handed = _unpacked(ranks.trade(sent)[0])
            images = (
                self.images(mine) if ranks.first else ImageFiles([self.file(row.id) for row in mine], _reader(handed))
            )
            said = look(images, mine) if mine else b""
            yield from zip(together, ranks.trade([said] * ranks.count)[: len(together)], strict=True)

    def _read(self, rows: Requests) -> dict[str, bytes]:
        return {row.id: self.file(row.id).read_bytes() for row in rows}

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


def rounds(parts: Sequence[Requests], ranks: Ranks) -> Iterator[tuple[Sequence[Requests], Requests]]:
    """As many parts at a time as there are processes, and this process's own of them, which may be empty."""
    for start in range(0, len(parts), ranks.count):
        together = parts[start : start + ranks.count]
        yield together, together[ranks.index] if ranks.index < len(together) else ()


def _packed(files: Mapping[str, bytes]) -> bytes:
    """Files by id, as one piece: the sizes in JSON, a line end, the files."""
    if not files:
        return b""
    return b"\n".join([json.dumps({id: len(data) for id, data in files.items()}).encode(), b"".join(files.values())])


def _unpacked(data: bytes) -> dict[str, bytes]:
    """What `_packed` has packed."""
    head, _, rest = data.partition(b"\n")
    files, start = {}, 0
    for id, size in json.loads(head or b"{}").items():
        files[id] = rest[start : start + size]
        start += size
    return files


def _reader(files: Mapping[str, bytes]) -> Callable[[Path], Image.Image]:
    """Reads images that are not on this machine."""
    return lambda path: read_image(path, io.BytesIO(files[path.stem]))


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
