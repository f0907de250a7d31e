"""The reward that training uses: a weighted sum of terms.

    total = sum over terms of weight * standardised(term)

Letters in shapes: P prompts, G images per prompt; sample b belongs to prompt b // G.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.rewards.aesthetic import AestheticReward
from fastgrpo.rewards.encoder import Encoders, SharedEncoder
from fastgrpo.rewards.safety import SafetyReward
from fastgrpo.rewards.service.client import Answers, Scores, Service, WrongScores
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.rewards.terms import BrokenReward, RewardFunction, Term
from fastgrpo.system.errors import quoted
from fastgrpo.types import Prompt, Rewards

Function = RewardFunction | SteeringReward
"""What computes a term."""

# Relative to the largest value: float32 rounds to 6e-8, a chain of a hundred operations to some 1e-5.
_FLAT = 1e-5
_FEATURES = "image features"  # no term can be called so


class WeightedReward:
    """Scores trajectories with every term. Build it with `registry.load_reward`.

    steering: the term of that name, or None where there is none.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        functions: dict[str, Function],
        standardise: str,
        encoders: Encoders,
        service: Service | None = None,
    ):
        """functions: of the terms, by label, but of those that a service computes. standardise: as in `standardised`.

        encoders: those that the terms use. service: what terms service:NAME are asked of.
        """
        self.terms = tuple(terms)
        steering = functions.get("steering")
        self.steering = steering if isinstance(steering, SteeringReward) else None
        self._functions, self._standardise, self._encoders = functions, standardise, encoders
        self._service = service

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], group_size: int) -> Rewards:
        """Score the images and combine the scores."""
        return self.combine(self.score(images, prompts, group_size))

    @property
    def elsewhere(self) -> bool:
        """Whether servers compute some of it, which may fail at any time."""
        return self._service is not None

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """The encoders' models, each by the field of the settings that names it."""
        return self._encoders.models

    def offload(self) -> None:
        """Keep the encoders and detectors in the host's memory while they are not used. On a CPU nothing is moved."""
        self._encoders.offload()
        for function in self._functions.values():
            if isinstance(function, SafetyReward):
                function.offload()

    @property
    def hashes(self) -> dict[str, str]:
        """Name -> sha256, in hex, of the files of weights that are no encoder's."""
        judged = [each for each in self._functions.values() if isinstance(each, AestheticReward | SafetyReward)]
        return {name: digest for each in judged for name, digest in each.hashes.items()}

    @property
    def encoder(self) -> SharedEncoder | None:
        """What sees the images: the encoder of `steering`, else of the first term that has one, else None."""
        steering = self.steering.encoder if self.steering else None
        return steering if isinstance(steering, SharedEncoder) else self._encoders.first

    def score(
        self, images: Tensor, prompts: Sequence[Prompt], group_size: int, broken: list[BrokenReward] | None = None
    ) -> dict[str, Tensor]:
        """The raw values of every term by its label, the parts that explain `steering`, and the images' features.

        images: [P * G, 3, h, w] float32 in [0, 1]; image b was drawn for prompts[b // G].
        Returns [P, G] float32 tensors on the images' device, the features [P, G, D]. Several processes may each score
        their prompts and concatenate along P before they combine: the keys are the same everywhere, in the same order.
        broken: takes what would be raised for numbers that are not finite, which are NaN in what is returned.
        Raises BrokenReward for a term that fails or returns anything but N finite numbers, and ServiceFailed.
        """
        return self.begin(images, prompts, group_size, broken).result()

    @torch.no_grad()
    def begin(
        self, images: Tensor, prompts: Sequence[Prompt], group_size: int, broken: list[BrokenReward] | None = None
    ) -> "Scoring":
        """Ask the servers and compute all other terms meanwhile, as `score`. Returns what gives the scores.

        Raises BrokenReward for a term that is computed here.
        """
        each = [prompt for prompt in prompts for _ in range(group_size)]
        names = [term.service for term in self.terms if term.service]
        answers = self._service.begin(names, images, each) if self._service else None
        raw: dict[str, Tensor | None] = {}
        try:
            for term in self.terms:
                if term.service:
                    raw[term.label] = None  # its place among the others
                    continue
                function = self._functions[term.label]
                if isinstance(function, SteeringReward):
                    rewards = function(images, prompts, group_size)
                    raw |= rewards.parts
                    values = rewards.total.flatten()
                else:
                    values = function(images, each)
                raw[term.label] = _checked(term, values, images, each, broken).view(len(prompts), group_size)
            if self.encoder and (features := self.encoder.seen) is not None:
                raw[_FEATURES] = features.view(len(prompts), group_size, -1)
        except BrokenReward:
            if self._service:
                self._service.cancel()
            raise
        finally:
            self._encoders.forget_images()
        asked = [term for term in self.terms if term.service]
        return Scoring(raw, asked, answers, images, each, group_size, broken)

    def combine(self, raw: dict[str, Tensor]) -> Rewards:
        """The rewards from what `score` returned, for any number of prompts.

        parts: all of `raw` but the features, and but `steering` where it is the only term: `steered` holds the same.
        A group in which a term has a NaN has that as its total and no part in the others' standardised values.
        """
        whole = torch.stack([raw[term.label].isfinite().all(dim=1) for term in self.terms]).all(dim=0)
        if not whole.all():
            total = torch.full_like(raw[self.terms[0].label], torch.nan)
            if whole.any():
                total[whole] = self.combine({name: values[whole] for name, values in raw.items()}).total
            return Rewards(total, self._parts(raw), raw.get(_FEATURES))
        weighted = [term.weight * standardised(raw[term.label], self._standardise) for term in self.terms]
        return Rewards(torch.stack(weighted).sum(0).float(), self._parts(raw), raw.get(_FEATURES))

    def _parts(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        alone = len(self.terms) == 1 and self.steering is not None
        left_out = {_FEATURES, *(["steering"] if alone else [])}
        return {name: values for name, values in raw.items() if name not in left_out}


@dataclass(frozen=True)
class Scoring:
    """Images being scored. raw: what `WeightedReward.score` returns; terms of `asked` are None until `result`.

    images: [N, 3, h, w]. prompts: of each image. broken: as of `WeightedReward.score`.
    """

    raw: dict[str, Tensor | None]
    asked: Sequence[Term]
    answers: Answers | None
    images: Tensor
    prompts: Sequence[Prompt]
    group_size: int
    broken: list[BrokenReward] | None

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """Wait for the servers. Returns and raises what `WeightedReward.score` does."""
        raw = dict(self.raw)
        found = self._found() if self.answers else {}
        for term in self.asked:
            scores = found[term.service]
            values = _checked(term, scores.values, self.images, self.prompts, self.broken, scores.servers)
            raw[term.label] = values.view(-1, self.group_size)
        return cast(dict[str, Tensor], raw)

    def _found(self) -> dict[str, Scores]:
        assert self.answers is not None
        try:
            return self.answers.result()
        except WrongScores as error:
            prompt = self.prompts[error.image]
            message = f"reward term 'service:{error.name}': {error}, for images the first of which is of prompt "
            raise BrokenReward(message + quoted(prompt.text), prompt, self.images[error.image]) from error


def standardised(values: Tensor, over: str) -> Tensor:
    """Standardise rewards [P, G] to (r - mean) / std, with the unbiased std. Returns [P, G] float64.

    over: `group`, each row by itself; `iteration`, all values together; `none` changes nothing. Values whose std is
    only rounding, at most 1e-5 of the largest of them, become 0.
    """
    values = values.double()
    if over == "none":
        return values
    dims = (1,) if over == "group" else (0, 1)
    centred = values - values.mean(dims, keepdim=True)
    std = centred.std(dims, keepdim=True)
    flat = std <= _FLAT * values.abs().amax(dims, keepdim=True)
    return (centred / std).masked_fill(flat, 0.0)


def _checked(
    term: Term,
    values: object,
    images: Tensor,
    prompts: Sequence[Prompt],
    taken: list[BrokenReward] | None,
    servers: Sequence[str] = (),
) -> Tensor:
    """What a term returned, as [N] float32 on the images' device in memory of its own. Raises BrokenReward.

    values: a tensor on any device, of any kind of real number, or an array, a list or a tuple of N finite numbers.
    taken: as `broken` of `WeightedReward.score`. servers: the url of each number's, where they come from servers.
    """
    count = len(prompts)
    try:
        if isinstance(values, list | tuple | np.ndarray):
            values = torch.as_tensor(values)
        if not isinstance(values, Tensor) or values.is_complex() or values.shape != (count,):
            raise TypeError
        # A copy: the function may use its tensor again in the next call, of which there are several in an iteration.
        values = values.detach().to(images.device, torch.float32, copy=True).to_dense()
    except Exception as error:  # PyTorch raises many things for what cannot be copied: no data, no layout, no numbers
        message = (
            f"reward term {term.name!r} returned {_described(values)} for {count} images, the first of prompt "
            f"{quoted(prompts[0].text)}; a tensor of shape [{count}] is needed"
        )
        raise BrokenReward(message, prompts[0], images[0]) from error
    if broken := (~values.isfinite()).nonzero().flatten().tolist():
        first = broken[0]
        whose = f" of {servers[first]}" if servers else ""
        message = (
            f"reward term {term.name!r}{whose} returned {values[first].item()} for an image of prompt "
            f"{quoted(prompts[first].text)}, and no finite number for {len(broken)} of {count} images"
        )
        broken_reward = BrokenReward(message, prompts[first], images[first])
        if taken is None:
            raise broken_reward
        taken.append(broken_reward)
        values.masked_fill_(~values.isfinite(), torch.nan)
    return values


def _described(values: object) -> str:
    """The kind and shape of a wrong result, for a sentence."""
    if isinstance(values, np.ndarray):
        return f"an array of shape {list(values.shape)} of {values.dtype}"
    if not isinstance(values, Tensor):
        return f"a {type(values).__name__}"
    if values.is_nested:
        return "a nested tensor"
    kind = str(values.dtype).removeprefix("torch.")
    plain = values.is_floating_point() and values.device.type != "meta"
    return f"shape {list(values.shape)}" + ("" if plain else f" of {kind} on {values.device}")
