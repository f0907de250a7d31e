"""model.unet: a UNet from elsewhere in the place of the pipeline's, or over it.

A diffusers folder or hub id must hold a whole UNet. A file of tensors, as ESD, UCE and MACE publish theirs, in
diffusers' layout or the original one, may hold the tuned tensors alone, which are laid over the pipeline's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fastgrpo.models.repository import Repository
from fastgrpo.models.single_file import UNET, left_over, unet_places
from fastgrpo.models.tensor_file import SAFETENSORS, TORCH_SUFFIXES, read_tensors, tensor_shapes
from fastgrpo.system.errors import ConfigError

SUFFIXES = (SAFETENSORS, *TORCH_SUFFIXES)

# What programs put before the names of a UNet's tensors, the longest first.
_PREFIXES = (UNET, "diffusion_model.", "module.", "unet.")
# The rest of a whole single file, which is not asked for here.
_REST = ("first_stage_model.", "cond_stage_model.", "model_ema.")


@dataclass(frozen=True)
class UnetTensors:
    """Where the tensors of model.unet lie. places: diffusers' name -> (file, name in it). whole: none is missing."""

    places: Mapping[str, tuple[Path, str]]
    whole: bool

    def read(self, field: str) -> dict[str, Tensor]:
        """diffusers' name -> tensor, in the files' precision."""
        state: dict[str, Tensor] = {}
        for file in dict.fromkeys(file for file, _ in self.places.values()):
            ours = {name: key for name, (place, key) in self.places.items() if place == file}
            tensors = read_tensors(file, field, ours.values())
            state |= {name: tensors[key] for name, key in ours.items()}
        return state


def unet_file(spec: str) -> Path | None:
    """The file that `spec` names, or None for a folder or hub id. Raises ConfigError for a file that is not there."""
    path = Path(spec)
    if path.is_dir() or not (path.is_file() or spec.endswith(SUFFIXES)):
        return None
    if not path.is_file():
        raise ConfigError(f"model.unet is {spec!r}, but there is no such file.")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"model.unet is {spec!r}, a file; one that ends in {', '.join(SUFFIXES)} is accepted.")
    return path


def unet_repository(spec: str) -> tuple[Repository, str]:
    """`FOLDER_OR_ID[:SUBFOLDER]` -> where it lies, and the subfolder as the beginning of its files' names."""
    if Path(spec).is_dir():
        return Repository("model.unet", spec), ""
    name, _, subfolder = spec.partition(":")
    subfolder = subfolder.strip("/")
    return Repository("model.unet", name), subfolder + "/" if subfolder else ""


def find_in_file(file: Path, unet: UNet2DConditionModel) -> UnetTensors:
    """Find where the tensors of a file belong in `unet`, which may be on the meta device.

    Raises ConfigError for a tensor that has no place there, or another shape, and for a file without any.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    here = f"model.unet is {str(file)!r}"
    found: dict[str, tuple[Path, str]] = {}
    shapes = {key: (_bare(key), shape) for key, shape in tensor_shapes(file, "model.unet").items()}
    names = {name: name for name in ours}
    if any(bare not in ours for bare, _ in shapes.values()):
        names |= {original: name for name, original in unet_places(unet).items()}
    for key, (bare, shape) in shapes.items():
        name = names.get(bare)
        if name is None:
            if "." not in key or key.startswith(_REST):
                continue  # numbers of the noise schedule
            raise ConfigError(f"{here}, where {left_over(key)}.")
        if shape != ours[name]:
            raise ConfigError(_other_shape(here, key, shape, ours[name]))
        found[name] = file, key
    if not found:
        raise ConfigError(
            f"{here}, where there is no tensor of a UNet; a UNet's state dict, in diffusers' or the original layout, "
            "is accepted."
        )
    return UnetTensors(found, whole=found.keys() == ours.keys())


def find_in_folder(field: str, spec: str, folder: Path, files: Iterable[str], unet: nn.Module) -> UnetTensors:
    """Find the UNet that some `files` of a diffusers folder hold, whole and with nothing besides.

    field, spec: the setting that names it, model.unet or model.path, and its value.
    Raises ConfigError for the first tensor in which it differs from `unet`, the pipeline's by its config.
    """
    here = f"{field} is {spec!r}"
    ours = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        for name, shape in tensor_shapes(folder / file, field).items():
            if name not in ours:
                raise ConfigError(f"{here}, where {left_over(name)}.")
            if shape != ours[name]:
                whose = "its config" if field == "model.path" else "the pipeline"
                raise ConfigError(_other_shape(here, name, shape, ours[name], whose))
            found[name] = folder / file, name
    if missing := next((name for name in ours if name not in found), None):
        raise ConfigError(f"{here}, whose UNet lacks {missing}; all tensors of a UNet are needed.")
    return UnetTensors(found, whole=True)


def _bare(key: str) -> str:
    """A tensor's name without what programs put before it."""
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


def _other_shape(here: str, name: str, found: tuple, needed: tuple, whose: str = "the pipeline") -> str:
    return (
        f"{here}, whose UNet is of another architecture than that of {whose}: {name} is {list(found)}, and "
        f"{list(needed)} in {whose}."
    )
