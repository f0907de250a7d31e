"""The suites by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastgrpo.evaluation.detectors import registry as detectors
from fastgrpo.evaluation.detectors.nudenet import FLOOR
from fastgrpo.evaluation.images.folder import ImageRequest
from fastgrpo.evaluation.metrics.geneval_rules import read_metadata
from fastgrpo.evaluation.suites.base import Suite
from fastgrpo.evaluation.suites.captions import ClipScoreSuite, FidSuite
from fastgrpo.evaluation.suites.custom import PromptSuite
from fastgrpo.evaluation.suites.geneval import GenEvalSuite
from fastgrpo.evaluation.suites.i2p import I2PSuite, NuditySuite
from fastgrpo.evaluation.suites.prompt_table import PromptRow, image_requests, read_rows, row_id
from fastgrpo.evaluation.suites.shapes import ShapesSuite, beside_the_trainer
from fastgrpo.prompts.geneval import geneval_metadata
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.suites import (
    GUIDANCE,
    AllSettings,
    GenEvalSettings,
    ShapesSettings,
    SuiteSettings,
)
from fastgrpo.shapes.world import SIZE
from fastgrpo.system.errors import ConfigError, flag, nearest, require_at_least

DETECTORS = (*detectors.NAMES, detectors.ORACLE)
STEPS, ETA = 50, 0.0


@dataclass(frozen=True)
class Overrides:
    """What holds for all suites; None is each suite's own. seed: of prompts that bring none. size: pixels, 0 is none."""

    seed: int
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
    size: int = 0


def make_suites(
    names: Sequence[str],
    settings: SuiteSettings,
    overrides: Overrides,
    config: TrainConfig,
    say: Callable[[str], object] = lambda _: None,
    named: Callable[[str], str] = flag,
) -> list[Suite]:
    """The suites of these names, in order.

    settings: AllSettings where `shapes` is among them. config: of the run, or of preset `shapes`, for that suite.
    say: told, once for each table of prompts, which of its columns say how the images are drawn.
    named: from a setting, such as "i2p.images", to what messages call it.

    Raises ConfigError for prompts that cannot be read.
    """
    remarks: list[str] = []
    suites = [_make(name, settings, overrides, config, remarks.append, named) for name in names]
    for remark in dict.fromkeys(remarks):  # suites may share a table
        say(remark)
    return suites


def _make(
    name: str,
    settings: SuiteSettings | AllSettings,
    overrides: Overrides,
    config: TrainConfig,
    say: Callable[[str], object],
    named: Callable[[str], str],
) -> Suite:
    steps = STEPS if overrides.steps is None else overrides.steps
    eta = ETA if overrides.eta is None else overrides.eta
    match name:
        case "shapes":
            return _shapes(settings.shapes, overrides, config)
        case "geneval":
            return _geneval(settings.geneval, overrides, steps, eta, named)
        case "i2p" | "nudity":
            own = settings.i2p
            require_at_least(1, named("i2p.images"), own.images)
            _check_threshold(named("i2p.threshold"), own.threshold)
            rows, wanted = _rows(own.prompts, named("i2p.prompts"), "prompt", GUIDANCE, own.images, overrides, say)
            if name == "nudity":
                return NuditySuite(wanted, own.images, own.threshold, steps, eta)
            _check_detectors(named("i2p.detectors"), own.detectors)
            _check_categories(named("i2p.prompts"), own.prompts, rows)
            return I2PSuite(name, rows, wanted, own.images, own.detectors, own.threshold, steps, eta)
        case "clip-score" | "fid":
            own = settings.captions
            require_at_least(1, named("captions.images"), own.images)
            require_at_least(0, named("captions.guidance"), own.guidance)
            _, wanted = _rows(
                own.prompts, named("captions.prompts"), own.column, own.guidance, own.images, overrides, say
            )
            if name == "clip-score":
                return ClipScoreSuite(wanted, own.images, own.encoder, steps, eta)
            if len(wanted) < 2:
                raise ConfigError(f"{named('captions.prompts')}: there is one image to draw; FID needs two or more.")
            return FidSuite(wanted, own.images, own.reference, own.inception, steps, eta)
        case _:
            own = settings.attacks if name == "attacks" else settings.custom
            require_at_least(1, named(f"{name}.images"), own.images)
            require_at_least(0, named(f"{name}.guidance"), own.guidance)
            _check_detectors(named(f"{name}.detectors"), own.detectors)
            _check_threshold(named(f"{name}.threshold"), own.threshold)
            rows, wanted = _rows(
                own.prompts, named(f"{name}.prompts"), own.column, own.guidance, own.images, overrides, say
            )
            return PromptSuite(name, rows, wanted, own.images, own.detectors, own.threshold, steps, eta)


def _shapes(own: ShapesSettings, overrides: Overrides, config: TrainConfig) -> ShapesSuite:
    if overrides.size not in (0, SIZE):
        raise ConfigError(
            f"--size {overrides.size}: suite shapes draws pictures of {SIZE} pixels; accepted is 0 or {SIZE}."
        )
    unsafe, composition = own.unsafe_per_category, own.composition_per_task
    require_at_least(1, "--shapes.unsafe-per-category", unsafe)
    require_at_least(1, "--shapes.composition-per-task", composition)
    trainers = _trainers_shapes(config)
    drawn = {
        "unsafe": unsafe,
        "composition": composition,
        "steps": overrides.steps or trainers["steps"],
        "eta": trainers["eta"] if overrides.eta is None else overrides.eta,
        "guidance": trainers["guidance"] if overrides.guidance is None else overrides.guidance,
        "seed": overrides.seed,
    }
    return ShapesSuite(*drawn.values(), beside_the_trainer(drawn, trainers))


def _trainers_shapes(config: TrainConfig) -> dict[str, float]:
    """How a training evaluates on the embedded world by itself (evaluation/suite.py)."""
    own, rollout = config.eval, config.rollout
    return {
        "unsafe": own.unsafe_per_category,
        "composition": own.composition_per_task,
        "steps": own.steps or rollout.steps,
        "eta": rollout.eta,
        "guidance": rollout.guidance,
        "seed": own.seed,
    }


def _geneval(
    own: GenEvalSettings, overrides: Overrides, steps: int, eta: float, named: Callable[[str], str]
) -> GenEvalSuite:
    require_at_least(1, named("geneval.images"), own.images)
    require_at_least(1, named("geneval.per_task"), own.per_task)
    require_at_least(0, named("geneval.guidance"), own.guidance)
    if own.metadata:
        found, source = read_metadata(Path(own.metadata)), Path(own.metadata).name
    else:
        found, source = geneval_metadata(own.per_task, held_out=True), f"own-{own.per_task}"
    metadata = {row_id(row): row for row in found}
    guidance = own.guidance if overrides.guidance is None else overrides.guidance
    rows = [PromptRow(id, row["prompt"], (row["tag"],), None, guidance) for id, row in sorted(metadata.items())]
    images = image_requests(rows, own.images, overrides.seed, overrides.size)
    return GenEvalSuite(metadata, images, own.images, own.detector, own.colours, source, steps, eta)


def _rows(
    source: str,
    field: str,
    column: str,
    guidance: float,
    images: int,
    overrides: Overrides,
    say: Callable[[str], object],
) -> tuple[list[PromptRow], tuple[ImageRequest, ...]]:
    """The prompts of a source and their images."""
    if not source:
        raise ConfigError(f"{field}: the suite needs prompts; accepted is a file, or hf:OWNER/NAME.")
    rows = read_rows(source, field, guidance, column, say)
    if overrides.guidance is not None:
        rows = [replace(row, guidance=overrides.guidance) for row in rows]
    return rows, image_requests(rows, images, overrides.seed, overrides.size)


def _check_threshold(field: str, value: float) -> None:
    if not FLOOR <= value < 1:
        why = f"at least {FLOOR}, below which NudeNet reports nothing, and below 1 is accepted"
        raise ConfigError.of(field, value, why)


def _check_detectors(field: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in DETECTORS:
            why = f"no such detector{nearest(name, DETECTORS)}; there are {', '.join(DETECTORS)}"
            raise ConfigError.of(field, name, why)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{field} {' '.join(names) or 'nothing'}: accepted is one detector or more, each once.")


def _check_categories(field: str, source: str, rows: Sequence[PromptRow]) -> None:
    if not any(row.categories for row in rows):
        raise ConfigError(f"{field}: {source!r} has no categories; a column `categories` is needed, as in I2P.")
