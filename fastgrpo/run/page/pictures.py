"""Pictures of the same prompts and seeds over iterations: one line a prompt, and a slider from before training on.

The grids of samples/ are cut into the rows of their prompts, and embedded as WebP: as large as there is room for on a
page that is quick to open.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from fastgrpo.run.page.charts import sample
from fastgrpo.run.page.reported import Pictured, ReportedRun
from fastgrpo.system.sheets import rows_of

PIL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
MOST_STOPS = 60  # of the slider
_ROOM = 2_400_000  # bytes of all pictures of the section, in base64
_SIZES = ((256, 85), (192, 82), (128, 80), (96, 75), (64, 70), (48, 60))
"""What is tried: the height of a row in pixels, and WebP's quality."""

Key = tuple[str, int]  # a prompt's text, and how often it came before
Strips = Mapping[int, str]  # iteration -> an <img>'s attributes
Encoded = tuple[tuple[str, int, int], ...]  # of a grid's rows: data URI, width, height


@dataclass(frozen=True)
class Grid:
    """A file of samples/. iteration: 0 is before training."""

    iteration: int
    path: Path


def pictures(runs: Sequence[ReportedRun]) -> str:
    """The section's content, or nothing where no run has pictures."""
    shown = [(run, found) for run in runs if (found := grids(run))]
    if not shown:
        return ""
    stops = sorted({grid.iteration for _, found in shown for grid in found})
    budget = _ROOM // sum(len(found) for _, found in shown)
    rows: dict[Key, Pictured] = {}
    strips: dict[tuple[int, Key], Strips] = {}
    for column, (run, found) in enumerate(shown):
        for key, pictured, of in _strips(run, found, budget):
            rows.setdefault(key, pictured)
            strips[column, key] = of
    if not rows:
        return '<p class="note">The picture files of this run cannot be read.</p>'
    single = len(runs) == 1
    numbers = [runs.index(run) + 1 for run, _ in shown]
    lines = []
    for key, pictured in rows.items():
        own = [(numbers[c], shown[c][0].name, strips[c, key]) for c in range(len(shown)) if (c, key) in strips]
        columns = _before_and_now(pictured, own[0][2]) if single else _of_runs(pictured, own)
        lines.append(_line(pictured, columns, single))
    names = [_name(stop, shown[0][0] if single else None) for stop in stops]
    slider = _slider(names, stops, single) if len(stops) > 1 else ""
    return f'<div class="pictures">{slider}{"".join(lines)}</div>'


def grids(run: ReportedRun) -> list[Grid]:
    """A run's grids in order, thinned out evenly where there are many."""
    found = {}
    for path in (run.folder / "samples").glob("*.png"):
        if path.stem == "before":
            found[0] = path
        elif numbered := re.fullmatch(r"iter-(\d+)", path.stem):
            found[int(numbered[1])] = path
    after = run.folder / "samples" / "after.png"
    if after.is_file():
        found[max(run.config.iterations, run.done, *found, 1)] = after
    every = [Grid(iteration, found[iteration]) for iteration in sorted(found)]
    if len(every) <= MOST_STOPS:
        return every
    return [every[round(i * (len(every) - 1) / (MOST_STOPS - 1))] for i in range(MOST_STOPS)]


def embedded(picture: Image.Image, height: int, quality: int) -> tuple[str, int, int]:
    """A picture of at most this height as a data URI, with its width and height."""
    if picture.height > height:
        size = max(1, round(picture.width * height / picture.height)), height
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", *picture.size


def _strips(run: ReportedRun, found: Sequence[Grid], budget: int) -> list[tuple[Key, Pictured, Strips]]:
    """Of every row of the grids: its pictures. budget: bytes for each grid, kept on average."""
    rows = run.pictured
    for height, quality in _SIZES:
        ends = [_encoded(*_stamped(grid.path), len(rows), height, quality) for grid in (found[0], found[-1])]
        if max(sum(len(uri) for uri, _, _ in strips) for strips in ends) <= budget:
            break
    encoded = {grid.iteration: _encoded(*_stamped(grid.path), len(rows), height, quality) for grid in found}
    whole = len(rows) == 0 or not all(len(strips) in (0, len(rows)) for strips in encoded.values())
    if whole:  # runs from before prompts.json was written, or other pictures
        rows = (Pictured("", "", False),)
        encoded = {grid.iteration: _encoded(*_stamped(grid.path), 0, 12 * height, quality) for grid in found}
    keys: list[Key] = []
    for row in rows:
        keys.append((row.text, sum(text == row.text for text, _ in keys)))
    result: list[tuple[Key, Pictured, Strips]] = []
    for number, (key, pictured) in enumerate(zip(keys, rows, strict=True)):
        of = {i: _attributes(strips[number], pictured, i, run) for i, strips in encoded.items() if strips}
        if of:
            result.append((key, pictured, of))
    return result


def _stamped(path: Path) -> tuple[Path, int]:
    """The path with when the file was written, so that what is remembered of it is not of an older one."""
    try:
        return path, path.stat().st_mtime_ns
    except OSError:
        return path, 0


@lru_cache(maxsize=1024)
def _encoded(path: Path, written: int, rows: int, height: int, quality: int) -> Encoded:
    """The rows of a grid, or all of it as one where it has no such rows; nothing where it cannot be read."""
    try:
        with Image.open(path) as opened:
            sheet = opened.convert("RGB")
    except PIL_ERRORS:
        return ()
    return tuple(embedded(row, height, quality) for row in rows_of(sheet, rows) or [sheet])


def _attributes(strip: tuple[str, int, int], pictured: Pictured, iteration: int, run: ReportedRun) -> str:
    uri, width, height = strip
    of = f"{pictured.text}, " if pictured.text else "Pictures "
    alt = escape(f"{of}drawn {_name(iteration, run)}")
    return f'alt="{alt}" src="{uri}" width="{width}" height="{height}" decoding="async"'


def _name(iteration: int, run: ReportedRun | None) -> str:
    """When pictures were drawn. run: whose; None for several."""
    if not iteration:
        return "before training"
    return "after training" if run and iteration >= run.config.iterations else f"after iteration {iteration}"


def _before_and_now(pictured: Pictured, of: Strips) -> str:
    """The first pictures, which stay, beside those that the slider moves."""
    first, *later = of
    if not later:
        return _figure(of, "")
    return _figure({first: of[first]}, "") + _figure(of, "")


def _of_runs(pictured: Pictured, own: Sequence[tuple[int, str, Strips]]) -> str:
    return "".join(_figure(of, f"{sample(number, 'r')}{escape(name)}") for number, name, of in own)


def _figure(of: Strips, caption: str) -> str:
    """One place for pictures, the last of which shows until the slider moves."""
    last = max(of)
    images = "".join(f'<img {of[i]} data-at="{i}"{"" if i == last else " hidden"}>' for i in sorted(of))
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="strip">{images}{below}</figure>'


def _line(pictured: Pictured, columns: str, single: bool) -> str:
    small = f" <small>{escape(pictured.category)}</small>" if pictured.category else ""
    said = f'<p class="said">{escape(pictured.text)}{small}</p>' if pictured.text else ""
    kind = "strips" if single else "strips several"
    return f'<div class="prompt{" unsafe" if pictured.hazard else ""}">{said}<div class="{kind}">{columns}</div></div>'


def _slider(names: Sequence[str], stops: Sequence[int], single: bool) -> str:
    """Moves through the stops. Without JavaScript it is not there, and the last pictures are."""
    iterations = " ".join(map(str, stops))
    heads = f'<div class="heads"><span>{escape(names[0])}</span><span class="now">{escape(names[-1])}</span></div>'
    return (
        f'<div class="bar"><div class="control scripted"><label for="stop">Drawn</label>'
        f'<input type="range" id="stop" min="0" max="{len(stops) - 1}" value="{len(stops) - 1}" '
        f'data-stops="{iterations}" data-names="{escape("|".join(names))}" aria-valuetext="{escape(names[-1])}">'
        f'<output for="stop" aria-live="off">{escape(names[-1])}</output></div>{heads if single else ""}</div>'
    )
