"""`ddim_step` and `log_prob`: the kernels under Triton's interpreter, the operators, and plain operations."""

import math

import pytest
import torch

from fastgrpo.kernels import ddim_step as op
from fastgrpo.kernels.ddim_step import ddim_step, log_prob, reference
from fastgrpo.kernels.specs.ddim_step import SPEC
from fastgrpo.kernels.step_math import BLOCK, as_launched
from fastgrpo.schedule import Schedule, make_schedule
from support.kernels import Recorder, poisoned
from support.plain_step import plain_log_prob, plain_mean

SD = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, odd sizes, SD-like, and more than one block of which the last is not full.
SHAPES = [(1, 1, 1), (3, 5, 7), (4, 8, 8), (3, 41, 37)]


def schedule_of(prediction_type: str = "epsilon", eta: float = 1.0) -> Schedule:
    return make_schedule(SD | {"prediction_type": prediction_type, "steps_offset": 1}, 50, eta, CPU)


def tables_of(schedule: Schedule) -> torch.Tensor:
    return torch.stack([schedule.coef_sample, schedule.coef_output, schedule.sigma])


def inputs(samples, shape, dtype=torch.float32, scale=1.0, halves=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output = (scale * torch.randn(halves * samples, *shape, generator=generator)).to(dtype)
    latents, noise = torch.randn(2, samples, *shape, generator=generator)
    return output, latents, noise


def launch(output, latents, tables, step, guidance, noise, rescale=0.0, keep_mean=True, taken=False):
    """The kernel itself, interpreted, on memory full of NaN."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here: the GPU tests run them")
    guidance = None if guidance is None else torch.tensor([guidance])
    with poisoned():
        return op._launch_ddim_step(output, latents, tables, step, guidance, noise, rescale, keep_mean, taken)


def exact(output, latents, tables, step, guidance, noise, rescale=0.0):
    """Mean and noise carried in float64 from the beginning, and the log-density by torch.distributions."""
    output, latents, noise, tables = (t.double() for t in (output, latents, noise, tables))
    guided = output
    if guidance is not None:
        uncond, cond = output.chunk(2)
        guided = (1 - guidance) * uncond + guidance * cond
        if rescale and latents[0].numel() > 1:
            flat = [t.flatten(1).std(dim=1).reshape(-1, 1, 1, 1) for t in (guided, cond)]
            guided = rescale * guided * flat[1] / flat[0] + (1 - rescale) * guided
    coef_sample, coef_output, sigma = (row[step].reshape(-1, 1, 1, 1) for row in tables)
    mean = coef_sample * latents + coef_output * guided
    return mean, mean + sigma * noise, sigma


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_kernel_is_the_float64_closed_form(shape, dtype, rescale):
    output, latents, noise = inputs(2, shape, dtype)
    tables = tables_of(schedule_of())
    step = torch.tensor([3, 48])
    following, log_probs, means = launch(output, latents, tables, step, 5.0, noise, rescale=rescale)
    mean, y, sigma = exact(output, latents, tables, step, 5.0, noise, rescale)
    # The guided output, below 60 in size, is rounded three times to float32; coef_output is below 0.1; the result once.
    bound = 2.0**-24 * (3 * 60 * 0.1 + y.abs())
    assert ((following - y).abs() <= bound).all()
    assert ((means - mean).abs() <= bound).all()
    expected = torch.distributions.Normal(mean, sigma).log_prob(following.double()).mean(dim=(1, 2, 3))
    slack = (bound / sigma * ((following - mean).abs() / sigma + 1)).mean(dim=(1, 2, 3)) + 2.0**-22
    assert ((log_probs - expected).abs() <= slack).all()


@pytest.mark.parametrize("rescale", [0.3, 1.0])
@pytest.mark.parametrize("path", ["kernel", "operator"])
def test_rescaled_guidance_is_diffusers(path, rescale):
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    output, latents, noise = inputs(2, (4, 8, 8))
    step, tables = torch.tensor([3, 48]), tables_of(schedule_of())
    run = launch if path == "kernel" else ddim_step
    *_, mean = run(output, latents, tables, step, 5.0, noise, rescale=rescale, keep_mean=True)
    uncond, cond = output.double().chunk(2)
    guided = pipeline.rescale_noise_cfg(uncond + 5.0 * (cond - uncond), cond, rescale)
    coef_sample, coef_output = (row[step].double().reshape(-1, 1, 1, 1) for row in tables[:2])
    wanted = coef_sample * latents.double() + coef_output * guided
    # As above.
    assert ((mean - wanted).abs() <= 2.0**-24 * (3 * 60 * 0.1 + wanted.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_kernel_and_cpu_operator_agree(dtype, guidance):
    """Both round where PyTorch's separate operations do, so latents and means are equal; sums take another order."""
    output, latents, noise = inputs(2, (3, 41, 37), dtype, halves=1 if guidance is None else 2)
    tables, step = tables_of(schedule_of("v_prediction", 0.6)), torch.tensor([20])
    kernel = launch(output, latents, tables, step, guidance, noise)
    plain = ddim_step(output, latents, tables, step, guidance, noise, keep_mean=True)
    assert torch.equal(kernel[0], plain[0])
    assert torch.equal(kernel[2], plain[2])
    # Each float64 sum is right to 1e-12, so the float32 results are neighbours at most.
    torch.testing.assert_close(kernel[1], plain[1], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 5.0, 7.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_operator_is_the_plain_operations_bit_for_bit(prediction_type, guidance, dtype):
    schedule = schedule_of(prediction_type)
    output, latents, noise = inputs(3, (4, 8, 8), dtype, halves=1 if guidance == 1 else 2)
    for index in (0, 17, 49):
        at = torch.full((3,), index)
        mean = plain_mean(output, latents, tables_of(schedule), at, None if guidance == 1 else guidance)
        sigma = schedule.sigma[at]
        following = (mean + sigma.double().reshape(-1, 1, 1, 1) * noise.double()).float()
        ours = ddim_step(output, latents, tables_of(schedule), torch.tensor([index]), guidance, noise, keep_mean=True)
        assert torch.equal(ours[0], following)
        assert torch.equal(ours[1], plain_log_prob(following, mean, sigma))
        assert torch.equal(ours[2], mean.float())
        assert torch.equal(log_prob(output, latents, following, tables_of(schedule), at, guidance), ours[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 8, 8), (3, 41, 37)])
def test_channels_last_and_other_strides_change_nothing(dtype, shape):
    output, latents, noise = inputs(2, shape, dtype)
    tables, step = tables_of(schedule_of()), torch.tensor([30])
    expected = launch(output, latents, tables, step, 5.0, noise)
    last = output.contiguous(memory_format=torch.channels_last)
    spaced = torch.empty(*output.shape, 2, dtype=dtype).fill_(torch.nan)[..., 0].copy_(output)
    shifted = torch.cat([torch.zeros(1), latents.flatten()])[1:].view_as(latents)  # on no 16 byte boundary
    every_other = torch.tensor([30, 0, 30, 0])[::2]
    for results in (
        launch(last, latents, tables, step, 5.0, noise),
        launch(spaced, shifted, tables, every_other, 5.0, noise.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        assert torch.equal(results[0], expected[0])
        assert torch.equal(results[2], expected[2])
        torch.testing.assert_close(results[1], expected[1], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_kernel_repeats_the_step_s_exactly(dtype, shape):
    output, latents, noise = inputs(2, shape, dtype)
    tables, step = tables_of(schedule_of()), torch.tensor([48, 2])
    following, expected, means = launch(output, latents, tables, step, 5.0, noise)
    nothing, *again = launch(output, latents, tables, step, 5.0, following, taken=True)
    assert nothing.numel() == 0
    assert torch.equal(again[0], expected)
    assert torch.equal(again[1], means)


def test_what_is_launched_begins_on_16_bytes():
    """Elsewhere the compiler lays out loads, and with them sums, otherwise than in `grpo_step`."""
    aligned = torch.arange(72, dtype=torch.bfloat16).view(1, 2, 6, 6)
    shifted = torch.arange(73, dtype=torch.bfloat16)[1:].view(1, 2, 6, 6)
    assert as_launched(aligned) is aligned
    for channels_last in (False, True):
        launched = as_launched(shifted, channels_last)
        assert launched.data_ptr() % 16 == 0
        assert torch.equal(launched, shifted)
        assert launched.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_extreme_outputs_and_sigmas_stay_finite():
    """Outputs of 1e4, and sigmas down to 1e-3 and 0: a late step's residual is the noise, whatever the mean."""
    output, latents, noise = inputs(3, (4, 8, 8), torch.bfloat16, scale=1e4)
    tables = torch.tensor([[1.0, 1.0, 1.0], [-0.03, -0.03, -0.03], [1e-3, 0.0, 0.2]])
    following, log_probs, means = launch(output, latents, tables, torch.arange(3), 7.5, noise)
    assert torch.isfinite(following).all()
    assert log_probs[1] == 0
    assert torch.equal(following[1], means[1])  # no noise where sigma is 0
    sigma = tables[2].double().reshape(-1, 1, 1, 1)
    mean, *_ = reference(output.double(), latents.double(), tables.double(), torch.arange(3), 7.5, noise.double())
    exact_mean = mean - sigma * noise.double()
    # The mean, of up to 2e4, is stored to half its spacing of 2^-9: over sigma 1e-3 that dominates the residual itself,
    # and the log-prob of the value stored must say so.
    guided_error = 2.0**-24 * 3 * 8e5 * 0.03
    bound = guided_error + 2.0**-24 * following.abs().double()
    assert ((following.double() - (exact_mean + sigma * noise)).abs() <= bound).all()
    unrounded = -0.5 * noise[0].double().square().mean() - math.log(1e-3) - 0.5 * math.log(2 * math.pi)
    stored = -0.5 * ((following[0].double() - _mean64(output, latents, tables, 0)) / 1e-3).square().mean()
    assert abs(log_probs[0] - (stored - math.log(float(tables[2, 0])) - 0.5 * math.log(2 * math.pi))) <= 1e-4
    assert abs(float(unrounded) - float(log_probs[0])) > 1e-3


def _mean64(output, latents, tables, sample):
    """The kernel's mean before it is stored: guided in float32, the rest in float64."""
    uncond, cond = output.float().chunk(2)
    guided = (uncond + 7.5 * (cond - uncond))[sample].double()
    return tables[0, sample].double() * latents[sample].double() + tables[1, sample].double() * guided


@pytest.mark.parametrize("aot", SPEC.aot, ids=lambda aot: aot.name)
def test_what_is_compiled_is_what_is_launched(aot, monkeypatch):
    monkeypatch.setattr(op, "ddim_step_kernel", recorder := Recorder())
    constants = {name: value for name, value in aot.constants.items() if value is not None}
    side, guided = math.isqrt(constants["SIZE"] // 4), constants["GUIDED"]
    dtype = torch.float32 if aot.signature["output"] == "*fp32" else torch.bfloat16
    output, latents, noise = inputs(1, (4, side, side), dtype, halves=1 + guided)
    if constants["CHANNELS_LAST"]:
        output = output.contiguous(memory_format=torch.channels_last)
    launch(
        output, latents, tables_of(schedule_of()), torch.tensor([0]), 5.0 if guided else None, noise,
        constants["RESCALE"], constants["KEEP_MEAN"], constants["TAKEN"],
    )  # fmt: skip
    assert recorder.options == constants | {"num_warps": aot.num_warps} | aot.options
    assert recorder.options["enable_fp_fusion"] is False


@pytest.mark.parametrize("call", ["given", "taken", "mean", "unguided"])
def test_opcheck(call):
    output, latents, noise = inputs(2, (4, 8, 8), torch.bfloat16)
    tables, step, guidance = tables_of(schedule_of()), torch.tensor([4, 7]), torch.tensor([5.0])
    arguments = {
        "given": (output, latents, tables, step, guidance, noise, 0.0, False, False),
        "taken": (output, latents.mT, tables, step[:1], guidance, noise, 0.7, False, True),
        "mean": (output, latents.mT, tables, step, guidance, noise, 0.7, True, True),
        "unguided": (output[:2], latents, tables, step, None, noise, 0.0, True, False),
    }
    torch.library.opcheck(torch.ops.fastgrpo.ddim_step.default, arguments[call])


def test_blocks_are_as_the_shapes_above_assume():
    assert BLOCK < 3 * 41 * 37
    assert (3 * 41 * 37) % BLOCK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(2, 4, 8, 8)}, "output is"),
        ({"output": torch.zeros(4, 4, 8, 8, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"latents": torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)}, "rounded step"),
        ({"tables": torch.zeros(2, 50)}, "tables are"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, "step is"),
        ({"guidance": torch.zeros(2)}, "guidance is"),
        ({"noise": torch.zeros(2, 4, 8, 7)}, "noise is"),
        ({"rescale": 1.5}, "rescale is"),
        ({"guidance": None, "output": torch.zeros(2, 4, 8, 8), "rescale": 0.5}, "rescale is"),
    ],
)
def test_bad_arguments_are_told(change, message):
    output, latents, noise = inputs(2, (4, 8, 8))
    arguments = {
        "output": output,
        "latents": latents,
        "tables": tables_of(schedule_of()),
        "step": torch.tensor([0]),
        "guidance": 5.0,
        "noise": noise,
    }
    with pytest.raises(ValueError, match=message):
        ddim_step(**(arguments | change))
