"""What of a training was not finite: kept in RUN/not_finite/, said, and counted where it is left out.

    iter-000012-step-03-gradient.json   an optimizer step: what is known of the first pair that is to blame
    iter-000012-reward-0.json           a reward of process 0: its message and prompt

each with tensors beside it, .safetensors: the latents, the prompt's embedding and the image of the pair, or the image.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastgrpo.engine.not_finite import NotFinite
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import complain, reason, warn
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.files import write_all_atomically
from fastgrpo.system.pulse import PULSE
from fastgrpo.system.watchdog import OthersEnded
from fastgrpo.types import UpdateStats


class LeftOut:
    """Knows how many iterations in a row have had something left out; a resumed run begins at none again."""

    def __init__(self, config: TrainConfig, ranks: Ranks, run: Path | None = None):
        """run: the folder to keep things in; None keeps nothing."""
        self._run, self._ranks = run, ranks
        self._skips, self._most = config.engine.not_finite == "skip", config.engine.skip_at_most
        self._row = 0

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Keeps what a NotFinite of the block is about, names the files and ends the training."""
        try:
            yield
        except NotFinite as error:
            speaker, sentence = self._kept(error)
            self._end(sentence, speaker, error)

    def counted(
        self, iteration: int, broken: Sequence[BrokenReward], whole: Tensor, stats: UpdateStats
    ) -> dict[str, float]:
        """Keeps and says what an iteration has left out. Returns skip/groups and skip/steps, if that is asked for.

        broken: this process's rewards that were not finite. whole: [P] bool, of all processes' groups.
        Raises FloatingPointError, or OthersEnded where that was said, where it is too many iterations in a row.
        """
        if not self._skips:
            return {}
        for number, reward in enumerate(broken):
            stem = f"iter-{iteration:06d}-reward-{self._ranks.index}" + (f"-{number}" if number else "")
            warn(f"iteration {iteration}: {self._kept_reward(stem, reward)}; its group is left out")
        for error in stats.left_out:
            assert isinstance(error, NotFinite)
            speaker, sentence = self._kept(error)
            if speaker == self._ranks.index:
                warn(f"{sentence}; the step is left out")
        groups = int((~whole).sum())
        self._row = self._row + 1 if groups or stats.left_out else 0
        if self._row >= self._most:
            what = f"{self._row} iterations in a row" if self._row > 1 else "an iteration"
            folder = f"; {self._run / 'not_finite'} has more" if self._run else ""
            self._end(f"{what} had rewards, losses or gradients that are not finite{folder}", 0)
        return {"skip/groups": float(groups), "skip/steps": float(len(stats.left_out))}

    def _kept(self, error: NotFinite) -> tuple[int, str]:
        """Keep it on one process that knows of a pair, else on the first.

        Returns the process, and the sentence that it has to say.
        """
        own = self._ranks.gather(torch.tensor([int(error.own)])).nonzero().flatten().tolist()
        speaker = own[0] if own else 0
        if speaker != self._ranks.index or self._run is None:
            return speaker, error.message
        record = error.record
        stem = f"iter-{record['iteration']:06d}-step-{record['optimizer_step']:02d}-{record['kind']}"
        return speaker, f"{error.message}; {self._write(stem, {'message': error.message, **record}, error.tensors)}"

    def _kept_reward(self, stem: str, error: BrokenReward) -> str:
        if self._run is None:
            return error.message
        record = {"message": error.message, **asdict(error.prompt)}
        return f"{error.message}; {self._write(stem, record, {'image': error.image})}"

    def _write(self, stem: str, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Returns the clause that says where the files are."""
        assert self._run is not None
        path = self._run / "not_finite" / f"{stem}.json"
        files, where = {path: json.dumps(record, indent=2, ensure_ascii=False).encode()}, f"what is known is in {path}"
        if tensors:
            # A step's latents are a view of the trajectory's: only their own numbers are written.
            own = {
                name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in tensors.items()
            }
            files[path.with_suffix(".safetensors")] = save(own)
            where += " and the .safetensors file beside it"
        try:
            path.parent.mkdir(exist_ok=True)
            write_all_atomically(files)
        except OSError as trouble:
            return f"what is known cannot be kept: {reason(trouble)}"
        return where

    def _end(self, sentence: str, speaker: int, error: NotFinite | None = None) -> None:
        """End the training on all processes, which call this together: one of them speaks."""
        if self._ranks.count == 1:
            raise FloatingPointError(sentence) from error
        kept = self._ranks.agree(PULSE.kept)  # the first process writes checkpoints, and knows of the newest
        if speaker == self._ranks.index:
            complain(f"{sentence}; {kept}")
        self._ranks.agree("it is said")  # or torchrun might end the speaker as soon as another has ended
        raise OthersEnded(sentence) from error
