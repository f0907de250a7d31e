"""The guard of one training: what it has seen, what it says, and what it does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastgrpo.base_pictures import BasePictures
from fastgrpo.engine.trainable import Trainable, learning_rate
from fastgrpo.grpo.kl_weight import KlWeight
from fastgrpo.guard import alarm, control
from fastgrpo.guard.alarm import WATCHED, Condition, Running
from fastgrpo.guard.base import BaseStatistics
from fastgrpo.rewards.encoder import SharedEncoder
from fastgrpo.settings.schema import GuardConfig, TrainConfig
from fastgrpo.types import POSITIVE, Prompt, Rewards, UpdateStats

_FIRST = 3  # iterations that the spread of rewards is compared with


class Guard:
    """Watches a training's pictures, and sets its KL weight and learning rate.

    All processes see the same features of all prompts, so all decide alike. Its state is a few numbers: `state` goes
    into a checkpoint and `restore` takes it back, bit for bit.
    """

    def __init__(self, config: TrainConfig, sees: bool, say: Callable[[str], object]):
        """sees: whether a term of the reward has an encoder. say: told of alarms, and of what cannot be watched."""
        self._config, self._guard, self._say = config, _comparable(config), say
        self._base: BaseStatistics | None = None
        self._encoder: SharedEncoder | None = None
        self._running: dict[str, Running] = {}
        self._conditions = {name: Condition() for name in WATCHED}
        self._spread: tuple[float, int] = 0.0, 0
        self._brake = 1.0
        self.blind = _blind(config, sees)
        """Why there is nothing to watch, as a clause; empty where there is, or where nothing is to be watched."""

    @property
    def watches(self) -> bool:
        """Whether it has a use for the base model's pictures."""
        return self._guard.action != "off" and not self.blind

    def watch(self, pictures: BasePictures | None, encoder: SharedEncoder | None) -> None:
        """Begin. pictures: the base model's, None where it has no use for them. encoder: the reward's, which saw them.

        Says it where it will never speak.
        """
        self._encoder = encoder
        if pictures is not None and len(pictures.ids) < 2:
            self.blind = "there are fewer than two positive prompts"
        if self.blind:
            self._say(f"guard: no collapse can be noticed, since {self.blind}")
        elif pictures is not None:
            self._base = BaseStatistics.of(pictures.ids, pictures.features, pictures.texts)
            untrained = {name: Running(c.policy, c.base) for name, c in self._base.untrained.items()}
            self._running = untrained | self._running  # what a checkpoint brought along counts

    def begin(self, iteration: int, trainable: Trainable, kl_weight: KlWeight) -> dict[str, float]:
        """Set what iteration number `iteration` trains with. Returns these numbers' metrics."""
        rate = learning_rate(self._config, iteration) / self._brake
        trainable.set_learning_rate(rate)
        kl_weight.set(control.braked_kl_weight(self._config.grpo.kl, self._brake))
        return {"optim/lr": rate} | ({"kl/weight": kl_weight.value} if self._config.kl_term else {})

    def end(self, iteration: int, prompts: Sequence[Prompt], rewards: Rewards, stats: UpdateStats) -> dict[str, float]:
        """Look at an iteration of all processes, say what is new, and decide on the next. Returns guard/*.

        prompts: the P of the iteration. rewards: theirs.
        """
        if self._guard.action == "off":
            return {}
        return self._seen(iteration, prompts, rewards) | self._reward_spread(rewards)

    @property
    def alarmed(self) -> bool:
        return any(condition.alarmed for condition in self._conditions.values())

    @property
    def halts(self) -> bool:
        """Whether training is to stop here."""
        return self.alarmed and self._guard.action == "stop"

    @property
    def good_until(self) -> int | None:
        """The last iteration whose weights drew within all limits; None while nothing is beyond any."""
        began = [condition.since for condition in self._conditions.values() if condition.since]
        return min(began) - 2 if began else None  # iteration i draws with the weights that i - 1 left

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {
            "brake": self._brake,
            "running": {name: [each.policy, each.base] for name, each in self._running.items()},
            "conditions": {name: [c.alarmed, c.turned, c.since] for name, c in self._conditions.items()},
            "spread": list(self._spread),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back a checkpoint's `state`; an empty one, of an earlier version, changes nothing."""
        if not state:
            return
        self._brake = state["brake"]
        self._running |= {name: Running(*each) for name, each in state["running"].items() if name in WATCHED}
        self._conditions |= {name: Condition(*each) for name, each in state["conditions"].items() if name in WATCHED}
        self._spread = tuple(state["spread"])

    def _seen(self, iteration: int, prompts: Sequence[Prompt], rewards: Rewards) -> dict[str, float]:
        rows = [row for row, prompt in enumerate(prompts) if prompt.label == POSITIVE]
        if self._base is None or self._encoder is None or rewards.features is None or len(rows) < 2:
            return {}
        texts = self._encoder.encode_text([prompts[row].text for row in rows])
        features = rewards.features.detach().cpu()[rows]
        compared = self._base.compare([prompts[row].id for row in rows], features, texts)
        for name, seen in compared.items():
            self._running[name] = self._running[name].after(seen)
        values = {name: self._running[name].value(name) for name in WATCHED}
        over = {name: alarm.excess(name, value, self._guard) for name, value in values.items()}
        for name, value in values.items():
            before = self._conditions[name]
            self._conditions[name] = after = before.after(iteration, over[name] > 0, self._guard.patience)
            if after.alarmed != before.alarmed:
                sentence = alarm.begun if after.alarmed else alarm.ended
                self._say(f"guard: {sentence(name, value, self._guard)}")
        if self._guard.action == "adapt":
            self._brake = control.brake_after(self._brake, max(over.values()), self.alarmed)
        braking = {"guard/brake": self._brake} if self._guard.action == "adapt" else {}
        metrics = {f"guard/{name}": value for name, value in values.items()}
        return metrics | {"guard/alarm": float(self.alarmed)} | braking

    def _reward_spread(self, rewards: Rewards) -> dict[str, float]:
        """The mean std within groups, in that of the first iterations; nothing where these had none."""
        spread = float(rewards.total.double().std(dim=1).mean())
        total, count = self._spread
        if count < _FIRST:
            self._spread = total, count = total + spread, count + 1
        return {"guard/reward_spread": spread / (total / count)} if total > 0 else {}


def _comparable(config: TrainConfig) -> GuardConfig:
    """Without a limit within prompts where a group starts from one latent: the base model's pictures do not."""
    alike = config.rollout.initial_noise != "independent"
    return replace(config.guard, diversity_within=0.0) if alike else config.guard


def _blind(config: TrainConfig, sees: bool) -> str:
    if config.guard.action == "off":
        return ""
    if not sees:
        return "no term of the reward sees images through an encoder"
    if config.positives_per_iteration < 2:
        return "an iteration has fewer than two positive prompts"
    return ""
