"""Putting an export on the Hugging Face hub: `python -m fastgrpo.export RUN --push OWNER/NAME`."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from fastgrpo.base_pictures import STEM
from fastgrpo.run.card import CARD, Card
from fastgrpo.settings.commands import Export
from fastgrpo.system.code_version import code_version
from fastgrpo.system.console import Console
from fastgrpo.system.errors import first_sentence
from fastgrpo.system.files import visible_files
from fastgrpo.system.kept import kept_files
from fastgrpo.system.shared_run import INSIDE


def upload(command: Export, card: Card, folder: Path, console: Console) -> None:
    """Upload what was exported from the checkpoint in `folder`, and its card, in one commit, and say where it is.

    Files of that name in the repository are replaced, others stay. Raises OSError, in a sentence, where that fails;
    then the repository may have been made, but nothing is in it that was not there before.
    """
    api, name = HfApi(), command.push
    disable_progress_bars()
    try:
        with console.bar("upload"):
            api.create_repo(name, private=not command.public, exist_ok=True)
            files = [CommitOperationAdd(inside, source) for inside, source in _files(command, card, folder).items()]
            said = api.create_commit(name, files, commit_message=f"Upload {command.output.name} by {code_version()}")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise OSError(f"--push {name}: {_in_the_way(error)}") from error
    console.say("", f"uploaded  {said.repo_url}")


def _files(command: Export, card: Card, folder: Path) -> dict[str, str | bytes]:
    """Name in the repository -> a file, or what is in it."""
    files: dict[str, str | bytes] = {}
    if command.is_file:
        files[command.output.name] = str(command.output)
        files |= {CARD: card.text.encode(), **{name: str(place) for name, place in card.pictures.items()}}
    else:
        files |= _within(command.output, visible_files(command.output), "")
    if command.with_checkpoint:
        own = [command.run / "config.toml", *(file for file in kept_files(command.run / STEM) if file.is_file())]
        files |= _within(command.run, [*own, *visible_files(folder)], f"{INSIDE}/")
    return files


def _within(folder: Path, files: Iterable[Path], prefix: str) -> dict[str, str | bytes]:
    """Name in the repository -> file, of files in a folder."""
    return {prefix + file.relative_to(folder).as_posix(): str(file) for file in sorted(files)}


def _in_the_way(error: Exception) -> str:
    """What a failed call to the hub was about, as a clause."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask the Hugging Face hub"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the Hugging Face hub does not accept this machine's token; `hf auth login` makes another one known"
    if status in (403, 404):
        return "the token may not write there, or there is no such owner; accepted is one with write access to OWNER"
    if isinstance(error, HfHubHTTPError | ValueError):
        said = getattr(error, "server_message", None) or first_sentence(error)
        return f"the Hugging Face hub did not take it ({' '.join(str(said).split())[:300]})"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    error = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    return f"the Hugging Face hub cannot be reached ({first_sentence(error)})"
