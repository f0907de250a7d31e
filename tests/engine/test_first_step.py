"""The rows of a rollout's first step: which differ, and that computing those alone comes to the same."""

import pytest
import torch
from torch import Tensor

from fastgrpo.engine import first_step
from fastgrpo.engine.first_step import distinct_rows, forward_distinct, keeps_bits
from fastgrpo.rollout import initial_noise
from fastgrpo.unet.fused import patch_unet
from support.sd_pipelines import build_unet


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["shared", "per_prompt", "independent"])
@pytest.mark.parametrize("samples", [range(12), range(2, 7), range(4, 8), range(11, 12)])
def test_distinct_rows_are_those_that_differ(kind: str, guidance: float, samples: range) -> None:
    """Against the rollout's own latents and contexts, compared number by number."""
    group_size, prompts = 4, 3
    start = initial_noise(1, prompts, group_size, (2, 2, 2), kind, torch.Generator().manual_seed(0))
    part = slice(samples.start, samples.stop)
    texts = torch.randn(prompts, 7).repeat_interleave(group_size, 0)[part]
    latents, contexts = start[part], texts
    if guidance != 1.0:
        latents, contexts = latents.repeat(2, 1, 1, 1), torch.cat([torch.zeros_like(texts), texts])
    rows = distinct_rows(kind, group_size, samples, guidance)
    joined = torch.cat([latents.flatten(1), contexts], 1)
    assert torch.equal(rows.expand(rows.select(joined)), joined)
    assert len(rows.chosen) == len(joined.unique(dim=0))
    assert rows.saved == len(joined) - len(rows.chosen)


@pytest.mark.parametrize("kind", ["shared", "per_prompt", "independent"])
@torch.no_grad()
def test_the_first_step_from_its_distinct_rows(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build_unet(
            "sd1",
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
        ).to(memory_format=torch.channels_last)
    patch_unet(unet)
    group_size, prompts = 3, 2
    start = initial_noise(1, prompts, group_size, (4, 8, 8), kind, torch.Generator().manual_seed(0))
    texts = torch.randn(prompts + 1, 5, 32, generator=torch.Generator().manual_seed(1))
    latents = start.repeat(2, 1, 1, 1).to(memory_format=torch.channels_last)
    contexts = texts[torch.tensor([2, 2, 2, 2, 2, 2, 0, 0, 0, 1, 1, 1])]
    rows = distinct_rows(kind, group_size, range(6), 5.0)
    assert len(rows.chosen) == {"shared": 3, "per_prompt": 4, "independent": 12}[kind]
    computed = []

    def forward(*args: Tensor) -> Tensor:
        computed.append(len(args[0]))
        return unet(*args, return_dict=False)[0]

    timesteps = torch.full((12,), 981)
    output = forward_distinct(forward, rows, latents, timesteps, contexts)
    assert computed == [len(rows.chosen)]
    whole = forward(latents, timesteps, contexts)
    # Sums of a few hundred terms in some 50 layers, in another order: 1e-3 for float32's 6e-8 if nothing cancels,
    # and a hundredth of that since roundings do. A wrong row is off by 1e-2.
    assert (output - whole).norm() < 1e-4 * whole.norm()
    assert output.stride() == whole.stride()


@pytest.mark.parametrize("change", ["none", "bit", "layout", "nan"])
def test_one_bit_or_another_layout_is_told(change: str) -> None:
    """Fewer rows than all give another result; every output lies in the same memory, as with a CUDA graph."""
    rows = distinct_rows("shared", 3, range(3), 5.0)
    latents, contexts = torch.randn(6, 3, 4, 4), torch.randn(6, 5, 7)
    memory = torch.empty_like(latents)

    def forward(latents: Tensor, timesteps: Tensor, contexts: Tensor) -> Tensor:
        output = memory[: len(latents)]
        output.copy_(latents * 3 + timesteps.view(-1, 1, 1, 1) + contexts[:, :1, :1, None])
        if len(latents) == 6:
            return output
        if change == "bit":
            output[0, 0, 0, 0] = output[0, 0, 0, 0].nextafter(output.new_tensor(9e9))
        elif change == "nan":
            output[0, 0, 0, 0] = torch.nan
        return output.to(memory_format=torch.channels_last) if change == "layout" else output

    assert keeps_bits(forward, rows, torch.tensor([981]), latents, contexts) == (change == "none")


def test_the_savings_that_the_docstring_states() -> None:
    """Every row costs the same."""
    document = " ".join(first_step.__doc__.split())
    for kind in ("shared", "per_prompt"):
        saved = distinct_rows(kind, 16, range(64), 5.0).saved
        assert f"{100 * saved / (128 * 50):.2f} %" in document
    assert distinct_rows("independent", 16, range(64), 5.0).saved == 0
