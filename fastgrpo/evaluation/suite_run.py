"""Draws and measures the images of suites, for each stage of a model; several processes share the work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.evaluation.images.folder import ImageFolder, Shard
from fastgrpo.evaluation.images.painters import make_painter
from fastgrpo.evaluation.results import comparison
from fastgrpo.evaluation.results.file import StageResult
from fastgrpo.evaluation.results.image_scores import write_verdicts
from fastgrpo.evaluation.suites.base import Measure, Suite
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.suites import SamplerName
from fastgrpo.system.console import Console
from fastgrpo.system.pictures import write_png


@dataclass(frozen=True)
class SuiteRun:
    """One suite at work.

    measure: None where images are only drawn. schedule: DDIM's; of other samplers it says how many steps.
    folders: stage, such as before or after, -> its images.
    """

    suite: Suite
    measure: Measure | None
    schedule: Schedule
    folders: dict[str, ImageFolder]


def draw(
    stage: str,
    policy: Policy,
    runs: Sequence[SuiteRun],
    sampler: SamplerName,
    console: Console,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> None:
    """Draw a shard of a stage's images, as far as they are missing. To be called by all processes."""
    for each in runs:
        folder = each.folders[stage]
        paint = make_painter(policy, sampler, each.schedule, folder.drawing.batch)
        with console.bar(f"{stage}, {each.suite.name}", len(folder.wanted) // shard.count) as bar:
            folder.draw(paint, shard, bar.advance)


def measure(runs: Sequence[SuiteRun], output: Path, console: Console) -> list[tuple[Suite, dict[str, StageResult]]]:
    """Measure all images that are there; values per image and the pictures that changed most are written on the way.

    To be called by all processes, which all get the results.
    """
    return [(each.suite, _measure(each, output, console)) for each in runs]


def _measure(run: SuiteRun, output: Path, console: Console) -> dict[str, StageResult]:
    assert run.measure, "images that are only drawn are not measured"
    results: dict[str, StageResult] = {}
    for stage, folder in run.folders.items():
        rows = folder.present()
        with console.bar(f"measuring {run.suite.name}") as bar:
            found = run.measure(folder, rows, bar.advance)
        if folder.ranks.first:
            write_verdicts(folder.path, run.suite, found)
        results[stage] = StageResult(folder, tuple(rows), found)
    if len(results) > 1 and folder.ranks.first:
        before, after = results.values()
        texts = {row.id: row.text for row in before.rows}
        folders = before.folder.path, after.folder.path
        sheet = comparison.changes_sheet(before.found.metrics, after.found.metrics, folders, texts)
        write_png(output / f"changes-{run.suite.name}.png", sheet)
    return results
