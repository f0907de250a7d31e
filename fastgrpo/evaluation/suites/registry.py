"""The suites by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastgrpo.evaluation.detectors.nudenet import FLOOR
from fastgrpo.evaluation.images.folder import ImageRequest
from fastgrpo.evaluation.metrics.geneval_rules import read_metadata
from fastgrpo.evaluation.suites.base import Suite
from fastgrpo.evaluation.suites.captions import ClipScoreSuite, FidSuite
from fastgrpo.evaluation.suites.custom import PromptSuite
from fastgrpo.evaluation.suites.geneval import GenEvalSuite
from fastgrpo.evaluation.suites.i2p import I2PSuite, NuditySuite
from fastgrpo.evaluation.suites.prompt_table import PromptRow, image_requests, read_rows, row_id
from fastgrpo.evaluation.suites.shapes import ShapesSuite
from fastgrpo.prompts.geneval import geneval_metadata
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.suites import DETECTORS, GUIDANCE, AllSettings, ShapesSettings, SourceSettings, SuiteSettings
from fastgrpo.shapes.world import HAZARDS, SIZE
from fastgrpo.system.errors import ConfigError, flag, nearest, require_at_least

STEPS, ETA = 50, 0.0


@dataclass(frozen=True)
class Overrides:
    """Holds for all suites; None is each suite's own. seed: for prompts that bring none. size: pixels, 0 is none."""

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
    """The suites of these names, in order. Raises ConfigError for prompts that cannot be read.

    config: of the run, or of preset `shapes`; unless overridden, suite `shapes` is as in that run's evaluations.
    say: told, once for each table of prompts, which of its columns say how the images are drawn.
    named: from a setting, such as "i2p.images", to what messages call it.
    """
    remarks: list[str] = []
    maker = _Maker(settings, overrides, remarks.append, named)
    suites = [maker.shapes(config) if name == "shapes" else maker.make(name) for name in names]
    for remark in dict.fromkeys(remarks):  # suites may share a table
        say(remark)
    return suites


@dataclass(frozen=True)
class _Maker:
    """Makes suites; fields as in `make_suites`."""

    settings: SuiteSettings
    overrides: Overrides
    say: Callable[[str], object]
    named: Callable[[str], str]

    def make(self, name: str) -> Suite:
        """A suite for any model."""
        if name == "geneval":
            return self._geneval()
        if name in ("i2p", "nudity"):
            return self._i2p(name)
        if name in ("clip-score", "fid"):
            return self._captions(name)
        return self._custom(name)

    def shapes(self, config: TrainConfig) -> ShapesSuite:
        """The suite of the embedded world."""
        own = self.settings.shapes if isinstance(self.settings, AllSettings) else ShapesSettings()
        overrides, prompts, rollout = self.overrides, config.prompts, config.rollout
        if overrides.size not in (0, SIZE):
            why = f"suite shapes draws pictures of {SIZE} pixels; accepted is 0 or {SIZE}"
            raise ConfigError.of("--size", overrides.size, why)
        unsafe = config.eval.unsafe_per_category if own.unsafe_per_category is None else own.unsafe_per_category
        composition = config.eval.composition_per_task if own.composition_per_task is None else own.composition_per_task
        require_at_least(1, self.named("shapes.unsafe_per_category"), unsafe)
        require_at_least(1, self.named("shapes.composition_per_task"), composition)
        steps = overrides.steps or config.eval.steps or rollout.steps
        eta = rollout.eta if overrides.eta is None else overrides.eta
        guidance = rollout.guidance if overrides.guidance is None else overrides.guidance
        hazards = tuple(category for category in prompts.categories or HAZARDS if category in HAZARDS)
        trained = hazards if prompts.negative == "shapes" else ()
        split = own.split or config.eval.split
        return ShapesSuite(unsafe, composition, steps, eta, guidance, overrides.seed, split, trained)

    @property
    def _sampler(self) -> tuple[int, float]:
        """Steps and eta."""
        steps, eta = self.overrides.steps, self.overrides.eta
        return STEPS if steps is None else steps, ETA if eta is None else eta

    def _i2p(self, name: str) -> Suite:
        own, named = self.settings.i2p, self.named
        require_at_least(1, named("i2p.images"), own.images)
        _check_threshold(named("i2p.threshold"), own.threshold)
        rows, wanted = self._rows(own.prompts, "i2p.prompts", "prompt", GUIDANCE, own.images)
        if name == "nudity":
            return NuditySuite(wanted, own.images, own.threshold, *self._sampler)
        _check_detectors(named("i2p.detectors"), own.detectors)
        _check_categories(named("i2p.prompts"), own.prompts, rows)
        return I2PSuite(name, rows, wanted, own.images, own.detectors, own.threshold, *self._sampler)

    def _captions(self, name: str) -> Suite:
        own = self.settings.captions
        _, wanted = self._source("captions", own)
        if name == "clip-score":
            return ClipScoreSuite(wanted, own.images, own.encoder, *self._sampler)
        if len(wanted) < 2:
            raise ConfigError(f"{self.named('captions.prompts')}: there is one image to draw; FID needs two or more.")
        return FidSuite(wanted, own.images, own.reference, own.inception, *self._sampler)

    def _custom(self, name: str) -> Suite:
        own = self.settings.attacks if name == "attacks" else self.settings.custom
        _check_detectors(self.named(f"{name}.detectors"), own.detectors)
        _check_threshold(self.named(f"{name}.threshold"), own.threshold)
        rows, wanted = self._source(name, own)
        return PromptSuite(name, rows, wanted, own.images, own.detectors, own.threshold, *self._sampler)

    def _geneval(self) -> GenEvalSuite:
        own, named = self.settings.geneval, self.named
        require_at_least(1, named("geneval.images"), own.images)
        require_at_least(1, named("geneval.per_task"), own.per_task)
        require_at_least(0, named("geneval.guidance"), own.guidance)
        if own.metadata:
            found, source = read_metadata(Path(own.metadata)), Path(own.metadata).name
        else:
            found, source = geneval_metadata(own.per_task, held_out=True), f"own-{own.per_task}"
        metadata = {row_id(row): row for row in found}
        guidance = own.guidance if self.overrides.guidance is None else self.overrides.guidance
        rows = [PromptRow(id, row["prompt"], (row["tag"],), None, guidance) for id, row in sorted(metadata.items())]
        images = image_requests(rows, own.images, self.overrides.seed, self.overrides.size)
        return GenEvalSuite(metadata, images, own.images, own.detector, own.colours, source, *self._sampler)

    def _source(self, group: str, own: SourceSettings) -> tuple[list[PromptRow], tuple[ImageRequest, ...]]:
        """The prompts of the user's own, and their images. group: of the settings."""
        require_at_least(1, self.named(f"{group}.images"), own.images)
        require_at_least(0, self.named(f"{group}.guidance"), own.guidance)
        return self._rows(own.prompts, f"{group}.prompts", own.column, own.guidance, own.images)

    def _rows(
        self, source: str, setting: str, column: str, guidance: float, images: int
    ) -> tuple[list[PromptRow], tuple[ImageRequest, ...]]:
        """The prompts of a source and their images. setting: that names the source."""
        field, overrides = self.named(setting), self.overrides
        if not source:
            raise ConfigError(f"{field}: the suite needs prompts; accepted is a file, or hf:OWNER/NAME.")
        rows = read_rows(source, field, guidance, column, self.say)
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
