"""What sinks are told of the run that they log."""

import dataclasses
from pathlib import Path

from fastgrpo._version import __version__
from fastgrpo.run.logs.base import LoggedRun
from fastgrpo.run.logs.secrets import hidden, without_secrets
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.code_version import git_commit


def logged_run(folder: Path, config: TrainConfig, finished: int) -> LoggedRun:
    """A run as sinks see it. finished: iterations done before this process began."""
    log = dataclasses.replace(config.log, tags=tuple(map(hidden, config.log.tags)))
    name = hidden(log.name or folder.resolve().name)
    settings = without_secrets(dataclasses.asdict(config))
    return LoggedRun(folder, finished, name, log, settings, __version__, git_commit() if log.to else "")
