"""Published results to stand beside ours, each with the checkpoint that it belongs to.

The rows are those of the tables of SafeDiffusion-R1 (arXiv 2605.18719), its baselines included. Its headline numbers
come from different checkpoints; a label says which one, or that it is not known. Where a table's overall number is not
what the row itself gives, the row's note says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.evaluation.results.summary import OVERALL
from fastgrpo.shapes.world import HAZARDS, TASKS

SOURCE = "arXiv 2605.18719"
SD14, SD15 = "Stable Diffusion 1.4", "Stable Diffusion 1.5"
MAIN, UNSAFE_ANCHORS = "SafeDiffusion-R1, main checkpoint", "SafeDiffusion-R1, unsafe anchors only"
COMPOSITION, NUDITY_ONLY = "SafeDiffusion-R1, GenEval + nudity prompts", "SafeDiffusion-R1, nudity prompts only"
UNNAMED = "SafeDiffusion-R1, checkpoint not named"

# What the numbers of a suite are: a name for each that a suite's own table also uses.
DETECTIONS = "detections"
CLIP_SCORE, FID = "clip-score", "fid"
ATTACK_SUCCESS, SKIP_RATE = "mma-diffusion success", "sneakyprompt skip rate"

PERCENT, COUNT, COSINE, DISTANCE = "%", "detections", "cosine", "squared distance"

_SUITE_PROTOCOLS = {
    "nudity": "NudeNet above 0.6 on I2P, nine classes, one count per class and image",
    "i2p": "Q16 on I2P, share of inappropriate images",
    "geneval": "GenEval, share of correct images",
    "clip-score": "CLIP score of images and their prompts; the encoder is not named",
    "fid": "FID; the reference images and their number are not named",
    "attacks": "adversarial prompts",
}


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table.

    suite: the suite whose numbers it stands beside. label: the checkpoint. base: what it was trained from.
    values: by the names of that suite's numbers, in `unit`, as printed.
    note: what a reader must know before comparing; empty where there is nothing.
    """

    suite: str
    label: str
    base: str
    values: dict[str, float]
    unit: str
    note: str = ""
    source: str = SOURCE

    @property
    def protocol(self) -> str:
        """How the numbers were taken."""
        return _SUITE_PROTOCOLS[self.suite]


def _detections(label: str, count: int, base: str = SD14) -> PublishedRow:
    return PublishedRow("nudity", label, base, {DETECTIONS: count}, COUNT)


def _inappropriate(label: str, rates: Sequence[float], overall: float, note: str, base: str = SD14) -> PublishedRow:
    return PublishedRow("i2p", label, base, _named(HAZARDS, rates) | {OVERALL: overall}, PERCENT, note)


def _composition(label: str, rates: Sequence[float], overall: float, base: str = SD14, note: str = "") -> PublishedRow:
    return PublishedRow("geneval", label, base, _named(TASKS, rates) | {OVERALL: overall}, PERCENT, note)


def _named(names: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
    return dict(zip(names, rates, strict=True)) if rates else {}


def _quality(label: str, clip: float, fid: float, base: str = SD14) -> tuple[PublishedRow, PublishedRow]:
    return (
        PublishedRow("clip-score", label, base, {CLIP_SCORE: clip}, COSINE),
        PublishedRow("fid", label, base, {FID: fid}, DISTANCE),
    )


def _attacks(label: str, success: float, skipped: float, base: str) -> PublishedRow:
    return PublishedRow("attacks", label, base, {ATTACK_SUCCESS: success, SKIP_RATE: skipped}, PERCENT)


_BY_SIZE = "overall is weighted by category size"
_ONLY_OVERALL = "only the overall number is known"

ROWS: tuple[PublishedRow, ...] = (
    _detections("SD 1.4", 646),
    _detections("SLD-Medium", 212),
    _detections("UCE", 182),
    _detections("ESD-u", 121),
    _detections("MACE", 109),
    _detections("RECE", 66),
    _detections("AdvUnlearn", 23),
    _detections("SAeUron", 18),
    _detections(MAIN, 31, SD15),
    _detections(UNSAFE_ANCHORS, 15, SD15),
    _inappropriate("SD 1.4", (44.2, 37.5, 46.3, 47.9, 60.2, 59.5, 40.0), 48.9, _BY_SIZE),
    _inappropriate(
        "SLD",
        (22.5, 22.1, 31.8, 30.0, 52.4, 40.5, 22.1),
        33.7,
        "the row gives 33.4 weighted by category size and 31.6 as a plain mean, not 33.7",
    ),
    _inappropriate(
        "ESD-u",
        (26.8, 24.0, 35.1, 33.7, 35.0, 40.1, 26.7),
        32.8,
        "the row gives 32.3 weighted by category size and 31.6 as a plain mean, not 32.8",
    ),
    _inappropriate("CASTEER", (29.0, 25.6, 27.8, 26.2, 20.7, 34.0, 17.6), 25.6, _BY_SIZE),
    _inappropriate(
        MAIN,
        (16.02, 25.12, 17.33, 15.86, 11.60, 14.60, 26.00),
        18.07,
        "overall is the plain mean of the seven, other than in the baselines' rows",
        SD15,
    ),
    _inappropriate(UNSAFE_ANCHORS, (), 33.43, _ONLY_OVERALL, SD15),
    _composition("SD 1.4", (97.81, 39.65, 31.56, 74.73, 3.00, 5.75), 42.08),
    _composition("RECE", (), 38.36, note=_ONLY_OVERALL),
    _composition(COMPOSITION, (99.06, 61.36, 30.00, 76.33, 9.75, 10.50), 47.83, SD15),
    _composition(NUDITY_ONLY, (), 44.12, SD15, _ONLY_OVERALL),
    *_quality("SD 1.4", 0.313, 37.35),
    *_quality("ESD", 0.303, 40.73),
    *_quality(UNNAMED, 0.311, 52.28, SD15),
    PublishedRow("fid", "GRPO without steering", SD15, {FID: 250.0}, DISTANCE, "the images have collapsed"),
    _attacks("before SafeDiffusion-R1", 22.6, 37.0, "not named"),
    _attacks(UNNAMED, 2.6, 89.5, SD15),
)


def published(suite: str) -> tuple[PublishedRow, ...]:
    """The rows that stand beside a suite's numbers, baselines first; none for a suite that was never published."""
    return tuple(row for row in ROWS if row.suite == suite)
