"""Which backend computes each attention shape of the UNet: all are checked against plain math, the fastest is kept.

SD 1.x has heads 40, 80 and 160 wide, and 77 keys in cross-attention. cuDNN (9.x, half precision, compute capability 8.0
to 12.1) takes widths in multiples of 8 up to 128, and beyond that what PyTorch's version says (2.14 with cuDNN 9.24:
256 on Hopper, backward passes at 256 alone), with columns next to each other and more than one key. Flash takes any
width up to 256, computed as 32, 64, 96, ...: 40 costs what 64 does. Memory-efficient takes any width, in rows of 16
bytes. Nothing here repeats these rules: PyTorch itself is asked at start-up.

xformers 0.0.35 has no attention kernels for Hopper: it calls PyTorch's flash (`fa2F-pt`, `fa2B-pt`) or memory-efficient
(`cutlassF-pt`, `cutlassB-pt`), or the packages flash-attn and flash_attn_3. `AttentionPlan.lines` says which.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrpo.kernels.timing import device_milliseconds
from fastgrpo.system.errors import ConfigError
from fastgrpo.unet.attention import (
    BACKENDS,
    LONGEST_REASON,
    Attend,
    AttentionPlan,
    AttentionShape,
    Choice,
    cudnn,
    cudnn_padded,
    efficient,
    flash,
    one_line,
    padded,
    sdpa,
    short_reason,
    xformers,
    xformers_missing,
)

Clock = Callable[[Callable[[], Any]], float]
"""Returns the milliseconds that a call takes."""

_GPU = "cuda"  # where all but flash and PyTorch's own choice run
_STEP = 16  # columns that a tensor core multiplies at once
_KERNELS: Mapping[Attend, SDPBackend] = {
    cudnn: SDPBackend.CUDNN_ATTENTION,
    cudnn_padded: SDPBackend.CUDNN_ATTENTION,
    flash: SDPBackend.FLASH_ATTENTION,
    efficient: SDPBackend.EFFICIENT_ATTENTION,
}
_SDPA_NAMES = {
    SDPBackend.CUDNN_ATTENTION.value: "cuDNN",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "memory-efficient",
    SDPBackend.MATH.value: "plain math",
}


def choose_backends(
    wanted: str,
    shapes: Sequence[AttentionShape],
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock | None = None,
    backends: Mapping[str, Attend] = BACKENDS,
) -> AttentionPlan:
    """Decides who computes each shape.

    Every backend's output and gradients are first compared with plain math in float64; one that fails or is wrong is
    left out, with the reason. `auto` keeps the fastest of the others; without a clock and off CUDA it is PyTorch's own
    choice. A named backend gets every shape it can do, PyTorch's own choice the rest. `sdpa` is neither checked nor
    measured. Global random numbers are not touched.
    wanted: engine.attention. dtype: what the UNet computes in. clock: None is `device_milliseconds`. backends: by name.
    Raises ConfigError for a named backend that can do none of the shapes.
    """
    auto = wanted == "auto"
    if wanted == "sdpa" or (auto and clock is None and device.type != "cuda"):
        return AttentionPlan(wanted, tuple(Choice(shape, "sdpa") for shape in shapes))
    if auto:
        clock = clock or device_milliseconds
        choices = tuple(_fastest(_Case.make(shape, device, dtype), backends, clock) for shape in shapes)
    else:
        choices = tuple(_named(_Case.make(shape, device, dtype), wanted, backends[wanted]) for shape in shapes)
        if choices and all(choice.backend != wanted for choice in choices):
            reason = choices[0].excluded[wanted]
            raise ConfigError(f"engine.attention = {wanted!r}: {reason}; accepted here is auto or sdpa.")
    return AttentionPlan(wanted, choices)


def _named(case: "_Case", name: str, attend: Attend) -> Choice:
    fault = case.fault(attend, case.plain())
    if fault:
        return Choice(case.shape, "sdpa", excluded={name: fault})
    return Choice(case.shape, name, kernels={name: case.kernels(attend)} if attend in (sdpa, xformers) else {})


def _fastest(case: "_Case", candidates: Mapping[str, Attend], clock: Clock) -> Choice:
    """Takes the fastest candidate that is right and can be compiled, else PyTorch's own choice."""
    expected = case.plain()
    milliseconds, excluded, kernels = {}, {}, {}
    for name, attend in candidates.items():
        fault = case.fault(attend, expected)
        if not fault and attend in (sdpa, xformers):
            runs = case.kernels(attend)
            if "cutlass" in runs:  # asked for by name, xformers may have it, and the UNet then runs uncompiled
                fault = f"torch.compile cannot trace {runs}, which efficient calls directly"
            else:
                kernels[name] = runs
        if fault:
            excluded[name] = fault
        else:
            milliseconds[name] = clock(partial(case.run, attend))
    fastest = min(milliseconds, key=lambda name: milliseconds[name], default="sdpa")
    return Choice(case.shape, fastest, milliseconds, excluded, kernels)


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Returns by how much a right result may be off, relative to its norm.

    Kernels round probabilities, scores' gradients, the output that the backward pass starts from and the result: 4
    roundoffs, which a softmax's gradient can double. Sums are float32 at least and err by `terms` of its roundoffs.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return 8 * roundoff + terms * min(roundoff, torch.finfo(torch.float32).eps / 2)


@dataclass(frozen=True)
class _Case:
    """Random inputs of a shape, laid out as the projections leave them: [B, H, tokens, d] views of [B, tokens, H, d].

    gradient: of the output.
    """

    shape: AttentionShape
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor

    @staticmethod
    def make(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> "_Case":
        generator = torch.Generator(device).manual_seed(0)

        def random(tokens: int) -> Tensor:
            size = (shape.rows, tokens, shape.heads, shape.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2)

        query, key, value = (random(tokens).requires_grad_() for tokens in (shape.queries, shape.keys, shape.keys))
        return _Case(shape, query, key, value, random(shape.queries))

    def run(self, attend: Attend) -> tuple[Tensor, ...]:
        """Returns the output and the gradients of query, key and value."""
        inputs = (self.query, self.key, self.value)
        with torch.enable_grad():
            output = attend(*inputs)
            return (output, *torch.autograd.grad(output, inputs, self.gradient))

    def plain(self) -> tuple[Tensor, ...]:
        """Computes what `run` should return for the first and last row, in float64, a head at a time: scores are large.

        With P = softmax(s Q K^T) and O = P V:
        dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = s dS K, dK = s dS^T Q.
        """
        tensors = (self.query, self.key, self.value, self.gradient)
        scale = self.query.shape[-1] ** -0.5
        results = []
        for query, key, value, gradient in zip(*(_sampled(tensor).flatten(0, 1) for tensor in tensors), strict=True):
            probabilities = torch.softmax(scale * query @ key.T, dim=-1)
            output = probabilities @ value
            centred = gradient @ value.T - (gradient * output).sum(-1, keepdim=True)
            scores = scale * probabilities * centred
            results.append((output, scores @ key, scores.T @ query, probabilities.T @ gradient))
        return tuple(torch.stack(heads) for heads in zip(*results, strict=True))

    def fault(self, attend: Attend, expected: tuple[Tensor, ...]) -> str:
        """Says why a backend cannot be used here, or ""."""
        try:
            reason = self._refusal(attend)
            if reason:
                return reason
            results = self.run(attend)
        except Exception as error:  # whatever the libraries raise
            return short_reason(error)
        allowed = tolerance(self.query.dtype, max(self.query.shape[2], self.key.shape[2]))
        names = ("output", "query's gradient", "key's gradient", "value's gradient")
        # Probabilities are about 1 / keys. With one key, queries and keys have no gradient, only rounding of that size.
        smallest = _sampled(self.query).norm() / self.key.shape[2]
        for name, result, right in zip(names, results, expected, strict=True):
            off = (_sampled(result).flatten(0, 1) - right).norm() / right.norm().maximum(smallest)
            if not off <= allowed:  # nor NaN
                return f"wrong: its {name} is off by {off:.1e} of the norm, where rounding explains {allowed:.1e}"
        return ""

    def _refusal(self, attend: Attend) -> str:
        """Says what PyTorch has against its kernel here, what is missing, or why it is not worth a try; else ""."""
        missing = xformers_missing() if attend is xformers else ""
        if missing or attend not in (*_KERNELS, xformers):
            return missing
        if self.query.device.type != _GPU and attend is not flash:
            return "it runs on CUDA only"
        if attend is cudnn_padded:
            if self.query.shape[-1] % _STEP == 0:
                return f"the width of its heads is a multiple of {_STEP} as it is"
            return _pytorch_against(_KERNELS[attend], lambda: self.run(partial(padded, sdpa)))
        return "" if attend is xformers else _pytorch_against(_KERNELS[attend], lambda: self.run(sdpa))

    def kernels(self, attend: Attend) -> str:
        """Names the kernels that PyTorch's own choice or xformers runs here."""
        if attend is xformers:
            return _in_words([operator.NAME for operator in _xformers_operators(self.query, self.key, self.value)])
        return _SDPA_NAMES.get(torch._fused_sdp_choice(self.query, self.key, self.value), "")


def _sampled(tensor: Tensor) -> Tensor:
    """Returns the first row and the last, [2, ...] float64."""
    return tensor.detach()[[0, -1]].double()


def _pytorch_against(kernel: SDPBackend, ask: Callable[[], Any]) -> str:
    """Says why PyTorch does not take a kernel for scaled_dot_product_attention, in its own words; "" if it does."""
    with warnings.catch_warnings(record=True) as caught, sdpa_kernel(kernel):
        warnings.simplefilter("always")
        try:
            ask()
        except RuntimeError as error:
            said = [one_line(str(warning.message)) for warning in caught]
            # It says of the other kernels that they are switched off, which they are for the question's sake.
            said = [text for text in said if "not used because" not in text and "runtime disabled" not in text]
            return " ".join(said)[:LONGEST_REASON] or short_reason(error)
    return ""


def _xformers_operators(query: Tensor, key: Tensor, value: Tensor) -> list[Any]:
    """Asks what memory_efficient_attention takes, forward and backward; NotImplementedError where it has nothing."""
    fmha = importlib.import_module("xformers.ops.fmha")
    inputs = fmha.Inputs(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    return [fmha._dispatch_fw(inputs, True), fmha._dispatch_bw(inputs, None)]


def _in_words(names: Sequence[str]) -> str:
    """Lists xformers' names of operators, and says whose kernels they are: it marks PyTorch's by "-pt"."""
    listed = " and ".join(names)
    if not all(name.endswith("-pt") for name in names):
        return listed
    kinds = dict.fromkeys("flash" if name.startswith("fa2") else "memory-efficient" for name in names)
    return f"{listed}, PyTorch's {' and '.join(kinds)} kernels"
