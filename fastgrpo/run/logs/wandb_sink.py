"""Weights & Biases, online or offline, its files in RUN/wandb. RUN/wandb.json keeps the run's id."""

import os
import secrets
from typing import Any

from fastgrpo.run.logs.base import Entry, LoggedRun, SinkKind, require_library
from fastgrpo.run.logs.secrets import hidden
from fastgrpo.settings.schema import LogConfig
from fastgrpo.system.errors import ConfigError, first_sentence

FINISHING = 40.0  # seconds that wandb uploads at the end; the rest stays in RUN/wandb, for `wandb sync`
_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")


class WandbSink:
    """One wandb run, which resumed trainings continue. Steps that it has already are not sent again."""

    def __init__(self, run: LoggedRun):
        _quiet()
        import wandb

        settings = run.settings
        to = {"project": settings.project, "entity": settings.entity}
        kept = run.kept("wandb")
        if {name: kept.get(name) for name in to} != to:
            kept = {"id": secrets.token_hex(8), **to}
            run.keep("wandb", kept)
        self._wandb = wandb
        self._run: Any = wandb.init(
            project=settings.project,
            entity=settings.entity or None,
            name=run.name,
            tags=list(settings.tags),
            config={**run.config, **run.code},
            allow_val_change=True,
            id=kept["id"],
            resume="allow",
            reinit="create_new",
            dir=run.folder,
            mode=None if settings.mode == "auto" else settings.mode,
            settings=wandb.Settings(
                console="off",  # the terminal is ours
                silent=True,
                # A command line and a repository's address may hold a password; config and commit are given above.
                x_disable_meta=True,
                x_save_requirements=False,  # reading what is installed takes seconds
                disable_git=True,
                disable_code=True,
                save_code=False,
                finish_timeout=FINISHING,
            ),
        )
        self._next = self._run.starting_step
        if self._run.offline:
            self.where = f"wandb sync {self._run.settings.sync_dir}"
        else:
            self.where = self._run.url or ""

    def write(self, entry: Entry) -> None:
        if entry.step < self._next:
            return
        logged: dict[str, Any] = dict(entry.values)
        logged |= {name: self._wandb.Image(str(path)) for name, path in entry.pictures.items()}
        for name, table in entry.tables.items():
            logged[name] = self._wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log(logged, step=entry.step, commit=True)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _quiet() -> None:
    """Before wandb is imported: its own words on the terminal, and reports of its errors to its makers, are off."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _check(settings: LogConfig) -> None:
    require_library("wandb")
    mode = os.environ.get("WANDB_MODE", "online") if settings.mode == "auto" else settings.mode
    if mode in _WITHOUT_LOGIN:
        return
    _quiet()
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        host = wandb.setup().settings.base_url
        login = wbauth.authenticate_session(host=host, source="fastgrpo", prompt=False, update_session=False)
    except Exception as error:  # of a key that cannot be one, or of settings that wandb cannot read
        raise ConfigError.of("log.to", "wandb", hidden(first_sentence(error))) from error
    if login is None:
        why = f"there is no login for {host}; run `wandb login`, set WANDB_API_KEY, or say --log.mode offline"
        raise ConfigError.of("log.to", "wandb", why)


def _abandon() -> None:
    """End wandb's own process, for which a hook at the program's end would wait until the server answers."""
    from wandb.sdk import wandb_setup

    connection = wandb_setup.singleton()._connection
    if connection is None:
        return
    if connection._cleanup:
        connection._cleanup()
    if connection._proc:
        connection._proc._process.kill()


KIND = SinkKind(_check, WandbSink, _abandon)
