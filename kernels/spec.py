"""What tests, benchmarks and ahead-of-time compilation need to know of an operator: its SPEC, in specs/NAME.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
"""Triton's names for tensors of these dtypes."""


@dataclass(frozen=True)
class Case:
    """One set of arguments of an operator's public function.

    name: short, such as "64x320x64x64". make: (device, dtype, generator) -> the arguments; dtype is that of the tensors
    that may be in half precision; the generator is of the default device, the CPU or `device`. bytes: the least that
    one call reads and writes, in half precision.
    """

    name: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], Arguments]
    bytes: int


@dataclass(frozen=True)
class AotKernel:
    """One Triton kernel with fixed parameters, to compile without a GPU.

    kernel: what `@triton.jit` made. types: parameter -> Triton's type, such as "*bf16", "*i64" or "fp32", or a tuple of
    them; it may name those of other kernels too. other: the type of parameters that are neither there nor in
    `constants`, the constexprs and what is None. num_warps, options: what the launch tells Triton's compiler.
    """

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    other: str = "*fp32"

    @property
    def signature(self) -> dict[str, Any]:
        """Returns every parameter's type, in the kernel's order; "constexpr" for constants."""
        return {
            name: "constexpr" if name in self.constants else self.types.get(name, self.other)
            for name in self.kernel.arg_names
        }


@dataclass(frozen=True)
class OpSpec:
    """One operator. function: public, works on any device.

    reference: takes the same arguments, in plain PyTorch, float64 when given float64.
    cases: small, for tests, odd sizes among them. bench: the shapes of SD 1.x and others that matter.
    tolerance: dtype of the half-precision tensors -> (rtol, atol) against the float64 reference, with a comment that
    derives it. differentiable: positions of the arguments that get gradients, where they are given.
    aot: every kernel, at a shape that matters.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    cases: tuple[Case, ...]
    bench: tuple[Case, ...]
    tolerance: Callable[[torch.dtype], tuple[float, float]]
    differentiable: tuple[int, ...] = ()
    aot: tuple[AotKernel, ...] = ()

    def differentiable_in(self, arguments: Arguments) -> tuple[int, ...]:
        """Returns where those that get gradients are among the arguments of a case, which may lack the last ones."""
        return tuple(position for position in self.differentiable if position < len(arguments))
