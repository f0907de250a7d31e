"""Images from files, opened when they are looked at."""

from fastgrpo.evaluation.images.files import chunks


def test_chunks_open_no_more_than_they_hold() -> None:
    class Opened(list):
        def __getitem__(self, i):
            opened.append(i)
            return super().__getitem__(i)

    opened: list[slice] = []
    parts = chunks(Opened("abcde"), 2)
    assert opened == []
    assert list(next(parts)) == ["a", "b"]
    assert opened == [slice(0, 2)]
    assert [list(part) for part in parts] == [["c", "d"], ["e"]]
    assert list(chunks([], 2)) == []
