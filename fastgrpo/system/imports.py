"""Make `import transformers, diffusers, open_clip` work beside a CPU build of torch.

The package index has torchvision for CUDA only. Beside a CPU torch its C++ library does not load; its import then fails
on operators that nobody defined, and so do those of transformers, diffusers, timm and open_clip. Declaring the
operators' schemas is enough, since nothing here calls them. A torchvision that works is left alone.

This is done when torchvision is first imported: it needs torch, whose import costs a refused command line seconds.
Programs that never import fastgrpo, such as the lines that `export` prints, need it too where fastgrpo is installed. So
`prepare` is also an entry point of the group `torch.backends`, which torch calls when it is imported.
"""

import logging
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MISSING_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# xformers warns of what it was built with. diffusers imports torchao wherever it is installed, and misses what torchao
# 0.18 no longer has for other uses than ours; torch tells torchao what a later torch will not take.
_TALKATIVE = ("xformers", "diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree")
_declared: list["torch.library.Library"] = []  # a Library undefines its operators when it is collected


def prepare() -> None:
    """Quieten warnings at start, and see to torchvision's operators once it is imported. Once is enough."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if _TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, _TorchvisionFinder)


class _TorchvisionFinder:
    """Finds torchvision as Python does, and lets its operators be declared just before its code runs.

    Whoever only looks whether it is installed, as transformers and diffusers do, gets an answer and nothing more.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name == "torchvision" else None
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        folder, execute = Path(spec.origin).parent, spec.loader.exec_module

        def declare_and_execute(module: ModuleType) -> None:
            _declare_missing_operators(folder)
            execute(module)

        spec.loader.exec_module = declare_and_execute  # type: ignore[method-assign]  # this one module's loader
        return spec


def _declare_missing_operators(folder: Path) -> None:
    """Declare torchvision's operators where its library, in `folder`, cannot load."""
    import torch

    if _declared or _torchvision_loads(folder):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _MISSING_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)


def _torchvision_loads(folder: Path) -> bool:
    import torch

    libraries = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return False
    return True
