"""The UNet's forward pass, alone and with the backward pass, per attention backend and number of rows.

On CUDA SD 1.5's with fastgrpo's own norms and activations, bf16 and channels_last, without torch.compile or graphs. On
a CPU the `shapes` UNet, a smoke test. `--throughput FOLDER` keeps what was measured, in unet.json.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from measure import CUDA, DEVICE, DeviceClock, free, warm_up
from pytest_benchmark.fixture import BenchmarkFixture
from workload import DTYPE, accounting_of, description, paper, random_policy, shapes

from fastgrpo.costs.throughput import Accounting
from fastgrpo.system.errors import ConfigError
from fastgrpo.unet import attention
from fastgrpo.unet.attention_choice import choose_backends
from fastgrpo.unet.compilation import make_example
from fastgrpo.unet.copies import computing_unet
from fastgrpo.unet.fused import patch_unet

CONFIG = paper() if CUDA else shapes(prompts=1)
ROWS = (8, 32, 128) if CUDA else (4,)
PASSES = ("forward", "forward + backward")
BACKENDS = tuple(attention.BACKENDS) if CUDA else ("sdpa", "flash")
TOKENS = description(CONFIG).text_encoder["max_position_embeddings"]
TIMER = DeviceClock() if CUDA else None


@pytest.fixture(scope="module")
def accounting() -> Accounting:
    return accounting_of(CONFIG)


@pytest.fixture(scope="module")
def kept(record: Any, accounting: Accounting) -> Any:
    return record("unet", rates=accounting.rates.to_json())


@functools.lru_cache(maxsize=1)
def _unet() -> UNet2DConditionModel:
    unet = computing_unet(random_policy(description(CONFIG)).unet, DTYPE)
    patch_unet(unet)
    free()
    return unet


def _call(direction: str, rows: int) -> Callable[[], Any]:
    unet = _unet()
    size = unet.config.sample_size
    inputs = make_example(unet, (unet.config.in_channels, size, size), TOKENS, DTYPE, DEVICE)
    latents, timesteps, contexts = (torch.cat([tensor] * (rows // 2)) for tensor in inputs)
    trained = list(unet.parameters())

    def forward() -> torch.Tensor:
        return unet(latents, timesteps, contexts, return_dict=False)[0]

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        output = forward()
        return torch.autograd.grad(output, trained, output.detach())

    return torch.no_grad()(forward) if direction == PASSES[0] else forward_and_backward


@pytest.mark.benchmark(**({"timer": TIMER} if CUDA else {}))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("direction", PASSES)
def test_unet(
    direction: str, rows: int, backend: str, benchmark: BenchmarkFixture, kept: Any, accounting: Accounting
) -> None:
    """A backend that this machine lacks, or that cannot do a shape, is left out with its reason."""
    benchmark.group = f"unet, {rows} rows, {direction}"
    unet = _unet()
    latent = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    shapes_of = attention.attention_shapes(unet, rows, latent, TOKENS)
    try:
        plan = choose_backends("sdpa" if backend == "sdpa" else backend, shapes_of, DEVICE, DTYPE)
        attention.apply_plan(unet, plan)
        call = _call(direction, rows)
        warm_up(call)
    except (ConfigError, torch.OutOfMemoryError) as error:
        free()
        pytest.skip(f"{backend}: {' '.join(str(error).split())[:200]}")
    served = sum(len(choice.shape.layers) for choice in plan.choices if choice.backend == backend)
    layers = sum(len(choice.shape.layers) for choice in plan.choices)
    benchmark.pedantic(TIMER.timed(call) if CUDA else call, rounds=5)
    seconds = benchmark.stats.stats.median
    flop = rows * (accounting.model.forward if direction == PASSES[0] else accounting.model.forward_backward)
    kept.add(
        backend=backend, rows=rows, direction=direction, seconds=seconds, flop=flop, layers=layers, served=served
    )  # fmt: skip
    free()
