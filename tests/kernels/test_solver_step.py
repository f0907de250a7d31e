"""`solver_step`: the kernel under Triton's interpreter, the operator, and closed forms."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from fastgrpo.kernels import ddim_step as first_order
from fastgrpo.kernels import grpo_step as update_op
from fastgrpo.kernels import solver_step as op
from fastgrpo.kernels.ddim_step import ddim_step
from fastgrpo.kernels.solver_step import solver_step
from fastgrpo.kernels.specs.solver_step import SPEC
from fastgrpo.schedule import Schedule, make_mixed_schedule
from support import ROOT
from support.kernels import Recorder, interpreted, poisoned

SD = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")
# Of 20 places: 5 steps, 3 with noise, 5 steps. Second order are all without noise but the first of each five.
FIRST, SECOND, NOISY = 0, 2, 6


def schedule_of(prediction_type: str = "epsilon") -> Schedule:
    config = SD | {"prediction_type": prediction_type, "steps_offset": 1}
    return make_mixed_schedule(config, 20, 1.0, CPU, range(8, 11), 10, "dpm++")


def inputs(shape, dtype=torch.float32, halves=2, samples=2):
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(halves * samples, *shape, generator=generator).to(dtype)
    latents, noise, history = torch.randn(3, samples, *shape, generator=generator)
    return output, latents, noise, history


def launch(output, latents, schedule, step, guidance, noise, history, rescale=0.0):
    """The kernel itself, interpreted, on memory full of NaN."""
    guidance = None if guidance is None else torch.tensor([guidance])
    with poisoned():
        return op._launch_solver_step(
            output, latents, schedule.tables, step, guidance, noise, history, schedule.solver, rescale, True
        )


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype", "rescale", "guidance", "channels_last"),
    [
        ((1, 1, 1), torch.float32, 0.0, 5.0, False),
        ((3, 41, 37), torch.bfloat16, 0.0, 5.0, False),
        ((3, 5, 7), torch.float16, 0.7, 5.0, True),
        ((4, 8, 8), torch.bfloat16, 0.0, None, True),
    ],
)
def test_kernel_is_the_operator_and_the_float64_closed_form(shape, dtype, rescale, guidance, channels_last):
    schedule = schedule_of("v_prediction")
    output, latents, noise, history = inputs(shape, dtype, 1 if guidance is None else 2)
    if channels_last:
        output = output.contiguous(memory_format=torch.channels_last)
    step = torch.tensor([SECOND, NOISY])
    following, log_prob, mean, data = launch(output, latents, schedule, step, guidance, noise, history, rescale)
    tables = schedule.tables, step, guidance, noise, history, schedule.solver, rescale
    plain = solver_step(output, latents, *tables, keep_mean=True)
    if not rescale:  # whose stds are sums in another order
        assert torch.equal(following, plain[0])
        assert torch.equal(mean, plain[2])
        assert torch.equal(data, plain[3])
    torch.testing.assert_close(log_prob, plain[1], rtol=2.0**-22, atol=0)

    guided = output.double()
    if guidance is not None:
        uncond, cond = output.double().chunk(2)
        guided = uncond + guidance * (cond - uncond)
        if rescale:
            std, wanted = (each.flatten(1).std(dim=1).reshape(-1, 1, 1, 1) for each in (guided, cond))
            guided = rescale * guided * wanted / std + (1 - rescale) * guided
    by_sample, by_output, sigma = schedule.tables[:, step].double().reshape(3, -1, 1, 1, 1)
    back, *x0 = schedule.solver[:, step].double().reshape(3, -1, 1, 1, 1)
    exact = by_sample * latents.double() + by_output * guided + back * history.double()
    # The guided output, below 60, is rounded three times to float32, and coefficients are below 1; the result once.
    error = 2.0**-24 * 3 * 60
    assert ((mean - exact).abs() <= error + 2.0**-24 * exact.abs()).all()
    assert ((following - exact - sigma * noise.double()).abs() <= error + 2.0**-24 * following.abs()).all()
    exact = x0[0] * latents.double() + x0[1] * guided
    assert ((data - exact).abs() <= error + 2.0**-24 * exact.abs()).all()
    assert log_prob[0] == 0


@pytest.mark.parametrize("path", [pytest.param("kernel", marks=interpreted), "operator"])
def test_where_nothing_looks_back_it_is_ddim_step_to_the_last_bit(path):
    """And so the update finds its log-probs again: `grpo_step` is given the schedule's three tables alone."""
    schedule = schedule_of()
    output, latents, noise, history = inputs((3, 41, 37), torch.bfloat16)
    step = torch.tensor([FIRST, NOISY])
    if path == "kernel":
        found = launch(output, latents, schedule, step, 5.0, noise, history)
        given = output, latents, schedule.tables, step, torch.tensor([5.0]), noise, 0.0, True, False
        expected = first_order._launch_ddim_step(*given)
    else:
        given = output, latents, schedule.tables, step, 5.0, noise
        found = solver_step(*given, history, schedule.solver, keep_mean=True)
        expected = ddim_step(*given, keep_mean=True)
    for ours, plain in zip(found[:3], expected, strict=True):
        assert torch.equal(ours, plain)
    assert found[1][0] == 0


def test_ratio_is_exactly_one_after_it():
    schedule = schedule_of()
    output, latents, noise, history = inputs((4, 8, 8))
    step = torch.tensor([NOISY, NOISY + 1])
    given = output, latents, schedule.tables, step, 5.0, noise
    taken, old, _ = solver_step(*given, history, schedule.solver)
    index = torch.tensor([0, 0])
    result = update_op.grpo_step(
        output, latents, taken, schedule.tables, step, 5.0,
        old_log_prob=old, old_mean=None, base_output=None, rewards=torch.tensor([[0.0, 1.0]]), group=index,
        reward=torch.tensor([0.0, 1.0]), mode="group", std_floor=1e-4, clamp=2.5, weight=torch.ones(2),
        clip_low=0.0, clip_high=0.0, kl_weight=torch.zeros(2), ratio_norm=False, rescale=0.0,
    )  # fmt: skip
    assert result.ratio.tolist() == [1, 1]


@interpreted
@pytest.mark.parametrize("aot", SPEC.aot, ids=lambda aot: aot.name)
def test_what_is_compiled_is_what_is_launched(aot, monkeypatch):
    monkeypatch.setattr(op, "ddim_step_kernel", recorder := Recorder())
    constants = {name: value for name, value in aot.constants.items() if value is not None}
    side, guided = math.isqrt(constants["SIZE"] // 4), constants["GUIDED"]
    dtype = torch.float32 if aot.signature["output"] == "*fp32" else torch.bfloat16
    output, latents, noise, history = inputs((4, side, side), dtype, 1 + guided, samples=1)
    if constants["CHANNELS_LAST"]:
        output = output.contiguous(memory_format=torch.channels_last)
    schedule = schedule_of()
    op._launch_solver_step(
        output, latents, schedule.tables, torch.tensor([0]), torch.tensor([5.0]) if guided else None, noise, history,
        schedule.solver, constants["RESCALE"], constants["KEEP_MEAN"],
    )  # fmt: skip
    assert recorder.options == constants | {"num_warps": aot.num_warps} | aot.options


@pytest.mark.parametrize("keep_mean", [False, True])
def test_opcheck(keep_mean):
    schedule = schedule_of()
    output, latents, noise, history = inputs((4, 8, 8), torch.bfloat16)
    arguments = output, latents.mT, schedule.tables, torch.tensor([2, 7]), torch.tensor([5.0]), noise, history
    torch.library.opcheck(torch.ops.fastgrpo.solver_step.default, (*arguments, schedule.solver, 0.0, keep_mean))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": torch.zeros(2, 4, 8, 7)}, "history is"),
        ({"history": torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)}, "history is"),
        ({"solver": torch.zeros(3, 12)}, "solver is"),
        ({"solver": torch.zeros(3, 13, dtype=torch.float64)}, "solver is"),
    ],
)
def test_bad_arguments_are_told(change, message):
    schedule = schedule_of()
    output, latents, noise, history = inputs((4, 8, 8))
    given = output, latents, schedule.tables, torch.tensor([0]), 5.0, noise
    with pytest.raises(ValueError, match=message):
        solver_step(*given, **({"history": history, "solver": schedule.solver} | change))


@pytest.mark.slow
def test_compiled_it_sums_the_log_prob_in_the_layout_of_ddim_step():
    """Which `grpo_step` is held to as well: the order of a GPU's sum is the layout that the compiler picks."""
    code = """
import json, re
import fastgrpo, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastgrpo.kernels.compile import _aligned
from fastgrpo.kernels.specs import ddim_step, solver_step
found = {}
for aot in (*ddim_step.SPEC.aot, *solver_step.SPEC.aot):
    kind = aot.signature["output"], aot.constants["RESCALE"]
    if aot.constants["SIZE"] != 16384 or aot.constants["TAKEN"] or kind not in (("*bf16", 0.0), ("*fp32", 0.7)):
        continue
    source = ASTSource(aot.kernel, aot.signature, aot.constants, _aligned(aot.signature))
    options = {"num_warps": aot.num_warps, **aot.options}
    ir = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    layouts = dict(re.findall(r"^(#blocked[0-9]*) = (.*)$", ir, re.M))
    block = aot.constants["BLOCK"]
    sums = re.findall(r"tt\\.reduce.*?: \\(tensor<" + str(block) + r"xf64, (#[a-z0-9]+)>\\)", ir, re.S)
    found[aot.name] = [str(kind), block, aot.num_warps, sorted({layouts[s] for s in sums})]
print(json.dumps(found))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(printed.stdout)
    assert {"ddim_step_given", "solver_step", "solver_step_mean", "solver_step_channels_last"} <= set(found)
    assert all(how[3] for how in found.values())
    for kind in {how[0] for how in found.values()}:
        assert len({json.dumps(how) for how in found.values() if how[0] == kind}) == 1, found
