"""fastgrpo: online safety post-training of Stable Diffusion with Group Relative Policy Optimization."""

import os

# Both must be set before torch (OpenMP) and xformers are first imported.
# Spinning OpenMP threads turn a 26 ms UNet forward into seconds when anything else wants the core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing here needs xformers' own C++ library to be importable; its warning would open every command.
os.environ.setdefault("XFORMERS_IGNORE_FLASH_VERSION_CHECK", "1")

from fastgrpo import _imports

_imports.prepare()

from fastgrpo._version import __version__  # noqa: E402, F401
