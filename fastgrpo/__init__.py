"""fastgrpo: online safety post-training of Stable Diffusion with Group Relative Policy Optimization."""

import os
import sys

# Spinning OpenMP threads turn a 26 ms UNet forward into seconds when anything else wants the core.
# OpenMP reads this when it is loaded, with torch: afterwards only the programs that this one starts would get it.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fastgrpo.system import imports, interrupt

interrupt.answer_in_a_sentence()
imports.prepare()

from fastgrpo._version import __version__  # noqa: E402, F401
