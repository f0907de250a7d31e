"""The UNet's attention, computed by a backend of choice.

    sdpa           torch.nn.functional.scaled_dot_product_attention, PyTorch's own choice
    cudnn          cuDNN's fused attention
    cudnn_padded   the same on heads that are padded to 64, 128, ... columns; a candidate of `auto`, not a setting
    flash          FlashAttention as PyTorch ships it; on the CPU PyTorch's own flash kernel
    efficient      PyTorch's memory-efficient kernel; a candidate of `auto`, not a setting
    xformers       xformers.ops.memory_efficient_attention, which chooses among its own kernels and PyTorch's

`attention_shapes` finds out what the UNet asks for, `choose_backends` (attention_choice.py) picks a backend for each
shape, and `apply_plan` installs them. The `AttentionPlan` is stored with the run: a resumed run does not measure again.

The kernels are called as the operators that scaled_dot_product_attention dispatches to. torch.nn.attention.sdpa_kernel
would set switches of the whole process, which threads that enter and leave it in turn can leave changed for good.

Forward passes repeat bit for bit (cuDNN does not promise it; `ratio/max_abs_dev_first` would show it), so rollout and
update agree on the log-probs. Backward passes on CUDA may differ by rounding: flash, also xformers', adds the queries'
gradients of different key blocks atomically, as the memory-efficient kernel does where it splits the keys. On the CPU
every backend repeats with the same number of threads.
"""

import copy
import importlib
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from fastgrpo.system.errors import ConfigError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(query key^T / sqrt(d)) value: query [B, H, Q, d], key and value [B, H, K, d] -> [B, H, Q, d]."""


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    # The log-sum-exp, which the backward pass needs, is asked for even where there will be none: without it another
    # kernel could run.
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[0]


_TILE = 64  # columns of cuDNN's tiles, or a divisor of that


def padded(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Calls `attend` on heads with columns of zeros added, which change no result. Memory stays [B, tokens, H, d]."""
    width = query.shape[-1]
    heads_last = (F.pad(tensor.transpose(1, 2), (0, -width % _TILE)) for tensor in (query, key, value))
    output = attend(*(tensor.transpose(1, 2) for tensor in heads_last), width**-0.5)
    return output.transpose(1, 2)[..., :width].transpose(1, 2)


def cudnn_padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN may have its faster kernels only for widths that are multiples of 16, which 40 is not."""
    return padded(cudnn, query, key, value)


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers wants [B, tokens, H, d]: that is how the projections lie in memory, so nothing is copied."""
    from xformers.ops import memory_efficient_attention

    heads_last = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return memory_efficient_attention(*heads_last).transpose(1, 2)


BACKENDS: Mapping[str, Attend] = {f.__name__: f for f in (sdpa, cudnn, cudnn_padded, flash, efficient, xformers)}


@dataclass(frozen=True)
class AttentionShape:
    """One kind of attention in a UNet. kind: "self" or "cross". layers: the names of the modules that have it."""

    rows: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    kind: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The backend of one shape.

    milliseconds: of a forward and a backward pass, for each backend that was measured. excluded: why each of the others
    was left out. kernels: what sdpa and xformers, which choose among kernels themselves, run here.
    """

    shape: AttentionShape
    backend: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> str:
        kernels = self.kernels.get(self.backend)
        return f"{self.backend} ({kernels})" if kernels else self.backend


@dataclass(frozen=True)
class AttentionPlan:
    """The backend of every attention shape of a UNet. wanted: engine.attention."""

    wanted: str
    choices: tuple[Choice, ...]

    @property
    def shapes(self) -> tuple[AttentionShape, ...]:
        """What the plan was made for; a stored plan serves a run whose `attention_shapes` are equal to them."""
        return tuple(choice.shape for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "AttentionPlan":
        """Reads what `to_json` returned, also after it went through a file."""

        def shape(stored: Mapping[str, Any]) -> AttentionShape:
            fields = {name: value for name, value in stored.items() if name != "token_strides"}  # of older versions
            return AttentionShape(**fields | {"layers": tuple(fields["layers"])})

        choices = (Choice(**choice | {"shape": shape(choice["shape"])}) for choice in data["choices"])
        return AttentionPlan(data["wanted"], tuple(choices))

    def lines(self) -> tuple[str, ...]:
        """Says at the start of a run who computes how many layers in what time, who was left out and why."""
        layers: Counter[str] = Counter()
        left_out: Counter[tuple[str, str]] = Counter()
        for choice in self.choices:
            layers[choice.runs] += len(choice.shape.layers)
            for backend, reason in choice.excluded.items():
                left_out[backend, reason] += len(choice.shape.layers)
        chosen = ", ".join(f"{runs} for {_layers_in_words(count)}" for runs, count in layers.most_common())
        return f"attention: {chosen}{self._times()}", *(
            f"  {name} left out for {_layers_in_words(count)}: {why}" for (name, why), count in left_out.items()
        )

    def _times(self) -> str:
        """Writes the time of all layers, if measured, and beside it that of every backend that can do them all."""

        def total(backend_of: Callable[[Choice], str]) -> float:
            return sum(choice.milliseconds[backend_of(choice)] * len(choice.shape.layers) for choice in self.choices)

        if not self.choices or not all(choice.backend in choice.milliseconds for choice in self.choices):
            return ""
        everywhere = set.intersection(*(set(choice.milliseconds) for choice in self.choices))
        alone = sorted((total(lambda choice: name), name) for name in everywhere)  # noqa: B023 (called at once)
        beside = ", ".join(f"{name} alone {milliseconds:.2f}" for milliseconds, name in alone)
        taken = f"; {total(lambda choice: choice.backend):.2f} ms forward and backward"
        return f"{taken} ({beside})" if beside else taken


def _layers_in_words(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


class AttentionProcessor:
    """Computes attention as diffusers' AttnProcessor2_0 does, by a backend of choice; it has no state.

    attend: the backend itself; by default what `backend` names. Unlike diffusers' it refuses masks, and it does not
    divide by a rescale_output_factor of 1, which saves a pass over memory and changes nothing.
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
        """Returns the attended hidden_states, [B, Q, C] or an image [B, C, H, W], in the same shape.

        encoder_hidden_states: [B, K, D]; None for self-attention. temb is not used. Raises ValueError for a mask.
        """
        if attention_mask is not None:
            raise ValueError("the attention backends take no attention mask")
        tokens = hidden_states if hidden_states.ndim != 4 else hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
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
    """Finds the kinds of attention in a UNet by running it on the meta device, in the order in which they first come.

    rows: of the batch, both halves of guidance together. latent_shape: (C, H, W). tokens: of a text.
    Attention that `apply_plan` would leave alone is not listed. The UNet stays as it is, and no weights are copied.
    """
    found: dict[tuple[int, int, int, int, int, str], list[str]] = {}
    weights = [*unet.parameters(), *unet.buffers()]
    twin = copy.deepcopy(unet, {id(weight): _on_meta(weight) for weight in weights})

    def recorder(name: str, attention: Attention) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = "cross" if attention.is_cross_attention else "self"
            _, heads, queries, width = query.shape
            found.setdefault((rows, heads, queries, key.shape[2], width, kind), []).append(name)
            return torch.empty_like(query)

        return attend

    for name, attention in _replaceable_layers(twin).items():
        attention.set_processor(AttentionProcessor("recorder", recorder(name, attention)))
    dtype = next(unet.parameters()).dtype
    with torch.no_grad(), torch.device("meta"):
        latents = torch.empty(rows, *latent_shape, dtype=dtype)
        contexts = torch.empty(rows, tokens, unet.config.cross_attention_dim, dtype=dtype)
        twin(latents, torch.empty(rows, dtype=torch.int64), contexts, return_dict=False)
    return tuple(AttentionShape(*shape, tuple(layers)) for shape, layers in found.items())


def apply_plan(unet: UNet2DConditionModel, plan: AttentionPlan) -> None:
    """Lets a UNet compute its attention as planned, in place; parameters and names stay.

    xformers, asked for by name, comes through diffusers' own `enable_xformers_memory_efficient_attention()`. Where
    `auto` chose it, it is called as it was measured, without the copies that diffusers' processor makes. Modules that
    do more than plain attention (added keys and values, further norms, IP adapters) keep their processor.
    Raises ConfigError where the plan needs a library that is not installed, ValueError for a plan of another UNet.
    """
    chosen = {layer: choice.backend for choice in plan.choices for layer in choice.shape.layers}
    layers = _replaceable_layers(unet)
    if chosen.keys() != layers.keys():
        other = min(chosen.keys() ^ layers.keys())
        raise ValueError(f"the attention plan is of another UNet: only one of them has {other}")
    missing = xformers_missing() if "xformers" in chosen.values() else ""
    if missing:
        raise ConfigError(f"engine.attention = {plan.wanted!r}: {missing}, which this run's plan needs.")
    named = plan.wanted == "xformers"
    if named:
        unet.enable_xformers_memory_efficient_attention()
    for name, attention in layers.items():
        if not (named and chosen[name] == "xformers"):
            attention.set_processor(AttentionProcessor(chosen[name]))


def xformers_missing() -> str:
    """Makes xformers ready. Returns why it cannot be used, or "".

    Its attention calls PyTorch's kernels, yet refuses every input on a GPU where xformers' own library does not load.
    So it is told that PyTorch has CUDA; kernels that it really lacks it still refuses, as not built.
    """
    if not importlib.util.find_spec("xformers"):
        return "the library xformers is not installed"
    try:
        common: Any = importlib.import_module("xformers.ops.fmha.common")
    except ImportError as error:  # of another version of flash-attn, for one
        return short_reason(error)
    if torch.version.cuda and hasattr(common, "_built_with_cuda"):
        common._built_with_cuda = True
    return ""


LONGEST_REASON = 200  # characters


def short_reason(error: Exception) -> str:
    """Says in one line what an exception says; of xformers' long ones, which say it last, what follows "because:"."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = one_line(str(error))
    return (text.partition("because: ")[2] or text or type(error).__name__)[:LONGEST_REASON]


def one_line(text: str) -> str:
    """Joins lines, without the places in PyTorch's source that its messages end with."""
    return " ".join(re.sub(r"\(Triggered internally at [^)]*\)\.?", "", text).split())


def _replaceable_layers(unet: nn.Module) -> dict[str, Attention]:
    layers = unet.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, Attention) and _is_plain(layer)}


def _is_plain(layer: Attention) -> bool:
    extras = layer.spatial_norm, layer.norm_q, layer.norm_k, layer.norm_cross, layer.added_kv_proj_dim
    return (
        type(layer.processor) in _REPLACED
        and all(extra is None for extra in extras)
        and layer.to_out is not None
        and layer.scale_qk
        and layer.inner_dim == layer.inner_kv_dim
        and not (layer.is_causal or layer.fused_projections)
    )


def _on_meta(weight: Tensor) -> Tensor:
    twin = torch.empty_like(weight, device="meta")
    return nn.Parameter(twin, weight.requires_grad) if isinstance(weight, nn.Parameter) else twin
