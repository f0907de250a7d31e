"""The steered reward by an encoder that nothing is trained on: what games one encoder seldom pays in another."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastgrpo.rewards.encoder import SharedEncoder
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.steering import reward_metrics
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, Prompt


class HeldOutReward:
    """The config's `steering` with the encoder of `eval.encoder`, in float32."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Raises ConfigError, which speaks of eval.encoder, where that cannot be loaded."""
        plain = replace(config.reward, terms=("steering",), standardise="none")
        own = replace(plain, encoder=config.eval.encoder, tf32=False)
        try:
            self._reward = load_reward(own, device)
        except ConfigError as error:
            raise error.about("eval.encoder") from error

    def offload(self) -> None:
        """Keep the encoder in the host's memory while it is not used. On a CPU nothing is moved."""
        self._reward.offload()

    @property
    def encoder(self) -> SharedEncoder | None:
        """That of eval.encoder."""
        return self._reward.encoder

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[Prompt],
        group_size: int,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ) -> dict[str, float]:
        """eval/held_out_mean, eval/held_out_positive_mean, ... as `reward_metrics` has them.

        images: [P * G, 3, h, w] float32 in [0, 1], G of each prompt in a row. ranks: score a share of them each.
        """
        shared = len(prompts) >= ranks.count  # of fewer, some process would have none to score
        own = ranks.share(len(prompts)) if shared else slice(0, len(prompts))
        pictures = images[own.start * group_size : own.stop * group_size]
        scores = self._reward.score(pictures, tuple(prompts[own]), group_size)
        if shared:
            scores = {name: ranks.gather(score) for name, score in scores.items()}
        negative = torch.tensor([prompt.label == NEGATIVE for prompt in prompts])
        values = reward_metrics(self._reward.combine(scores), negative)
        return {name.replace("reward/", "eval/held_out_", 1): value for name, value in values.items()}
