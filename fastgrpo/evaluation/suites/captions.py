"""How well images show their captions (suite `clip-score`), and how far they are from real ones (`fid`)."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import ImageFolder, ImageRequest, Requests
from fastgrpo.evaluation.images.judgements import Judgement, Progress, judgements
from fastgrpo.evaluation.statistics.intervals import distance, mean
from fastgrpo.evaluation.suites.base import Loader, Measure, Metric, Number, SuiteResult, Table, described, tally
from fastgrpo.system.errors import ConfigError

if TYPE_CHECKING:
    from fastgrpo.evaluation.metrics.clip_score import ClipScore
    from fastgrpo.evaluation.metrics.inception import Inception

FOLDER = "captions"


class ClipScoreSuite:
    """The mean cosine of images and their captions."""

    name = "clip-score"
    folder = FOLDER

    def __init__(self, wanted: tuple[ImageRequest, ...], images: int, encoder: str, steps: int, eta: float) -> None:
        self.wanted, self.steps, self.eta, self.encoder = wanted, steps, eta, encoder
        self.protocol = f"clip-score/{images}-image/{encoder}"

    def prepare(self, loader: Loader) -> Measure:
        """Load the encoder."""
        from fastgrpo.evaluation.metrics.clip_score import ClipScore

        return partial(self._measure, ClipScore(self.encoder, loader.device, loader.named("captions.encoder")))

    def _measure(
        self, clip: "ClipScore", folder: ImageFolder, rows: Requests, progress: Progress | None
    ) -> SuiteResult:
        def detect(images: ImageFiles, rows: Requests) -> list[Judgement]:
            return [{"cosine": cosine} for cosine in clip(images, [row.text for row in rows])]

        said = judgements(folder, rows, self.name, {"protocol": clip.protocol, "hashes": clip.hashes}, detect, progress)
        cosines = {id: what["cosine"] for id, what in said.items()}
        own = tally(rows, cosines)
        number = Number(self.name, mean(own.totals, own.counts))
        cut = clip.count_cut(list(dict.fromkeys(row.text for row in rows)))
        return SuiteResult(
            tables=(Table("clip-score", f"CLIP score, {self.encoder}", "score", (number,)),),
            metrics=(Metric("cosine", False, cosines, "higher"),),
            judges=described(clip),
            notes=(f"{cut} captions are longer than the encoder reads, and were cut",) if cut else (),
        )


class FidSuite:
    """The distance from a folder of real images."""

    name = "fid"
    folder = FOLDER

    def __init__(
        self, wanted: tuple[ImageRequest, ...], images: int, reference: str, inception: str, steps: int, eta: float
    ) -> None:
        self.wanted, self.steps, self.eta = wanted, steps, eta
        self.reference, self.inception = Path(reference), inception
        self.protocol = f"fid/{images}-image"

    def prepare(self, loader: Loader) -> Measure:
        """Load Inception, and look at the reference's images."""
        from fastgrpo.evaluation.metrics.fid import folder_images
        from fastgrpo.evaluation.metrics.inception import load_inception

        inception = load_inception(self.inception, loader.device, field=loader.named("captions.inception"))
        reference = folder_images(self.reference, loader.named("captions.reference"))
        return partial(self._measure, inception, reference)

    def _measure(
        self, inception: "Inception", real: ImageFiles, folder: ImageFolder, rows: Requests, progress: Progress | None
    ) -> SuiteResult:
        from fastgrpo.evaluation.metrics.fid import drawn_features, fid, reference_features

        if len(rows) < 2:
            raise ConfigError(f"{folder.path}: {len(rows)} image; FID needs two or more.")
        ours = drawn_features(folder, rows, inception)
        found = fid(ours, reference_features(self.reference, real, inception, folder.ranks))
        own = tally(rows, {row.id: float(slope) for row, slope in zip(rows, found.influence, strict=True)})
        number = Number(self.name, distance(found.value, own.totals, own.counts))
        note = (
            f"against {len(real)} images of the reference; FID falls with the number of images, and its interval "
            f"is for {len(ours)} of them against this reference"
        )
        return SuiteResult((Table("fid", "FID", "score", (number,)),), (), described(inception), (note,))
