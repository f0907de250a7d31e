"""Who computes the UNet's attention: PyTorch's own choice, cuDNN, flash, memory-efficient, or xformers.

    sdpa           torch.nn.functional.scaled_dot_product_attention, PyTorch's own choice
    cudnn          cuDNN's fused attention
    cudnn_padded   the same on heads that are padded to 64, 128, ... columns; a candidate of `auto`, not a setting
    flash          FlashAttention as PyTorch ships it; on the CPU PyTorch's own flash kernel
    efficient      PyTorch's memory-efficient kernel; a candidate of `auto`, not a setting
    xformers       xformers.ops.memory_efficient_attention, which chooses among the kernels it has, and PyTorch's

`attention_shapes` finds out what the UNet asks for, `choose` who does it, `use` installs that, and the `AttentionPlan`
between the last two can be stored with the run, so that a resumed run does the same without measuring.

What can do SD 1.x, whose heads are 40, 80 and 160 wide, with 77 keys in cross-attention. cuDNN (9.x, half precision, compute
capability 8.0 to 12.1): widths that are multiples of 8, any strides with columns next to each other, any number of keys but
one; up to 128 wide, and beyond that what PyTorch's version says (2.14 with cuDNN 9.24: 256 on Hopper, but then backward passes
at 256 alone). Flash: any width up to 256, computed as 32, 64, 96, 128, ...; so 40 costs what 64 does. Memory-efficient: rows
of 16 bytes, any width. PyTorch itself is asked at start-up and its words are kept, so nothing here repeats these rules.

xformers 0.0.35 has no attention kernels of its own for Hopper: it calls PyTorch's flash (`fa2F-pt`, `fa2B-pt`) or
memory-efficient (`cutlassF-pt`, `cutlassB-pt`) operators, or those of the packages flash-attn and flash_attn_3 where they are
installed. `AttentionPlan.lines` says which.

The kernels are called as the operators that scaled_dot_product_attention itself dispatches to. The public way to pick one
of them, torch.nn.attention.sdpa_kernel, sets switches of the whole process: two threads that enter and leave it in turn,
as CPU workers would, can leave the switches changed for good. Here it only tells, at start-up, what a kernel can do.

What is the same bit for bit. Forward passes are: kernels join partial sums in a fixed order (cuDNN does not say how it
does; `ratio/max_abs_dev_first` would show it). Backward passes on CUDA need not be. Flash, and with it xformers' flash,
adds the queries' gradients of different key blocks atomically; so does the memory-efficient kernel where it splits the
keys; cuDNN promises nothing, and PyTorch says of it "not deterministic". So rollout and update can agree on the log-probs
to the last bit, while two identical updates may differ by rounding, and a resumed run with them. Inside
`deterministic()`, flash and the memory-efficient kernel add in a fixed order, at some cost, and cuDNN and the xformers
kernels that cannot are refused. A run that must resume bit for bit on CUDA needs both: a plan made with
`choose(..., reproducible=True)`, and `deterministic()` around everything that computes or captures gradients. On the CPU
all are reproducible with the same number of threads.
"""

import copy
import importlib
import importlib.util
import os
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrpo.system.errors import ConfigError
from fastgrpo.unet.projections import linear_layers

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(query key^T / sqrt(d)) value: query [B, H, Q, d], key and value [B, H, K, d] -> [B, H, Q, d]."""

Clock = Callable[[Callable[[], Any]], float]
"""Milliseconds that a call takes."""


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    # With the log-sum-exp, which the backward pass needs, also where there will be none: it could be another kernel.
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[0]


_STEP, _TILE = 16, 64  # columns that a tensor core multiplies at once; columns of cuDNN's tiles, or a multiple


def _padded(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attend` on heads with zeros as further columns, which change neither scores nor output; memory stays [B, tokens, H, d]."""
    width = query.shape[-1]
    heads_last = (F.pad(tensor.transpose(1, 2), (0, -width % _TILE)) for tensor in (query, key, value))
    output = attend(*(tensor.transpose(1, 2) for tensor in heads_last), width**-0.5)
    return output.transpose(1, 2)[..., :width].transpose(1, 2)


def _cudnn_padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN may have its faster kernels for widths alone that are multiples of 16, which 40 is not."""
    return _padded(_cudnn, query, key, value)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers wants [B, tokens, H, d]: how the projections lie in memory, so that nothing is copied."""
    from xformers.ops import memory_efficient_attention

    heads_last = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return memory_efficient_attention(*heads_last).transpose(1, 2)


BACKENDS: Mapping[str, Attend] = {
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "cudnn_padded": _cudnn_padded,
    "flash": _flash,
    "efficient": _efficient,
    "xformers": _xformers,
}
_GPU = "cuda"  # where all but flash and PyTorch's own choice run
_KERNELS = {
    _cudnn: SDPBackend.CUDNN_ATTENTION,
    _cudnn_padded: SDPBackend.CUDNN_ATTENTION,
    _flash: SDPBackend.FLASH_ATTENTION,
    _efficient: SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class AttentionShape:
    """One kind of attention in a UNet. kind: "self" or "cross". layers: the names of the modules that have it.

    token_strides: from a token to the next one in query, key and value, in elements; () where they are heads * head_dim. Longer
    ones are views of a product that has more beside it.
    """

    rows: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    kind: str
    layers: tuple[str, ...]
    token_strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Who computes one shape.

    milliseconds: of each backend that was measured. excluded: why each of the others was left out. kernels: what those among
    them run that choose themselves.
    """

    shape: AttentionShape
    backend: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> str:
        """The backend, with its kernels if it was asked for them."""
        kernels = self.kernels.get(self.backend)
        return f"{self.backend} ({kernels})" if kernels else self.backend


@dataclass(frozen=True)
class AttentionPlan:
    """Who computes what, and why.

    wanted: engine.attention. backward: whether the milliseconds are of forward and backward pass, or forward alone.
    reproducible: whether only backends were taken whose gradients are the same every time inside `deterministic()`.
    """

    wanted: str
    choices: tuple[Choice, ...]
    backward: bool = True
    reproducible: bool = False

    @property
    def shapes(self) -> tuple[AttentionShape, ...]:
        """What it was made for; a stored plan serves a run whose `attention_shapes` are equal to them."""
        return tuple(choice.shape for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "AttentionPlan":
        """The inverse of `to_json`, also after its way through a file."""

        def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

        choices = (
            Choice(**choice | {"shape": AttentionShape(**tuples(choice["shape"]))}) for choice in data["choices"]
        )
        return AttentionPlan(**dict(data) | {"choices": tuple(choices)})

    def lines(self) -> tuple[str, ...]:
        """For the start of a run: who computes how many layers, how long all take if measured, who was left out and why."""
        layers: Counter[str] = Counter()
        left_out: Counter[tuple[str, str]] = Counter()
        for choice in self.choices:
            layers[choice.runs] += len(choice.shape.layers)
            for backend, reason in choice.excluded.items():
                left_out[backend, reason] += len(choice.shape.layers)
        chosen = ", ".join(f"{runs} for {_counted(count)}" for runs, count in layers.most_common())
        first = f"attention: {chosen}{self._times()}"
        return first, *(f"  {name} left out for {_counted(count)}: {why}" for (name, why), count in left_out.items())

    def _times(self) -> str:
        """The time of all layers, where all were measured, and beside it that of every backend that can do them all."""

        def total(backend_of: Callable[[Choice], str]) -> float:
            return sum(choice.milliseconds[backend_of(choice)] * len(choice.shape.layers) for choice in self.choices)

        if not self.choices or not all(choice.backend in choice.milliseconds for choice in self.choices):
            return ""
        everywhere = set.intersection(*(set(choice.milliseconds) for choice in self.choices))
        alone = sorted((total(lambda choice: name), name) for name in everywhere)  # noqa: B023 (called at once)
        beside = ", ".join(f"{name} alone {milliseconds:.2f}" for milliseconds, name in alone)
        passes = "forward and backward" if self.backward else "forward"
        return f"; {total(lambda choice: choice.backend):.2f} ms {passes}" + (f" ({beside})" if beside else "")


class AttentionProcessor:
    """Self- and cross-attention as diffusers' AttnProcessor2_0 does it, by a backend of choice; it has no state.

    attend: the backend itself; by default what `backend` names. Unlike diffusers' it refuses masks, and it does not
    divide by a rescale_output_factor of 1, which saves a pass over memory and changes nothing. In self-attention the tokens'
    gradients from queries, keys and values are added up in the products that compute them (`linear_layers`).
    """

    def __init__(self, backend: str, attend: Attend | None = None):
        self.backend = backend
        self._attend = BACKENDS[backend] if attend is None else attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: [B, Q, C], or an image [B, C, H, W]. encoder_hidden_states: [B, K, D]; without, Q attends to Q.

        temb is not used. Returns what hidden_states' shape is. Raises ValueError for an attention mask.
        """
        if attention_mask is not None:
            raise ValueError("the attention backends take no attention mask")
        tokens = hidden_states
        if hidden_states.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        layers = attn.to_q, attn.to_k, attn.to_v
        if context is tokens and all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
            projected = linear_layers(tokens, [layer.weight for layer in layers])
        else:
            projected = attn.to_q(tokens), attn.to_k(context), attn.to_v(context)
        query, key, value = (tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in projected)
        output = self._attend(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)
        for module in attn.to_out:
            output = module(output)
        if hidden_states.ndim == 4:
            output = output.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            output = output + hidden_states
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


_REPLACED = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, AttentionProcessor)


def attention_shapes(
    unet: UNet2DConditionModel, rows: int, latent_shape: Sequence[int], tokens: int
) -> tuple[AttentionShape, ...]:
    """What a UNet asks of attention, in the order in which it first does; found by running it on the meta device.

    rows: of the batch, both halves of guidance together. latent_shape: (C, H, W). tokens: of a text.
    Attention that `use` would leave alone is not listed. The UNet stays as it is, and no weights are copied.
    """
    found: dict[tuple, list[str]] = {}
    weights = [*unet.parameters(), *unet.buffers()]
    twin = copy.deepcopy(unet, {id(weight): _on_meta(weight) for weight in weights})

    def recorder(name: str, attention: Attention) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = "cross" if attention.is_cross_attention else "self"
            _, heads, queries, width = query.shape
            strides = tuple(tensor.stride(2) for tensor in (query, key, value))
            strides = () if set(strides) == {heads * width} else strides
            found.setdefault((rows, heads, queries, key.shape[2], width, kind, strides), []).append(name)
            return torch.empty_like(query)

        return attend

    for name, attention in _layers(twin).items():
        attention.set_processor(AttentionProcessor("recorder", recorder(name, attention)))
    dtype = next(unet.parameters()).dtype
    with torch.no_grad(), torch.device("meta"):
        latents = torch.empty(rows, *latent_shape, dtype=dtype)
        contexts = torch.empty(rows, tokens, unet.config.cross_attention_dim, dtype=dtype)
        twin(latents, torch.empty(rows, dtype=torch.int64), contexts, return_dict=False)
    return tuple(AttentionShape(*shape, tuple(layers), strides) for (*shape, strides), layers in found.items())


def choose(
    wanted: str,
    shapes: Sequence[AttentionShape],
    device: torch.device,
    dtype: torch.dtype,
    backward: bool = True,
    clock: Clock | None = None,
    backends: Mapping[str, Attend] = BACKENDS,
    reproducible: bool = False,
) -> AttentionPlan:
    """Decide who computes each shape.

    Every backend's output and gradients are first compared with plain math in float64; one that fails or is wrong is
    left out, with the reason. `auto` measures the others and keeps the fastest; without a clock it does so on CUDA,
    while elsewhere it is PyTorch's own choice. A named backend is taken for every shape it can do, PyTorch's own choice
    for the rest. `sdpa` is neither checked nor measured. Global random numbers are not touched.
    wanted: engine.attention. dtype: what the UNet computes in. backward: whether gradients are wanted.
    clock: how calls are timed; None: `cuda_milliseconds`. backends: the candidates, by name.
    reproducible: leave out whose gradients are not the same every time, inside `deterministic()`.
    Raises ConfigError for a named backend that can do none of the shapes.
    """

    def plan(choices: Iterator[Choice]) -> AttentionPlan:
        return AttentionPlan(wanted, tuple(choices), backward, reproducible)

    auto = wanted == "auto"
    if wanted == "sdpa" or (auto and clock is None and device.type != "cuda"):
        return plan(Choice(shape, "sdpa") for shape in shapes)
    candidates = dict(backends) if auto else {wanted: backends[wanted]}
    clock = cuda_milliseconds if clock is None else clock
    with deterministic() if reproducible else nullcontext():
        made = plan(_choose(shape, candidates, device, dtype, backward, clock if auto else None) for shape in shapes)
    if made.choices and not auto and all(choice.backend != wanted for choice in made.choices):
        reason = made.choices[0].excluded[wanted]
        raise ConfigError(f"engine.attention = {wanted!r}: {reason}; accepted here is auto or sdpa.")
    return made


def use(unet: UNet2DConditionModel, plan: AttentionPlan) -> None:
    """Let a UNet compute its attention as planned, in place; parameters and names stay.

    Asked for by name, xformers comes through diffusers' own `enable_xformers_memory_efficient_attention()`, as users of
    diffusers know it. Where `auto` chose it, it was measured without the copies of queries, keys and values that
    diffusers' processor makes, and is called that way. Modules that do more than plain attention (masks aside: added
    keys and values, norms of queries, keys or contexts, IP adapters) keep the processor they have.
    Raises ConfigError where the plan needs a library that is not installed, ValueError for a plan of another UNet.
    """
    chosen = {layer: choice.backend for choice in plan.choices for layer in choice.shape.layers}
    layers = _layers(unet)
    if chosen.keys() != layers.keys():
        other = min(chosen.keys() ^ layers.keys())
        raise ValueError(f"the attention plan is of another UNet: only one of them has {other}")
    missing = _without_xformers() if "xformers" in chosen.values() else ""
    if missing:
        raise ConfigError(f"engine.attention = {plan.wanted!r}: {missing}, which this run's plan needs.")
    named = plan.wanted == "xformers"
    if named:
        unet.enable_xformers_memory_efficient_attention()
    for name, attention in layers.items():
        if not (named and chosen[name] == "xformers"):
            attention.set_processor(AttentionProcessor(chosen[name]))


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms: the gradients of flash and memory-efficient attention repeat bit for bit.

    It is a switch of the whole process, read when a backward pass is computed or captured into a CUDA graph. New memory
    is not filled, which PyTorch otherwise does under it; operations that have no deterministic form raise RuntimeError. The environment variable that
    cuBLAS then needs is set where it is not, and stays.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


_WARMUP = 3
_CALLS = 7
# 10 to 20 ms: longer than Python takes to launch the calls, so that the device then does them without waiting for it.
# Within a CUDA graph, where the engine has them, Python's time is not there either.
_HEAD_START_CYCLES = 20_000_000


def cuda_milliseconds(call: Callable[[], Any]) -> float:
    """The median of seven calls, each between two CUDA events: the device's work without Python's."""
    for _ in range(_WARMUP):
        call()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_CALLS)]
    torch.cuda._sleep(_HEAD_START_CYCLES)
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """By how much a right result may be off, relative to its norm.

    With u the dtype's unit roundoff: kernels round probabilities, scores' gradients, the output that the backward pass
    starts from and the result, 4 u; the difference in a softmax's gradient can double it. Sums are float32 at least and
    err by `terms` of its roundoffs at most.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return 8 * roundoff + terms * min(roundoff, torch.finfo(torch.float32).eps / 2)


def _choose(
    shape: AttentionShape,
    candidates: Mapping[str, Attend],
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    clock: Clock | None,
) -> Choice:
    """The fastest candidate that is right, or, without a clock, the first; PyTorch's own choice if there is none."""
    case = _Case.make(shape, device, dtype, backward)
    wanted = case.plain()
    excluded = {name: case.fault(attend, wanted) for name, attend in candidates.items()}
    excluded = {name: fault for name, fault in excluded.items() if fault}
    right = {name: attend for name, attend in candidates.items() if name not in excluded}
    kernels = {name: case.kernels(attend) for name, attend in right.items() if attend in (_sdpa, _xformers)}
    if clock is None:
        return Choice(shape, next(iter(right), "sdpa"), {}, excluded, kernels)
    # Asked for by name it may have them, and the UNet then runs uncompiled.
    for name in [name for name, runs in kernels.items() if "cutlass" in runs]:
        excluded[name] = f"torch.compile cannot trace {kernels.pop(name)}, which efficient calls directly"
        del right[name]

    def timed(attend: Attend) -> float:
        return clock(lambda: case.run(attend))

    milliseconds = {name: timed(attend) for name, attend in right.items()}
    return Choice(shape, min(milliseconds, key=milliseconds.get, default="sdpa"), milliseconds, excluded, kernels)


@dataclass(frozen=True)
class _Case:
    """Random inputs of a shape, laid out as the projections leave them: [B, H, tokens, d] views of [B, tokens, stride].

    gradient: of the output; None where no gradients are wanted.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor | None

    @staticmethod
    def make(shape: AttentionShape, device: torch.device, dtype: torch.dtype, backward: bool) -> "_Case":
        generator = torch.Generator(device).manual_seed(0)
        width = shape.heads * shape.head_dim

        def random(tokens: int, stride: int = width) -> Tensor:
            whole = torch.randn(shape.rows, tokens, stride, generator=generator, device=device, dtype=dtype)
            return whole[..., :width].unflatten(-1, (shape.heads, -1)).transpose(1, 2)

        sizes = zip((shape.queries, shape.keys, shape.keys), shape.token_strides or (width,) * 3, strict=True)
        inputs = [random(*size).requires_grad_(backward) for size in sizes]
        return _Case(*inputs, random(shape.queries) if backward else None)

    def run(self, attend: Attend) -> tuple[Tensor, ...]:
        """The output, and the gradients of query, key and value if they are wanted."""
        inputs = (self.query, self.key, self.value)
        with torch.set_grad_enabled(self.gradient is not None):
            output = attend(*inputs)
            return (output, *(() if self.gradient is None else torch.autograd.grad(output, inputs, self.gradient)))

    def plain(self) -> tuple[Tensor, ...]:
        """What `run` should give for the first row and the last, in float64, a head at a time: scores are large.

        With P = softmax(s Q K^T) and O = P V: dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = s dS K, dK = s dS^T Q.
        """
        inputs = (self.query, self.key, self.value, *(() if self.gradient is None else (self.gradient,)))
        inputs = [self._sampled(tensor).flatten(0, 1) for tensor in inputs]
        scale = self.query.shape[-1] ** -0.5
        results = []
        for query, key, value, *gradients in zip(*inputs, strict=True):
            probabilities = torch.softmax(scale * query @ key.T, dim=-1)
            results.append([probabilities @ value])
            for gradient in gradients:
                centred = gradient @ value.T - (gradient * results[-1][0]).sum(-1, keepdim=True)
                scores = scale * probabilities * centred
                results[-1] += [scores @ key, scores.T @ query, probabilities.T @ gradient]
        return tuple(torch.stack(heads) for heads in zip(*results, strict=True))

    def fault(self, attend: Attend, wanted: tuple[Tensor, ...]) -> str:
        """Why a backend cannot be used here, or ""."""
        try:
            reason = self._refusal(attend)
            if reason:
                return reason
            results = self.run(attend)
            if torch.are_deterministic_algorithms_enabled() and not all(map(torch.equal, results, self.run(attend))):
                return "its result is not the same every time"
        except Exception as error:  # whatever the libraries raise
            return _reason(error)
        allowed = tolerance(self.query.dtype, max(self.query.shape[2], self.key.shape[2]))
        names = ("output", "query's gradient", "key's gradient", "value's gradient")
        # Probabilities are about 1 / keys. With a single key queries and keys have no gradient, only rounding of that size.
        smallest = self._sampled(self.query).norm() / self.key.shape[2]
        for name, result, right in zip(names, results, wanted, strict=False):
            error = (self._sampled(result).flatten(0, 1) - right).norm() / right.norm().maximum(smallest)
            if not error <= allowed:  # nor NaN
                return f"wrong: its {name} is off by {error:.1e} of the norm, where rounding explains {allowed:.1e}"
        return ""

    def _refusal(self, attend: Attend) -> str:
        """What PyTorch says against one of its kernels here, what is not installed, or why it is not worth a try; else ""."""
        missing = _without_xformers() if attend is _xformers else ""
        if missing or attend not in (*_KERNELS, _xformers):
            return missing
        if self.query.device.type != _GPU and attend is not _flash:
            return "it runs on CUDA only"
        if attend is _cudnn_padded:
            if self.query.shape[-1] % _STEP == 0:
                return f"the width of its heads is a multiple of {_STEP} as it is"
            return _said_against(_KERNELS[attend], lambda: self.run(partial(_padded, _sdpa)))
        return "" if attend is _xformers else _said_against(_KERNELS[attend], lambda: self.run(_sdpa))

    def kernels(self, attend: Attend) -> str:
        """What PyTorch's own choice or xformers' runs here, in words."""
        if attend is _xformers:
            operators = _xformers_operators(self.query, self.key, self.value, self.gradient is not None)
            return _in_words([operator.NAME for operator in operators])
        return _SDPA_NAMES.get(torch._fused_sdp_choice(self.query, self.key, self.value), "")

    @staticmethod
    def _sampled(tensor: Tensor) -> Tensor:
        """[2, ...] float64: the first row and the last."""
        return tensor.detach()[[0, -1]].double()


_LONGEST_REASON = 200
_SDPA_NAMES = {
    SDPBackend.CUDNN_ATTENTION.value: "cuDNN",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "memory-efficient",
    SDPBackend.MATH.value: "plain math",
}


def _said_against(kernel: SDPBackend, ask: Callable[[], Any]) -> str:
    """Why PyTorch does not take a kernel for a call of scaled_dot_product_attention, in its own words; "" if it does."""
    with warnings.catch_warnings(record=True) as caught, sdpa_kernel(kernel):
        warnings.simplefilter("always")
        try:
            ask()
        except RuntimeError as error:
            said = [_cleaned(str(warning.message)) for warning in caught]
            # Of the others it says that they are switched off, which they are for the question's sake.
            said = [text for text in said if "not used because" not in text and "runtime disabled" not in text]
            return " ".join(said)[:_LONGEST_REASON] or _reason(error)
    return ""


def _counted(layers: int) -> str:
    return f"{layers} layer" if layers == 1 else f"{layers} layers"


def _reason(error: Exception) -> str:
    """One line of an exception; of xformers' long ones, which say it last, what comes after "because:"."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = _cleaned(str(error))
    return (text.partition("because: ")[2] or text or type(error).__name__)[:_LONGEST_REASON]


def _cleaned(text: str) -> str:
    return " ".join(re.sub(r"\(Triggered internally at [^)]*\)\.?", "", text).split())


def _without_xformers() -> str:
    """Why xformers cannot be used, or "". Makes it ready.

    Its attention calls PyTorch's kernels. But where xformers' own library does not load, which attention does not need, it
    takes itself for built without CUDA and refuses every input on a GPU: so it is told that PyTorch has CUDA. Kernels that it
    really does not have it still refuses, as not built.
    """
    if not importlib.util.find_spec("xformers"):
        return "the library xformers is not installed"
    try:
        common = importlib.import_module("xformers.ops.fmha.common")
    except ImportError as error:  # of another version of flash-attn, for one
        return _reason(error)
    if torch.version.cuda and hasattr(common, "_built_with_cuda"):
        common._built_with_cuda = True
    return ""


def _xformers_operators(query: Tensor, key: Tensor, value: Tensor, backward: bool) -> list[type]:
    """Which operators memory_efficient_attention takes, forward and if wanted backward.

    Of the tensors only device, dtype, shapes and strides are looked at. Raises NotImplementedError where it has none.
    """
    fmha = importlib.import_module("xformers.ops.fmha")
    inputs = fmha.Inputs(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    operators = [fmha._dispatch_fw(inputs, backward)]
    return [*operators, fmha._dispatch_bw(inputs, None)] if backward else operators


def _in_words(names: Sequence[str]) -> str:
    """xformers' names of operators, and whose kernels they are: it marks PyTorch's by "-pt"."""
    listed = " and ".join(names)
    if not all(name.endswith("-pt") for name in names):
        return listed
    kinds = dict.fromkeys("flash" if name.startswith("fa2") else "memory-efficient" for name in names)
    return f"{listed}, PyTorch's {' and '.join(kinds)} kernel{'s' if len(names) > 1 else ''}"


def _layers(unet: nn.Module) -> dict[str, Attention]:
    """The attention modules that AttentionProcessor can serve, by name."""
    return {
        name: module for name, module in unet.named_modules() if isinstance(module, Attention) and _is_plain(module)
    }


def _is_plain(attention: Attention) -> bool:
    extras = (
        attention.spatial_norm,
        attention.norm_q,
        attention.norm_k,
        attention.norm_cross,
        attention.added_kv_proj_dim,
    )
    return (
        type(attention.processor) in _REPLACED
        and all(extra is None for extra in extras)
        and attention.to_out is not None
        and attention.scale_qk
        and attention.inner_dim == attention.inner_kv_dim
        and not (attention.is_causal or attention.fused_projections)
    )


def _on_meta(weight: Tensor) -> Tensor:
    twin = torch.empty_like(weight, device="meta")
    return nn.Parameter(twin, weight.requires_grad) if isinstance(weight, nn.Parameter) else twin
