"""FID: how far the images of one folder are from those of another (Heusel et al., arXiv 1706.08500), as in clean-fid.

With m and C the mean and the covariance (n - 1) of N images' features, which are those of inception.py,

    FID = |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))

FID falls with the number of images at the same quality: numbers of different counts cannot be compared. Its interval is
of the delta method (`influence`, `intervals.distance`): how far FID would lie with other images of the same model, as
many as these, against the same reference. It covers neither the bias of a small number of images nor the choice of the
reference. In simulations it held the expected FID of so many images in 91 to 100% of cases with 100 prompts or more,
with fewer images than features too, and in 86% or more with fewer prompts.
A bootstrap would not do in its place: resampled folders are farther from each other than the folders themselves.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.linalg import eigh
from torch import Tensor

from fastgrpo.evaluation.images.files import BATCH, PIL_ERRORS, ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, Requests
from fastgrpo.evaluation.metrics.inception import WIDTH, Inception
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import visible_files, write_atomically

SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
Compute = Callable[[], Tensor]
_AT_ONCE = 4096  # images of a chunk in float64: bounds memory; results do not depend on it


def folder_images(folder: Path, field: str = "fid.reference") -> ImageFiles:
    """The images in a folder and those below it, by their path, as clean-fid finds them.

    field: what messages call the setting, here and when an image is read. Raises ConfigError where there are not two,
    which a covariance needs, and for a file that does not begin as an image does.
    """
    if not folder.is_dir():
        raise ConfigError(f"{field}: {str(folder)!r} is not a folder; FID needs one with images.")
    files = sorted(file for file in visible_files(folder) if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(files) < 2:
        raise ConfigError(
            f"{field}: {str(folder)!r} has {len(files)} images; FID needs two or more with one of the suffixes "
            f"{', '.join(sorted(SUFFIXES))}."
        )

    def read(file: Path, whole: bool = True) -> Image.Image:
        try:
            with Image.open(file) as image:
                return image.convert("RGB") if whole else image
        except PIL_ERRORS as error:
            raise ConfigError(f"{field}: {str(file)!r} is no image that can be read ({error}).") from error

    for file in files:
        read(file, whole=False)
    return ImageFiles(files, read)


def folder_features(folder: Path, images: ImageFiles, inception: Inception, compute: Compute, ranks: Ranks) -> Tensor:
    """[N, 2048] float32: the features of some images of a folder, in their order, on all processes.

    They are kept in the folder, and taken from there while weights, names, sizes and times of modification are the
    same; one that cannot be written keeps none. Only the first process needs the folder, unless `compute` does.
    compute: computes them; called by all processes. Raises ConfigError for a file that is no image.
    """
    kept = folder / f".fid-{inception.hashes['inception'][:16]}.safetensors"
    key = _key(folder, images.paths, inception) if ranks.first else ""
    features = _read_kept(kept, key, len(images)) if ranks.first else None
    if ranks.any(features is not None):
        return ranks.gather(torch.empty(0, WIDTH) if features is None else features)
    features = compute()
    if ranks.first:
        with suppress(OSError):
            write_atomically(kept, save({"features": features}, {"key": key}))
    return features


def drawn_features(folder: ImageFolder, rows: Requests, inception: Inception) -> Tensor:
    """[N, 2048] float32: the features of images that were drawn, on all processes, each of which computes a share."""

    def compute() -> Tensor:
        parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        found = folder.look(parts, lambda images, _: inception(images).numpy().tobytes())
        features = [np.frombuffer(data, np.float32).reshape(-1, WIDTH) for _, data in found]
        return torch.from_numpy(np.concatenate([np.empty((0, WIDTH), np.float32), *features]))

    return folder_features(folder.path / "images", folder.images(rows), inception, compute, folder.ranks)


def reference_features(folder: Path, images: ImageFiles, inception: Inception, ranks: Ranks) -> Tensor:
    """[N, 2048] float32: the features of real images, which every process can read and computes a share of."""

    def compute() -> Tensor:
        part = ranks.share(-(-len(images) // BATCH))  # in whole passes, as one process would compute them
        return ranks.gather(inception(images[part.start * BATCH : part.stop * BATCH]))

    return folder_features(folder, images, inception, compute, ranks)


def _key(folder: Path, files: Sequence[Path], inception: Inception) -> str:
    """What the features of a folder depend on, as SHA-256."""
    states = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
    listed = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    content = [inception.protocol, inception.hashes, listed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_kept(file: Path, key: str, number: int) -> Tensor | None:
    """The features in a file, or None where it is not there, is damaged, or holds those of something else."""
    try:
        with safe_open(file, "pt") as content:
            if (content.metadata() or {}).get("key") != key:
                return None
            features = content.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    return features if features.shape == (number, WIDTH) else None


@dataclass(frozen=True)
class Fid:
    """value: the distance. influence: [N] float64, see `influence`."""

    value: float
    influence: np.ndarray


@dataclass(frozen=True)
class Frechet:
    """The squared Fréchet distance of two Gaussians, and the linear map T from the first's shape to the second's.

    transport: [E, E] float64, W with T = W W', for which T C_1 T = C_2. Where C_1 is singular, T is that of the
    directions in which C_1 varies, and 0 in the others.
    """

    distance: float
    transport: np.ndarray


def fid(features: Tensor, reference: Tensor) -> Fid:
    """FID between two sets of features, [N, E] and [M, E], and what each of the N does to it.

    Raises ValueError where one of them has fewer than two rows.
    """
    for each in (features, reference):
        if len(each) < 2:
            raise ValueError(f"FID needs the features of two images or more, not {len(each)}.")
    values, others = (each.double().numpy() for each in (features, reference))
    mean, mean_2 = values.mean(0), others.mean(0)
    found = frechet(mean, np.cov(values, rowvar=False), mean_2, np.cov(others, rowvar=False))
    return Fid(found.distance, influence(values, mean - mean_2, found.transport))


def frechet(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> Frechet:
    """Means [E] and covariances [E, E], float64.

    C_1 C_2 has the eigenvalues of the symmetric L' C_2 L, where C_1 = L L', and the trace of its root is the sum of
    their roots. So no general matrix root is taken, which fails where covariances are singular, as those of fewer
    images than features are. Rounding may carry eigenvalues of 0 below it; they count as 0.
    With C_1 = V D V', L = V D^(1/2) and L' C_2 L = U S U', the map
    T = C_1^(-1/2) (C_1^(1/2) C_2 C_1^(1/2))^(1/2) C_1^(-1/2) is W W' for W = V D^(-1/2) U S^(1/4).
    """
    values, vectors = eigh(cov_1)
    scales = np.sqrt(values.clip(0))
    factor = vectors * scales
    squares, turns = eigh(factor.T @ cov_2 @ factor)
    roots = np.sqrt(squares.clip(0))
    offset = mean_1 - mean_2
    distance = max(0.0, float(offset @ offset + np.trace(cov_1) + np.trace(cov_2) - 2 * roots.sum()))
    # Below this an eigenvalue cannot be told from 0.
    varies = values > len(values) * np.finfo(np.float64).eps * values[-1]
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=varies)
    return Frechet(distance, (vectors * inverse) @ (turns * np.sqrt(roots)))


def influence(values: np.ndarray, offset: np.ndarray, transport: np.ndarray) -> np.ndarray:
    """[N]: FID's influence function at each image, the derivative of FID in the image's share of all N.

    values: [N, E] float64, of mean m and covariance C. offset: [E], m - m_2. transport: `Frechet.transport`, W.

        phi(x) = 2 (m - m_2)' (x - m) + (x - m)' (I - W W') (x - m) - tr((I - W W') C)

    tr((C C_2)^(1/2)) has the derivative T / 2 in C (T. Rippl, A. Munk, A. Sturm, "Limit laws of the empirical
    Wasserstein distance: Gaussian distributions", arXiv 1507.04090). The images' mean of phi is 0.
    """
    mean = values.mean(0)
    slopes = np.empty(len(values))
    for start in range(0, len(values), _AT_ONCE):
        centred = values[start : start + _AT_ONCE] - mean
        squares = (centred**2).sum(1) - ((centred @ transport) ** 2).sum(1)
        slopes[start : start + _AT_ONCE] = 2 * centred @ offset + squares
    return slopes - slopes.mean()
