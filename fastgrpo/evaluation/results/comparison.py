"""Two models on the same prompts and seeds: is the difference more than chance, and which pictures changed most?

Values that are 0 or 1, of one image a prompt, are compared by McNemar's exact test. Images of one prompt are no
independent pairs: where a prompt has several, and for scores, the test is a bootstrap over prompts (paired_tests.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgrpo.evaluation.images.files import read_image
from fastgrpo.evaluation.images.folder import read_manifest
from fastgrpo.evaluation.results.image_scores import SUFFIX, read_verdicts
from fastgrpo.evaluation.results.tables import PROMPT_WIDTH, one_line
from fastgrpo.evaluation.sentences import Entry, verdict_of
from fastgrpo.evaluation.statistics.paired_tests import MCNEMAR, mcnemar, paired_means
from fastgrpo.evaluation.suites.base import Metric
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.pictures import CAPTION_WIDTH, HEADING_HEIGHT, grid, side_by_side
from fastgrpo.types import POSITIVE, Prompt

BOOTSTRAP_TEST = "paired bootstrap over prompts"
PAIRS = 8  # pictures that are shown


def compare_metrics(first: Sequence[Metric], second: Sequence[Metric], prompts: Mapping[str, str]) -> list[Entry]:
    """Every metric that both have, on the images that both have. prompts: image id -> prompt id."""
    others = {metric.name: metric for metric in second}
    compared = (compare(m, others[m.name], prompts) for m in first if m.name in others)
    return [entry for entry in compared if entry]


def compare(first: Metric, second: Metric, prompts: Mapping[str, str]) -> Entry | None:
    """One metric of two models, on the images that both have; None where there is none. prompts: as above."""
    ids = sorted(first.values.keys() & second.values.keys())
    if not ids:
        return None
    images: dict[str, list[str]] = {}  # by prompt
    for id in ids:
        images.setdefault(prompts[id], []).append(id)
    one, two = ([sum(m.values[id] for id in own) for own in images.values()] for m in (first, second))
    groups = first.groups or {}
    sizes = Counter(groups[id] for id in ids if groups)
    members = [[groups[own[0]] == group for group in sizes] for own in images.values()] if groups else None
    means = paired_means(one, two, [len(own) for own in images.values()], members)
    difference = means.difference
    entry: Entry = {"metric": first.name, "binary": first.binary, "n": len(ids), "a": means.first, "b": means.second}
    entry |= {"difference": difference.value, "low": difference.low, "high": difference.high}
    entry |= {"interval": difference.method, "p": means.p, "test": BOOTSTRAP_TEST}
    if first.binary:
        table = mcnemar(*([bool(m.values[id]) for id in ids] for m in (first, second)))
        entry |= {"only_a": table.only_first, "only_b": table.only_second}
        # Of groups of other sizes the plain mean is not that of all images, which McNemar's test is of.
        if len(images) == len(ids) and len(set(sizes.values())) < 2:
            entry |= {"p": table.p, "test": MCNEMAR}
    if first.better:
        entry |= {"better": first.better, "verdict": verdict_of(difference.value, entry["p"], first.better)}
    return entry


def most_changed(
    first: Sequence[Metric], second: Sequence[Metric], files: Mapping[str, tuple[Path, Path]], count: int = PAIRS
) -> list[str]:
    """Image ids by how much they changed: in the metrics, each in units of its spread, and among equals in the pixels.

    files: image id -> the two images.
    """
    changes = dict.fromkeys(files, 0.0)
    for metric in first:
        others = next((m.values for m in second if m.name == metric.name), {})
        ids = [id for id in files if id in metric.values and id in others]
        spread = 1.0 if metric.binary else float(np.std([metric.values[id] for id in ids])) if ids else 0.0
        for id in ids if spread else ():
            changes[id] += abs(others[id] - metric.values[id]) / spread
    # Pixels decide among the many whose verdict flipped; the files of the others need not be opened.
    floor = sorted(changes.values(), reverse=True)[:count][-1] if changes else 0.0
    candidates = [id for id, change in changes.items() if change >= floor]
    distance = {id: _distance(*files[id]) for id in candidates}
    return sorted(candidates, key=lambda id: (-changes[id], -distance[id], id))[:count]


def changes_sheet(
    first: Sequence[Metric],
    second: Sequence[Metric],
    folders: tuple[Path, Path],
    texts: Mapping[str, str],
    headings: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """The pictures that changed most, one row each: the prompt, cut, and both pictures.

    folders: the two stages' folders of images. texts: image id -> prompt. Pictures of other sizes are fitted into the
    largest. Where no picture is in both folders, the sheet is empty.
    """
    files = {id: (folders[0] / "images" / f"{id}.png", folders[1] / "images" / f"{id}.png") for id in texts}
    ids = most_changed(first, second, {id: both for id, both in files.items() if all(file.is_file() for file in both)})
    if not ids:
        return Image.new("RGB", (CAPTION_WIDTH, HEADING_HEIGHT), "white")
    prompts = [Prompt(one_line(texts[id], PROMPT_WIDTH), POSITIVE) for id in ids]
    pictures = [[read_image(files[id][side]) for id in ids] for side in (0, 1)]
    sizes = [picture.size for side in pictures for picture in side]
    size = max(width for width, _ in sizes), max(height for _, height in sizes)
    before, after = (grid(_stacked(side, size), prompts) for side in pictures)
    return side_by_side(before, after, headings)


@dataclass(frozen=True)
class SuiteComparison:
    """Two models in one suite. compared: one entry per metric, as in evaluation.json. sheet: what changed most."""

    suite: str
    compared: list[Entry]
    sheet: Image.Image


def find_stage(path: Path) -> Path:
    """The folder of one model's images and verdicts: `path` itself, or the only one in it.

    Raises ConfigError where there is none, or several.
    """
    if any(path.glob(f"*/*{SUFFIX}")):
        return path
    stages = sorted({file.parents[1] for file in path.glob(f"*/*/*{SUFFIX}")})
    if len(stages) == 1:
        return stages[0]
    if stages:
        raise ConfigError(f"--compare {path}: it holds {' and '.join(map(str, stages))}; accepted is one of these.")
    raise ConfigError(f"--compare {path}: there are no results in it; accepted is a folder that evaluate has written.")


def compare_stages(first: Path, second: Path) -> list[SuiteComparison]:
    """Every suite that both stages have. Raises ConfigError where one was measured in another way, or there is none."""
    found = {file.relative_to(first) for file in first.glob(f"*/*{SUFFIX}")}
    shared = sorted(found & {file.relative_to(second) for file in second.glob(f"*/*{SUFFIX}")})
    if not shared:
        raise ConfigError(f"--compare {first} {second}: they have no suite in common.")
    return [_compare_suite(first / file, second / file) for file in shared]


def _compare_suite(first: Path, second: Path) -> SuiteComparison:
    one, two = read_verdicts(first), read_verdicts(second)
    manifests = read_manifest(first.parent), read_manifest(second.parent)
    if one.protocol != two.protocol or one.judges != two.judges:
        raise ConfigError(f"--compare: {first} and {second} are of other protocols or judges; accepted are the same.")
    steps = [{key: m["drawing"][key] for key in ("sampler", "steps", "eta")} for m in manifests]
    if steps[0] != steps[1] or manifests[0]["images"] != manifests[1]["images"]:
        what = "with other steps" if steps[0] != steps[1] else "from other prompts, seeds, guidance or sizes"
        raise ConfigError(f"--compare: {first.parent} and {second.parent} were drawn {what}; accepted are the same.")
    rows = manifests[0]["images"]
    compared = compare_metrics(one.metrics, two.metrics, {row["id"]: row["prompt"] for row in rows})
    headings = one_line(manifests[0]["drawing"]["model"], 30), one_line(manifests[1]["drawing"]["model"], 30)
    texts = {row["id"]: row["text"] for row in rows}
    sheet = changes_sheet(one.metrics, two.metrics, (first.parent, second.parent), texts, headings)
    return SuiteComparison(one.suite, compared, sheet)


def _stacked(pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """[N, 3, h, w] float32 in [0, 1]."""
    padded = [p if p.size == size else ImageOps.pad(p, size, color="white") for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p) for p in padded])).permute(0, 3, 1, 2).float() / 255


def _distance(first: Path, second: Path) -> float:
    """Mean absolute difference of the pixels, 0 ... 255, the second image brought to the first one's size."""
    one, two = read_image(first), read_image(second)
    two = two if two.size == one.size else ImageOps.fit(two, one.size)
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(two, np.float32)).mean())
