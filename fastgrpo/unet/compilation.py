"""torch.compile for the UNet, trusted only after its output and gradients were compared with those of plain calls.

A compiler may drop gradients in silence. For diffusers' UNet, inductor on a CPU (torch 2.13) reads the sum that the
backward pass of nearest-neighbour upsampling scatters into before anything is added to it: gradients are zeros or
wrong. Doubling by broadcasting, whose backward pass is a plain sum, avoids that scatter.

The comparison is made once per machine, versions, model and number of rows, since other rows mean other code. Where a
run comes to another number (another rollout.batch, memory ran out) it is compiled then, and compared when the run is
next started with it.

The UNet becomes one graph without breaks (`fullgraph`) of fixed shapes; CUDA graphs are recorded around it. The mode is
the default one: max-autotune may pick other kernels in a resumed run, which then computes other bits.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from fastgrpo._version import __version__
from fastgrpo.kernels.language import VERSION
from fastgrpo.kernels.native import cache_folder
from fastgrpo.system.files import write_atomically
from fastgrpo.unet.convolutions import searching
from fastgrpo.unet.copies import Network, computing_unet

Example = tuple[Tensor, Tensor, Tensor]
"""Latents [R, C, H, W], timesteps [R] int64 and contexts [R, L, D], as the UNet takes them."""

Say = Callable[[str], object]

# How many times the error of plain calls a compiled call may have. Both round the same sums, so their errors have about
# the same distribution; in a small bias's four directions their ratio exceeds 8 once in 1,400 (F(4, 4) > 64), in forty
# never.
_FACTOR = 8.0
# An error of 1 is that of a gradient of zeros: nothing near it is rounding, unless the plain gradient is as wrong.
_CEILING = 0.5
_DISTURBANCE = 0.02  # standard deviation in place of weights that are all 0


@dataclass(frozen=True)
class GradientCheck:
    """How far compiled code is from the exact result, where it is furthest.

    worst: "output" or a parameter's name. error: |compiled - exact| / |exact|. bound: the most that rounding explains.
    """

    matches: bool
    worst: str
    error: float
    bound: float


class DoublingUpsample2D(Upsample2D):
    """Upsamples to the same bits; where it is compiled, by broadcasting."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None or not torch.compiler.is_compiling():
            return super().forward(hidden_states, output_size, *args, **kwargs)
        n, c, h, w = hidden_states.shape
        doubled = hidden_states[:, :, :, None, :, None].expand(n, c, h, 2, w, 2)
        return self.conv(doubled.reshape(n, c, 2 * h, 2 * w))


def compile_forward(
    network: UNet2DConditionModel, plain: UNet2DConditionModel, example: Example, rows: int, operators: str, say: Say
) -> Network | None:
    """Compiles the network, which is then called as before, with or without gradients; None if it is wrong.

    network: what computes, in eval mode; its upsamplers are replaced in place.
    plain: the same parameters under the same names, not patched in any way; only its structure matters.
    example: of `make_example`; a larger one needs memory for a pass with gradients in the next wider dtype.
    rows: of the run's passes, the one number that the network is compiled for and compared at.
    operators: which kernels and which attention the network has, in any words.
    Never fails: compiled code that is wrong or cannot be made is left out, and `say` gets one line.
    """
    replace_upsamplers(network)
    # On a CPU inductor's changes of layout lead to that scatter's fault too, where an upsampler is not replaced.
    options: dict[str, Any] | None = {"layout_optimization": False} if example[0].device.type == "cpu" else None
    compiled = torch.compile(network, dynamic=False, fullgraph=True, options=options)
    key = _key(network, example, rows, operators)
    check, reason = _recall(key), "compared before on this machine"
    if check is None:
        try:
            check, reason = check_compiled(network, plain, compiled, example, rows), "compared now"
        except Exception as error:
            say(f"torch.compile is left out: it failed with {_in_short(error)}")
            return None
        _remember(key, check)
    if not check.matches:
        what = "output" if check.worst == "output" else f"gradient of {check.worst}"
        errors = f"its {what} is off by {check.error:.1e}, of which rounding explains {check.bound:.1e}"
        say(f"torch.compile is left out: {errors} ({reason})")
        return None
    return _WithFallback(network, compiled, say)


def replace_upsamplers(network: UNet2DConditionModel) -> None:
    """Makes the upsamplers of a UNet double by broadcasting when it is compiled, in place."""
    for module in network.modules():
        plain = type(module) is Upsample2D and module.norm is None and module.interpolate and module.use_conv
        if plain and not module.use_conv_transpose and module.name == "conv":
            module.__class__ = DoublingUpsample2D


def make_example(
    unet: UNet2DConditionModel,
    latent_shape: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Example:
    """Makes two rows of noise at the shapes of a run, always the same."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *latent_shape, generator=generator)
    contexts = torch.randn(2, tokens, unet.config.cross_attention_dim, generator=generator)
    return latents.to(device, dtype), torch.tensor([981, 21], device=device), contexts.to(device, dtype)


def check_compiled(
    network: UNet2DConditionModel, plain: UNet2DConditionModel, compiled: Network, example: Example, rows: int
) -> GradientCheck:
    """Compares the output and the gradient of every trained parameter with those of `network`, by the errors of both.

    Both compute copies of the example's rows, `rows` in one pass. The exact results are those of the example alone, by
    `plain` with the network's weights in the next wider dtype, float64 for float32. Of the output, the row furthest off
    counts. Weights that are all 0, such as fresh adapters', are noise meanwhile: the gradients of what they multiply
    would be 0. Needs memory for one pass at a time: the exact results wait on the host. Raises whatever the compiler
    raises.
    """
    dtype = example[0].dtype
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    latents, timesteps, contexts = (tensor[:rows] for tensor in example)
    example = latents, timesteps, contexts
    with _disturbed(network):
        weights = {name: parameter.detach().to(wider) for name, parameter in network.named_parameters()}
        precise = computing_unet(plain, wider, weights)
        with searching(False):
            output, exact = _results(precise, precise, example, len(latents), wider)
        del weights, precise
        output, exact = output[_copies(example, rows)], {name: value.cpu() for name, value in exact.items()}

        def errors(call: Network) -> tuple[Tensor, Tensor]:
            """Returns the errors of each row of the output, and of each gradient."""
            rows_, gradients = _results(call, network, example, rows, dtype)
            return relative_errors(dict(enumerate(output)), dict(enumerate(rows_))), relative_errors(exact, gradients)

        (eager_rows, eager), (given_rows, given) = errors(network), errors(compiled)
    furthest = given_rows.argmax()[None]  # the first that is not a number, if there is one
    return compare_gradients(
        ("output", *exact), torch.cat([eager_rows[furthest], eager]), torch.cat([given_rows[furthest], given])
    )


def compare_gradients(names: Sequence[str], eager_errors: Tensor, errors: Tensor) -> GradientCheck:
    """Finds out whether compiled results are as near to the exact ones as plain calls', tensor by tensor.

    names: the tensors'. eager_errors, errors: of plain and of compiled calls, from `relative_errors`. With e a tensor's
    error by plain calls, and m the median of all tensors', the compiled one's may be

        max(min(8 max(e, m), 1/2), 2 e)

    where m stands in for an e that is small by chance. Zeros, or anything as far off, thus pass only where the plain
    gradient is itself half noise. Anything that is not finite does not.
    """
    typical = eager_errors.median()
    bounds = (_FACTOR * eager_errors.clamp_min(typical)).clamp_max(_CEILING).maximum(2 * eager_errors)
    excess = (errors / bounds.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    error, bound = float(errors[worst]), float(bounds[worst])
    return GradientCheck(bool(error <= bound), names[worst], error, bound)


def relative_errors(exact: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> Tensor:
    """Returns |other - exact| / |exact| of each tensor, [tensors] float64 on the CPU; 0 where both are 0."""
    lengths = []
    for name, value in exact.items():
        given = other[name].to(value.dtype)
        value = value.to(given.device)
        lengths.append(torch.stack([(given - value).norm(), value.norm()]))
    errors, norms = torch.stack(lengths, dim=1).double().cpu()
    return torch.where(errors == 0, 0.0, errors / norms)


class _WithFallback:
    """Calls compiled code, and the network itself from the first failure to compile for new shapes on."""

    def __init__(self, network: UNet2DConditionModel, compiled: Network, say: Say):
        self._network, self._compiled, self._say = network, compiled, say

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is not self._network:
            try:
                return self._compiled(*args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self._compiled = self._network
                self._say(f"torch.compile is left out from here on: it failed with {_in_short(error)}")
        return self._network(*args, **kwargs)


def _results(
    call: Network, network: UNet2DConditionModel, example: Example, rows: int, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the output for `rows` copies of the example's rows, and gradients by parameter of a fixed function of it.

    The gradients are the same for any number of copies. call: how `network`, whose parameters they are of, is called.
    """
    copies = _copies(example, rows)
    latents, timesteps, contexts = (tensor[copies] for tensor in example)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        output = call(latents.to(dtype), timesteps, contexts.to(dtype), return_dict=False)[0]
        towards = torch.randn(len(example[0]), *output.shape[1:], generator=torch.Generator().manual_seed(1))
        towards = towards[copies] * _weights(len(example[0]), rows).view(-1, 1, 1, 1)
        gradients = torch.autograd.grad(output, list(trained.values()), towards.to(output))
    return output.detach(), dict(zip(trained, gradients, strict=True))


def _copies(example: Example, rows: int) -> Tensor:
    """Returns which of the example's rows each of `rows` is, [rows] int64."""
    return torch.arange(rows) % len(example[0])


def _weights(distinct: int, rows: int) -> Tensor:
    """Returns what each copy of `distinct` rows counts for, [rows] float32, so that the copies of one row add up to 1.

    They are 1, -1 or 1/2, exact in any dtype. As signs take turns, a wrong or missing row changes a gradient by half a
    row's at least, and not by one of 66 parts, which half precision would hide.
    """
    weights = torch.empty(rows)
    for first in range(distinct):
        copies = torch.ones(len(range(first, rows, distinct)))
        copies[1::2] = -1
        if len(copies) % 2 == 0:
            copies[:2] = 0.5
        weights[first::distinct] = copies
    return weights


@contextmanager
def _disturbed(network: UNet2DConditionModel) -> Iterator[None]:
    zero = [p.data for p in network.parameters() if p.requires_grad and not p.count_nonzero()]
    generator = torch.Generator().manual_seed(2)
    try:
        for values in zero:
            values.copy_(_DISTURBANCE * torch.randn(values.shape, generator=generator))
        yield
    finally:
        for values in zero:
            values.zero_()


def _key(network: UNet2DConditionModel, example: Example, rows: int, operators: str) -> dict[str, Any]:
    """Returns everything that the outcome of a check depends on."""
    device, cuda = example[0].device, example[0].is_cuda
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    trained = [[name, list(p.shape), str(p.dtype)] for name, p in network.named_parameters() if p.requires_grad]
    return {
        "machine": platform.node(),
        "device": torch.cuda.get_device_name(device) if cuda else processor,
        "versions": {
            "torch": torch.__version__,
            "triton": VERSION,
            "diffusers": diffusers.__version__,
            "fastgrpo": __version__,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
        },
        "unet": hashlib.sha256(json.dumps([config, trained], sort_keys=True, default=str).encode()).hexdigest(),
        "dtype": str(example[0].dtype),
        "shapes": [list(tensor.shape[1:]) for tensor in example],
        "rows": rows,
        "operators": operators,
    }


def _file(key: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "compilation" / f"{name}.json"


def _recall(key: dict[str, Any]) -> GradientCheck | None:
    """Reads what `_remember` wrote; None where there is nothing that can be read."""
    try:
        kept = json.loads(_file(key).read_bytes())
        check = GradientCheck(**kept["check"])
        fits = kept["key"] == key and type(check.matches) is bool and type(check.worst) is str
        return check if fits and all(type(n) is float for n in (check.error, check.bound)) else None
    except (OSError, RuntimeError, KeyError, TypeError, ValueError):  # RuntimeError: there is no home folder
        return None


def _remember(key: dict[str, Any], check: GradientCheck) -> None:
    with suppress(OSError, RuntimeError):
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"key": key, "check": asdict(check)}, indent=1).encode())


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
