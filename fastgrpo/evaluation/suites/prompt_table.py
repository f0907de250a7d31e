"""Prompts to evaluate on, from tables (CSV, TSV, JSONL, a hub data set) or a text file with one per line.

Data sets of unsafe prompts bring along what an image is to be drawn with. The columns are found by the names that they
have in I2P, in lists derived from it, and in people's own, in upper or lower case, the first that is there:

    seed         evaluation_seed, sd_seed, seed
    guidance     evaluation_guidance, sd_guidance_scale, guidance, guidance_scale, cfg, cfg_scale
    width        sd_image_width, width                         height       sd_image_height, height
    categories   categories, category (several separated by commas; a row counts in each)

A prompt's id is made of all this and nothing else, so results can be joined in any order, and where rows are missing.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgrpo.evaluation.images.folder import ImageRequest
from fastgrpo.prompts.files import TABLE_SUFFIXES, TEXT_SUFFIX, PromptTable, read_lines, read_table, table_prompts
from fastgrpo.prompts.hub import NOTATION, PREFIX, read_dataset
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.randomness import seed_for
from fastgrpo.types import POSITIVE

_COLUMNS = {
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance", "guidance_scale", "cfg", "cfg_scale"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
    "categories": ("categories", "category"),
}
_LARGEST_SIDE = 4096  # pixels: beyond it a cell is broken rather than an image large
# Words in the names of columns that would change the picture.
_DRAWING = {"seed", "guidance", "cfg", "width", "height", "size", "resolution", "negative", "steps", "sampler"}
_DRAWING |= {"scheduler", "eta", "strength", "lora", "skip"}


@dataclass(frozen=True)
class PromptRow:
    """A prompt and how its images are drawn.

    id: 16 hexadecimal digits of a hash over the rest; equal rows are told apart by -2, -3, ...
    seed: None where the source has none. guidance: 0 or more. width, height: pixels; 0 is the model's.
    """

    id: str
    text: str
    categories: tuple[str, ...]
    seed: int | None
    guidance: float
    width: int = 0
    height: int = 0


def read_rows(
    source: str, field: str, guidance: float, column: str = "prompt", say: Callable[[str], object] = lambda _: None
) -> list[PromptRow]:
    """The prompts of a .txt, .csv, .tsv or .jsonl file or of `hf:OWNER/NAME[:CONFIG][@SPLIT]`, by id.

    field: what messages call the setting. guidance: of rows that do not say. column: where the prompts are.
    say: told which columns say how the images are drawn, and which would but are not used.
    Raises ConfigError for a source that cannot be read, or a row with an impossible seed, guidance or size.
    """
    suffix = Path(source).suffix.lower()
    if suffix == TEXT_SUFFIX and not source.startswith(PREFIX):
        rows = [_row(prompt.text, (), None, guidance, 0, 0) for prompt in read_lines(Path(source), POSITIVE, field)]
        return _numbered(rows)
    if source.startswith(PREFIX):
        table = read_dataset(source, field, lambda columns: (column, *_found(columns).values()))
    elif suffix in TABLE_SUFFIXES:
        table = read_table(Path(source), field)
    else:
        accepted = f"{', '.join((TEXT_SUFFIX, *TABLE_SUFFIXES[:-1]))} or {TABLE_SUFFIXES[-1]}"
        raise ConfigError(f"{field} {source!r}: accepted is a file that ends in {accepted}, and {NOTATION}.")
    rows = _rows(table, column, guidance)
    if remark := column_remark(table.name, table.columns, column):
        say(remark)
    return _numbered(rows)


def image_requests(rows: Iterable[PromptRow], images: int, seed: int, size: int = 0) -> tuple[ImageRequest, ...]:
    """`images` of each row: ID-0 from the row's own seed, ID-1 ... from seeds derived from it.

    seed: what the seeds of rows without one are derived from. size: a side in pixels for all; 0 leaves it to the rows.
    """
    return tuple(
        ImageRequest(
            f"{row.id}-{k}", row.id, row.text, _seed(row, k, seed), row.guidance, size or row.width, size or row.height
        )
        for row in rows
        for k in range(images)
    )


def row_id(*parts: Any) -> str:
    """16 hexadecimal digits that depend on the parts alone."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def _seed(row: PromptRow, k: int, seed: int) -> int:
    if row.seed is None:
        return seed_for(seed, k, row.id)
    return row.seed if k == 0 else seed_for(row.seed, k, "another image of the same prompt")


def column_remark(name: str, columns: Sequence[str], column: str) -> str:
    """What to say of a table's columns besides the prompts' own `column`; empty where there is nothing."""
    found = _found(columns)
    brought = [what if what == own else f"{what} ({own})" for what, own in found.items()]
    others = [own for own in columns if own not in (column, *found.values())]
    unused = [own for own in others if _DRAWING & set(_plain(own).split("_"))]
    parts = [f"its rows bring their own {_listed(brought)}"] if brought else []
    if unused:
        s, are = ("s", "are") if len(unused) > 1 else ("", "is")
        parts.append(f"column{s} {_listed(unused)} {are} not used")
    return f"{name}: {'; '.join(parts)}" if parts else ""


def _found(columns: Sequence[str]) -> dict[str, str]:
    """Which of the columns has which of the things that rows bring along."""
    by_name = {_plain(column): column for column in reversed(columns)}
    names = {what: next((name for name in choices if name in by_name), None) for what, choices in _COLUMNS.items()}
    return {what: by_name[name] for what, name in names.items() if name}


def _plain(column: str) -> str:
    """`Guidance Scale` is as good as `guidance_scale`."""
    return re.sub(r"[\W_]+", "_", column.strip().lower())


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _rows(table: PromptTable, column: str, guidance: float) -> list[PromptRow]:
    found = _found(table.columns)
    for name in found.values():
        table.check_single(name, table.field)
    cells = {number: (place, values) for number, place, values in table.rows}
    rows = []
    for prompt in table_prompts(table, POSITIVE, column, found.get("categories", ""), f"{table.field} (its column)"):
        place, values = cells[prompt.id]
        where = f"{table.field}: {table.name!r} in {place}"
        seed, width, height = (
            _whole(values, found.get(what), where, low, high)
            for what, low, high in (("seed", 0, 2**63 - 1), ("width", 1, _LARGEST_SIDE), ("height", 1, _LARGEST_SIDE))
        )
        own = _number(values, found.get("guidance"), where, 0, math.inf, "a number")
        names = (" ".join(name.split()).lower() for name in prompt.category.split(","))
        categories = tuple(dict.fromkeys(filter(None, names)))
        rows.append(_row(prompt.text, categories, seed, guidance if own is None else own, width or 0, height or 0))
    return rows


def _row(
    text: str, categories: tuple[str, ...], seed: int | None, guidance: float, width: int, height: int
) -> PromptRow:
    values = text, categories, seed, float(guidance), width, height
    return PromptRow(row_id(*values), *values)


def _numbered(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows by id, of which those that are equal in everything get ids of their own."""
    seen: Counter[str] = Counter()
    numbered = []
    for row in rows:
        seen[row.id] += 1
        numbered.append(replace(row, id=f"{row.id}-{seen[row.id]}") if seen[row.id] > 1 else row)
    return sorted(numbered, key=lambda row: row.id)


def _whole(cells: Mapping[str, Any], column: str | None, where: str, low: int, high: int) -> int | None:
    """A cell as a whole number; None where there is no such column, or nothing in the cell."""
    number = _number(cells, column, where, low, high, "a whole number")
    return None if number is None else int(number)


def _number(
    cells: Mapping[str, Any], column: str | None, where: str, low: float, high: float, kind: str
) -> int | float | None:
    """A cell as a number; None where there is no such column, or nothing in the cell. kind: as messages say it."""
    value = cells.get(column) if column else None
    # Where some have no seed, pandas writes the others as 1234.0 and, in JSON, these as null or NaN.
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        return None
    number: int | float = math.nan
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value)
    # Seeds fill 63 bits, more than a float holds.
    with suppress(TypeError, ValueError):
        number = number if isinstance(value, float) else int(value)
    whole = kind == "a whole number"
    fits = low <= number <= high and math.isfinite(number) and not (whole and number != int(number))
    if not fits or isinstance(value, bool):
        up_to = f"to {high}" if math.isfinite(high) else "on"
        raise ConfigError(f"{where} has {column} = {str(value)[:60]!r}; {kind} from {low:g} {up_to} is accepted.")
    return number
