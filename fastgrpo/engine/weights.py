"""The trained weights in one flat buffer, and AdamW on it: one pass over memory updates everything, at fixed addresses.

Names stay: every parameter is a view of the buffer in its own shape and memory layout, so modules, state dicts and
checkpoints see what they saw before.

Of several processes each may own an equal share of the buffers, and step that share alone (ZeRO, Rajbhandari et al.,
arXiv 1910.02054, stage 1): it holds the moments and the average of its share only. The weights stay whole, also those
in float32 beside a working copy: they are the UNet's own parameters, which state dicts, evaluations and what
torch.compile is compared with read. So does the gradient, which sums up many micro-batches before it is reduced.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine.host_average import HostAverage
from fastgrpo.kernels.accumulate import ALIGNMENT, accumulate
from fastgrpo.kernels.fused_adamw import clip_coefficient, fused_adamw, global_norm
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError

SCALES = "exp_avg_scale."
"""How the names of the first moment's scales begin, which a checkpoint has where moments are held in 8 bits."""


class FlatWeights:
    """Parameters, their gradient and, if wanted, their moving average, each in one [size] float32 buffer.

    parameters: by name. values, gradient: the buffers. ema: this process's share of a third, which starts as the
    weights, or None. alignment: elements, at multiples of which parameters and shares begin. size: elements of a
    buffer, a multiple of `owners.count * alignment`; the few between and behind parameters stay 0.
    working: the buffer of `working_copy`, None before its first call.
    owners: the processes that each own a share of the buffers; one alone owns all, whatever else trains beside it.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        ema: bool = False,
        owners: Ranks = Ranks(),  # noqa: B008 (frozen)
        alignment: int = ALIGNMENT,
    ):
        """Moves the parameters' data into `values`. Raises ValueError unless all are float32 and on one device.

        alignment: a multiple of `kernels.accumulate.ALIGNMENT`.
        """
        self.parameters, self.owners, self.alignment = dict(parameters), owners, alignment
        devices = {parameter.device for parameter in self.parameters.values()}
        if len(devices) != 1:
            raise ValueError(f"the parameters are on {sorted(map(str, devices))}; accepted is one device")
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} is {parameter.dtype}; accepted is torch.float32")
        self._starts, self.size = {}, 0
        for name, parameter in self.parameters.items():
            self._starts[name] = self.size
            # 128 bytes of float32 or more, 64 of a working copy: no two parameters share a cache line, and vector loads
            # are aligned as for a tensor allocated alone.
            self.size += -(-parameter.numel() // alignment) * alignment
        self.size += -self.size % (owners.count * alignment)
        # Dense, and in the parameter's own order of dimensions.
        self._strides = {name: torch.empty_like(p, device="meta").stride() for name, p in self.parameters.items()}
        self._device = devices.pop()
        self.values, self.gradient = self.zeros(), self.zeros()
        self._gradients = list(self.views(self.gradient).values())
        for name, view in self.views(self.values).items():
            view.copy_(self.parameters[name].detach())
            self.parameters[name].data = view
        self._addresses = {name: parameter.data_ptr() for name, parameter in self.parameters.items()}
        self.ema = self.own(self.values).clone() if ema else None
        self.working: Tensor | None = None

    def zeros(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Another buffer like `values`."""
        return torch.zeros(self.size, dtype=dtype, device=self._device)

    @property
    def sharded(self) -> bool:
        """Whether several processes own the buffers."""
        return self.owners.count > 1

    def own(self, buffer: Tensor) -> Tensor:
        """This process's share of a [size] buffer."""
        return buffer[self.owners.share(self.size)]

    def joined(self, share: Tensor) -> Tensor:
        """A [size] buffer of which every process holds its `share`, on all of them; where one owns all, `share`."""
        if not self.sharded:
            return share
        whole = share.new_empty(self.size)
        self.own(whole).copy_(share)
        self.owners.join_shares_(whole)
        return whole

    def fill_own(self, share: Tensor, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy tensors, named as the parameters with `prefix`, into this process's `share` of a buffer as of `views`.

        Raises KeyError where one is missing, RuntimeError where one has another shape.
        """
        each = self.size // (len(share) * self.owners.count)
        owned = self.owners.share(self.size // each)
        for name in self.parameters:
            tensor, (start, shape, strides) = tensors[prefix + name], self._place(name, each)
            if tensor.shape != shape:
                raise RuntimeError(f"{prefix}{name} has another shape than {name}")
            count = math.prod(shape)
            first, last = max(start, owned.start), min(start + count, owned.stop)
            if first < last:
                placed = torch.empty_strided(shape, strides, dtype=share.dtype).copy_(tensor)
                part = placed.as_strided((count,), (1,))[first - start : last - start]
                share[first - owned.start : last - owned.start].copy_(part)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its part of a [size] buffer of any dtype, in its shape and memory layout.

        Of a [size // alignment] buffer, which has a number for each block of so many elements, it is flat.
        """
        views = {}
        for name in self.parameters:
            start, shape, strides = self._place(name, self.size // len(buffer))
            views[name] = buffer[start : start + math.prod(shape)].as_strided(shape, strides)
        return views

    def _place(self, name: str, each: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """A parameter's start, shape and strides in a buffer with a number for `each` elements, 1 or `alignment`."""
        shape = self.parameters[name].shape
        if each == 1:
            return self._starts[name], shape, self._strides[name]
        return self._starts[name] // each, (-(-shape.numel() // each),), (1,)

    def working_copy(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameter name -> the weight rounded to `dtype`, bfloat16 or float16; `FlatAdamW.step` keeps it up to date.

        All are views of one buffer, and later calls return the same. Raises ValueError for another dtype then.
        """
        if self.working is None:
            self.working = self.zeros(dtype)
        if self.working.dtype != dtype:
            raise ValueError(f"the working copy is {self.working.dtype}, not {dtype}")
        self.refresh()
        return self.views(self.working)

    def refresh(self) -> None:
        """Round the parameters, wherever their data lie, into the working copy, if there is one."""
        if self.working is not None:
            with torch.no_grad():
                for name, view in self.views(self.working).items():
                    view.copy_(self.parameters[name])

    def zero_gradient(self) -> None:
        """Set the flat gradient to 0 and let every `.grad` lie in it."""
        self.gradient.zero_()
        for parameter, view in zip(self.parameters.values(), self._gradients, strict=True):
            parameter.grad = view

    def accumulate(self, gradients: Sequence[Tensor]) -> None:
        """Add one gradient per parameter, of any dtype, to `.grad`, which then lies in the flat gradient."""
        if all(p.grad is view for p, view in zip(self.parameters.values(), self._gradients, strict=True)):
            self._add(gradients)
            return
        torch._foreach_copy_(self._gradients, list(gradients))
        for parameter, view in zip(self.parameters.values(), self._gradients, strict=True):
            parameter.grad = view

    def _add(self, gradients: Sequence[Tensor]) -> None:
        """On a GPU gradients laid out like their places take a few launches; the others are added one by one."""
        if self._device.type == "cpu":  # the same bits; there is no launch to spare
            torch._foreach_add_(self._gradients, list(gradients))
            return
        alike = []
        for gradient, view, start in zip(gradients, self._gradients, self._starts.values(), strict=True):
            if _same_layout(gradient, view):
                alike.append((gradient, start))
            else:
                view.add_(gradient)
        if alike:
            accumulate(self.gradient, *zip(*alike, strict=True))

    def collect_gradients(self) -> Tensor:
        """The flat gradient, with every `.grad` that lies elsewhere copied into it; a missing one counts as 0."""
        views, elsewhere = [], []
        for parameter, view in zip(self.parameters.values(), self._gradients, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                views.append(view)
                elsewhere.append(parameter.grad)
                parameter.grad = view
        if views:
            torch._foreach_copy_(views, elsewhere)
        return self.gradient

    def reduce(self, ranks: Ranks) -> None:
        """Sum the flat gradient over all `ranks`; where they own shares, each has the sum of its own share only."""
        gradient = self.collect_gradients()
        if self.sharded:
            self.owners.sum_shares_(gradient)
        else:
            ranks.sum_([gradient])

    def check_places(self) -> None:
        """Raises RuntimeError where a parameter is no longer in `values`: steps would not reach it."""
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() != self._addresses[name]:
                raise RuntimeError(f"{name} was moved out of the flat buffer, so the optimizer no longer moves it")


def _same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape have their elements in the same order; `other` has no holes."""
    strides = zip(tensor.stride(), other.stride(), tensor.shape, strict=True)
    return all(mine == its or size == 1 for mine, its, size in strides)


class FlatAdamW:
    """torch.optim.AdamW on FlatWeights, with gradient clipping, working copy and moving average in the same pass.

    On the CPU the weights get the bits of torch's. Unlike there, a step whose gradient is not finite changes nothing,
    and a missing gradient counts as 0. One step counter and one learning rate, on the device, serve all parameters.

    Where processes own shares of the weights, each steps its own; all call `FlatWeights.reduce`, `step` and `gather`
    together, the first before every step.

    param_groups: one, whose "lr" is read at every step. exp_avg, exp_avg_sq: float32, this process's share of [size].
    step_count: [1] float32. moments: what both are held in, as optim.moments has it.
    """

    moments = "fp32"

    # torch.amp.GradScaler then leaves the gradient scaled; the attribute `grad_scale` exists during its steps only.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        weights: FlatWeights,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ema_decay: float = 0.0,
        average: HostAverage | None = None,
    ):
        """ema_decay: of `weights.ema`, if there is one. average: kept up to date in its stead; never of shares."""
        self.weights, self.average = weights, average
        # GradScaler looks for what is not finite in these gradients. In those of shares every process would find
        # something else; the norm, which all know, shows the same.
        self._shown = torch.nn.Parameter(torch.zeros_like(weights.values[:1])) if weights.sharded else None
        seen = list(weights.parameters.values()) if self._shown is None else [self._shown]
        self.param_groups: list[dict[str, Any]] = [{"params": seen, "lr": lr}]
        self._make_moments()
        self._gathered: dict[str, dict[str, Tensor]] | None = None
        device = weights.values.device
        self.step_count = torch.zeros(1, device=device)
        decays = {"weight_decay": weight_decay, "ema_decay": ema_decay}
        self._options: dict[str, Any] = {"beta1": betas[0], "beta2": betas[1], "eps": eps} | decays
        # float64, so that it is the Python number; the host remembers it and writes it only when it changes.
        self._lr, self._written_lr = torch.full((1,), lr, dtype=torch.float64, device=device), lr

    def _make_moments(self) -> None:
        """Moments of this process's share, as before any step."""
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.weights.own(self.weights.values)) for _ in range(2))

    @torch.no_grad()
    def step(self, max_grad_norm: float = math.inf) -> Tensor:
        """One step on the gradients in `.grad`, clipped to `max_grad_norm` without being changed themselves.

        Returns their norm, without the loss scale: a float32 scalar on the device, not finite if the step was left out.
        Raises RuntimeError where a parameter was moved out of the flat buffer.
        """
        weights = self.weights
        weights.check_places()
        lr = self.param_groups[0]["lr"]
        if lr != self._written_lr:
            self._lr.fill_(lr)
            self._written_lr = lr
        gradient = weights.own(weights.collect_gradients())
        grad_scale = getattr(self, "grad_scale", None)
        loss_scale = None if grad_scale is None else grad_scale.reshape(1)
        norm = self._norm(gradient)
        scale, found_inf = clip_coefficient(norm, max_grad_norm, loss_scale)
        working = None if weights.working is None or weights.sharded else weights.working
        self._update(weights.own(weights.values), gradient, scale, found_inf, working)
        if self.average is not None:
            self.average.follow(weights.values, found_inf)
        if weights.sharded:
            weights.owners.join_shares_(weights.values)
            if weights.working is not None:
                weights.working.copy_(weights.values)
        self._gathered = None
        return (norm if loss_scale is None else norm / loss_scale)[0]

    def _update(
        self, values: Tensor, gradient: Tensor, scale: Tensor, found_inf: Tensor, working: Tensor | None
    ) -> None:
        """Step this process's share of weights, moments, average and step count, and the `working` copy if given."""
        state, ema = (values, self.exp_avg, self.exp_avg_sq, gradient, self.step_count, self._lr), self.weights.ema
        fused_adamw(*state, scale=scale, found_inf=found_inf, working=working, ema=ema, **self._options)

    def _norm(self, gradient: Tensor) -> Tensor:
        """[1] float32: of the whole gradient, of which this process has its share. The same bits on all processes.

        The shares' squares are summed in float64 in the order of the processes, whatever way they were sent.
        """
        norm, owners = global_norm(gradient), self.weights.owners
        return owners.stack(norm.double().square()).sum(dim=0).sqrt().float() if self.weights.sharded else norm

    def show_norm(self) -> None:
        """Let GradScaler see, where processes own shares, what all have together. Called before its step."""
        if self._shown is not None:
            self._shown.grad = self._norm(self.weights.own(self.weights.collect_gradients()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; or, without `set_to_none`, make them 0."""
        if set_to_none:
            for parameter in self.weights.parameters.values():
                parameter.grad = None
        else:
            self.weights.zero_gradient()

    def gather(self) -> None:
        """Where processes own shares, bring moments and average into the first one's host memory, until the next step.

        Stable Diffusion's are 10 GB, for which a host has room. So a checkpoint is the same files whatever wrote it,
        and needs no format for shards, as torch.distributed.checkpoint's is, that only torch can read.
        """
        weights = self.weights
        if not weights.sharded or self._gathered is not None:
            return
        shares = self._shares()
        shares |= {} if weights.ema is None else {"ema": weights.ema}
        wholes = {key: weights.owners.collect(share) for key, share in shares.items()}
        self._gathered = {key: weights.views(whole) for key, whole in wholes.items() if whole is not None}

    def whole(self, key: str) -> dict[str, Tensor]:
        """Parameter name -> its "exp_avg", "exp_avg_sq", "ema", or what else `_shares` has.

        Raises RuntimeError where processes own shares and this one is not the first, or has not called `gather` yet.
        """
        if self.weights.sharded:
            if not self._gathered:
                raise RuntimeError(f"this process has a share of {key} only: the first one has all after `gather`")
            return self._gathered[key]
        average = self.weights.ema if self.average is None else self.average.values
        buffer = average if key == "ema" else self._shares()[key]
        return {} if buffer is None else self.weights.views(buffer)

    def _shares(self) -> dict[str, Tensor]:
        """This process's share of what the moments are held in, by the names that checkpoints have."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def _forget(self) -> None:
        """Make both moments 0."""
        for share in self._shares().values():
            share.zero_()

    def saved_bytes(self) -> int:
        """Bytes of the moments in a checkpoint."""
        return 8 * sum(parameter.numel() for parameter in self.weights.parameters.values())

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns "exp_avg.NAME", "exp_avg_sq.NAME" and "step.NAME" of every parameter, contiguous, as in torch.

        Raises RuntimeError as `whole` does.
        """
        moments = {key: self.whole(key) for key in self._shares()}
        tensors = {f"{key}.{name}": view.contiguous() for key, views in moments.items() for name, view in views.items()}
        return tensors | {f"step.{name}": self.step_count[0].clone() for name in self.weights.parameters}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` or torch.optim.AdamW's state held; {} is the state before any step.

        Raises KeyError where a tensor is missing, RuntimeError where one has another shape or step counts differ, and
        ConfigError where they are another optim.moments's.
        """
        held = "8bit" if any(name.startswith(SCALES) for name in tensors) else "fp32"
        if tensors and held != self.moments:
            why = f"the checkpoint's moments are held in {held}; accepted is {held}, as its run began"
            raise ConfigError.of("optim.moments", self.moments, why)
        names = list(self.weights.parameters) if tensors else []
        steps = {tensors[f"step.{name}"].item() for name in names}
        if len(steps) > 1:
            raise RuntimeError(f"the parameters are at different steps, {sorted(steps)}; accepted is one for all")
        self._forget()
        for key, share in self._shares().items() if names else ():
            self.weights.fill_own(share, tensors, f"{key}.")
        self._gathered = None
        self.step_count.fill_(steps.pop() if steps else 0.0)
