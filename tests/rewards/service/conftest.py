"""Servers that end with the test, and a client that does not wait for long."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fastgrpo.rewards.service import client
from support.reward_service import TOKEN, Fake


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    """Starts servers, which end with the test."""
    with ExitStack() as running:
        yield lambda *faults, **settings: running.enter_context(Fake(list(faults), **settings).running())
