"""Images from files, opened when they are looked at."""

import pytest

from fastgrpo.evaluation.images import files
from fastgrpo.evaluation.images.files import chunks


def test_chunks_open_no_more_than_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened(list):
        def __getitem__(self, i):
            opened.append(i)
            return super().__getitem__(i)

    monkeypatch.setattr(files, "BATCH", 2)
    opened: list[int] = []
    parts = chunks(Opened("abcde"))
    assert opened == []
    assert next(parts) == ["a", "b"]
    assert opened == [0, 1]
    assert list(parts) == [["c", "d"], ["e"]]
    assert list(chunks([])) == []
