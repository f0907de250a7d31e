"""What a judge says of a folder's images, by id, kept beside them: images are judged once, whatever suites ask.

A judge is whatever turns pictures into one JSON-able dict each. Its file names the judge's protocol and the hashes of its
weights; where they differ from the judge at hand, everything is judged again. Judging goes batch by batch, and a batch
that was not kept whole is judged again as a whole, for the reason given in images.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastgrpo.evaluation.detectors.base import Finding, SafetyDetector
from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading, write_atomically
from fastgrpo.system.wording import cut

BATCH = 64  # images judged at once
KEPT_EVERY = 16  # batches between writes

Judgement = dict[str, Any]
"""What a judge says of one image."""

Detect = Callable[[ImageFiles, Sequence[ImageRequest]], Sequence[Judgement]]

Progress = Callable[[int], None]


def judgements(
    folder: ImageFolder,
    rows: Sequence[ImageRequest],
    name: str,
    key: dict[str, Any],
    detect: Detect,
    progress: Progress | None = None,
) -> dict[str, Judgement]:
    """Image id -> what the judge says, for all `rows`.

    name: of the file that keeps it. key: what tells this judge from others, its protocol and hashes, JSON-able.
    progress: called with the number of images after every batch.
    Raises ConfigError for a judge that says what is no finite number: compared with a threshold, it would be safe.
    """
    path = folder.path / f"{name}.json"
    said: dict[str, Judgement] = {}
    if path.is_file():
        with reading(path):
            kept = json.loads(path.read_text(encoding="utf-8"))
            said = dict(kept["images"]) if kept["judge"] == key else {}

    def keep() -> None:
        ordered = {id: said[id] for id in sorted(said)}
        lines = ",\n".join(f"{json.dumps(id)}: {json.dumps(what, ensure_ascii=False)}" for id, what in ordered.items())
        write_atomically(path, f'{{"judge": {json.dumps(key)}, "images": {{\n{lines}\n}}}}\n'.encode())

    unkept = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        if not all(row.id in said for row in batch):
            answers = detect(folder.images(batch), batch)
            _check(name, batch, answers)
            said |= {row.id: answer for row, answer in zip(batch, answers, strict=True)}
            unkept += 1
            if unkept % KEPT_EVERY == 0:
                keep()
        if progress:
            progress(len(batch))
    if unkept % KEPT_EVERY:
        keep()
    return {row.id: said[row.id] for row in rows}


def _check(judge: str, rows: Sequence[ImageRequest], answers: Sequence[Judgement]) -> None:
    for row, answer in zip(rows, answers, strict=True):
        try:
            json.dumps(answer, allow_nan=False)
        except ValueError as error:
            raise ConfigError(
                f"{judge} says of image {row.id} what is no finite number ({cut(str(answer), 200)}), so its weights are damaged."
            ) from error


def findings(
    folder: ImageFolder, rows: Sequence[ImageRequest], detector: SafetyDetector, progress: Progress | None = None
) -> dict[str, Finding]:
    """Image id -> the detector's finding."""
    key = {"protocol": detector.protocol, "hashes": detector.hashes}

    def detect(images: ImageFiles, rows: Sequence[ImageRequest]) -> list[Judgement]:
        return [asdict(finding) for finding in detector(images)]

    said = judgements(folder, rows, detector.name, key, detect, progress)
    with reading(folder.path / f"{detector.name}.json"):
        return {id: Finding(what["unsafe"], dict(what["scores"]), tuple(what["labels"])) for id, what in said.items()}
