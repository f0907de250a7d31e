"""Training from Python: what the command does, with rewards, prompts and callbacks of one's own."""

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgrpo.hooks import Callback, Hooks, Source
from fastgrpo.rewards.plugins import given_function
from fastgrpo.rewards.terms import RewardFunction, parse_terms
from fastgrpo.run.failures import explain
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.errors import ConfigError
from fastgrpo.training import HALTED, begin
from fastgrpo.validation import validate


@dataclass(frozen=True)
class Result:
    """What came of a training. The files are described in docs/using.md.

    run: its folder. iterations: how many are done. finished: whether these are all, or a callback, a signal or the
    guard has stopped it. metrics: what metrics.jsonl has of each. evaluation: what evaluation.json has, rates with
    intervals "before" and "after"; {} where it was stopped. unet: the newest checkpoint's, for diffusers.
    """

    run: Path
    iterations: int
    finished: bool
    metrics: list[dict[str, float]]
    evaluation: dict[str, Any]
    unet: Path


class Trainer:
    """One training.

        from fastgrpo import Trainer, load_config

        def redness(images, prompts):  # [N, 3, h, w] in [0, 1] and N prompts -> N numbers
            return images[:, 0].mean((1, 2))

        config = load_config("shapes", {"iterations": 8, "reward.terms": ["steering", "given:redness=0.5"]})
        result = Trainer(config, rewards={"redness": redness}).train()

    Where torchrun starts the program, it trains together with the other processes, as the command does.
    """

    def __init__(
        self,
        config: TrainConfig | str = "shapes",
        *,
        rewards: Mapping[str, RewardFunction] | None = None,
        source: Source | None = None,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
    ):
        """config: settings, or a preset's name or a FILE.toml. rewards: the functions of terms given:NAME, by name.

        source: says what is drawn in place of the settings' order of prompts, which are pictured and watched all the
        same. callbacks: called after every iteration. quiet: nothing on the terminal but warnings.
        Raises ConfigError for settings that are impossible, for rewards that no term names or that are missing, and for
        what cannot be called as it would be.
        """
        _check_given(config, rewards, source, callbacks)
        self.config = load_config(config) if isinstance(config, str) else config
        self._preset = Path(config).stem if isinstance(config, str) else "run"
        self._hooks, self._quiet = Hooks(dict(rewards or {}), source, tuple(callbacks)), quiet
        validate(self.config)
        asked = [term.given for term in parse_terms(self.config.reward.terms) if term.given]
        for name in self._hooks.rewards:
            if name not in asked:
                raise ConfigError(
                    f"rewards: no term asks for {name!r}; accepted is it where reward.terms has 'given:{name}', with "
                    "or without =WEIGHT."
                )
        for term in (term for term in parse_terms(self.config.reward.terms) if term.given):
            given_function(term, self._hooks.rewards)

    def train(self) -> Result:
        """Train in `config.run`, a new folder in runs/ where that is empty.

        Raises ConfigError as `__init__` does for what only loading shows; RuntimeError, FloatingPointError, OSError or
        MemoryError for what goes wrong, with a note of what there is to go on from; and what a callback raised, after
        the iteration was saved.
        """
        return self._begin(self.config, None)

    def resume(self, run: str | Path) -> Result:
        """Go on with the training in this folder, by its own settings but for the number of iterations."""
        folder = Path(run)
        if not (folder / "config.toml").is_file():
            raise ConfigError(f"resume {run}: there is no config.toml in it, so it is not a run that can go on.")
        config = replace(load_toml(folder / "config.toml"), iterations=self.config.iterations)
        validate(config)
        return self._begin(config, folder)

    def _begin(self, config: TrainConfig, resumed: Path | None) -> Result:
        found: list[Path] = []
        try:
            code = begin(config, self._preset, resumed, self._hooks, self._quiet, found.append)
        except (FloatingPointError, RuntimeError, MemoryError, OSError) as error:
            with suppress(type(error)):  # it is raised again where there is nothing to say
                error.add_note(explain(error, found[0] if found else None))
            raise
        run = found[0]
        if code == 1:  # servers that gave no scores, which was said
            raise RuntimeError(f"the training in {run} has failed")
        metrics = read_metrics(run / "metrics.jsonl")
        done = len(metrics)
        evaluated = done == config.iterations and code != HALTED and (run / "evaluation.json").is_file()
        evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8")) if evaluated else {}
        unet = run / "checkpoints" / f"iter-{done:06d}" / "unet"
        return Result(run, done, done == config.iterations, metrics, evaluation, unet)


def _check_given(config: object, rewards: object, source: object, callbacks: object) -> None:
    """Raise ConfigError for what is of a kind that cannot be used."""
    if not isinstance(config, str | TrainConfig):
        accepted = "a preset's name, a FILE.toml or what load_config returns"
        raise ConfigError(f"config is of type {type(config).__name__}; accepted is {accepted}.")
    if not isinstance(rewards, Mapping | None):
        kind = type(rewards).__name__
        raise ConfigError(f"rewards is of type {kind}; accepted is a dictionary of functions by their names.")
    if source is not None and not callable(getattr(source, "batch", None)):
        raise ConfigError(f"source is of type {type(source).__name__}, which has no batch(iteration) to call.")
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise ConfigError(f"callbacks is of type {type(callbacks).__name__}; accepted is a list, also of one function.")
    for number, callback in enumerate(callbacks):
        if not callable(callback):
            raise ConfigError(
                f"callbacks[{number}] is of type {type(callback).__name__}; accepted is a function of a fastgrpo.Step."
            )
        try:
            inspect.signature(callback).bind("step")
        except TypeError as error:
            raise ConfigError(
                f"callbacks[{number}] cannot be called with (step): {error}; accepted is a function of a fastgrpo.Step."
            ) from error
        except ValueError:
            pass  # a function written in C may have no signature to look at


def load_config(name: str | Path = "shapes", changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """The settings of a preset or a FILE.toml. changes: GROUP.NAME -> value, as in {"grpo.kl": 0.02}.

    Raises ConfigError for a preset, a name or a value that there is not.
    """
    return load_toml(find_preset(str(name)), changes)
