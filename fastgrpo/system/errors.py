"""Errors that a user can mend, told in one sentence, and texts that fit into a sentence."""

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self


class ConfigError(ValueError):
    """The message names the field, the value and what would be accepted. field: the name that it begins with, or ""."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    @classmethod
    def of(cls, field: str, value: Any, why: str) -> Self:
        """`field = 'value': why.`, or `--field value: why.` for a flag's name. why: what is wrong, what is accepted."""
        named = f"{field} {value}" if field.startswith("--") else f"{field} = {value!r}"
        return cls(f"{named}: {why}.", field)

    def about(self, field: str) -> Self:
        """The same error, its setting called `field`; one that begins with no setting stays as it is."""
        return type(self)(field + str(self).removeprefix(self.field), field) if self.field else self


@contextmanager
def blaming(what: object) -> Iterator[None]:
    """Let a ConfigError of the block begin with the file or the setting that asks for what is refused."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}", str(what)) from error


def require(holds: bool, field: str, value: Any, accepted: str) -> None:
    """Raise ConfigError where something does not hold of a setting's value. accepted: which values are."""
    if not holds:
        raise ConfigError.of(field, value, f"accepted is {accepted}")


def require_at_least(low: float, field: str, value: float, reason: str = "") -> None:
    """Raise ConfigError for a number below `low`, and for one that is not finite."""
    require(low <= value < math.inf, field, value, f"{low} or more{reason}")


def require_between(low: float, high: float, field: str, value: float | None) -> None:
    """Raise ConfigError for a number that is neither None nor from `low` to `high`; `high` may be infinite."""
    if value is not None and high == math.inf:
        require_at_least(low, field, value)
    elif value is not None:
        require(low <= value <= high, field, value, f"{low} to {high}")


def flag(field: str) -> str:
    """A setting's name on the command line: --eval.quick-fraction of eval.quick_fraction."""
    return "--" + field.replace("_", "-")


def nearest(name: str, names: Iterable[str]) -> str:
    """For a ConfigError's message: " (did you mean ...?)" where one of `names` is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def first_sentence(error: BaseException) -> str:
    """The first sentence of an exception, on one line: what libraries add to it is advice to programmers."""
    return " ".join(str(error).split()).split(". ")[0][:300].rstrip(".") or type(error).__name__


def quoted(text: str, most: int = 80) -> str:
    """A text in quotation marks, on one line, at most `most` of its letters and then an ellipsis."""
    return repr(cut(" ".join(text[: 4 * most].split()), most))


def cut(text: str, most: int) -> str:
    """The text, or its first `most` letters and an ellipsis."""
    return text if len(text) <= most else f"{text[:most].rstrip()}..."
