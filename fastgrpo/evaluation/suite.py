"""A suite draws its held-out prompts with fixed seeds and shows the images to a detector."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from fastgrpo import rollout
from fastgrpo.evaluation.detectors import Detector, OracleDetector
from fastgrpo.evaluation.results.summary import Examined
from fastgrpo.evaluation.suites.shapes import OTHER_NUMBERS, TRAINER_PROTOCOL
from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.shapes.captions import heldout_prompts
from fastgrpo.system.finite import Request
from fastgrpo.system.randomness import image_seed
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Verdict

CHUNK = 256  # images drawn and judged at once; results do not depend on it


class Suite:
    """Held-out prompts, the seed of their noise, and the detector that judges their images.

    Prompt ids are unique within a suite. Prompt order and chunks do not matter: an image depends on its own prompt
    and seed only, so two evaluations of one policy differ in nothing, and of two policies in nothing else.
    """

    def __init__(
        self,
        protocol: str,
        prompts: Sequence[Prompt],
        seed: int,
        detector: Detector,
        quick_fraction: float = 1.0,
        others: str = "",
    ) -> None:
        """protocol: the name under which results may be compared; quick_fraction: in (0, 1].

        others: a sentence on where else numbers of the same policy are to be had, and why they differ.
        """
        self.protocol = protocol
        self.prompts = tuple(prompts)
        self.seed = seed
        self.detector = detector
        self.quick_fraction = quick_fraction
        self.others = others

    def evaluate(
        self,
        policy: Policy,
        schedule: Schedule,
        guidance: float,
        quick: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Examined:
        """Draw one image per prompt and have it judged.

        quick: only the first `quick_fraction` of every category and task.
        progress: called with (images done, images in all) after every chunk.
        """
        prompts = self.quick_prompts() if quick else self.prompts
        verdicts: list[Verdict] = []
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            embeds = policy.encode([prompt.text for prompt in chunk])
            requests = [Request(f"evaluation's image {prompt.id}", prompt.text) for prompt in chunk]
            images = rollout.draw_images(
                policy, embeds, schedule, guidance, self.seeds(chunk), CHUNK, requests=requests
            )
            verdicts += self.detector(images, chunk)
            if progress:
                progress(len(verdicts), len(prompts))
        return Examined(prompts, tuple(verdicts))

    def settings(self) -> dict[str, Any]:
        """What its numbers depend on but the policy and its sampler: {"protocol", "judge", "images": {"unsafe", "composition"}}."""
        labels = [prompt.label for prompt in self.prompts]
        images = {"unsafe": labels.count(NEGATIVE), "composition": labels.count(POSITIVE)}
        return {"protocol": self.protocol, "judge": self.detector.name, "images": images}

    def about(self, settings: dict[str, Any]) -> str:
        """What the numbers of a full evaluation are of, in a sentence or two. settings: its own and the sampler's."""
        images = settings["images"]
        return (
            f"{self.protocol}: {images['unsafe']} unsafe and {images['composition']} composition prompts, one image each, "
            f"{settings['steps']} steps, eta {settings['eta']:g}, guidance {settings['guidance']:g}, judged by "
            f"{self.detector.name}.{' ' if self.others else ''}{self.others}"
        )

    def seeds(self, prompts: Sequence[Prompt]) -> list[int]:
        """One seed in [0, 2^63) per prompt: a fixed function of the suite's seed and the prompt's id."""
        return [image_seed(self.seed, prompt.id) for prompt in prompts]

    def quick_prompts(self) -> tuple[Prompt, ...]:
        """The first `quick_fraction` of every category and task, rounded up."""
        groups = self._groups()
        return tuple(p for group in groups.values() for p in group[: math.ceil(self.quick_fraction * len(group))])

    def picture_prompts(self) -> tuple[Prompt, ...]:
        """The first prompt of every category and task: what picture grids show, drawn with their `seeds`."""
        return tuple(group[0] for group in self._groups().values())

    def _groups(self) -> dict[tuple[str, str], list[Prompt]]:
        groups = defaultdict(list)
        for prompt in self.prompts:
            groups[prompt.label, prompt.category].append(prompt)
        return groups


def make_suite(config: TrainConfig) -> Suite | None:
    """The suite that fits what is trained, or None where nothing can judge its pictures yet."""
    shapes_prompts = (config.prompts.positive, config.prompts.negative) == ("shapes", "shapes")
    if config.model.path != "shapes" and not shapes_prompts:
        return None
    return Suite(
        protocol=TRAINER_PROTOCOL,
        prompts=heldout_prompts(config.eval.unsafe_per_category, config.eval.composition_per_task),
        seed=config.eval.seed,
        detector=OracleDetector(),
        quick_fraction=config.eval.quick_fraction,
        others=OTHER_NUMBERS,
    )
