"""The rows of CSV and TSV files, as lists of cells."""

import csv
import io
import re
from collections.abc import Iterator

# The inside of the quotation marks, or else the whole cell. Possessive: a mark without its partner is given up at once.
_CELL = re.compile(r'"((?:[^"]++|"")*+)"(?=[\t\n]|\Z)|([^\t\n]*+)')


class BrokenTable(ValueError):
    """Cells that cannot be told apart. The message is what follows the file's name in a sentence."""


def csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of every row; a cell with commas, quotation marks or line ends in it is quoted.

    Raises BrokenTable for quotation marks that do not fit.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise BrokenTable(f"cannot be read at line {reader.line_num}: {error}") from error


def tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of every row.

    Two customs are in use. Spreadsheets put a cell with tabs, quotation marks or line ends in it between marks, and
    double those within. Others know no quoting, and a cell such as `"Go" on a wall` just begins with one. So a cell is
    quoted where it begins with a mark and the next single one ends it, unless the row's width would not be the first's.
    """
    start, line, width = 0, 1, 0
    while start < len(text):
        cells, end = _row(text, start, len(text))
        if width and len(cells) != width and "\n" in text[start:end]:
            # A mark without its partner has taken another cell's: is the line a whole row by itself?
            alone, stop = _row(text, start, text.index("\n", start))
            if len(alone) == width:
                cells, end = alone, stop
        width = width or len(cells)
        line += text.count("\n", start, end)
        yield line, cells
        start, line = end + 1, line + 1


def _row(text: str, start: int, stop: int) -> tuple[list[str], int]:
    """The cells from `start` on to the end of their row, before `stop`, and where that is."""
    cells = []
    while True:
        match = _CELL.match(text, start, stop)
        assert match is not None  # a cell may be empty
        quoted, plain = match.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"'))
        start = match.end() + 1
        if text[match.end() : start] != "\t":
            return cells, match.end()
