"""What a single file says of itself: how its UNet was trained, which no tensor's shape tells.

safetensors metadata    modelspec.prediction_type, modelspec.resolution, modelspec.architecture (Stability AI's
                        ModelSpec); ss_zero_terminal_snr (kohya's trainer)
tensors without content v_pred, ztsnr, by which programs tell files of such models
torch files             global_step: 875,000 is Stability AI's SD 2.x at 512 pixels, 110,000 their SD 2.1 at 768
"""

import re
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.models.tensor_file import SAFETENSORS, read_metadata, tensor_shapes, torch_content
from fastgrpo.system.errors import ConfigError

EPSILON, V_PREDICTION = "epsilon", "v_prediction"
_PREDICTIONS = dict.fromkeys(("epsilon", "eps"), EPSILON)
_PREDICTIONS |= dict.fromkeys(("v", "v_prediction", "v-prediction"), V_PREDICTION)
_SD2_512, _SD2_768 = (EPSILON, (512, 512)), (V_PREDICTION, (768, 768))
_ARCHITECTURES = {"stable-diffusion-v2-512": _SD2_512, "stable-diffusion-v2-768-v": _SD2_768}
# Of Stability AI's own files of SD 2.x; others count their steps as they like.
_STEPS = {875_000: _SD2_512, 110_000: _SD2_768}


@dataclass(frozen=True)
class Declared:
    """What a file says of itself.

    prediction: "epsilon", "v_prediction" or, where the file does not say, empty. size: (height, width) in pixels.
    zero_snr: trained with zero terminal SNR (arXiv 2305.08891). by: where the file says so.
    """

    prediction: str = ""
    size: tuple[int, int] | None = None
    zero_snr: bool = False
    by: tuple[str, ...] = ()


def read_declared(path: Path, field: str, decided: bool) -> Declared:
    """Read what a file says of itself.

    field: the setting that names the file. decided: a setting says what it predicts, whatever it says itself.
    Raises ConfigError for a file that contradicts itself or names something else than SD's predictions.
    """
    here, metadata, names = f"{field} is {str(path)!r}", read_metadata(path, field), tensor_shapes(path, field)
    content = {} if path.suffix == SAFETENSORS else torch_content(path, field)
    predictions: dict[str, str] = {}  # where it is said -> what
    sizes: dict[str, tuple[int, int]] = {}
    if kind := metadata.get("modelspec.prediction_type"):
        if kind.lower() not in _PREDICTIONS and not decided:
            raise ConfigError(
                f"{here}, whose modelspec.prediction_type is {kind!r}; {EPSILON} or {V_PREDICTION} is accepted."
            )
        predictions["modelspec.prediction_type"] = _PREDICTIONS.get(kind.lower(), "")
    if size := _size(metadata.get("modelspec.resolution", "")):
        sizes["modelspec.resolution"] = size
    for where, said in (
        ("modelspec.architecture", _ARCHITECTURES.get(metadata.get("modelspec.architecture", ""))),
        ("global_step", _STEPS.get(content.get("global_step", 0)) if isinstance(content, dict) else None),
    ):
        if said:
            predictions[where], sizes[where] = said
    if "v_pred" in names:
        predictions["v_pred"] = V_PREDICTION
    marks = {"ss_zero_terminal_snr": metadata.get("ss_zero_terminal_snr") == "True", "ztsnr": "ztsnr" in names}
    zero_snr = [mark for mark, holds in marks.items() if holds]
    if len(set(predictions.values())) > 1 and not decided:
        told = " and ".join(f"{value} by its {where}" for where, value in predictions.items())
        raise ConfigError(f"{here}, which predicts {told}; model.prediction_type decides between them.")
    return Declared(
        prediction=next(iter(predictions.values()), ""),
        size=next(iter(sizes.values()), None),  # the first said is the most exact
        zero_snr=bool(zero_snr),
        by=tuple(dict.fromkeys([*predictions, *sizes, *zero_snr])),
    )


def _size(text: str) -> tuple[int, int] | None:
    """(height, width) of "WIDTHxHEIGHT", or "SIDE" of both; None for anything else."""
    found = re.fullmatch(r"\s*(\d+)(?:\s*[xX,]\s*(\d+))?\s*", text)
    return (int(found[2] or found[1]), int(found[1])) if found else None
