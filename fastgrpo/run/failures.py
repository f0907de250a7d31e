"""What a training that cannot go on says: one sentence of what went wrong, and what there is to go on from."""

from pathlib import Path

from fastgrpo.rewards.terms import BrokenReward, ServiceFailed
from fastgrpo.run import checkpoint
from fastgrpo.run.folder import keep_evidence
from fastgrpo.system.console import memory_full, reason
from fastgrpo.system.finite import BrokenPicture


def explain(error: Exception, run: Path | None) -> str:
    """The sentence for an error of a training in the folder `run`; None where there is no folder yet.

    Raises the error itself where it is none that people can do something about.
    """
    if isinstance(error, BrokenReward):
        return f"{error}; {_evidence(run, error)}"
    if isinstance(error, ServiceFailed):
        return f"{error}; {kept(run)}"
    if isinstance(error, BrokenPicture):
        return f"{error.sentence('engine.dtype')}; {_evidence(run, error)}; {kept(run)}"
    if isinstance(error, FloatingPointError):
        return f"{error}; {kept(run)}"
    if isinstance(error, OSError):
        return f"{reason(error)}; {kept(run)}"
    if full := memory_full(error):
        return f"{full}: lower micro_batch, rollout.batch, rollout.decode_batch or reward.batch; {kept(run)}"
    raise error


def kept(run: Path | None) -> str:
    """What there is to go on from."""
    newest = checkpoint.newest(run) if run else None
    return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _evidence(run: Path | None, error: BrokenReward | BrokenPicture) -> str:
    """Keep the prompt and the image, and say where they are."""
    assert run is not None, "a picture is drawn in a run"
    try:
        record, image = keep_evidence(run, error)
    except OSError as trouble:
        return f"prompt and image cannot be kept: {reason(trouble)}"
    return f"prompt and image are in {record} and {image.name} beside it"
