"""Keeping secrets out of what is logged: values of the environment that are one, and passwords within addresses."""

import os
import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
_SHORTEST = 8  # of a value that is looked for: a shorter one would be found in words that are no secret
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # USER:PASSWORD or TOKEN
_IN_QUERY = re.compile(r"(?<=[?&])((?:[\w-]*(?:token|key|secret|password|signature))=)[^&#\s]+", re.IGNORECASE)
HIDDEN = "***"


def hidden(text: str) -> str:
    """The text with *** for each secret in it."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name):
            text = text.replace(value, HIDDEN)
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_ADDRESS.sub(HIDDEN, text))


def without_secrets(value: Any) -> Any:
    """A config as JSON has it, tuples as lists, each text in it `hidden`."""
    if isinstance(value, Mapping):
        return {name: without_secrets(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return hidden(value) if isinstance(value, str) else value
