"""Prompts in a data set of the Hugging Face hub, read by the library `datasets`, an optional dependency.

A source is `hf:OWNER/NAME[:CONFIG][@SPLIT]`. The library keeps what it downloads in its own cache, so that a data set
once loaded needs no network. It runs no code of a data set's.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from fastgrpo.prompts.files import PromptTable, named
from fastgrpo.system.errors import ConfigError

PREFIX = "hf:"
NOTATION = "hf:OWNER/NAME[:CONFIG][@SPLIT]"

_SOURCE = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
_LONGEST = 400  # characters of the library's own message: those that name what there is


def read_dataset(source: str, field: str, wanted: Callable[[tuple[str, ...]], Iterable[str]]) -> PromptTable:
    """Read one split of a data set; ids are row numbers, from 1.

    source: as above; without CONFIG the only or default one, without SPLIT `train`; a slice is `train[:100]`. A folder
        OWNER/NAME below the working directory is read instead of the hub. field: the setting that names it.
    wanted: from the columns that there are to the ones to read, or more; others, such as images, are not even decoded.
    Raises ConfigError for another notation, without the library, and for what it cannot load.
    """
    if (match := _SOURCE.fullmatch(source)) is None:
        raise ConfigError(f"{field} = {source!r}: accepted is {NOTATION}.")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{field} = {source!r}: this needs the library datasets: "
            'pip install "fastgrpo[datasets]", or export the prompts to a file.'
        ) from error
    try:
        data = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the library's own, the hub's, the network's: whichever, the data set is not there
        reason = " ".join(str(error).split()).rstrip(".")[:_LONGEST] or type(error).__name__
        raise ConfigError(f"{field} = {source!r}: cannot be loaded: {reason}.") from error
    columns = named(data.column_names)
    read = set(wanted(columns))
    data = data.select_columns([column for column in columns if column in read])
    rows = ({column: _with_names(value, data.features[column]) for column, value in cells.items()} for cells in data)
    return PromptTable(
        field, source, columns, tuple((number, f"row {number}", row) for number, row in enumerate(rows, start=1))
    )


def _with_names(value: Any, feature: Any) -> Any:
    """A cell with the names of classes, for which the library gives numbers."""
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_with_names(each, feature.feature) for each in value]
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None  # -1 is what the library writes for none
    return value
