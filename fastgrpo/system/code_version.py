"""Which code this is."""

import subprocess
from contextlib import suppress
from pathlib import Path

from fastgrpo._version import __version__

_ROOT = Path(__file__).resolve().parents[2]


def code_version() -> str:
    """Such as "fastgrpo 0.9.0", and of a git checkout the commit, `-dirty` after it where files have changed since."""
    commit = ""
    if (_ROOT / ".git").exists():
        git = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
        # Without git, or in a checkout of somebody else's, which git does not read, the version has to do.
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return f"fastgrpo {__version__}" + (f", commit {commit}" if commit else "")
