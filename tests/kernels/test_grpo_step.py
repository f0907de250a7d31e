"""`grpo_step` and its parts: kernels under Triton's interpreter, the operators, plain operations and closed forms."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from fastgrpo.kernels import ddim_step as rollout_op
from fastgrpo.kernels import group_advantages as advantage_op
from fastgrpo.kernels import grpo_step as op
from fastgrpo.kernels.ddim_step import ddim_step
from fastgrpo.kernels.group_advantages import group_advantages
from fastgrpo.kernels.grpo_step import GrpoStep, GrpoStepArguments, clip_pair, clipped_loss, grpo_step
from fastgrpo.kernels.language import tl, triton
from fastgrpo.kernels.specs.grpo_step import SPEC
from fastgrpo.schedule import Schedule, make_schedule
from support import ROOT
from support.kernels import Recorder, interpreted, on_gpu, poisoned
from support.plain_step import (
    plain_advantages,
    plain_clipped_loss,
    plain_kl,
    plain_log_prob,
    plain_mean,
    plain_normalised_log_ratio,
)

SD = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = [pytest.param("kernel", marks=interpreted), "operator"]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
LOOPED = (3, 83, 67)
"""More elements than registers hold, and a last block that is not full."""


def schedule_of(prediction_type: str = "epsilon") -> Schedule:
    return make_schedule(SD | {"prediction_type": prediction_type, "steps_offset": 1}, 50, 1.0, CPU)


def tables_of(schedule: Schedule) -> torch.Tensor:
    return torch.stack([schedule.coef_sample, schedule.coef_output, schedule.sigma])


def make(groups=2, group_size=3, shape=(4, 8, 8), dtype=torch.float32, guidance=5.0, scale=1.0, tables=None, seed=0):
    """Arguments of `grpo_step`: a rollout, then outputs that have moved a little, so that ratios spread around 1."""
    generator = torch.Generator().manual_seed(seed)
    pairs = groups * group_size
    halves = 1 if guidance is None else 2
    old_output = scale * torch.randn(halves * pairs, *shape, generator=generator)
    latents, noise = torch.randn(2, pairs, *shape, generator=generator)
    tables = tables_of(schedule_of()) if tables is None else tables
    step = torch.randint(tables.shape[1] - 1, (pairs,), generator=generator)
    taken, old_log_prob, old_mean = ddim_step(
        old_output.to(dtype), latents, tables, step, guidance, noise, keep_mean=True
    )
    output = (old_output + 0.02 * scale * torch.randn(old_output.shape, generator=generator)).to(dtype)
    base_output = (old_output + 0.05 * scale * torch.randn(old_output.shape, generator=generator)).to(dtype)
    index = torch.randperm(pairs, generator=generator)
    rewards, group = torch.randn(groups, group_size, generator=generator), index // group_size
    return {
        "output": output,
        "latents": latents,
        "taken": taken,
        "tables": tables,
        "step": step,
        "guidance": guidance,
        "old_log_prob": old_log_prob,
        "old_mean": old_mean,
        "base_output": base_output,
        "rewards": rewards,
        "group": group,
        "reward": rewards[group, index % group_size],
        "weight": torch.rand(pairs, generator=generator) + 0.5,
    }


def options(arguments, kl=0.0, ratio_norm=False, own=False, **settings):
    """The keyword arguments of one variant of the loss."""
    chosen = dict(arguments)
    base_output, old_mean = chosen.pop("base_output"), chosen.pop("old_mean")
    if isinstance(kl, torch.Tensor) or kl:
        chosen |= {"base_output": base_output, "kl_weight": kl}
    if ratio_norm:
        chosen |= {"ratio_norm": True, "old_mean": None if own else old_mean}
    if own:
        chosen["old_log_prob"] = None
    return chosen | {"clip_low": 2e-3, "clip_high": 3e-3} | settings


def filled(arguments: dict) -> GrpoStepArguments:
    """The operator's arguments, from keyword arguments of `grpo_step`."""
    defaults = dict.fromkeys(("old_log_prob", "old_mean", "rewards", "group", "reward", "advantage", "base_output")) | {
        "weight": 1.0,
        "mode": "group",
        "std_floor": 1e-6,
        "clamp": 2.5,
        "kl_weight": 0.0,
        "ratio_norm": False,
        "rescale": 0.0,
    }
    made = defaults | arguments
    for name in ("guidance", "weight", "kl_weight"):
        if isinstance(made[name], float):
            made[name] = torch.tensor([made[name]])
    return GrpoStepArguments(**made)


def launch(**arguments) -> GrpoStep:
    """The kernel itself, interpreted, on memory full of NaN."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here: the GPU tests run them")
    with poisoned():
        return op._launch_grpo_step(*filled(arguments))


def reference(**arguments) -> GrpoStep:
    """The operation in PyTorch, from the same keyword arguments."""
    return op.reference(filled(arguments))


def total(results: GrpoStep, weight, kl_weight: float = 0.0, **_) -> torch.Tensor:
    """What the gradient is of."""
    return (weight * (results.loss + kl_weight * results.kl)).sum()


def slots(arguments: dict) -> torch.Tensor:
    """[N] int64: where in its group each pair's reward is."""
    return (arguments["rewards"][arguments["group"]] == arguments["reward"][:, None]).int().argmax(dim=1)


def given_advantages(arguments: dict, advantage: torch.Tensor) -> dict:
    return {k: v for k, v in arguments.items() if k not in ("rewards", "group", "reward")} | {"advantage": advantage}


VARIANTS = {
    "plain": {},
    "kl": {"kl": 0.3},
    "own": {"own": True},
    "ratio_norm": {"ratio_norm": True, "clip_low": 1e-5, "clip_high": 1e-5},  # its log-ratios are smaller
    "ratio_norm_own_kl": {"ratio_norm": True, "own": True, "kl": 0.1},
    "rescale": {"rescale": 0.7},
    "rescale_kl": {"rescale": 0.7, "kl": 0.3},
    "global": {"mode": "global"},
    "none": {"mode": "none"},
}


def rescaled(guided, conditional, phi):
    dims = (1, 2, 3)
    stds = [(t - t.mean(dims, True)).square().sum(dims, True).sqrt() for t in (guided, conditional)]
    return guided * (phi * stds[1] / stds[0] + 1 - phi)


def closed_form(arguments, rescaled=rescaled) -> GrpoStep:
    """All in float64, with the gradient by autograd of formulas written as in the papers."""
    a = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    output = a["output"].requires_grad_()
    dims = (1, 2, 3)

    def mean_of(output):
        guided = output
        if a["guidance"] is not None:
            uncond, cond = output.chunk(2)
            guided = (1 - a["guidance"]) * uncond + a["guidance"] * cond
            phi = a.get("rescale", 0.0)
            if phi and guided[0].numel() > 1:
                guided = rescaled(guided, cond, phi)
        coef_sample, coef_output = (row[a["step"]].reshape(-1, 1, 1, 1) for row in a["tables"][:2])
        return coef_sample * a["latents"] + coef_output * guided

    mean, sigma = mean_of(output), a["tables"][2][a["step"]]
    wide = sigma.reshape(-1, 1, 1, 1)
    if a.get("ratio_norm"):
        old_mean = mean.detach() if a["old_mean"] is None else a["old_mean"]
        log_ratio = ((mean - old_mean) * (a["taken"] - old_mean) / wide).mean(dims)
    else:
        new = torch.distributions.Normal(mean, wide).log_prob(a["taken"]).mean(dims)
        log_ratio = new - (new.detach() if a["old_log_prob"] is None else a["old_log_prob"])
    if "advantage" in a:
        advantage = a["advantage"]
    else:
        centred = a["rewards"] - a["rewards"].mean(1, True)
        std = (centred.square().sum(1, True) / (centred.shape[1] - 1)).sqrt()
        scale = {"group": std, "global": (centred.square().sum() / (centred.numel() - 1)).sqrt(), "none": 1.0}
        table = (centred / scale[a.get("mode", "group")]).clamp(-2.5, 2.5)
        advantage = table[a["group"], slots(a)]
    ratio = log_ratio.exp()
    loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - a["clip_low"], 1 + a["clip_high"]))
    clipped = (-advantage * ratio < loss) * (ratio - 1).sign()
    kl = torch.zeros_like(loss)
    if "base_output" in a:
        with torch.no_grad():
            base_mean = mean_of(a["base_output"])
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, wide), torch.distributions.Normal(base_mean, wide)
        ).mean(dims)
    (gradient,) = torch.autograd.grad((a["weight"] * (loss + a.get("kl_weight", 0.0) * kl)).sum(), output)
    return GrpoStep(*(t.detach() for t in (loss, ratio, clipped.to(torch.int8), kl, gradient)))


def assert_matches(ours: GrpoStep, exact: GrpoStep, dtype: torch.dtype, spread: float = 1.0) -> None:
    """Within what rounding to float32 inside, and to `dtype` at the end, may do.

    spread: how large the guided output is compared to that of unit outputs.
    """
    # A guided output below 60 is rounded three times to float32. What moves a residual is coef_output / sigma of that,
    # at most 1.1 in SD's schedule, and the log-prob by it times the mean |residual|, of about 1; ratios lie below 2,
    # advantages below 2.5.
    error = 3 * 60 * 2.0**-24 * 1.1 * spread
    torch.testing.assert_close(ours.ratio.double(), exact.ratio, rtol=4 * error, atol=0)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=4 * error, atol=4 * error)
    torch.testing.assert_close(ours.kl.double(), exact.kl, rtol=8 * error, atol=2 * error)
    assert torch.equal(ours.clipped, exact.clipped)
    assert ours.gradient.dtype == dtype
    # The interpreter truncates bfloat16: a whole unit in the last place. float16 may be subnormal. A gradient that is a
    # small difference of large ones (rescale, KL) errs by its largest neighbours.
    size = exact.gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    bound = torch.finfo(dtype).eps * exact.gradient.abs() + 8 * error * size
    bound = bound + (2.0**-24 if dtype == torch.float16 else 0)
    assert ((ours.gradient.double() - exact.gradient).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_is_the_float64_closed_form(variant, dtype):
    arguments = options(make(shape=(3, 5, 7), dtype=dtype), **VARIANTS[variant])
    ours, exact = launch(**arguments), closed_form(arguments)
    assert exact.gradient.abs().max() > 0
    assert (exact.clipped != 0).any() or VARIANTS[variant].get("own")
    assert_matches(ours, exact, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize(
    ("groups_and_size", "shape"),
    [
        ((1, 2), (1, 1, 1)),
        ((1, 2), (3, 5, 7)),
        ((3, 5), (1, 1, 1)),
        ((2, 4), (4, 8, 8)),
        ((1, 64), (1, 1, 1)),
        ((1, 2), (3, 41, 37)),  # two blocks in registers, of which the last is not full
        ((1, 2), (4, 64, 64)),  # SD 1.x: all that registers hold
    ],
)
def test_kernel_at_other_sizes(groups_and_size, shape, guidance):
    _, keep, _, _ = op.grpo_tiling(math.prod(shape), torch.float32, guidance is not None, False, False, 0.0)
    assert keep == (guidance is not None)
    # Steps without the last: there one element's ratio is beyond any bound.
    arguments = options(
        make(*groups_and_size, shape=shape, guidance=guidance, tables=tables_of(schedule_of())[:, :40].contiguous())
    )
    assert_matches(launch(**arguments), closed_form(arguments), torch.float32)


@pytest.mark.parametrize(
    ("variant", "channels_last"), [("plain", True), ("kl", False), ("rescale_kl", False), ("ratio_norm", True)]
)
def test_kernel_on_latents_larger_than_its_registers(variant, channels_last):
    arguments = options(make(1, 2, shape=LOOPED, dtype=torch.bfloat16), **VARIANTS[variant])
    if channels_last:
        arguments["output"] = arguments["output"].contiguous(memory_format=torch.channels_last)
    assert_matches(launch(**arguments), closed_form(arguments), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "ratio_norm", "rescale_kl"])
@pytest.mark.parametrize("path", PATHS)
def test_layout_of_the_output_is_the_gradient_s_and_changes_nothing(variant, path):
    run = launch if path == "kernel" else grpo_step
    arguments = options(make(shape=(3, 5, 7), dtype=torch.bfloat16), **VARIANTS[variant])
    output = arguments["output"]
    expected = run(**arguments)
    last = run(**arguments | {"output": output.contiguous(memory_format=torch.channels_last)})
    spaced = torch.empty(*output.shape, 2, dtype=output.dtype).fill_(torch.nan)[..., 0].copy_(output)
    apart = run(**arguments | {"output": spaced, "latents": arguments["latents"].mT.contiguous().mT})
    assert last.gradient.is_contiguous(memory_format=torch.channels_last)
    for other in (last, apart):
        # Sums in another order, in float64: each float32 result is a neighbour at most, and the bfloat16 gradient with
        # it.
        for name in ("loss", "ratio", "kl"):
            torch.testing.assert_close(getattr(other, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.gradient, expected.gradient, rtol=2.0**-7, atol=1e-9)


@pytest.mark.parametrize("variant", ["plain", "kl", "ratio_norm"])
def test_every_argument_may_be_strided(variant):
    arguments = options(make(), **VARIANTS[variant])
    expected = launch(**arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name != "tables":  # which are refused
            spaced = value.unsqueeze(-1).repeat(*[1] * value.dim(), 3)
            spaced[..., 1:] = 0
            arguments[name] = spaced[..., 0]
            assert value.numel() == 1 or not arguments[name].is_contiguous()
    for strided in (launch(**arguments), grpo_step(**arguments)):
        torch.testing.assert_close(strided.loss, expected.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(strided.gradient, expected.gradient, rtol=1e-6, atol=1e-6)
    one_weight = launch(**arguments | {"weight": torch.tensor([0.5]).expand(6)})
    assert torch.equal(one_weight.gradient, launch(**arguments | {"weight": 0.5}).gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rescale", "channels_last"),
    [
        ((1, 1, 1), 0.0, False),
        ((3, 5, 7), 0.7, True),
        ((4, 8, 8), 0.0, False),
        ((4, 8, 8), 0.0, True),
        ((3, 41, 37), 0.0, False),
        ((3, 41, 37), 0.7, False),
        (LOOPED, 0.0, True),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_ratio_is_exactly_one_after_ddim_step(shape, dtype, rescale, channels_last, path):
    pairs = 2
    arguments = make(1, pairs, shape, dtype)
    if channels_last:
        arguments["output"] = arguments["output"].contiguous(memory_format=torch.channels_last)
    step = torch.tensor([10, 49])
    noise = torch.randn(pairs, *shape, generator=torch.Generator().manual_seed(1))
    given = (arguments["output"], arguments["latents"], arguments["tables"], step)
    if path == "kernel":
        taken, old_log_prob, old_mean = rollout_op._launch_ddim_step(
            *given, torch.tensor([5.0]), noise, rescale, True, False
        )
    else:
        taken, old_log_prob, old_mean = ddim_step(*given, 5.0, noise, rescale=rescale, keep_mean=True)
    arguments |= {"taken": taken, "old_log_prob": old_log_prob, "old_mean": old_mean, "step": step}
    run = launch if path == "kernel" else grpo_step
    for variant in ({}, {"ratio_norm": True}):
        ours = run(**options(arguments, rescale=rescale, clip_low=0.0, clip_high=0.0, **variant))
        assert (ours.ratio == 1).all()
        assert (ours.clipped == 0).all()
        assert (ours.gradient != 0).any() or shape == (1, 1, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "shape", "rescale", "channels_last"),
    [
        *((dtype, (4, 64, 64), 0.0, False) for dtype in DTYPES),
        (torch.bfloat16, (4, 64, 64), 0.0, True),
        (torch.bfloat16, (4, 96, 96), 0.0, False),
        (torch.bfloat16, (4, 64, 64), 0.7, False),
        (torch.bfloat16, (3, 41, 37), 0.0, False),
    ],
)
def test_ratio_is_one_where_the_update_cuts_the_rollout_otherwise(dtype, shape, rescale, channels_last, device):
    """Samples step together; pairs of other samples and steps are learned from together."""
    generator = torch.Generator().manual_seed(4)
    form = torch.channels_last if channels_last else torch.contiguous_format
    steps, samples = (10, 30, 49), 4
    tables = tables_of(schedule_of()).to(device)
    latents = torch.randn(samples, *shape, generator=generator).to(device)
    guidance = torch.tensor([5.0], device=device)
    outputs, before, after, old = [], [], [], []
    for step in steps:
        output = torch.randn(2 * samples, *shape, generator=generator).to(device, dtype).contiguous(memory_format=form)
        noise = torch.randn(samples, *shape, generator=generator).to(device)
        at = torch.tensor([step], device=device)
        following, log_prob = ddim_step(output, latents, tables, at, guidance, noise, rescale=rescale)
        outputs.append(output.unflatten(0, (2, samples)))
        before.append(latents)
        after.append(following)
        old.append(log_prob)
        latents = following
    order = torch.randperm(len(steps) * samples, generator=generator).to(device)
    for pairs in order.split(5):
        ours = grpo_step(
            torch.cat(outputs, dim=1)[:, pairs].flatten(0, 1).contiguous(memory_format=form),
            torch.cat(before)[pairs],
            torch.cat(after)[pairs],
            tables,
            torch.tensor(steps, device=device).repeat_interleave(samples)[pairs],
            guidance,
            torch.cat(old)[pairs],
            advantage=torch.ones(len(pairs), device=device),
            rescale=rescale,
        )
        # PyTorch's sums on the CPU may take another order for another batch: a unit in the last place of a log-prob
        # below 8.
        assert (ours.ratio - 1).abs().max() <= (0 if device == "cuda" else 2.0**-21)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_computes_what_its_inputs_are_at_each_replay():
    generator = torch.Generator().manual_seed(6)
    output = torch.randn(12, 4, 64, 64, generator=generator).cuda().bfloat16()
    latents, noise = torch.randn(2, 6, 4, 64, 64, generator=generator).cuda()
    tables, step, guidance = tables_of(schedule_of()).cuda(), torch.tensor([30]).cuda(), torch.tensor([5.0]).cuda()
    rewards, group = torch.randn(2, 3).cuda(), torch.arange(6).cuda() // 3

    def run():
        following, old = ddim_step(output, latents, tables, step, guidance, noise)
        pairs = {"rewards": rewards, "group": group, "reward": rewards.flatten()}
        return following, *grpo_step(output, latents, following, tables, step, guidance, old, **pairs)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(3):
        noise.normal_()
        rewards.normal_()
        graph.replay()
        assert (results[2] == 1).all()
        assert all(map(torch.equal, results, run()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [None, 7.3])
@pytest.mark.parametrize("variant", ["plain", "kl", "own", "ratio_norm", "ratio_norm_own_kl", "global", "none"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_cpu_operator_is_the_chain_of_plain_operations_bit_for_bit(dtype, guidance, variant, prediction_type):
    """The loss and its gradient by autograd, from the UNet's output on."""
    schedule, part_size, scale = schedule_of(prediction_type), 7, 1024.0
    arguments = make(dtype=dtype, guidance=guidance, tables=tables_of(schedule))
    settings = {"kl": 0.0, "ratio_norm": False, "own": False, "mode": "group"} | VARIANTS[variant]
    # With ranges so narrow nearly every ratio is out of bounds, and for about half of them that decides.
    arguments["weight"] = scale / part_size
    ours = grpo_step(**options(arguments, **settings) | {"clip_low": 1e-5, "clip_high": 2e-5})

    output, step = arguments["output"].clone().requires_grad_(), arguments["step"]

    def mean_of(output):
        return plain_mean(output, arguments["latents"], arguments["tables"], step, guidance)

    mean, sigma = mean_of(output), schedule.sigma[step]
    if settings["ratio_norm"]:
        old_mean = mean.detach().float() if settings["own"] else arguments["old_mean"]
        log_ratio = plain_normalised_log_ratio(mean, old_mean, arguments["taken"], sigma)
    else:
        log_prob = plain_log_prob(arguments["taken"], mean, sigma)
        log_ratio = log_prob - (log_prob.detach() if settings["own"] else arguments["old_log_prob"])
    advantage = plain_advantages(arguments["rewards"], settings["mode"], 1e-6, 2.5)
    loss, ratio, clipped = plain_clipped_loss(log_ratio, advantage[arguments["group"], slots(arguments)], 1e-5, 2e-5)
    policy_loss, kl = loss, torch.zeros_like(loss)
    if settings["kl"]:
        kl = plain_kl(mean, mean_of(arguments["base_output"]), sigma)
        loss = loss + settings["kl"] * kl
    (gradient,) = torch.autograd.grad(loss.sum() * scale / part_size, output)

    if not settings["own"]:
        assert 0 < clipped.sum() < len(clipped)
    assert torch.equal(ours.loss, policy_loss)
    assert torch.equal(ours.ratio, ratio)
    assert torch.equal(ours.clipped != 0, clipped)
    assert torch.equal(ours.clipped > 0, clipped & (ratio > 1))
    assert torch.equal(ours.kl, kl)
    assert torch.equal(ours.gradient, gradient)


def test_gradient_is_finite_differences():
    """Of the CPU operator's total in float32 along random directions, with everything switched on."""
    arguments = options(make(shape=(3, 5, 7)), kl=0.3, rescale=0.7, mode="global")
    gradient = grpo_step(**arguments).gradient.double()
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        step = 1e-6
        high, low = (reference(**wide | {"output": wide["output"] + s * step * direction}) for s in (1, -1))
        slope = (total(high, **wide) - total(low, **wide)) / (2 * step)
        # Central differences: 1e-16 / 1e-6 of rounding and 1e-12 of curvature; the gradient itself is float32.
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-5)


@interpreted
def test_extremes():
    """Outputs of 1e4, sigma 1e-3 and 0, and a ratio that overflows: losses as of the plain chain, never NaN."""
    tables = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-0.03] * 4, [1e-3, 0.0, 0.2, 0.5]])
    arguments = make(1, 4, dtype=torch.bfloat16, scale=1e4, tables=tables)
    arguments = given_advantages(arguments, torch.tensor([1.0, 1.0, -1.0, 1.0])) | {"step": torch.arange(4)}
    given = (arguments["output"], arguments["latents"], tables, torch.arange(4))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    guidance = torch.tensor([5.0])
    taken, old, old_mean = rollout_op._launch_ddim_step(*given, guidance, noise, 0.0, True, False)
    arguments |= {"taken": taken, "old_log_prob": old, "old_mean": old_mean}
    still = launch(**options(arguments))
    assert still.ratio.tolist() == [1, 1, 1, 1]
    assert torch.isfinite(still.gradient).all()
    for half in still.gradient.chunk(2):
        assert (half[1] == 0).all()  # sigma 0
        assert (half[[0, 2, 3]] != 0).any(dim=(1, 2, 3)).all()
    # exp(log_prob - old): exp(200) is above the largest float32, exp(-200) below the smallest.
    arguments["old_log_prob"] = old + torch.tensor([200.0, 0.0, -200.0, -200.0])
    moved = launch(**options(arguments))
    plain = grpo_step(**options(arguments))
    assert moved.ratio.tolist() == [0, 1, math.inf, math.inf]
    assert moved.loss.tolist() == [0, -1, math.inf, plain.loss[3].item()]
    assert moved.clipped.tolist() == plain.clipped.tolist() == [0, 0, 0, 1]
    for half in (*moved.gradient.chunk(2), *plain.gradient.chunk(2)):
        assert (half[3] == 0).all()  # though its ratio is infinite: the clip decides


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", ["plain", "kl", "ratio_norm", "rescale_kl"])
def test_a_step_without_noise_has_no_gradient(variant, path):
    arguments = make(1, 2, tables=torch.tensor([[1.0, 1.0], [-0.03, -0.03], [0.2, 0.0]]))
    arguments |= {"step": torch.tensor([0, 1]), "old_log_prob": arguments["old_log_prob"] * torch.tensor([1.0, 0.0])}
    run = launch if path == "kernel" else grpo_step
    ours = run(**options(arguments, **VARIANTS[variant]) | {"clip_low": 1.0, "clip_high": 1e9})
    assert (ours.ratio[1], ours.kl[1]) == (1, 0)
    for half in ours.gradient.chunk(2):
        assert (half[1] == 0).all()
        assert (half[0] != 0).any()


@pytest.mark.parametrize("path", PATHS)
def test_an_advantage_of_zero_has_loss_and_gradient_zero_whatever_the_ratio(path):
    arguments = given_advantages(options(make(1, 2)), torch.zeros(2))
    arguments |= {"old_log_prob": arguments["old_log_prob"] - torch.tensor([200.0, 0.0])}
    ours = (launch if path == "kernel" else grpo_step)(**arguments)
    assert ours.ratio[0] == math.inf
    assert (ours.loss == 0).all()
    assert (ours.gradient == 0).all()


def test_one_pair():
    arguments = options(make(1, 2, shape=(4, 8, 8)))
    one = {
        k: v[:1] if isinstance(v, torch.Tensor) and k not in ("tables", "rewards", "output") else v
        for k, v in arguments.items()
    }
    one["output"] = arguments["output"][[0, 2]]
    both, alone = launch(**arguments), launch(**one)
    assert torch.equal(alone.loss, both.loss[:1])
    assert torch.equal(alone.gradient, both.gradient[[0, 2]])
    assert torch.equal(alone.ratio, both.ratio[:1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["group", "global", "none"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (2, 64), (17, 64)])
def test_advantages_are_numpy_s(path, mode, shape):
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rewards[0] = 0.1  # flat, and not exact in binary
    run = group_advantages
    if path == "kernel":

        def run(*arguments):
            with poisoned():
                return advantage_op._launch_group_advantages(*arguments)

    advantage, flat = run(rewards, mode, 1e-6, 1.2)
    table = rewards.numpy().astype("f8")
    centred = table - table.mean(axis=1, keepdims=True)
    scale = {"group": table.std(axis=1, ddof=1, keepdims=True), "global": centred.std(ddof=1), "none": 1}[mode]
    with_zero = torch.from_numpy((centred[1:] / (scale[1:] if mode == "group" else scale)).clip(-1.2, 1.2))
    assert (advantage[0] == 0).all()
    assert flat.tolist() == [True] + [False] * (shape[0] - 1)
    # float64 throughout, rounded once.
    torch.testing.assert_close(advantage[1:], with_zero.float(), rtol=2.0**-23, atol=1e-12)
    if path == "operator":
        assert torch.equal(advantage, plain_advantages(rewards, mode, 1e-6, 1.2))
    for ours, expected in zip(run(rewards, mode, 0.0, 1.2), (advantage, flat), strict=True):
        assert torch.equal(ours, expected)  # a floor of 0 is a floor too


@pytest.mark.parametrize("mode", ["group", "global", "none"])
def test_flat_groups_have_advantage_zero_in_the_step(mode):
    """One group without spread, one with; then, by a floor above the common std, all flat with "global"."""
    arguments = make(2, 3)
    arguments["rewards"][1] = 0.1
    arguments |= {"group": torch.tensor([0, 0, 0, 1, 1, 1]), "reward": arguments["rewards"].flatten()}
    ours = launch(**options(arguments, mode=mode))
    assert (ours.loss[3:] == 0).all()
    assert (ours.loss[:3] != 0).all()
    for half in ours.gradient.chunk(2):
        assert (half[3:] == 0).all()
    group_std, common = (
        arguments["rewards"][0].std(),
        torch.cat([arguments["rewards"][0] - arguments["rewards"][0].mean(), torch.zeros(3)]).std(),
    )
    between = float(group_std + common) / 2
    assert common < between < group_std
    ours = launch(**options(arguments, mode=mode, std_floor=between))
    assert (ours.loss[:3] == 0).all() == (mode == "global")


@triton.jit
def clip_pairs_kernel(log_ratio, advantage, loss, ratio, clipped, low, high):
    i = tl.program_id(0)
    one_loss, one_ratio, one_clipped, _ = clip_pair(tl.load(log_ratio + i), tl.load(advantage + i), low, high)
    tl.store(loss + i, one_loss)
    tl.store(ratio + i, one_ratio)
    tl.store(clipped + i, one_clipped.to(tl.int8))


@pytest.mark.parametrize("path", PATHS)
def test_clipped_loss_alone(path):
    """Every combination of the advantage's sign and a ratio below, at, within and above the bounds."""
    ratio = torch.tensor([0.5, 0.8, 0.9, 1.0, 1.2, 1.25, 3.0])
    log_ratio, advantage = ratio.log().repeat(3), torch.tensor([1.5, -1.5, 0.0]).repeat_interleave(7)
    if path == "kernel":
        loss, ratios, clipped = torch.zeros(21), torch.zeros(21), torch.zeros(21, dtype=torch.int8)
        clip_pairs_kernel[(21,)](log_ratio, advantage, loss, ratios, clipped, 1 - 0.3, 1 + 0.22)
    else:
        loss, ratios, clipped, _ = clipped_loss(log_ratio, advantage, 0.3, 0.22)
    torch.testing.assert_close(ratios, ratio.repeat(3), rtol=4 * 2.0**-24, atol=0)
    positive, negative, zero = loss.split(7)
    torch.testing.assert_close(positive, -1.5 * ratio.clamp(max=1.22), rtol=1e-6, atol=0)
    torch.testing.assert_close(negative, 1.5 * ratio.clamp(min=0.7), rtol=1e-6, atol=0)
    assert (zero == 0).all()
    assert clipped.tolist() == [0, 0, 0, 0, 0, 1, 1, -1, 0, 0, 0, 0, 0, 0] + [0] * 7


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["group", "global", "none"])
@pytest.mark.parametrize(("groups", "group_size"), [(2, 3), (3, 8), (1, 19), (4, 2)])
def test_advantages_of_rewards_are_those_of_group_advantages_bit_for_bit(path, mode, groups, group_size):
    """Also of a flat group, of clamped ones, and of pairs that are some of the samples, one of them twice."""
    arguments = options(make(groups, group_size, shape=(4, 2, 2)), mode=mode, std_floor=1e-3, clamp=0.7)
    slot = slots(arguments)
    arguments["rewards"][-1, 1:] = arguments["rewards"][-1, 0] + 1e-4
    if groups > 1:
        arguments["rewards"][0, 0] = 40.0
    kernel = path == "kernel"
    run, alone = (launch, advantage_op._launch_group_advantages) if kernel else (grpo_step, group_advantages)
    table, flat = alone(arguments["rewards"], mode, 1e-3, 0.7)
    assert flat.any()
    assert groups == 1 or (table.abs() == torch.tensor(0.7)).any()
    if not kernel:
        assert torch.equal(table, plain_advantages(arguments["rewards"], mode, 1e-3, 0.7))
    arguments["group"][0], slot[0] = arguments["group"][1], slot[1]
    arguments["reward"] = arguments["rewards"][arguments["group"], slot]
    ours = run(**arguments)
    given = run(**given_advantages(arguments, table[arguments["group"], slot]))
    for a, b in zip(ours, given, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["group", "global", "none"])
def test_a_reward_that_is_none_of_the_group_s_is_compared_with_them_all_the_same(path, mode):
    """A branch's is the mean of what it led to."""
    arguments = options(make(3, 4, shape=(4, 2, 2)), mode=mode, own=True, clamp=0.5)
    rewards, group = arguments["rewards"], arguments["group"]
    arguments["reward"] = torch.stack([rewards[g, :2].mean() for g in group])
    run = launch if path == "kernel" else grpo_step
    scale = {"group": rewards.double().std(dim=1), "none": torch.ones(3).double()}
    scale["global"] = (rewards - rewards.mean(dim=1, keepdim=True)).double().square().sum().div(11).sqrt().expand(3)
    expected = ((arguments["reward"].double() - rewards.double().mean(dim=1)[group]) / scale[mode][group]).clamp(
        -0.5, 0.5
    )
    # Both are rounded once, to float32; "global" is centred in float32 here: an error of 2^-24 of rewards up to 4.
    torch.testing.assert_close(run(**arguments).loss, -expected.float(), rtol=2**-22, atol=2**-21)


@pytest.mark.parametrize("path", PATHS)
def test_an_advantage_s_bits_are_seen_in_the_loss(path):
    """What the test above rests on: with the ratio at 1 the loss is the advantage, negated."""
    arguments = options(make(3, 16, shape=(4, 2, 2)), own=True)
    kernel = path == "kernel"
    run, alone = (launch, advantage_op._launch_group_advantages) if kernel else (grpo_step, group_advantages)
    table, _ = alone(arguments["rewards"], "group", 1e-6, 2.5)
    assert torch.equal(run(**arguments).loss, -table[arguments["group"], slots(arguments)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(path, rescale):
    """Losses, KL and gradient are those of autograd through diffusers' function, in float64."""
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    arguments = options(make(shape=(4, 5, 7)), kl=0.3, rescale=rescale)
    exact = closed_form(arguments, pipeline.rescale_noise_cfg)
    assert_matches((launch if path == "kernel" else grpo_step)(**arguments), exact, torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", ["kl", "rescale_kl"])
def test_a_kl_weight_on_the_device_is_read_there_and_gives_the_bits_of_a_number(path, variant):
    """A tensor's content may change between calls, as between replays of a captured graph."""
    run, operand = launch if path == "kernel" else grpo_step, torch.empty(1)
    settings = VARIANTS[variant] | {"kl": operand}
    arguments = make(shape=(3, 5, 7))
    found = []
    for weight in (0.3, 0.1, 0.0):
        operand.fill_(weight)
        found.append(run(**options(arguments, **settings)))
        number = {"base_output": arguments["base_output"], "kl_weight": weight}
        exact = run(**options(arguments, **settings | {"kl": 0.0}) | number)
        assert all(map(torch.equal, found[-1], exact))
    assert not torch.equal(found[0].gradient, found[1].gradient)
    alone = run(**options(arguments, **settings | {"kl": 0.0}))
    torch.testing.assert_close(found[2].gradient, alone.gradient, rtol=1e-6, atol=0)  # of weight 0 it adds nothing


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_every_pair_may_have_a_kl_weight_of_its_own(path, rescale):
    arguments = options(make(shape=(4, 5, 7)), kl=torch.tensor([0.3, 0.0, 1.2, 0.0, 0.1, 2.0]), rescale=rescale)
    exact = closed_form(arguments)
    assert_matches((launch if path == "kernel" else grpo_step)(**arguments), exact, torch.float32)


def test_runs_are_the_same_bits():
    arguments = options(make(dtype=torch.bfloat16), kl=0.2)
    for a, b in zip(launch(**arguments), launch(**arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("variant", "given"),
    [
        ("plain", False),
        ("plain", True),
        ("own", True),
        ("ratio_norm", True),
        ("ratio_norm_own_kl", False),
        ("rescale_kl", False),
    ],
)
def test_opcheck(variant, given):
    arguments = options(make(1, 2), **VARIANTS[variant])
    if given:
        arguments = given_advantages(arguments, torch.tensor([1.0, -1.0]))
    arguments["output"] = arguments["output"].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fastgrpo.grpo_step.default, tuple(filled(arguments)))


def test_opcheck_of_group_advantages():
    torch.library.opcheck(torch.ops.fastgrpo.group_advantages.default, (torch.randn(3, 5), "global", 1e-6, 2.5))
    torch.library.opcheck(torch.ops.fastgrpo.group_advantages.default, (torch.randn(5, 3).mT, "group", 1e-6, 2.5))


def test_compiled_into_one_graph_it_is_the_same_bits():
    arguments = options(make(dtype=torch.bfloat16), kl=0.2)

    def step(output):
        return grpo_step(2 * output, **arguments)

    output = arguments.pop("output")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(output)
    assert all(map(torch.equal, step(output), compiled))


@pytest.mark.parametrize("aot", SPEC.aot, ids=lambda aot: aot.name)
def test_what_is_compiled_is_what_is_launched(aot, monkeypatch):
    monkeypatch.setattr(op, "grpo_step_kernel", recorder := Recorder())
    constants = {name: value for name, value in aot.constants.items() if value is not None}
    side, size, mode, old = (
        math.isqrt(constants["SIZE"] // 4),
        constants["GROUP_SIZE"],
        constants["MODE"],
        constants["OLD"],
    )
    dtype, guided = torch.float32 if aot.signature["output"] == "*fp32" else torch.bfloat16, constants["GUIDED"]
    output, latents = torch.zeros(1 + guided, 4, side, side, dtype=dtype), torch.zeros(1, 4, side, side)
    if constants["CHANNELS_LAST"]:
        output = output.contiguous(memory_format=torch.channels_last)
    zero = torch.zeros(1, dtype=torch.int64)
    arguments = {
        "output": output, "latents": latents, "taken": latents, "tables": tables_of(schedule_of()), "step": zero,
        "guidance": 5.0 if guided else None, "clip_low": 0.1, "clip_high": 0.1,
        "ratio_norm": old.endswith("mean"), "rescale": constants["RESCALE"],
        "base_output": output if constants["KL"] else None,
        "old_mean": latents if old == "mean" else None,
        "old_log_prob": torch.zeros(1) if old == "log_prob" else None,
    }  # fmt: skip
    if mode == "given":
        arguments |= {"advantage": torch.zeros(1)}
        constants |= {"GROUP_SIZE": 2, "BLOCK_G": 2}  # of no use to it
    else:
        arguments |= {"rewards": torch.zeros(1, size), "group": zero, "reward": torch.zeros(1), "mode": mode}
    launch(**arguments)
    assert recorder.options == constants | {"num_warps": aot.num_warps} | aot.options
    assert recorder.options["enable_fp_fusion"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(6, 4, 8, 8)}, "output is"),
        ({"taken": torch.zeros(6, 4, 8, 9)}, "taken is"),
        ({"old_log_prob": torch.zeros(5)}, "old_log_prob is"),
        ({"group": torch.zeros(6)}, "group is"),
        ({"reward": None}, "one of the two"),
        ({"advantage": torch.zeros(6)}, "one of the two"),
        ({"rewards": torch.zeros(6, 1)}, "G at least 2"),
        ({"mode": "batch"}, "group, global or none"),
        ({"weight": torch.zeros(5)}, "weight is"),
        ({"base_output": torch.zeros(6, 4, 8, 8)}, "base_output is"),
        ({"old_mean": torch.zeros(6, 4, 8, 8)}, "without ratio_norm"),
    ],
)
def test_bad_arguments_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        grpo_step(**options(make()) | change)


@pytest.mark.slow
def test_compiled_kernels_sum_the_log_prob_in_the_same_layout_as_ddim_step():
    """What the interpreter cannot show: the order of a GPU's sum is the layout of what is summed, which the compiler
    picks.

    In a process of its own, without the interpreter: every kernel that sums log-probs, by its block of float64
    residuals.
    """
    code = """
import json, re
import fastgrpo, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastgrpo.kernels.specs import ddim_step, grpo_step
found = {}
for aot in (*ddim_step.SPEC.aot, *grpo_step.SPEC.aot):
    if not aot.constants.get("OLD", "log_prob").endswith("log_prob") or aot.constants["SIZE"] != 16384:
        continue
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(aot.signature.values()) if t.startswith("*")}
    source = ASTSource(fn=aot.kernel, signature=aot.signature, constexprs=aot.constants, attrs=attrs)
    options = {"num_warps": aot.num_warps, **aot.options}
    assert options["enable_fp_fusion"] is False
    ir = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    layouts = dict(re.findall(r"^(#blocked[0-9]*) = (.*)$", ir, re.M))
    block = aot.constants["BLOCK"]
    sums = re.findall(r"tt\\.reduce.*?: \\(tensor<" + str(block) + r"xf64, (#[a-z0-9]+)>\\)", ir, re.S)
    kind = [aot.signature["output"], aot.constants["RESCALE"]]
    found[aot.name] = [kind, [block, aot.num_warps, *sorted({layouts[s] for s in sums})]]
print(json.dumps(found))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(printed.stdout)
    assert {"ddim_step_given", "ddim_step_taken", "grpo_step", "grpo_step_kl", "grpo_step_channels_last"} <= set(found)
    for output, rescale in itertools.product(("*bf16", "*fp32"), (0.0, 0.7)):
        sums = [how for kind, how in found.values() if kind == [output, rescale]]
        assert len(sums) > 3
        assert all(how == sums[0] for how in sums)
        assert len(sums[0]) == 3
