"""Runs on the Hugging Face hub: what `export --push OWNER/NAME --with-checkpoint` put there, to be used elsewhere.

They lie in the repository's folder run/, which has in it what a run's folder has: config.toml, one checkpoint, and what
the guard knows of the base model. Nothing that is read of them can hold code.
"""

import os
import re
import shutil
from pathlib import Path

from fastgrpo.system.errors import ConfigError, first_sentence
from fastgrpo.system.files import appearing

PREFIX = "hf:"
INSIDE = "run"  # the folder in a repository
_PATTERNS = [f"{INSIDE}/{end}" for end in ("config.toml", "*.json", "*.safetensors")]  # `*` is any folder too

_REPOSITORY = re.compile(r"(?=.{3,96}$)[A-Za-z0-9_][\w.-]*(?<![.-])/[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)


def is_repository(name: str) -> bool:
    """Whether a name is OWNER/NAME, as the Hugging Face hub lets repositories be called."""
    return bool(_REPOSITORY.fullmatch(name)) and not re.search(r"--|\.\.", name)


def fetch_run(name: str, flag: str = "") -> Path:
    """Download the run of `hf:OWNER/NAME` to runs/NAME, a folder that is new, and return that.

    flag: with a space after it, what the name was said to; the commands that only use a run have none.
    Raises ConfigError where there is no such run, it cannot be reached, or the folder is there already.
    """
    field, repository = f"{flag}{name}", name.removeprefix(PREFIX)
    if not is_repository(repository):
        raise ConfigError(f"{field}: accepted is hf:OWNER/NAME, a repository on the Hugging Face hub.")
    folder = Path("runs") / repository.rpartition("/")[2]
    if folder.exists():
        raise ConfigError(
            f"{field}: {folder} is there already; {flag}{folder} {'goes on from' if flag else 'uses'} it."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"{field}: several processes would download it at once; accepted is the folder of a run: `hf download "
            f"{repository} --include 'run/*' --local-dir FOLDER`, then {flag}FOLDER/run."
        )
    from huggingface_hub import HfApi, snapshot_download  # only now: it takes a while
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        if f"{INSIDE}/config.toml" not in HfApi().list_repo_files(repository):
            raise ConfigError(
                f"{field}: there is no run in that repository; export --push --with-checkpoint puts one there."
            )
        found = Path(snapshot_download(repository, allow_patterns=_PATTERNS)) / INSIDE
    except ConfigError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        absent = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)
        why = (
            "has no such repository (one that is private needs `hf auth login`)"
            if absent
            else f"did not deliver it ({first_sentence(error)})"
        )
        raise ConfigError(f"{field}: the Hugging Face hub {why}.") from error
    folder.parent.mkdir(exist_ok=True)
    with appearing(folder) as partial:
        shutil.copytree(found, partial)  # from the hub's cache, whose links lead to what others use too
    return folder
