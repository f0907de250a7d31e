"""Image files, opened when they are needed: thousands need not be held at once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, overload

from PIL import Image

from fastgrpo.system.errors import ConfigError

BATCH = 32  # images per forward pass: bounds memory; results do not depend on it but for rounding
# Whatever PIL says of a broken file; of one with an impossible size in its header, the last.
PIL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path, content: IO[bytes] | None = None) -> Image.Image:
    """Read an image that was drawn, as RGB. content: of the file, where it is not on this machine.

    Raises ConfigError, which names the file, where none can be read.
    """
    try:
        with Image.open(content or path) as image:
            return image.convert("RGB")
    except PIL_ERRORS as error:
        raise ConfigError(f"{path} cannot be read as an image ({error}); remove it, and it is drawn again.") from error


class ImageFiles(Sequence[Image.Image]):
    """Image files as a sequence that reads each when asked for it."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Image.Image] = read_image) -> None:
        self.paths = tuple(paths)
        self._read = read

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...

    def __getitem__(self, index: int | slice) -> "Image.Image | ImageFiles":
        return ImageFiles(self.paths[index], self._read) if isinstance(index, slice) else self._read(self.paths[index])


def chunks(images: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
    """The images in order, as many at a time as a forward pass takes, opened one by one."""
    for start in range(0, len(images), BATCH):
        yield [images[i] for i in range(start, min(start + BATCH, len(images)))]
