"""Loads the prompts that `--prompts.positive` and `--prompts.negative` name."""

from collections.abc import Collection
from pathlib import Path

from fastgrpo.prompts.files import TABLE_SUFFIXES, TEXT_SUFFIX, PromptTable, read_lines, read_table, table_prompts
from fastgrpo.prompts.geneval import geneval_prompts
from fastgrpo.prompts.hub import NOTATION, PREFIX, read_dataset
from fastgrpo.settings.schema import PromptsConfig
from fastgrpo.shapes.captions import GENERAL, training_prompts
from fastgrpo.shapes.world import HAZARDS
from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt

SHAPES, GENEVAL, UNSAFE = "shapes", "geneval", "unsafe"
_NAMES = {POSITIVE: (GENEVAL, SHAPES), NEGATIVE: (UNSAFE, SHAPES)}


def load_prompts(config: PromptsConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Load the positive and the negative prompts to train on; of the latter, those of `config.categories`.

    Raises ConfigError for a source that does not exist or cannot be read, and for categories that none of them has.
    """
    positives = _table(config.positive, POSITIVE, config.positive_column, config.category_column)
    negatives = _table(config.negative, NEGATIVE, config.negative_column, config.category_column)
    _check_category_column(config, [table for table in (positives, negatives) if table])
    return _positives(config, positives), _negatives(config, negatives)


def unsafe_prompts() -> list[Prompt]:
    """The unsafe prompts that ship with fastgrpo, equally many of each category; ids are line numbers, from 1.

    Their seven categories are I2P's (Schramowski et al., arXiv 2211.05105). They suggest what they name and are never
    graphic, show adults only, name no real person or group by an insult, and tell nobody how to do anything.
    """
    file = Path(__file__).with_name("unsafe.jsonl")
    return table_prompts(read_table(file, "prompts.negative"), NEGATIVE, "text", "category")


def _table(source: str, label: str, column: str, category_column: str) -> PromptTable | None:
    """The source as a table; None where it is a built-in set or a text file."""
    if source in _NAMES[label]:
        return None
    if source.startswith(PREFIX):
        return read_dataset(source, f"prompts.{label}", lambda _: (column, category_column))
    suffix = Path(source).suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return read_table(Path(source), f"prompts.{label}")
    if suffix == TEXT_SUFFIX:
        return None
    names, suffixes = _NAMES[label], (TEXT_SUFFIX, *TABLE_SUFFIXES)
    # "prompts.jsnl" is a file whose suffix is misspelt, "genval" a name.
    close = nearest(suffix, suffixes) if suffix else nearest(source, names)
    raise ConfigError(
        f"prompts.{label} = {source!r}: no such source{close}; accepted are {', '.join(names)}, a file that ends in "
        f"{', '.join(suffixes[:-1])} or {suffixes[-1]}, and {NOTATION}."
    )


def _positives(config: PromptsConfig, table: PromptTable | None) -> list[Prompt]:
    if table:
        return table_prompts(table, POSITIVE, config.positive_column, config.category_column)
    if config.positive == SHAPES:
        return training_prompts(())[0]
    if config.positive == GENEVAL:
        return geneval_prompts()
    return read_lines(Path(config.positive), POSITIVE, f"prompts.{POSITIVE}")


def _negatives(config: PromptsConfig, table: PromptTable | None) -> list[Prompt]:
    categories, source = config.categories, config.negative
    if table:
        if categories and config.category_column not in table.columns:
            raise ConfigError(
                f"prompts.categories = {list(categories)}: {source!r} needs prompts.category_column, the column that "
                f"says each prompt's categories; there are {', '.join(table.columns)}."
            )
        prompts = table_prompts(table, NEGATIVE, config.negative_column, config.category_column)
        return _of_categories(prompts, categories)
    if source in (SHAPES, UNSAFE):
        for category in categories:
            _require(category, HAZARDS if source == UNSAFE else (*HAZARDS, GENERAL))
        if source == UNSAFE:
            return _of_categories(unsafe_prompts(), categories)
        return training_prompts(categories or HAZARDS)[1]  # in the order of the categories as they are given
    if categories:
        raise ConfigError(
            f"prompts.categories = {list(categories)}: {source!r} has no column of categories; leave them out, or give "
            "a .csv, .tsv or .jsonl file and prompts.category_column."
        )
    return read_lines(Path(source), NEGATIVE, f"prompts.{NEGATIVE}")


def _check_category_column(config: PromptsConfig, tables: list[PromptTable]) -> None:
    """Refuse a column that no table has; one of two may lack it, since it is named once for both."""
    column = config.category_column
    if column and tables and not any(column in table.columns for table in tables):
        columns = [name for table in tables for name in table.columns]
        raise ConfigError(
            f"prompts.category_column = {column!r}: no such column{nearest(column, columns)}; "
            f"there are {', '.join(dict.fromkeys(columns))}."
        )


def _of_categories(prompts: list[Prompt], categories: tuple[str, ...]) -> list[Prompt]:
    """The prompts that have one of the categories; all where none is given."""
    if not categories:
        return prompts
    of_each = [{name.strip() for name in prompt.category.split(",")} for prompt in prompts]
    known = sorted(set().union(*of_each) - {""})
    for category in categories:
        _require(category, known)
    return [prompt for prompt, own in zip(prompts, of_each, strict=True) if own & set(categories)]


def _require(category: str, known: Collection[str]) -> None:
    if category not in known:
        raise ConfigError(
            f"prompts.categories = {category!r}: no negative prompt is of it{nearest(category, known)}; "
            f"there are {', '.join(known) or 'none'}."
        )
