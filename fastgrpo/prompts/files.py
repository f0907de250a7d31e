"""Prompts in files: text with one per line, and tables with a column of them (CSV, TSV, JSONL).

Whatever the kind, a file is read as UTF-8, with or without a byte order mark and with either kind of line end.
"""

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.config import ConfigError, nearest
from fastgrpo.types import Prompt

TEXT_SUFFIX = ".txt"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    name: what to call it in messages. columns: in the order of the file.
    rows: (id, place, cells): the prompt's id, what to call the row in messages, and column -> value. A row may lack
        columns.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, str, Mapping[str, Any]], ...]


def read_lines(path: Path, label: str) -> list[Prompt]:
    """One prompt per line of a text file; blank lines are skipped and ids are line numbers, from 1.

    Raises ConfigError for a file that cannot be read, is not UTF-8 text, or holds no prompt.
    """
    lines = enumerate(_read(path, label).split("\n"), start=1)
    prompts = [Prompt(one_line(line), label, id=number) for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts.{label}: {str(path)!r} holds no prompt; one per line is needed.")
    return prompts


def read_table(path: Path, label: str) -> Table:
    """A .csv, .tsv (both with a header) or .jsonl file (one object per line).

    Ids are those of the rows after the header, from 1; of a JSONL file the line numbers.
    Raises ConfigError for a file that cannot be read, is not UTF-8 text, or is not of its suffix's kind.
    """
    text = _read(path, label)
    if path.suffix.lower() == ".jsonl":
        return _read_jsonl(text, str(path), label)
    return _read_csv(text, str(path), label, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def table_prompts(table: Table, label: str, column: str, category_column: str) -> list[Prompt]:
    """The prompts of a table's column; blank ones are skipped.

    category_column: where each one's category is; "" or a column that the table lacks: they have none.
    Raises ConfigError where the column is missing, a value is not text, or there is no prompt.
    """
    if column not in table.columns:
        columns = ", ".join(table.columns) or "none"
        raise ConfigError(
            f"prompts.{label}_column: {table.name!r} has no column {column!r}{nearest(column, table.columns)}; "
            f"there are {columns}."
        )
    if table.columns.count(column) > 1:
        raise ConfigError(
            f"prompts.{label}_column: {table.name!r} has {table.columns.count(column)} columns {column!r}; one is needed."
        )
    prompts = []
    for number, place, cells in table.rows:
        if column not in cells:
            raise ConfigError(f"prompts.{label}: {table.name!r} has no {column!r} in {place}.")
        value = cells[column]
        if not (value is None or _is_text(value)):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            raise ConfigError(f"prompts.{label}: {table.name!r} has {column!r} = {shown} in {place}; text is needed.")
        if value and value.strip():
            prompts.append(Prompt(one_line(value), label, _category(cells.get(category_column)), number))
    if not prompts:
        raise ConfigError(f"prompts.{label}: {table.name!r} holds no prompt in its column {column!r}.")
    return prompts


def one_line(text: str) -> str:
    """The text with a space for every line end and the blanks around it."""
    return re.sub(r"\s*[\r\n]\s*", " ", text.strip())


def _category(value: Any) -> str:
    """Several categories, as a hub data set may list them, are separated by commas."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "" if value is None else one_line(str(value))


def _is_text(value: Any) -> bool:
    """Half a surrogate pair, which JSON can spell, is no text: no tokenizer takes it."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _read(path: Path, label: str) -> str:
    field = f"prompts.{label}"
    try:
        data = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field}: cannot read {str(path)!r} ({error.strerror}); a UTF-8 text file is needed."
        ) from error
    if b"\0" in data:
        raise ConfigError(
            f"{field}: {str(path)!r} is binary, with a NUL byte in line {_line(data, data.index(0))}; "
            "UTF-8 text is needed."
        )
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{field}: {str(path)!r} is not UTF-8: byte 0x{data[error.start]:02x} in line {_line(data, error.start)}, "
            f"offset {error.start} of the file."
        ) from error


def _line(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _read_csv(text: str, name: str, label: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: tuple[str, ...] = ()
    rows = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = tuple(cell.strip() for cell in cells)
            elif len(cells) == len(columns):
                rows.append((len(rows) + 1, f"line {reader.line_num}", dict(zip(columns, cells, strict=True))))
            else:
                raise ConfigError(
                    f"prompts.{label}: {name!r} has {len(cells)} cells in line {reader.line_num} and {len(columns)} in "
                    "its header; a cell with commas, quotes or line ends in it must be quoted."
                )
    except csv.Error as error:
        raise ConfigError(f"prompts.{label}: {name!r} cannot be read at line {reader.line_num}: {error}.") from error
    if not columns:
        raise ConfigError(f"prompts.{label}: {name!r} holds no prompt; a header and rows are needed.")
    return Table(name, columns, tuple(rows))


def _read_jsonl(text: str, name: str, label: str) -> Table:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number too long for int() is a ValueError
            raise ConfigError(f"prompts.{label}: {name!r} is broken in line {number}: {error}.") from error
        if not isinstance(cells, dict):
            raise ConfigError(f"prompts.{label}: {name!r} has no JSON object in line {number}, as every line must.")
        rows.append((number, f"line {number}", cells))
    if not rows:
        raise ConfigError(f"prompts.{label}: {name!r} holds no prompt; one JSON object per line is needed.")
    columns = dict.fromkeys(column for _, _, cells in rows for column in cells)
    return Table(name, tuple(columns), tuple(rows))
