"""What learns: the UNet's weights or its adapters, their optimizer, the loss scale of fp16, and a moving average."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fastgrpo.engine.adamw_8bit import BLOCK, FlatAdamW8bit, compiles
from fastgrpo.engine.host_average import HostAverage
from fastgrpo.engine.weights import FlatAdamW, FlatWeights
from fastgrpo.kernels.accumulate import ALIGNMENT
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.devices import is_on
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.randomness import seed_for
from fastgrpo.unet.copies import computing_unet
from fastgrpo.unet.lora import add_lora


class Ema:
    """An exponential moving average of the trained weights: average <- decay * average + (1 - decay) * weights.

    The optimizer keeps it up to date, beside the weights or in the host's memory. Where processes own shares of it, all
    call `in_place` together.
    """

    def __init__(self, optimizer: FlatAdamW):
        self._optimizer, self._weights = optimizer, optimizer.weights

    @property
    def average(self) -> dict[str, Tensor]:
        """By the parameters' names. Raises RuntimeError as `FlatAdamW.whole`."""
        return self._optimizer.whole("ema")

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the averages; afterwards it has its weights back, bit for bit."""
        weights, host = self._weights, self._optimizer.average
        if host is not None:
            host.exchange(weights.values)
            weights.refresh()
            try:
                yield
            finally:
                host.exchange(weights.values)
                weights.refresh()
            return
        assert weights.ema is not None
        own = {name: parameter.data for name, parameter in weights.parameters.items()}
        self._put(weights.views(weights.joined(weights.ema)))
        try:
            yield
        finally:
            self._put(own)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take averages over, by the parameters' names. Raises KeyError or RuntimeError for other names or shapes."""
        host, share = self._optimizer.average, self._weights.ema
        own = share if host is None else host.values
        assert own is not None
        self._weights.fill_own(own, tensors)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._weights.parameters.items():
            parameter.data = tensors[name]
        self._weights.refresh()


@dataclass(frozen=True)
class Trainable:
    """The part of the UNet that learns.

    unet: what is saved. parameters: float32, by their names in the UNet. optimizer: over these, in this order.
    scaler: the loss scale; disabled unless the UNet computes in fp16. ema: where optim.ema is above 0.
    network: what computes, made by `computing_unet`. trained: its parameters that learn, in the order of `parameters`.
    """

    unet: UNet2DConditionModel
    parameters: dict[str, torch.nn.Parameter]
    optimizer: FlatAdamW
    scaler: torch.amp.GradScaler
    ema: Ema | None
    network: UNet2DConditionModel
    trained: tuple[torch.nn.Parameter, ...]

    def refresh(self) -> None:
        """Bring `network` up to date after weights were loaded."""
        self.optimizer.weights.refresh()

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before the way back; 1 unless the UNet computes in fp16."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    def set_learning_rate(self, rate: float) -> None:
        """For the optimizer steps from here on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, max_grad_norm: float) -> tuple[Tensor, bool]:
        """One optimizer step on the gradients in `.grad`, scaled down to `max_grad_norm`.

        Returns the norm before that (a scalar tensor) and whether the step was taken: where fp16's scaled gradients
        overflowed it is left out, and the loss scale halved.
        """
        if self.scaler.is_enabled():
            self.optimizer.show_norm()
        step: Any = self.scaler.step  # which returns what the optimizer's own step does
        norm: Tensor = step(self.optimizer, max_grad_norm)
        taken = not self.scaler.is_enabled() or bool(norm.isfinite())
        self.scaler.update()
        return norm, taken


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """The learning rate of iteration number `iteration`, from 1.

    Iteration i of W warm-up iterations has i / W of `lr`. Then `linear` and `cosine` fall from `lr` towards 0, which
    they would reach after the last iteration.
    """
    optim = config.optim
    if iteration <= optim.warmup:
        return optim.lr * iteration / optim.warmup
    progress = (iteration - 1 - optim.warmup) / (config.iterations - optim.warmup)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return optim.lr * factors[optim.schedule]


def make_trainable(
    unet: UNet2DConditionModel,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> Trainable:
    """Adapters on `unet` where the config has them, and everything else that training moves. Raises ConfigError.

    config: with engine.shard and engine.offload decided. dtype: what the UNet computes in; with adapters its frozen
    weights are held in it. ranks: the processes that train together; with engine.shard `optimizer` each owns a share of
    the optimizer's state, with any other all of it.
    """
    if config.model.lora_rank:
        add_lora(unet, config.model, seed_for(config.seed, 0, "adapters"), dtype)
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    optim = config.optim
    owners = ranks if config.engine.shard == "optimizer" else Ranks()
    away = optim.ema > 0 and config.engine.offload == "on" and owners.count == 1  # a share is small
    eight = optim.moments == "8bit"
    weights = FlatWeights(parameters, optim.ema > 0 and not away, owners, BLOCK if eight else ALIGNMENT)
    host = HostAverage(weights.values, optim.ema) if away else None
    given = weights, optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay, optim.ema, host
    if eight:
        # A process that cannot compile would round otherwise than the others.
        compiled = is_on(config.engine.compile, device) and not ranks.any(not compiles(device))
        optimizer: FlatAdamW = FlatAdamW8bit(*given, compiled=compiled)
    else:
        optimizer = FlatAdamW(*given)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros(1, device=device))  # makes its state, which it otherwise does at the first loss
    working = None if dtype == torch.float32 else weights.working_copy(dtype)
    network = computing_unet(unet, dtype, working)
    computing = dict(network.named_parameters())
    average = Ema(optimizer) if optim.ema else None
    trained = tuple(computing[name] for name in parameters)
    return Trainable(unet, parameters, optimizer, scaler, average, network, trained)
