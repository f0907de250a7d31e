"""What the sinks' libraries change in a process is undone, or later tests would meet it."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def exits() -> Iterator[None]:
    """wandb puts functions of its own in the place of these."""
    before = sys.exit, sys.excepthook
    yield
    sys.exit, sys.excepthook = before
