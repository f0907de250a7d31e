"""An iteration whose rewards cannot be had, because servers elsewhere do not give them: all processes stop together.

Nothing was learned from it yet, so the weights are those of the last finished iteration, which a checkpoint then keeps.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from fastgrpo.rewards.terms import BrokenReward, ServiceFailed
from fastgrpo.run.failures import explain
from fastgrpo.system.console import complain
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.pulse import PULSE

Result = TypeVar("Result")


class Unscored(RuntimeError):
    """Raised on all processes together. error: what this one has met, if anything. speaker: who has to say it."""

    def __init__(self, error: BrokenReward | ServiceFailed | None, speaker: int) -> None:
        super().__init__(str(error or "another process has no rewards"))
        self.error, self.speaker = error, speaker

    def say(self, run: Path, ranks: Ranks) -> None:
        """Print the sentence once, on the process whose it is. All call this together."""
        PULSE.kept = ranks.agree(PULSE.kept)  # the first process writes checkpoints, and knows of the newest
        if self.error is not None and self.speaker == ranks.index:
            sentence = explain(self.error, run)
            complain(sentence if PULSE.kept in sentence else f"{sentence}; {PULSE.kept}")
        ranks.agree("it is said")  # or torchrun might end the speaker as soon as another has ended


def all_scored(results: Callable[[], Result], ranks: Ranks) -> Result:
    """What `results` returns, unless BrokenReward or ServiceFailed came of it on any process: then Unscored."""
    found, failed = None, None
    try:
        found = results()
    except (BrokenReward, ServiceFailed) as error:
        failed = error
    failures = ranks.gather(torch.tensor([int(failed is not None)])).nonzero().flatten().tolist()
    if failures:
        raise Unscored(failed, failures[0]) from failed
    assert found is not None
    return found
