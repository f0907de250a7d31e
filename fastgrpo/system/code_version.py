"""Which code is running: the version, and the commit of git where that can be known."""

import importlib.metadata
import json
import subprocess
from contextlib import suppress
from pathlib import Path

from fastgrpo._version import __version__

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 10.0  # seconds for git, which on a network's disk may take its time


def git_commit() -> str:
    """The commit of the checkout that the code runs from, with "-dirty" where tracked files differ from it.

    Of what pip installed from a repository the commit that pip noted. "" where neither is known.
    """
    # A wheel inside somebody's checkout, as in its .venv, is not of that repository.
    if (_ROOT / ".git").exists():
        ask = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        # Without git, or in a checkout of somebody else's, which git does not read, the version has to do.
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=_PATIENCE)
            return done.stdout.strip()
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        noted = importlib.metadata.distribution("fastgrpo").read_text("direct_url.json")
        return str(json.loads(noted or "{}")["vcs_info"]["commit_id"])
    return ""


def code_version() -> str:
    """Such as "fastgrpo 0.9.0", and ", commit ..." after it where that is known."""
    commit = git_commit()
    return f"fastgrpo {__version__}" + (f", commit {commit}" if commit else "")
