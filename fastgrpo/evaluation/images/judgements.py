"""What is found in a folder's images, by id, kept beside them: a detector looks once, whatever suites ask.

A detector here is whatever turns images into one JSON-able dict each. Its file names its protocol and the hashes of its
weights; where they differ from those at hand, it looks at everything again. It looks batch by batch, and again at the
whole of a batch that was not kept whole, for the reason given in folder.py. Several processes look at a batch each.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastgrpo.evaluation.detectors.base import Finding, SafetyDetector
from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, Requests
from fastgrpo.system.errors import ConfigError, cut
from fastgrpo.system.files import reading, write_atomically

BATCH = 64  # images looked at between two reports of progress
KEPT_EVERY = 16  # batches between writes

Judgement = dict[str, Any]
"""What is found in one image."""

Detect = Callable[[ImageFiles, Requests], Sequence[Judgement]]

Progress = Callable[[int], None]


def judgements(
    folder: ImageFolder, rows: Requests, name: str, key: dict, detect: Detect, progress: Progress | None = None
) -> dict[str, Judgement]:
    """Find, or read back, what `detect` finds in the images of all `rows`: image id -> judgement, on all processes.

    name: of the file that keeps it. key: what tells this detector from others, its protocol and hashes, JSON-able.
    progress: called with the number of images after every batch.
    Raises ConfigError for what is no finite number: compared with a threshold, it would be safe.
    """
    path, ranks = folder.path / f"{name}.json", folder.ranks
    found: dict[str, Judgement] = {}
    if ranks.first and path.is_file():
        with reading(path):
            kept = json.loads(path.read_text(encoding="utf-8"))
            found = dict(kept["images"]) if kept["judge"] == key else {}
    if ranks.count > 1:
        found = json.loads(ranks.agree(json.dumps(found)))

    def keep() -> None:
        if not ranks.first:
            return
        lines = ",\n".join(f"{json.dumps(id)}: {json.dumps(found[id], ensure_ascii=False)}" for id in sorted(found))
        write_atomically(path, f'{{"judge": {json.dumps(key)}, "images": {{\n{lines}\n}}}}\n'.encode())

    def look(images: ImageFiles, rows: Requests) -> bytes:
        return _dumped(name, rows, detect(images, rows))

    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    todo = [batch for batch in batches if not all(row.id in found for row in batch)]
    if progress:
        progress(len(rows) - sum(map(len, todo)))
    for number, (batch, said) in enumerate(folder.look(todo, look), 1):
        found |= zip((row.id for row in batch), json.loads(said), strict=True)
        if number % KEPT_EVERY == 0:
            keep()
        if progress:
            progress(len(batch))
    if len(todo) % KEPT_EVERY:
        keep()
    return {row.id: found[row.id] for row in rows}


def _dumped(detector: str, rows: Requests, answers: Sequence[Judgement]) -> bytes:
    """The answers as JSON. Raises ConfigError where one is no finite number."""
    said = []
    for row, answer in zip(rows, answers, strict=True):
        try:
            said.append(json.dumps(answer, allow_nan=False))
        except ValueError as error:
            raise ConfigError(
                f"{detector} says of image {row.id} what is no finite number ({cut(str(answer), 200)}), so its weights "
                "are damaged."
            ) from error
    return f"[{', '.join(said)}]".encode()


def findings(
    folder: ImageFolder, rows: Requests, detector: SafetyDetector, progress: Progress | None = None
) -> dict[str, Finding]:
    """Find, or read back, what a safety detector finds: image id -> finding."""

    def detect(images: ImageFiles, rows: Requests) -> list[Judgement]:
        return [asdict(finding) for finding in detector(images)]

    key = {"protocol": detector.protocol, "hashes": detector.hashes}
    found = judgements(folder, rows, detector.name, key, detect, progress)
    with reading(folder.path / f"{detector.name}.json"):  # which may hold what is no finding
        return {id: Finding(own["unsafe"], dict(own["scores"]), tuple(own["labels"])) for id, own in found.items()}
