"""What a user can mend, in one sentence."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A value that cannot be used. The message names the field, the value and what would be accepted."""


def nearest(name: str, names: Iterable[str]) -> str:
    """For a ConfigError's message: " (did you mean ...?)" where one of `names` is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
