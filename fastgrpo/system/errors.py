"""What a user can mend, in one sentence."""

import difflib
from collections.abc import Iterable
from typing import Any, Self


class ConfigError(ValueError):
    """A value that cannot be used. The message names the field, the value and what would be accepted.

    field: the setting's name, where the message begins with it.
    """

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
