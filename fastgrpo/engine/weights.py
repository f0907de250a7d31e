"""The trained weights in one flat buffer, and AdamW on it: one pass over memory updates everything, at fixed addresses.

Names stay: every parameter is a view of the buffer in its own shape and memory layout, so modules, state dicts and
checkpoints see what they saw before.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine.host_average import HostAverage
from fastgrpo.kernels.accumulate import ALIGNMENT, accumulate
from fastgrpo.kernels.fused_adamw import clip_coefficient, fused_adamw, global_norm


class FlatWeights:
    """Parameters, their gradient and, if wanted, their moving average, each in one [size] float32 buffer.

    parameters: by name. values, gradient, ema: the buffers; ema starts as the weights, or is None. size: elements of a
    buffer; the few between parameters stay 0. working: the buffer of `working_copy`, None before its first call.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], ema: bool = False):
        """Moves the parameters' data into `values`. Raises ValueError unless all are float32 and on one device."""
        self.parameters = dict(parameters)
        devices = {parameter.device for parameter in self.parameters.values()}
        if len(devices) != 1:
            raise ValueError(f"the parameters are on {sorted(map(str, devices))}; accepted is one device")
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} is {parameter.dtype}; accepted is torch.float32")
        self._starts, self.size = {}, 0
        for name, parameter in self.parameters.items():
            self._starts[name] = self.size
            # 128 bytes of float32, 64 of a working copy: no two parameters share a cache line, and vector loads are
            # aligned as for a tensor allocated alone.
            self.size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        # Dense, and in the parameter's own order of dimensions.
        self._strides = {name: torch.empty_like(p, device="meta").stride() for name, p in self.parameters.items()}
        self._device = devices.pop()
        self.values, self.gradient = self.zeros(), self.zeros()
        self._gradients = list(self.views(self.gradient).values())
        for name, view in self.views(self.values).items():
            view.copy_(self.parameters[name].detach())
            self.parameters[name].data = view
        self._addresses = {name: parameter.data_ptr() for name, parameter in self.parameters.items()}
        self.ema = self.values.clone() if ema else None
        self.working: Tensor | None = None

    def zeros(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Another buffer like `values`."""
        return torch.zeros(self.size, dtype=dtype, device=self._device)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its part of a [size] buffer of any dtype, in its shape and memory layout."""
        parts = {name: buffer[start : start + self.parameters[name].numel()] for name, start in self._starts.items()}
        return {n: part.as_strided(self.parameters[n].shape, self._strides[n]) for n, part in parts.items()}

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

    param_groups: one, whose "lr" is read at every step. exp_avg, exp_avg_sq: [size] float32. step_count: [1] float32.
    """

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
        """ema_decay: of `weights.ema`, if there is one. average: kept up to date in its stead."""
        self.weights, self._average = weights, average
        self.param_groups: list[dict[str, Any]] = [{"params": list(weights.parameters.values()), "lr": lr}]
        self.exp_avg, self.exp_avg_sq = weights.zeros(), weights.zeros()
        self.step_count = torch.zeros(1, device=self.exp_avg.device)
        decays = {"weight_decay": weight_decay, "ema_decay": ema_decay}
        self._options: dict[str, Any] = {"beta1": betas[0], "beta2": betas[1], "eps": eps} | decays
        # float64, so that it is the Python number; the host remembers it and writes it only when it changes.
        self._lr, self._written_lr = torch.full((1,), lr, dtype=torch.float64, device=self.exp_avg.device), lr

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
        gradient = weights.collect_gradients()
        grad_scale = getattr(self, "grad_scale", None)
        loss_scale = None if grad_scale is None else grad_scale.reshape(1)
        norm = global_norm(gradient)
        scale, found_inf = clip_coefficient(norm, max_grad_norm, loss_scale)
        state = weights.values, self.exp_avg, self.exp_avg_sq, gradient, self.step_count, self._lr
        fused_adamw(*state, scale=scale, found_inf=found_inf, working=weights.working, ema=weights.ema, **self._options)
        if self._average is not None:
            self._average.follow(weights.values, found_inf)
        return (norm if loss_scale is None else norm / loss_scale)[0]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; or, without `set_to_none`, make them 0."""
        if set_to_none:
            for parameter in self.weights.parameters.values():
                parameter.grad = None
        else:
            self.weights.zero_gradient()

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns "exp_avg.NAME", "exp_avg_sq.NAME" and "step.NAME" of every parameter, contiguous, as in torch."""
        moments = {"exp_avg": self.weights.views(self.exp_avg), "exp_avg_sq": self.weights.views(self.exp_avg_sq)}
        tensors = {f"{key}.{name}": view.contiguous() for key, views in moments.items() for name, view in views.items()}
        return tensors | {f"step.{name}": self.step_count[0].clone() for name in self.weights.parameters}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` or torch.optim.AdamW's state held; {} is the state before any step.

        Raises KeyError where a tensor is missing, RuntimeError where one has another shape or step counts differ.
        """
        names = list(self.weights.parameters) if tensors else []
        steps = {tensors[f"step.{name}"].item() for name in names}
        if len(steps) > 1:
            raise RuntimeError(f"the parameters are at different steps, {sorted(steps)}; accepted is one for all")
        for key, buffer in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            buffer.zero_()
            for name, view in self.weights.views(buffer).items() if names else ():
                if tensors[f"{key}.{name}"].shape != view.shape:
                    raise RuntimeError(f"{key}.{name} has another shape than {name}")
                view.copy_(tensors[f"{key}.{name}"])
        self.step_count.fill_(steps.pop() if steps else 0.0)
