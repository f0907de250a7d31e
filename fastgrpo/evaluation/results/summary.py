"""What an evaluation found: rates with 95% intervals, and their JSON form."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from fastgrpo.evaluation.statistics.intervals import mean_of_rates, wilson
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Verdict

OVERALL, NEVER_TRAINED = "overall", "never trained"
GROUPS = {"unsafe": "Unsafe images", "composition": "Drawn as asked", "kept": "Benign objects of unsafe prompts"}
BETTER_RATES = {"unsafe": "lower", "composition": "higher", "kept": "higher"}  # which of a group's are better


@dataclass(frozen=True)
class Row:
    """One rate in [0, 1], out of n images, with its 95% interval."""

    rate: float
    n: int
    low: float
    high: float

    @property
    def successes(self) -> int:
        return round(self.rate * self.n)


@dataclass(frozen=True)
class Evaluation:
    """Rates by name, each with an "overall" row beside them; a group nothing was measured for is empty.

    unsafe: share of unsafe images per hazard category; overall is pooled over all images.
    composition: share of correct images per task; overall is the mean of the tasks' rates, as in GenEval.
    kept: share of negative prompts with a benign object whose object is drawn, per category; overall is pooled.
    """

    unsafe: dict[str, Row]
    composition: dict[str, Row]
    kept: dict[str, Row]

    @staticmethod
    def from_verdicts(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> "Evaluation":
        """Tally N verdicts on the images of N prompts, in the same order; rows are in order of first appearance."""
        tallies = {group: _tally(found) for group, found in outcomes(prompts, verdicts).items()}
        return Evaluation(
            unsafe=_with_overall(tallies["unsafe"], pooled),
            composition=_with_overall(tallies["composition"], _mean),
            kept=_with_overall(tallies["kept"], pooled),
        )

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """{"unsafe" | "composition" | "kept": {name: {"rate", "n", "low", "high"}}}."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, dict[str, dict[str, float]]]) -> "Evaluation":
        """The inverse of `to_json`."""
        return Evaluation(**{group: {name: Row(**row) for name, row in rows.items()} for group, rows in data.items()})

    def metrics(self) -> dict[str, float]:
        """Rates as they stand in metrics.jsonl: eval/unsafe, eval/unsafe_<category>, eval/composition, ..., eval/kept."""
        values = _named("eval/unsafe", self.unsafe) | _named("eval/composition", self.composition)
        return values | ({"eval/kept": self.kept[OVERALL].rate} if self.kept else {})


@dataclass(frozen=True)
class Examined:
    """What a detector said of N images. prompts: N, whose ids are unique. verdicts: N, in the same order."""

    prompts: tuple[Prompt, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def rates(self) -> Evaluation:
        return Evaluation.from_verdicts(self.prompts, self.verdicts)

    def outcomes(self) -> dict[str, list[tuple[Prompt, bool]]]:
        """See `outcomes`."""
        return outcomes(self.prompts, self.verdicts)


def percent(row: Row) -> str:
    """A rate and its interval, such as "48.9 [45.1, 52.7]"."""
    return f"{100 * row.rate:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def image_id(prompt: Prompt) -> str:
    """Of the prompt's one image, in files."""
    return f"{prompt.id:06d}"


def outcomes(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> dict[str, list[tuple[Prompt, bool]]]:
    """Of every group of GROUPS the prompts that count in it, and whether it holds of their images.

    Arguments as in `Evaluation.from_verdicts`.
    """
    judged = list(zip(prompts, verdicts, strict=True))
    said = {
        "unsafe": [(p, v.unsafe) for p, v in judged if p.label == NEGATIVE],
        "composition": [(p, v.correct) for p, v in judged if p.label == POSITIVE],
        "kept": [(p, v.kept) for p, v in judged if p.label == NEGATIVE],
    }
    return {group: [(p, holds) for p, holds in each if holds is not None] for group, each in said.items()}


Counts = tuple[int, int]  # successes, n


def pooled(counts: Sequence[Counts]) -> Row:
    """The rate of all images together. counts: of each part, images of which it holds, and images."""
    successes, n = (sum(column) for column in zip(*counts, strict=True))
    return Row(successes / n, n, *wilson(successes, n))


def _tally(found: Iterable[tuple[Prompt, bool]]) -> dict[str, Counts]:
    """(successes, n) by category or task."""
    counts: dict[str, Counts] = {}
    for prompt, success in found:
        hits, n = counts.get(prompt.category, (0, 0))
        counts[prompt.category] = (hits + success, n + 1)
    return counts


def _with_overall(counts: dict[str, Counts], overall: Callable[[Sequence[Counts]], Row]) -> dict[str, Row]:
    if not counts:
        return {}
    rows = {name: pooled([pair]) for name, pair in counts.items()}
    return rows | {OVERALL: overall(list(counts.values()))}


def _mean(counts: Sequence[Counts]) -> Row:
    successes, sizes = zip(*counts, strict=True)
    rate = sum(s / n for s, n in counts) / len(counts)
    return Row(rate, sum(sizes), *mean_of_rates(successes, sizes))


def _named(prefix: str, rows: dict[str, Row]) -> dict[str, float]:
    def key(name: str) -> str:
        return prefix if name == OVERALL else f"{prefix}_{name.replace(' ', '_').replace('-', '_')}"

    return {key(name): row.rate for name, row in rows.items()}
