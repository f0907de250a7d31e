"""AdamW on the flat weights with both moments in 8 bits (Dettmers et al., arXiv 2110.02861), quantized by torchao.

256 elements that are neighbours in memory are a block. It has a scale, the largest magnitude in it, and each element a
code: a number is map[code] * scale, by one of torchao's maps of 256 values from -1 (the first moment) or 0 (the second)
to 1, which lie the closer the nearer they are to 0. So a moment takes 1 + 4 / 256 bytes an element instead of 4.
Every parameter begins a block, as every process's share does: a scale depends neither on another parameter nor on the
number of processes.

A step goes over the buffers piece by piece: a piece's moments become float32, are stepped by the kernel that moments in
float32 have, and are rounded into codes again. The weights take the step of the moments before they are rounded.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fastgrpo.engine.weights import FlatAdamW
from fastgrpo.kernels.fused_adamw import fused_adamw
from fastgrpo.system.console import warn
from fastgrpo.system.errors import ConfigError

BLOCK = 256
"""Elements that share a scale, as in torchao's own optimizers."""
_CPU_PIECE = 1 << 16  # elements that a step is about at a time; on a CPU as many as its cache holds
_PIECE = 1 << 20  # 50 bytes each are alive meanwhile, as costs/memory.py counts
_COMPILED_PIECE = 1 << 22  # which holds only the moments in float32, 8 bytes each, and has the more calls to spare

Functions = tuple[Callable[..., Tensor], Callable[..., None]]


@dataclass(frozen=True)
class Quantized:
    """[n] numbers in 8 bits. codes: [n] uint8. scales: [n / 256] float32. map: [256] float32, ascending.

    zero: the code of 0.
    """

    codes: Tensor
    scales: Tensor
    map: Tensor
    zero: int

    @classmethod
    def zeros(cls, n: int, signed: bool, device: torch.device) -> Self:
        """n: a multiple of 256. Without `signed` no number may be below 0. Raises ConfigError without torchao."""
        values = torch.tensor(_library().create_dynamic_map(signed), dtype=torch.float32)
        zero = int((values == 0).nonzero())
        codes = torch.full((n,), zero, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(n // BLOCK, device=device), values.to(device), zero)

    def clear(self) -> None:
        """Make all numbers 0."""
        self.codes.fill_(self.zero)
        self.scales.zero_()

    def pieces(self, size: int) -> "Iterator[Quantized]":
        """Views of `size` numbers each, a multiple of 256, and of what is left."""
        for codes, scales in zip(self.codes.split(size), self.scales.split(size // BLOCK), strict=True):
            yield replace(self, codes=codes, scales=scales)


@functools.cache
def functions() -> Functions:
    """What reads a `Quantized` and what writes one, by torchao. Raises ConfigError where that is not there."""
    quant = _library()

    def read(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
        """The numbers, [n] float32, that codes and scales stand for; values: the map."""
        return quant.dequant_with_qmap(codes, values, scales)

    def write(codes: Tensor, scales: Tensor, values: Tensor, numbers: Tensor, left_out: Tensor) -> None:
        """Round `numbers`, [n] float32, into codes and scales. left_out: [1] float32; where not 0 nothing changes.

        Numbers that were read would not always be rounded to the codes they came from: the signed map has no -1.
        """
        scaled, largest = quant.scale_tensor(numbers, BLOCK)
        rounded = quant.quantize_8bit_with_qmap(scaled, values)
        codes.copy_(torch.where(left_out != 0, codes, rounded))
        scales.copy_(torch.where(left_out != 0, scales, largest))

    return read, write


def _library() -> Any:
    """torchao's functions for quantizing by a map. Raises ConfigError where there are none."""
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        why = f"torchao's quantization cannot be imported ({error}); get it with `pip install 'fastgrpo[8bit]'`"
        raise ConfigError.of("optim.moments", "8bit", why) from error
    return quant_utils


@functools.cache
def _compiled() -> Functions:
    """`functions`, each one kernel on a GPU where it would be dozens."""
    read, write = functions()
    return torch.compile(read, fullgraph=True, dynamic=False), torch.compile(write, fullgraph=True, dynamic=False)


@torch.no_grad()
def compiles(device: torch.device) -> bool:
    """Whether torch.compile makes of `functions` what computes the same but for rounding; says where not."""
    numbers = torch.linspace(-1, 1, _COMPILED_PIECE, device=device) ** 3
    left_out = torch.zeros(1, device=device)
    (read, write), (compiled_read, compiled_write) = functions(), _compiled()
    try:
        for signed in (True, False):
            ours, plain = (Quantized.zeros(_COMPILED_PIECE, signed, device) for _ in range(2))
            given = numbers if signed else numbers.square()
            compiled_write(ours.codes, ours.scales, ours.map, given, left_out)
            numbers_read = compiled_read(ours.codes, ours.scales, ours.map)
            parts = zip(ours.pieces(_PIECE), plain.pieces(_PIECE), given.split(_PIECE), strict=True)
            for part, (mine, its, some) in enumerate(parts):
                write(its.codes, its.scales, its.map, some, left_out)
                apart = (mine.codes.short() - its.codes.short()).abs().max().item()
                same = read(mine.codes, mine.scales, mine.map)
                near = torch.allclose(numbers_read.split(_PIECE)[part], same, rtol=1e-6, atol=0)
                if apart > 1 or not near or not torch.equal(mine.scales, its.scales):
                    warn("torch.compile quantizes moments of 8 bits otherwise than torchao does: they are not compiled")
                    return False
    except Exception as error:  # whatever a compiler raises
        warn(f"moments of 8 bits are not compiled ({str(error).strip().splitlines()[0]})")
        return False
    return True


class FlatAdamW8bit(FlatAdamW):
    """`FlatAdamW` whose moments are `quantized`, by "exp_avg" and "exp_avg_sq": this process's share of each.

    Where a gradient stays below 4e-4 of the largest of its block, the second moment's code is that of 0: its square
    alone is then what the next step divides by, which is longer for it, up to 1 / sqrt(1 - beta2) times.
    """

    moments = "8bit"

    def __init__(self, *arguments: Any, compiled: bool = False, **options: Any):
        """As `FlatAdamW`, of weights whose alignment is `BLOCK`. compiled: as `compiles` has found."""
        super().__init__(*arguments, **options)
        self._read, self._write = _compiled() if compiled else functions()
        self._piece = _COMPILED_PIECE if compiled else _PIECE
        if self.weights.values.device.type == "cpu" and not compiled:
            self._piece = _CPU_PIECE

    def _make_moments(self) -> None:
        if self.weights.alignment % BLOCK:
            raise ValueError(f"the weights' alignment is {self.weights.alignment}; accepted are multiples of {BLOCK}")
        own = self.weights.own(self.weights.values)
        self.quantized = {
            key: Quantized.zeros(len(own), key == "exp_avg", own.device) for key in ("exp_avg", "exp_avg_sq")
        }

    def _update(
        self, values: Tensor, gradient: Tensor, scale: Tensor, found_inf: Tensor, working: Tensor | None
    ) -> None:
        step, given = self.step_count, {"scale": scale, "found_inf": found_inf} | self._options
        buffers = values, gradient, working, self.weights.ema
        pieces = zip(*(each.pieces(self._piece) for each in self.quantized.values()), strict=True)
        for index, moments in enumerate(pieces):
            here = slice(index * self._piece, (index + 1) * self._piece)
            p, g, half, average = (None if buffer is None else buffer[here] for buffer in buffers)
            assert p is not None
            assert g is not None
            m, v = (self._read(each.codes, each.scales, each.map) for each in moments)
            step = self.step_count.clone()  # every piece counts the same step
            fused_adamw(p, m, v, g, step, self._lr, working=half, ema=average, **given)
            for each, numbers in zip(moments, (m, v), strict=True):
                self._write(each.codes, each.scales, each.map, numbers, found_inf)
        self.step_count.copy_(step)

    def _shares(self) -> dict[str, Tensor]:
        shares: dict[str, Tensor] = {}
        for key, moment in self.quantized.items():
            shares |= {key: moment.codes, f"{key}_scale": moment.scales}
        return shares

    def _forget(self) -> None:
        for moment in self.quantized.values():
            moment.clear()

    def saved_bytes(self) -> int:
        """Bytes of the moments in a checkpoint."""
        sizes = [parameter.numel() for parameter in self.weights.parameters.values()]
        maps = sum(moment.map.nbytes for moment in self.quantized.values())
        return 2 * sum(size + 4 * -(-size // BLOCK) for size in sizes) + maps

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns of every parameter the codes, "exp_avg.NAME", uint8 in its shape, the scales, "exp_avg_scale.NAME",

        [blocks] float32 of its elements in the order of memory, and "step.NAME"; and the map, "exp_avg_map". So also
        of "exp_avg_sq". Raises RuntimeError as `whole` does.
        """
        maps = {f"{key}_map": moment.map for key, moment in self.quantized.items()}
        return super().state_tensors() | maps

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` held, bit for bit; {} is the state before any step.

        Raises as `FlatAdamW` does, and ConfigError where codes stand for other values than torchao's now.
        """
        super().load_state_tensors(tensors)
        for key, moment in self.quantized.items() if tensors else ():
            if not torch.equal(tensors[f"{key}_map"].to(moment.map.device), moment.map):
                why = "the checkpoint's codes are of another torchao's map; accepted is the torchao that wrote it"
                raise ConfigError.of("optim.moments", self.moments, why)
