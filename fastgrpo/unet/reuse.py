"""Work that is the same throughout a rollout, done once: texts' keys and values, time embeddings, a shared first step.

Weights do not change during a rollout. So in diffusers' UNet2DConditionModel

    text     `to_k` and `to_v` of every cross-attention make the same of a context at all T steps
    times    what every resnet makes of a timestep is the same in all rows, of all chunks
    first    where samples start from one latent, their first rows are the same until their prompts differ

The first two are arguments, not a state of the UNet, so any number of threads can use one UNet, each with its own, and
torch.compile and CUDA graphs see tensors at fixed addresses:

    enable_reuse(unet)                                      # once, before it is compiled
    text = RememberedText(unet, contexts)                   # text.update(contexts): the next chunk, in the same memory
    times = RememberedTimes(unet, schedule.timesteps, latents)
    output = unet(latents, times.at(steps), text).sample    # as of unet(latents, schedule.timesteps[steps], contexts)

`text` stands in the place of the contexts, so there are no others it could be stale for; `times` likewise. Both belong
to the weights they were computed with: `update` them in every rollout. They carry no gradient, so the update goes
without.

What it saves for SD 1.x, 64 images in 4 groups, guidance, 50 steps: 128 rows of 64 x 64 latents, and 5,141 TFLOP of the
UNet. Counted on the meta device, not measured; a launch is an operator of PyTorch's that is not a view.

               TFLOP    share       launches a step, of 728 (597 after `patch_unet`)
    text       18.5     0.36 %      32
    times       0.35    0.007 %     37
    first      98.8     1.92 %      where all share a latent; 96.4 (1.88 %) where each group has one, else nothing

What is remembered takes 492 MB of bfloat16 for the texts of 128 rows, 2 MB for the times.
A matrix product of other rows may be summed in another order. Texts are computed at the shapes they always have, and
times in batches of as many rows; the first step's rows are fewer. `choose_reuse` tries what leaves the bits alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import Tensor, nn

Forward = Callable[..., Tensor]
"""(latents [R, C, H, W], timesteps [R] int64 or TimesOfRows, contexts [R, L, D] or RememberedText) -> [R, C, H, W]."""


@dataclass(frozen=True)
class Reuse:
    """What a rollout computes once: texts' keys and values, time embeddings, the distinct rows of its first step."""

    text: bool = False
    times: bool = False
    first: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# What the UNet's modules do when they are given something remembered


class _TextProjection(nn.Module):
    """Comes before the class of a cross-attention's `to_k` or `to_v`. slot: its place among them."""

    slot: int

    def forward(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(context, RememberedText):
            return context.results[self.slot]
        return super().forward(context, *args, **kwargs)


class _TimeProjection(nn.Module):
    """Comes before the class of a resnet's `time_emb_proj`. slot: its place among them.

    activation: the resnet's own, or None. It is left to this module, since it cannot be called with what is remembered.
    """

    slot: int
    activation: nn.Module | None

    def forward(self, embedding: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(embedding, TimesOfRows):
            return embedding.tables[self.slot][embedding.steps]
        embedding = embedding if self.activation is None else self.activation(embedding)
        return super().forward(embedding, *args, **kwargs)


class _TimeEmbedding(nn.Module):
    """Comes before the class of `time_embedding`."""

    def forward(self, sample: Any, condition: Any = None) -> Any:
        return sample if isinstance(sample, TimesOfRows) else super().forward(sample, condition)


class _ReusingUNet(nn.Module):
    """Comes before the class of the UNet itself."""

    def get_time_embed(self, sample: Tensor, timestep: Any) -> Any:
        if isinstance(timestep, TimesOfRows):
            return timestep
        return super().get_time_embed(sample, timestep)  # type: ignore[misc]  # the UNet's


@cache
def _mixed(mixin: type[Any], kind: type[Any]) -> type[Any]:
    return type(f"{mixin.__name__.lstrip('_')}{kind.__name__}", (mixin, kind), {})


def _mix(mixin: Any, module: Any) -> None:
    """Puts `mixin` before the module's own class."""
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, module.__class__)


def enable_reuse(unet: UNet2DConditionModel) -> None:
    """Lets a UNet take `RememberedText` for contexts and `TimesOfRows` for timesteps, in place, once and for all.

    Names, parameters and what the UNet computes from plain tensors stay as they are. It may have LoRA adapters, be
    patched by `patch_unet` before or after, and use any attention processor that asks a cross-attention's contexts for
    nothing but their shape and gives them to `to_k` and `to_v` as they are.
    Raises ValueError for a UNet with other conditions than text and time, or whose cross-attention normalises its
    contexts.
    """
    refused = [
        name
        for name in ("class_embedding", "add_embedding", "time_embed_act", "encoder_hid_proj")
        if getattr(unet, name, None) is not None
    ]
    refused += [name for name, module in unet.named_modules() if isinstance(module, ResnetBlockCondNorm2D)]
    refused += [f"{name}.norm_cross" for name, module in _cross_attentions(unet) if module.norm_cross is not None]
    if refused:
        raise ValueError(f"engine.reuse: the UNet has {refused[0]}; accepted is a UNet of SD 1.x or 2.x, without it")
    for slot, projection in enumerate(_text_projections(unet)):
        _mix(_TextProjection, projection)
        projection.slot = slot
    resnets = [
        module for module in unet.modules() if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None
    ]
    for slot, resnet in enumerate(resnets):
        if isinstance(resnet.time_emb_proj, _TimeProjection):
            continue
        _mix(_TimeProjection, resnet.time_emb_proj)
        resnet.time_emb_proj.slot = slot
        resnet.time_emb_proj.activation = None if resnet.skip_time_act else resnet.nonlinearity
        resnet.skip_time_act = True
    _mix(_TimeEmbedding, unet.time_embedding)
    _mix(_ReusingUNet, unet)


def _cross_attentions(unet: nn.Module) -> list[tuple[str, Attention]]:
    return [(name, m) for name, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention]


def _text_projections(unet: nn.Module) -> list[Any]:
    return [projection for _, module in _cross_attentions(unet) for projection in (module.to_k, module.to_v)]


def _check_enabled(unet: nn.Module) -> None:
    if not isinstance(unet, _ReusingUNet):
        raise ValueError("the UNet was not prepared; call enable_reuse(unet) first")


# ---------------------------------------------------------------------------------------------------------------------
# Texts


class RememberedText:
    """Keys and values of a chunk's contexts, given to the UNet in their place.

    shape: [R, L, D], the contexts'. results: of every `to_k` and `to_v`, [R, L, width], at addresses that never change.
    """

    def __init__(self, unet: UNet2DConditionModel, contexts: Tensor):
        """contexts: [R, L, D], in the dtype that the UNet computes in. Raises ValueError without `enable_reuse`."""
        _check_enabled(unet)
        self.shape, self._like = contexts.shape, (contexts.shape, contexts.dtype, contexts.device)
        self._projections = _text_projections(unet)
        with torch.no_grad():
            self.results = tuple(projection(contexts) for projection in self._projections)

    @torch.no_grad()
    def update(self, contexts: Tensor) -> None:
        """Computes them anew, for other contexts or after the weights changed, into the same memory.

        Raises ValueError for contexts of another shape, dtype or device than the first.
        """
        like = (contexts.shape, contexts.dtype, contexts.device)
        if like != self._like:
            given, wanted = (f"{list(shape)} {dtype} on {device}" for shape, dtype, device in (like, self._like))
            raise ValueError(f"the contexts are {given}; accepted is {wanted}, for which there is memory")
        for projection, result in zip(self._projections, self.results, strict=True):
            result.copy_(projection(contexts))


# ---------------------------------------------------------------------------------------------------------------------
# Times


@dataclass(frozen=True)
class TimesOfRows:
    """The timesteps of a forward pass's rows, given to the UNet in their place.

    tables: [T, width] for every resnet. steps: [R] int64, each row's place in them, on the device.
    """

    tables: tuple[Tensor, ...]
    steps: Tensor


class RememberedTimes:
    """What every resnet adds at each of T timesteps.

    tables: [T, width] for every resnet, at addresses that never change.
    """

    def __init__(self, unet: UNet2DConditionModel, timesteps: Tensor, latents: Tensor):
        """timesteps: a rollout's, [T] int64. latents: [R, ...]; only their number, dtype and device matter.

        Raises ValueError for a UNet without `enable_reuse`.
        """
        _check_enabled(unet)
        self._unet, self._timesteps = unet, timesteps
        # As many rows as the UNet has: in a product of the same shape a row is likeliest to get the same bits.
        self._rows, self._dtype = latents.shape[0], latents.dtype
        self.tables = tuple(self._compute())

    def at(self, steps: Tensor) -> TimesOfRows:
        """Returns what to give the UNet for `timesteps[steps]`. steps: [R] int64, counted from 0."""
        return TimesOfRows(self.tables, steps)

    def update(self) -> None:
        """Computes them anew, after the weights changed, into the same memory."""
        for table, computed in zip(self.tables, self._compute(), strict=True):
            table.copy_(computed)

    @torch.no_grad()
    def _compute(self) -> list[Tensor]:
        count = len(self._timesteps)
        last = self._timesteps[-1:].expand(-count % self._rows)
        projections = [m for m in self._unet.modules() if isinstance(m, _TimeProjection)]
        parts = []
        for timesteps in torch.cat([self._timesteps, last]).split(self._rows):
            sample = torch.empty(self._rows, dtype=self._dtype, device=timesteps.device)  # for its length and dtype
            embedding = self._unet.time_embedding(self._unet.get_time_embed(sample, timesteps))
            parts.append([projection(embedding) for projection in projections])
        return [torch.cat(part)[:count] for part in zip(*parts, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The first step


@dataclass(frozen=True)
class DistinctRows:
    """Which of R rows differ. chosen: [K] int64, a row of each kind. index: [R] int64, each row's place in `chosen`."""

    chosen: Tensor
    index: Tensor

    @property
    def saved(self) -> int:
        """How many rows need not be computed."""
        return len(self.index) - len(self.chosen)

    def select(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [K, ...], in the same memory format."""
        return rows[self.chosen]

    def expand(self, distinct: Tensor) -> Tensor:
        """[K, ...] -> [R, ...], in the same memory format."""
        return distinct[self.index]


def distinct_rows(
    initial_noise: Literal["shared", "per_prompt", "independent"],
    group_size: int,
    samples: range,
    guidance: float,
    device: torch.device | str = "cpu",
) -> DistinctRows:
    """Finds the distinct rows of a rollout's first step: without, then with prompts; at guidance 1 only the latter.

    initial_noise: as in RolloutConfig.
    samples: those of the chunk, counted over all that this process draws, `group_size` a prompt.
    """
    latent = {"shared": lambda i: 0, "per_prompt": lambda i: i // group_size, "independent": lambda i: i}[initial_noise]
    rows: list[tuple[int, int | None]] = [] if guidance == 1.0 else [(latent(sample), None) for sample in samples]
    rows += [(latent(sample), sample // group_size) for sample in samples]
    kinds: dict[tuple[int, int | None], int] = {}
    index = [kinds.setdefault(row, len(kinds)) for row in rows]
    chosen = [index.index(kind) for kind in range(len(kinds))]
    # Not built on the device: that waits for what the rollout's chunk before has yet to compute.
    return DistinctRows(*(torch.tensor(rows).to(device, non_blocking=True) for rows in (chosen, index)))


def forward_distinct(
    forward: Forward, rows: DistinctRows, latents: Tensor, timesteps: Tensor | TimesOfRows, contexts: Tensor
) -> Tensor:
    """Returns [R, C, H, W], of which only the distinct rows are computed. All arguments have R rows."""
    if isinstance(timesteps, TimesOfRows):
        timesteps = TimesOfRows(timesteps.tables, rows.select(timesteps.steps))
    else:
        timesteps = rows.select(timesteps)
    return rows.expand(forward(rows.select(latents), timesteps, rows.select(contexts)))


# ---------------------------------------------------------------------------------------------------------------------
# Which of it


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same to the last bit and in memory format, so that nothing after them differs."""
    return one.stride() == other.stride() and torch.equal(one, other)


def choose_reuse(
    forward: Forward,
    unet: UNet2DConditionModel,
    timesteps: Tensor,
    latents: Tensor,
    contexts: Tensor,
    rows: DistinctRows,
    remember: bool = True,
) -> Reuse:
    """Finds what a rollout can compute once without changing a bit of its output.

    It runs `forward`, as the rollout will, at the first, the middle and the last step, plain and with one thing more
    remembered each time; what changes a bit is left out. Which bits come out is a matter of kernels and shapes, so the
    choice holds for other weights of the same UNet; only adapters whose B is still zero hide what their A does.
    timesteps: [T] int64. latents: [R, C, H, W], contexts: [R, L, D]: any of the rollout's shapes.
    rows: of its first step. remember: whether texts and times are tried at all.
    Raises ValueError for a UNet without `enable_reuse`.
    """
    if not remember:
        return Reuse(first=_first_is_the_same(forward, timesteps[:1], latents, contexts, rows))
    text, times = RememberedText(unet, contexts), RememberedTimes(unet, timesteps, latents)
    steps = sorted({0, len(timesteps) // 2, len(timesteps) - 1})
    at = [torch.full((len(latents),), step, device=timesteps.device) for step in steps]
    # Copies: a forward pass may write its output to where the last one's is, or hold on to what a backward pass needs.
    plain = [forward(latents, timesteps[step], contexts).detach().clone() for step in at]

    def unchanged(use_text: bool, use_times: bool) -> bool:
        given = [times.at(step) if use_times else timesteps[step] for step in at]
        outputs = (forward(latents, when, text if use_text else contexts) for when in given)
        return all(map(same_bits, outputs, plain))

    use_text = unchanged(True, False)
    use_times = unchanged(use_text, True)
    remembered = times.at(at[0]) if use_times else None
    return Reuse(use_text, use_times, _first_is_the_same(forward, timesteps[:1], latents, contexts, rows, remembered))


def _first_is_the_same(
    forward: Forward,
    timestep: Tensor,
    latents: Tensor,
    contexts: Tensor,
    rows: DistinctRows,
    times: TimesOfRows | None = None,
) -> bool:
    """Whether computing the distinct rows alone saves something and leaves the bits alone. times: if remembered."""
    if not rows.saved:
        return False
    latents, contexts = (rows.expand(rows.select(tensor)) for tensor in (latents, contexts))
    timesteps = timestep.expand(len(latents)).contiguous()
    whole = forward(latents, timesteps, contexts).detach().clone()
    return same_bits(forward_distinct(forward, rows, latents, times or timesteps, contexts), whole)
