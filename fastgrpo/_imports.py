"""Make `import transformers, diffusers, open_clip` work beside a CPU build of torch.

torchvision publishes no CPU wheel on the package index. Beside a CPU torch the CUDA wheel's C++ library does not
load, torchvision's import then dies while registering shape functions for operators nobody defined, and takes
transformers, diffusers, timm and open_clip with it. Declaring the missing operators is enough: only their
schemas are needed, since nothing in this project calls them. With a working torchvision this does nothing.
"""

import importlib.util
import logging
from pathlib import Path

import torch

_MISSING_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # a Library undefines its operators when it is collected


def prepare() -> None:
    """Quieten xformers' start-up warning and declare torchvision's operators where its library cannot load."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    if importlib.util.find_spec("torchvision") is None or _declared or _torchvision_loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _MISSING_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)


def _torchvision_loads() -> bool:
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    libraries = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return False
    return True
