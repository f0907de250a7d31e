"""TensorBoard: event files in RUN/tensorboard."""

from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from fastgrpo.run.logs.base import Entry, LoggedRun, LoggedTable, SinkKind
from fastgrpo.settings.schema import LogConfig
from fastgrpo.system.files import naming


class TensorBoardSink:
    """Every start writes a file of its own; charts leave out what earlier ones say of iterations that are run again."""

    where = ""  # said at the end of every run

    def __init__(self, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter

        self._finished = run.finished
        self._folder = run.folder / "tensorboard"
        self._writer: Any = SummaryWriter(self._folder, purge_step=run.finished + 1)
        with naming(self._folder):
            for name, text in _texts(run).items():
                self._writer.add_text(name, text, run.finished)
            self._writer.flush()

    def write(self, entry: Entry) -> None:
        with naming(self._folder):
            for name, value in entry.values.items():
                self._writer.add_scalar(name, value, entry.step)
            if entry.step > self._finished or not self._finished:  # else the first start's file has them
                for name, path in entry.pictures.items():
                    self._write_picture(name, path, entry.step)
                for name, table in entry.tables.items():
                    self._writer.add_text(name, _markdown(table), entry.step)
            self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()

    def _write_picture(self, name: str, path: Path, step: int) -> None:
        """The PNG as it is: to decode and encode it again would take seconds."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


def _texts(run: LoggedRun) -> dict[str, str]:
    """What TensorBoard shows under "text": who the run is, and its config."""
    told = {"name": run.name, "project": run.settings.project, "tags": ", ".join(run.settings.tags), **run.code}
    about = LoggedTable(("", ""), tuple((name, value) for name, value in told.items() if value))
    config = LoggedTable(("setting", "value"), tuple(_flat(dict(run.config), "")))
    return {"run": _markdown(about), "config": _markdown(config)}


def _flat(config: dict[str, object], prefix: str) -> list[tuple[str, str]]:
    rows = []
    for name, value in config.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, str(value))]
    return rows


def _markdown(table: LoggedTable) -> str:
    """What a cell says is shown as it is: neither HTML nor Markdown."""
    rows = [[_cell(cell) for cell in row] for row in (table.columns, *table.rows)]
    lines = [" | ".join(["", *row, ""]).strip() for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(table.columns), *lines[1:]])


def _cell(text: str) -> str:
    text = escape(" ".join(text.split()), quote=False)
    for letter in "\\`*_|~#![]":
        text = text.replace(letter, f"\\{letter}")
    return text


def _check(settings: LogConfig) -> None:
    """It is one of fastgrpo's own dependencies, and needs no login."""


KIND = SinkKind(_check, TensorBoardSink)
