"""Which commit of git the running code is, where that can be known."""

import importlib.metadata
import json
import subprocess
from contextlib import suppress
from pathlib import Path

_PATIENCE = 10.0  # seconds for git, which on a network's disk may take its time


def git_commit() -> str:
    """The commit of the checkout that the code runs from, with "-dirty" where tracked files differ from it.

    Of what pip installed from a repository the commit that pip noted. "" where neither is known.
    """
    package = Path(__file__).resolve().parents[2]
    # A wheel inside somebody's checkout, as in its .venv, is not of that repository.
    if (package.parent / ".git").exists():
        ask = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=_PATIENCE)
            return done.stdout.strip()
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        noted = importlib.metadata.distribution("fastgrpo").read_text("direct_url.json")
        return str(json.loads(noted or "{}")["vcs_info"]["commit_id"])
    return ""
