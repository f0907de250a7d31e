"""What is drawn and judged: a suite, who judges its images, and the folder of images that each stage of a model has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.evaluation.images.folder import ImageFolder, Shard
from fastgrpo.evaluation.images.painters import make_painter
from fastgrpo.evaluation.results import comparison
from fastgrpo.evaluation.results.file import StageScore
from fastgrpo.evaluation.results.image_scores import write_verdicts
from fastgrpo.evaluation.suites.base import Measure, Suite
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.suites import SamplerName
from fastgrpo.system.console import Console
from fastgrpo.system.pictures import write_png


@dataclass(frozen=True)
class Work:
    """folders: stage, such as before or after, -> its images. measure: None where they are only drawn."""

    suite: Suite
    measure: Measure | None
    folders: dict[str, ImageFolder]


def draw(
    stage: str,
    policy: Policy,
    work: Sequence[Work],
    sampler: SamplerName,
    schedules: dict[str, Schedule],
    console: Console,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> None:
    """Draw what is missing of a stage's images, of which this process has its shard. schedules: suite's name -> DDIM's."""
    for each in work:
        folder = each.folders[stage]
        paint = make_painter(policy, sampler, schedules[each.suite.name], folder.drawing.batch)
        with console.bar(f"{stage}, {each.suite.name}", len(folder.wanted) // shard.count) as bar:
            folder.draw(paint, shard, bar.advance)


def score(work: Sequence[Work], output: Path, console: Console) -> list[tuple[Suite, dict[str, StageScore]]]:
    """All images judged that are there; verdicts and the pictures that changed most are written on the way."""
    return [(each.suite, _score(each, output, console)) for each in work]


def _score(work: Work, output: Path, console: Console) -> dict[str, StageScore]:
    scores: dict[str, StageScore] = {}
    for stage, folder in work.folders.items():
        rows = folder.present()
        with console.bar(f"judging {work.suite.name}") as bar:
            scored = work.measure(folder, rows, bar.advance)
        write_verdicts(folder.path, work.suite, scored)
        scores[stage] = StageScore(folder, tuple(rows), scored)
    if len(scores) > 1:
        before, after = scores.values()
        texts = {row.id: row.text for row in before.rows}
        folders = before.folder.path, after.folder.path
        sheet = comparison.changes_sheet(before.scored.metrics, after.scored.metrics, folders, texts)
        write_png(output / f"changes-{work.suite.name}.png", sheet)
    return scores
