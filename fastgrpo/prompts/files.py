"""Prompts in files: text with one per line, and tables with a column of them (CSV, TSV, JSONL)."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.prompts.delimited import BrokenTable, csv_rows, tsv_rows
from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.system.files import NoText, read_text
from fastgrpo.types import Prompt

TEXT_SUFFIX = ".txt"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class PromptTable:
    """Rows with named columns. What has no name, such as the index that pandas writes first, is no column.

    field, name: the setting that names it, and its own name, for messages. columns: in the order of the file.
    rows: (id, place, cells): the prompt's id, what messages call the row, and column -> value. A row may lack columns.
    """

    field: str
    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, str, Mapping[str, Any]], ...]

    def check_single(self, column: str, field: str) -> None:
        """Raise ConfigError, which begins with `field`, where several columns have this name."""
        if (count := self.columns.count(column)) > 1:
            raise ConfigError(f"{field}: {self.name!r} has {count} columns {column!r}; one is needed.")


def named(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that have a name."""
    return tuple(column for column in columns if column.strip())


def read_lines(path: Path, label: str, field: str) -> list[Prompt]:
    """Read one prompt per line of a text file; blank lines are skipped and ids are line numbers, from 1.

    field: the setting that names the file, for messages.
    Raises ConfigError for a file that cannot be read, is not UTF-8 text, or holds no prompt.
    """
    lines = enumerate(_read(path, field).split("\n"), start=1)
    prompts = [Prompt(one_line(line), label, id=number) for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{field}: {str(path)!r} holds no prompt; one per line is needed.")
    return prompts


def read_table(path: Path, field: str) -> PromptTable:
    """Read a .csv or .tsv file with a header, or a .jsonl file of one object per line.

    field: the setting that names the file, for messages. Ids number the rows after the header, from 1, or are a JSONL
    file's line numbers.
    Raises ConfigError for a file that cannot be read, is not UTF-8 text, or is not of its suffix's kind.
    """
    text = _read(path, field)
    if path.suffix.lower() == ".jsonl":
        return _read_jsonl(text, str(path), field)
    return _read_rows(text, str(path), field, tabs=path.suffix.lower() == ".tsv")


def table_prompts(
    table: PromptTable, label: str, column: str, category_column: str, column_field: str = ""
) -> list[Prompt]:
    """The prompts of a table's column; blank ones are skipped.

    category_column: holds their categories; they have none where it is "" or a column that the table lacks.
    column_field: the setting that names the column, for messages; empty: a training's.
    Raises ConfigError where the column is missing, a value is not text, or there is no prompt.
    """
    column_field = column_field or f"prompts.{label}_column"
    if column not in table.columns:
        raise ConfigError(
            f"{column_field}: {table.name!r} has no column {column!r}{nearest(column, table.columns)}; "
            f"there are {', '.join(table.columns) or 'none'}."
        )
    table.check_single(column, column_field)
    table.check_single(category_column, "prompts.category_column")
    prompts = []
    for number, place, cells in table.rows:
        if column not in cells:
            raise ConfigError(f"{table.field}: {table.name!r} has no {column!r} in {place}.")
        value = cells[column]
        # Half a surrogate pair, which JSON can spell, is no text: no tokenizer takes it.
        if not (value is None or (isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value))):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            raise ConfigError(f"{table.field}: {table.name!r} has {column!r} = {shown} in {place}; text is needed.")
        if value and value.strip():
            prompts.append(Prompt(one_line(value), label, _category(cells.get(category_column)), number))
    if not prompts:
        raise ConfigError(f"{table.field}: {table.name!r} holds no prompt in its column {column!r}.")
    return prompts


def one_line(text: str) -> str:
    """The text with a space for every line end and the blanks around it."""
    return re.sub(r"\s*[\r\n]\s*", " ", text.strip())


def _category(value: Any) -> str:
    """A cell as a category; several, as a hub data set may list them, are separated by commas."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "" if value is None else one_line(str(value))


def _read(path: Path, field: str) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise ConfigError(
            f"{field}: cannot read {str(path)!r} ({error.strerror}); a UTF-8 text file is needed."
        ) from error
    except NoText as error:
        raise ConfigError(f"{field}: {str(path)!r} {error}.") from error


def _read_rows(text: str, name: str, field: str, tabs: bool) -> PromptTable:
    """tabs: between the cells, instead of commas."""
    columns: list[str] = []
    rows: list[tuple[int, str, Mapping[str, Any]]] = []
    try:
        for line, cells in tsv_rows(text) if tabs else csv_rows(text):
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                _check_delimiter(columns, name, field, tabs)
            elif len(cells) == len(columns):
                values = {column: cell for column, cell in zip(columns, cells, strict=True) if column}
                rows.append((len(rows) + 1, f"line {line}", values))
            else:
                raise ConfigError(
                    f"{field}: {name!r} has {len(cells)} cells in line {line} and {len(columns)} in its header; a "
                    f"cell with {'tabs' if tabs else 'commas'}, quotes or line ends in it must be quoted."
                )
    except BrokenTable as error:
        raise ConfigError(f"{field}: {name!r} {error}.") from error
    if not columns:
        raise ConfigError(f"{field}: {name!r} holds no prompt; a header and rows are needed.")
    return PromptTable(field, name, named(columns), tuple(rows))


def _check_delimiter(columns: Sequence[str], name: str, field: str, tabs: bool) -> None:
    """Refuse a header of one cell that has several in it, by other delimiters than the file's suffix stands for."""
    others = {";": "semicolons"} | ({",": "commas"} if tabs else {"\t": "tabs"})
    found = next((other for mark, other in others.items() if mark in columns[0]), None) if len(columns) == 1 else None
    if found:
        raise ConfigError(
            f"{field}: {name!r} has {found} between its columns; accepted are commas in a .csv and tabs in a .tsv file."
        )


def _read_jsonl(text: str, name: str, field: str) -> PromptTable:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number too long for int() is a ValueError
            raise ConfigError(f"{field}: {name!r} is broken in line {number}: {error}.") from error
        if not isinstance(cells, dict):
            raise ConfigError(f"{field}: {name!r} has no JSON object in line {number}, as every line must.")
        rows.append((number, f"line {number}", {column: cells[column] for column in named(list(cells))}))
    if not rows:
        raise ConfigError(f"{field}: {name!r} holds no prompt; one JSON object per line is needed.")
    columns = dict.fromkeys(column for _, _, cells in rows for column in cells)
    return PromptTable(field, name, tuple(columns), tuple(rows))
