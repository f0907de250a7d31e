"""fastgrpo: online safety post-training of Stable Diffusion with Group Relative Policy Optimization."""

import os
import sys
from pathlib import Path

# Spinning OpenMP threads turn a 26 ms UNet forward into seconds when anything else wants the core.
# OpenMP reads this when it is loaded, with torch: afterwards only the programs that this one starts would get it.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In a checkout `kernels` lies beside this package; a wheel has it inside. Either way it is fastgrpo.kernels.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from fastgrpo import _imports, _interrupt

_interrupt.answer_in_a_sentence()
_imports.prepare()

from fastgrpo._version import __version__  # noqa: E402, F401
