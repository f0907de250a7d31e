"""How many pairs and images are computed together."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from fastgrpo.engine import batch_size
from fastgrpo.engine.batch_size import MicroBatchFinder
from fastgrpo.engine.setup import decoded_at_once
from fastgrpo.models.check import describe
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.distributed import Ranks
from support.training import altered


@pytest.mark.parametrize(("samples", "batch"), [(64, 16), (64, 64), (24, 7), (5, 16), (1, 1)])
def test_what_is_decoded_at_once_is_known_beforehand(base: TrainConfig, samples: int, batch: int) -> None:
    """As `Policy.decode` splits the chunks of a rollout."""
    config = altered(base, {"rollout.decode_batch": batch})
    for chunk in (1, 4, 16, 22, 33, 64, 66):
        chunks = torch.empty(samples).split(chunk)
        expected = {len(latents) for part in chunks for latents in part.split(batch)}
        assert decoded_at_once(samples, chunk, config) == sorted(expected)


@pytest.mark.parametrize(
    ("settled", "given", "why"),
    [
        (8, 8, "micro-batch of 8 pairs, as micro_batch says"),
        (4, 8, "micro-batch of 4 pairs, as the run had them before"),
    ],
)
def test_the_memory_plan_is_said_for_a_settled_micro_batch_too(settled: int, given: int, why: str) -> None:
    config = replace(load_toml(find_preset("shapes")), micro_batch=given)
    said: list[str] = []
    find = MicroBatchFinder(config, describe(config.model), torch.device("cuda"), torch.bfloat16, Ranks(), said.append)
    unwanted = lambda size: pytest.fail("measured")  # noqa: E731
    assert find(unwanted, settled, unwanted) == settled
    assert said[-1] == why
    assert re.search(rf"update +{2 * settled} UNet samples' activations, bf16", "\n".join(said))


def test_processes_expect_and_take_what_the_first_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has less room, and fewer pairs would be faster here."""

    @dataclass(frozen=True)
    class BesideAFirst(Ranks):
        def agree(self, text: str) -> str:
            own.append(int(text))
            return str(first.pop(0))

    own, expected, first = [], [], [48, 96]
    monkeypatch.setattr(batch_size, "memory_room", lambda *_: 1)
    monkeypatch.setattr(batch_size, "fits_within", lambda *_: lambda size: True)
    monkeypatch.setattr(batch_size, "timed", lambda *_: lambda size: size**2)
    config, said = replace(load_toml(find_preset("shapes")), micro_batch=0), []
    find = MicroBatchFinder(
        config, describe(config.model), torch.device("cuda"), torch.bfloat16, BesideAFirst(1, 2), said.append
    )
    assert find(lambda size: None, 0, expected.append) == 96
    assert expected == [48]
    assert own[0] < 48
    assert own[1] < 96
    assert "timed uncompiled" in said[-1]
