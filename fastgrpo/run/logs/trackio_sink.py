"""Trackio: a database on this machine, or a Space or server that its own variables name. RUN/trackio.json has the id.

It prints a few lines of its own.
"""

import os
from typing import Any

from fastgrpo.run.logs.base import Entry, LoggedRun, SinkKind, require_library
from fastgrpo.settings.schema import LogConfig
from fastgrpo.system.errors import ConfigError

_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioSink:
    """One trackio run, which resumed trainings continue. Steps that it has already are not sent again."""

    def __init__(self, run: LoggedRun):
        if run.settings.mode == "offline":
            for name in _ELSEWHERE:
                os.environ.pop(name, None)
        import trackio

        project = run.settings.project
        kept = run.kept("trackio")
        known = bool(kept) and (kept.get("project"), kept.get("name")) == (project, run.name)
        self._trackio = trackio
        self._run: Any = trackio.init(
            project=project,
            name=run.name,
            config={**run.config, **run.code, "tags": list(run.settings.tags)},
            resume="allow" if known else "never",
            embed=False,
        )
        if known and self._run.id != kept["id"]:
            self._run.finish()
            raise RuntimeError(f"project {project!r} has a later run called {run.name!r}; --log.name can name another")
        if not known:
            run.keep("trackio", {"id": self._run.id, "project": project, "name": run.name})
        self._next = self._run._next_step if known else 0
        self.where = f"trackio show --project {project!r}"

    def write(self, entry: Entry) -> None:
        if entry.step < self._next:
            return
        logged: dict[str, Any] = dict(entry.values)
        logged |= {name: self._trackio.Image(path) for name, path in entry.pictures.items()}
        for name, table in entry.tables.items():
            logged[name] = self._trackio.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log(logged, step=entry.step)

    def close(self, failed: bool) -> None:
        self._trackio.finish()


def _check(settings: LogConfig) -> None:
    require_library("trackio")
    if settings.mode != "offline" and os.environ.get("TRACKIO_SPACE_ID"):
        from huggingface_hub import get_token

        if get_token() is None:
            why = "TRACKIO_SPACE_ID names a Space and there is no login; run `hf auth login` or set HF_TOKEN"
            raise ConfigError.of("log.to", "trackio", f"{why}, or say --log.mode offline")


# Its threads are daemons, and its hook at the program's end knows no run of another thread.
KIND = SinkKind(_check, TrackioSink)
