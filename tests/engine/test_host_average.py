"""The moving average in the host's memory against the one beside the weights, which the optimizer's own pass keeps."""

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.engine import host_average
from fastgrpo.engine.host_average import HostAverage
from fastgrpo.engine.trainable import Ema
from fastgrpo.engine.weights import FlatAdamW, FlatWeights

DECAY, STEPS = 0.75, 6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, the last of them not full."""
    monkeypatch.setattr(host_average, "_CHUNK", 7)


def stepped(away: bool, device: str = "cpu") -> tuple[Ema, FlatWeights, list[Tensor]]:
    """Six steps, of which one is left out since its gradient is not finite; also the average after each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(5, 9).to(device)
    weights = FlatWeights(dict(model.named_parameters()), ema=not away)
    host = HostAverage(weights.values, DECAY) if away else None
    optimizer = FlatAdamW(weights, lr=0.1, ema_decay=DECAY, average=host)
    ema, seen = Ema(optimizer), []
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (gradient if step != 2 else gradient / 0).to(device)
        optimizer.step()
        seen.append(torch.cat([average.flatten().cpu() for average in ema.average.values()]))
    return ema, weights, seen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_averages_are_those_of_the_optimizers_own_pass(device: str) -> None:
    (_, mine, host), (_, its, beside) = stepped(True, device), stepped(False, device)
    assert torch.equal(mine.values, its.values)
    assert mine.ema is None
    for after, other in zip(host, beside, strict=True):
        # Each step rounds three times, by half a unit of numbers below 1 each.
        torch.testing.assert_close(after, other, rtol=0, atol=STEPS * 3 * 2**-24)
    assert torch.equal(host[1], host[2])  # the step that was left out
    assert not torch.equal(host[2], host[3])


def test_in_place_the_model_has_the_averages_and_then_its_weights_again() -> None:
    ema, weights, seen = stepped(True)
    before, addresses = weights.values.clone(), [p.data_ptr() for p in weights.parameters.values()]
    with ema.in_place():
        assert torch.equal(torch.cat([p.detach().flatten() for p in weights.parameters.values()]), seen[-1])
        assert [p.data_ptr() for p in weights.parameters.values()] == addresses
    assert torch.equal(weights.values, before)
    assert torch.equal(torch.cat([average.flatten() for average in ema.average.values()]), seen[-1])
