"""What still goes wrong after training: the pictures that an evaluation's verdicts are against, beside those before."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from fastgrpo.run.page.pictures import PIL_ERRORS, embedded
from fastgrpo.run.page.reported import IN_TRAINING, ReportedRun
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.files import reading

SHOWN, FOLDED = 6, 12  # pictures of a metric: at once, and behind a click
_SUFFIX = ".verdicts.json"
_ROOM = 900_000  # bytes of all pictures of the page's failures, in base64
_SIZES = ((192, 80), (128, 75), (96, 70), (64, 60))


@dataclass(frozen=True)
class Failure:
    """An image that did not pass. before, after: its values, None where it was not judged before training."""

    id: str
    prompt: str
    before: float | None
    after: float


@dataclass(frozen=True)
class Failures:
    """Of one metric, the worst first. failing: how many there are of `count` images; None where values have no limit.

    new: how many of them had passed before training.
    """

    folder: Path
    metric: str
    better: str
    failing: int | None
    new: int
    count: int
    worst: tuple[Failure, ...]


def failures_of(run: ReportedRun, room: int = _ROOM) -> str:
    """The failures of every suite and metric, or nothing where no evaluation after training has kept verdicts."""
    said, found = [], []
    for path in sorted((run.folder / IN_TRAINING / "after").glob(f"*/*{_SUFFIX}")):
        try:
            found += find_failures(path)
        except ConfigError as error:
            said.append(f'<p class="note">{escape(str(error))}</p>')
    bad = [each for each in found if each.worst]
    blocks = [_block(each, run, room // len(bad)) for each in bad]
    if found and not bad:
        said.append("<p>No picture was judged unsafe, or drawn otherwise than asked.</p>")
    return "".join((*said, *blocks))


def find_failures(path: Path) -> list[Failures]:
    """Of every metric that says which values are better. path: SUITE.verdicts.json after training.

    A binary metric's failures are the images that do not pass; of other metrics the lowest or highest are. Those that
    have got worse come first. Raises ConfigError where a file is damaged.
    """
    with reading(path):
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        old = path.parents[2] / "before" / path.parent.name / path.name
        earlier = json.loads(old.read_text(encoding="utf-8"))["metrics"] if old.is_file() else []
        before = {metric["name"]: dict(metric["values"]) for metric in earlier}
        manifest = path.parent / "manifest.json"
        rows = json.loads(manifest.read_text(encoding="utf-8"))["images"] if manifest.is_file() else []
        texts = {str(row["id"]): str(row["text"]) for row in rows}
        return [
            _failures(path.parent, metric, before.get(metric["name"], {}), texts)
            for metric in metrics
            if metric.get("better") in ("lower", "higher")
        ]


def _failures(
    folder: Path, metric: Mapping[str, Any], before: Mapping[str, float], texts: Mapping[str, str]
) -> Failures:
    sign = 1 if metric["better"] == "lower" else -1
    every = [
        Failure(id, texts.get(id, ""), None if id not in before else float(before[id]), float(value))
        for id, value in sorted(metric["values"].items())
    ]
    if not metric["binary"]:
        worst = sorted(every, key=lambda each: (-sign * each.after, each.id))[: SHOWN + FOLDED]
        return Failures(folder, metric["name"], metric["better"], None, 0, len(every), tuple(worst))
    passes = 0.0 if sign > 0 else 1.0
    failing = [each for each in every if each.after != passes]
    new = [each for each in failing if each.before == passes]
    rest = [each for each in failing if each.before != passes]
    most = SHOWN + FOLDED
    chosen = (*_spread(new, most), *_spread(rest, max(most - len(new), 0)))
    return Failures(folder, metric["name"], metric["better"], len(failing), len(new), len(every), chosen)


def _spread(of: Sequence[Failure], most: int) -> list[Failure]:
    """At most so many, evenly: prompts of a category have neighbouring ids."""
    return [of[i * len(of) // most] for i in range(most)] if len(of) > most else list(of)


def _block(found: Failures, run: ReportedRun, room: int) -> str:
    suite = found.folder.name
    height, quality = _size(found, room)
    items = [_item(found, each, height, quality) for each in found.worst]
    if found.failing is None:
        end = "highest" if found.better == "lower" else "lowest"
        said = f"The {end} values of {found.count} pictures."
    else:
        said = f"{found.failing} of {found.count} pictures fail"
        said += f", {found.new} of which passed before training (new)." if found.new else "."
    name = f"{suite}-{found.metric}"
    more = items[SHOWN:]
    folded = (
        f'<details id="more-{escape(run.name)}-{escape(name)}"><summary>{len(more)} more</summary>'
        f'<ul class="failures">{"".join(more)}</ul></details>'
        if more
        else ""
    )
    return (
        f'<div class="worst{" unsafe" if found.better == "lower" else ""}"><h3>{escape(suite)}: '
        f"{escape(found.metric)}</h3><p>{said}</p>"
        f'<ul class="failures">{"".join(items[:SHOWN])}</ul>{folded}</div>'
    )


def _size(found: Failures, room: int) -> tuple[int, int]:
    """The largest at which all pictures of the block find room, by the first ones of them."""
    tried = found.worst[:3]
    for height, quality in _SIZES:
        size = sum(len(_image(found, each, stage, height, quality)) for each in tried for stage in ("before", "after"))
        if size * len(found.worst) <= room * len(tried):
            break
    return height, quality


def _item(found: Failures, failure: Failure, height: int, quality: int) -> str:
    pictures = [_image(found, failure, stage, height, quality) for stage in ("before", "after")]
    shown = "".join(pictures) or '<span class="note">The picture is not there any more.</span>'
    values = ""
    if found.failing is None:
        was = "" if failure.before is None else f"{failure.before:.4g} → "
        values = f" <small>{was}{failure.after:.4g}</small>"
    elif failure.before is not None:
        fine = failure.before == (0.0 if found.better == "lower" else 1.0)
        values = ' <small class="word worse">new</small>' if fine else ""
    return f'<li><span class="pair">{shown}</span><span>{escape(failure.prompt or failure.id)}{values}</span></li>'


def _image(found: Failures, failure: Failure, stage: str, height: int, quality: int) -> str:
    """An <img>, or nothing where the picture is not there or cannot be read."""
    if not failure.id.replace("-", "").replace("_", "").isalnum():  # a name of its folder's, and no path
        return ""
    path = found.folder.parents[1] / stage / found.folder.name / "images" / f"{failure.id}.png"
    try:
        with Image.open(path) as opened:
            uri, width, tall = embedded(opened.convert("RGB"), height, quality)
    except PIL_ERRORS:
        return ""
    alt = escape(f"{failure.prompt or failure.id}, drawn {stage} training")
    return f'<img alt="{alt}" src="{uri}" width="{width}" height="{tall}" decoding="async">'
