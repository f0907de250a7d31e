"""The kernels that inductor would generate for a module on a GPU, with bytes, FLOP and a predicted time.

    python bench/generated.py                                     the UNet of SD 1.5 as it is trained
    python bench/generated.py --block down_blocks.0.resnets.0     one of its modules, in seconds; --rows, --kernels,
                                                                  --out FILE.json

`predict(module, inputs)` does it for any module. torch.compile's own stages trace the module forward and backward,
lower it and generate code for an H200 that is not there (absent.py). Each kernel is counted as it stands there: bytes
are those of all it reads and writes, once each; FLOP those of convolutions, products and attention, which is padded as
kernels pad its heads. A time is the longer of both at the `Speeds`, which are assumptions. **Everything here is a
prediction.**
"""

import argparse
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from absent import absent_device, module_on_device, on_device, without_autograd
from absent_unet import block_inputs, computing_unet, unet_inputs
from torch import Tensor, nn
from torch._inductor import compile_fx, config, ir, memory
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import get_fused_kernel_name
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._ordered_set import OrderedSet
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from workload import paper

from fastgrpo.unet.attention import BACKENDS

ATTENTION = "attention"
CLASSES = ("convolutions", ATTENTION, "GEMMs", "norms and GEGLU", "adds, clones, sums")
_DEVICE = torch.device("cuda", 0)
_OVERWRITING = ("aten::copy_", "aten::zero_", "aten::fill_")
_HEADS = (32, 64, 96, 128, 192, 256)  # widths that FlashAttention's kernels have


@dataclass(frozen=True)
class Speeds:
    """What kernels are assumed to reach on an H200: FLOP/s in bfloat16 and bytes/s."""

    convolution: float = 450e12
    product: float = 650e12
    attention: float = 350e12
    attention_backward: float = 300e12
    cudnn: float = (
        1.27  # times as fast as flash: FlashAttention-3's authors have 408 and 321 TFLOP/s, forward, 4,096 tokens
    )
    single: float = 48e12  # in float32, whatever it is
    tf32: float = 220e12
    memory: float = 0.85 * 4.3e12


SPEEDS = Speeds()


@dataclass(frozen=True)
class Kernel:
    """One launch. kind: of CLASSES. bytes: read and written. seconds: predicted."""

    name: str
    kind: str
    flop: float
    bytes: int
    seconds: float


def kernel(name: str, flop: float, moved: int, speeds: Speeds, single: bool = False) -> Kernel:
    """name: of the operator, or of what is fused. single: whether it computes in float32."""
    backward = "backward" in name
    if name.startswith("triton"):
        kind, speed = CLASSES[4], speeds.product
    elif "convolution" in name:
        kind, speed = CLASSES[0], speeds.convolution
    elif "scaled_dot_product" in name:
        kind, speed = ATTENTION, speeds.attention_backward if backward else speeds.attention
        speed *= speeds.cudnn if "cudnn" in name else 1
    elif flop:
        kind, speed = CLASSES[2], speeds.product
    else:
        norm = name.startswith(("fastgrpo::", "aten::native_"))
        kind, speed = CLASSES[3] if norm else CLASSES[4], speeds.product
    if single:
        settings = torch.backends.cudnn.conv if kind == CLASSES[0] else torch.backends.cuda.matmul
        speed = speeds.tf32 if settings.fp32_precision == "tf32" else speeds.single
    return Kernel(name, kind, flop, moved, max(flop / speed, moved / speeds.memory))


def operation(func: Any, args: Any, kwargs: Any, out: Any, speeds: Speeds) -> Kernel:
    """Of an operator that is called as it is. args, kwargs, out: with tensors that have no values."""
    given, made = tensors((args, kwargs)), tensors(out)
    values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    written = tensors([values.get(name) for name in changed])
    moved = sum(map(_bytes, (*given, *(written or made))))
    if func._schema.name in _OVERWRITING:
        moved -= _bytes(written[0])
    name, flop = func._schema.name, 0
    if _has_flop(func):
        flop = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
    elif name == "aten::_native_multi_head_attention":  # nn.MultiheadAttention without gradients, in one operator
        rows, tokens, width = given[0].shape
        flop = 4 * rows * tokens * width * (2 * width + tokens)
    if "scaled_dot_product" in name and flop:
        width = max(t.shape[-1] for t in given[:3] if t.ndim == 4)
        flop *= next((head for head in _HEADS if head >= width), width) / width
    return kernel(name, flop, moved, speeds, single=bool(flop) and given[0].dtype == torch.float32)


def _has_flop(func: Any) -> bool:
    return getattr(func, "_overloadpacket", None) in flop_registry


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Of what lies in memory: an expanded dimension is there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


# ---------------------------------------------------------------------------------------------------------------------
# Inductor


# Caches would hide a graph from us; folding constants and trying paddings would run on the device.
_CONFIG = {"fx_graph_cache": False, "joint_graph_constant_folding": False, "shape_padding": False, "compile_threads": 1}


@dataclass(frozen=True)
class Output:
    """What a compiled graph returns in one place: a view of a buffer. name: of that. size: its elements."""

    name: str
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Graph:
    """What one compiled graph launches and returns.

    code: what inductor wrote. transient: bytes that it has at its worst beyond what it was given to free, as inductor
    estimates them. inputs: names; an output of such a name is that input.
    """

    kernels: tuple[Kernel, ...]
    code: str
    transient: int
    inputs: tuple[str, ...]
    outputs: tuple[Output | None, ...]

    def run(self, given: list[Any], hold: Callable[[list[Tensor]], object]) -> list[Any]:
        """As the compiled code would: takes its memory, frees what it was given, makes outputs without values.

        hold: told of memory that is taken, since for its speed no operator is called.
        """
        mode = next(value.fake_mode for value in given if isinstance(value, FakeTensor))

        def empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            with no_dispatch():
                return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), _DEVICE)

        hold([empty((self.transient,), (1,), torch.int8)])
        names = Counter(output.name for output in self.outputs if output)
        buffers = {name: tensor for name, tensor in zip(self.inputs, given, strict=True) if name in names}
        given.clear()

        def made(output: Output) -> Tensor:
            alone = names[output.name] == 1 and math.prod(output.shape) == output.size
            if output.name not in buffers and alone:
                return empty(output.shape, output.stride, output.dtype)
            if output.name not in buffers:
                buffers[output.name] = empty((output.size,), (1,), output.dtype)
            buffer = buffers[output.name]
            same = (buffer.shape, buffer.stride()) == (output.shape, output.stride)
            return buffer if same else buffer.as_strided(output.shape, output.stride, output.offset)

        outputs = [output and made(output) for output in self.outputs]
        hold(tensors(outputs))
        return outputs


class Compiler:
    """A backend of torch.compile that generates code, counts it and returns what only makes outputs.

    graphs: of all that it was given, the forward graph before the backward one. ran: told of each that runs; hold: as
    Graph's.
    """

    def __init__(self, speeds: Speeds):
        self.graphs: list[Graph] = []
        self.speeds = speeds
        self.ran: Callable[[Graph], object] = lambda graph: None
        self.hold: Callable[[list[Tensor]], object] = lambda tensors: None

    def __call__(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None
    ) -> Callable[..., Any]:
        compiler = functools.partial(self._compile, told=_CONFIG | (options or {}))
        with config.patch(_CONFIG | (options or {})), torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx.compile_fx(module, inputs, inner_compile=compiler)

    def _compile(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], told: dict[str, Any], **kwargs: Any
    ) -> Callable[..., Any]:
        def generate(lowered: GraphLowering) -> None:
            code, _ = lowered.codegen()
            outputs = tuple(map(_output, lowered.graph_outputs))
            kernels = tuple(self._kernels(lowered))
            self.graphs.append(Graph(kernels, code.value, _transient(lowered), tuple(lowered.graph_inputs), outputs))
            raise _Generated

        generating = mock.patch.object(GraphLowering, "compile_to_module", generate)
        with suppress(_Generated), without_autograd(), config.patch(told), generating:
            compile_fx.compile_fx_inner(module, inputs, **kwargs)
        graph = self.graphs[-1]
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            context.output_strides.extend(output and output.stride for output in graph.outputs)

        def run(given: list[Any]) -> list[Any]:
            self.ran(graph)
            return graph.run(given, self.hold)

        run._boxed_call = True
        return run

    def _kernels(self, graph: GraphLowering) -> Iterable[Kernel]:
        for node in graph.scheduler.nodes:
            if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
                continue
            if node.is_extern():
                yield self._extern(node)
            else:
                name = get_fused_kernel_name(node.get_nodes(), "original_aten")
                yield kernel(f"triton {name}", 0, _generated_bytes(node), self.speeds)

    def _extern(self, node: BaseSchedulerNode) -> Kernel:
        """As the operator of the traced graph that it came from."""
        origins = [node.node.get_origin_node(), *node.node.origins]
        origins = [origin for origin in origins if isinstance(getattr(origin, "target", None), torch._ops.OpOverload)]
        # Of what is called through PyTorch the operator is known. Origins may also be what comes before or after.
        own = node.node.op_overload if isinstance(node.node, ir.FallbackKernel) else None
        origin = next((o for o in origins if (o.target is own if own else _has_flop(o.target))), None)
        if origin is None:
            return kernel(
                f"extern {node.get_name()}", 0, sum(d.numbytes_hint() for d in node.read_writes.reads), self.speeds
            )

        def value(of: Any) -> Any:
            return of.meta["val"] if isinstance(of, torch.fx.Node) else of

        args, kwargs = torch.fx.map_arg((origin.args, origin.kwargs), value)
        return operation(origin.target, args, kwargs, origin.meta["val"], self.speeds)


class _Generated(BaseException):
    """Leaves inductor once the code is there. Not an Exception: those it catches."""


def _output(made: Any) -> Output | None:
    if not made.has_tensor_output():
        return None
    layout, name = made.get_layout(), made.get_name()
    shape, stride = (tuple(map(int, numbers)) for numbers in (layout.size, layout.stride))
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + int(layout.offset) + 1
    return Output(name, max(int(V.graph.get_numel(name)), last), shape, stride, int(layout.offset), made.get_dtype())


def _transient(graph: GraphLowering) -> int:
    scheduler, outputs = graph.scheduler, OrderedSet(graph.get_output_names())
    nodes, buffers, fused = scheduler.nodes, scheduler.name_to_buf, scheduler.name_to_fused_node
    _, freed = memory.prepare_planning_info(nodes, buffers, fused, OrderedSet(graph.graph_inputs), outputs)
    changes = [0] * (len(nodes) + 2)
    for buffer in memory.compute_memory_timeline(nodes, freed, outputs)[0]:
        changes[buffer.start_step] += int(buffer.size_alloc)
        if buffer.end_step >= 0:  # else it is an output
            changes[buffer.end_step + 1] -= int(buffer.size_free)
    return max(0, max(accumulate(changes)) - sum(int(buffer.mpi_buffer.size_free) for buffer in freed.values()))


def _generated_bytes(node: BaseSchedulerNode) -> int:
    """What a Triton kernel reads and writes of each buffer, without what lives within the kernel only."""
    members = set(node.get_nodes())
    made = {buffer.get_name(): buffer for member in members for buffer in member.get_outputs()}

    def inside(name: str) -> bool:
        return name in made and all(user.node in members for user in made[name].users)

    total = 0
    for deps in (node.read_writes.reads, node.read_writes.writes):
        sizes: Counter[str] = Counter()
        for dep in deps:
            if isinstance(dep, (MemoryDep, StarDep)) and not (dep.name in made and deps is node.read_writes.reads):
                sizes[dep.name] += 0 if inside(dep.name) else dep.numbytes_hint()
        total += sum(min(size, _whole(name, size)) for name, size in sizes.items())
    return total


def _whole(name: str, otherwise: int) -> int:
    """Bytes of a buffer."""
    numel = V.graph.get_numel(name)
    return int(numel) * V.graph.get_dtype(name).itemsize if numel is not None else otherwise


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Of one pass of a module over some rows."""

    forward: Graph
    backward: Graph | None

    def graphs(self) -> dict[str, Graph]:
        return {"forward": self.forward} | ({"backward": self.backward} if self.backward else {})

    def classes(self, rows: int) -> dict[str, dict[str, float]]:
        """Pass -> class -> predicted seconds a row."""
        return {
            name: {kind: sum(k.seconds for k in graph.kernels if k.kind == kind) / rows for kind in CLASSES}
            for name, graph in self.graphs().items()
        }

    def table(self, rows: int) -> str:
        """Predicted microseconds a row by class."""
        lines = [f"{'predicted, a row of ' + str(rows):26}{'launches':>9}{'MB':>9}{'GFLOP':>9}{'us':>9}"]
        for name, graph in self.graphs().items():
            for kind in (*CLASSES, ""):
                some = [k for k in graph.kernels if k.kind.startswith(kind)]
                moved, flop, took = (
                    sum(getattr(k, what) for k in some) / rows for what in ("bytes", "flop", "seconds")
                )
                line = f"{len(some):9}{moved / 1e6:9.1f}{flop / 1e9:9.1f}{1e6 * took:9.1f}"
                lines.append(f"{name if not kind else '  ' + kind:26}{line}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {name: [asdict(k) for k in graph.kernels] for name, graph in self.graphs().items()}


def predict(
    module: nn.Module,
    inputs: Sequence[Any],
    speeds: Speeds = SPEEDS,
    backward: bool = True,
    options: dict[str, Any] | None = None,
) -> Prediction:
    """module, inputs: on any device, the meta device too.

    Only shapes, strides, dtypes and what requires gradients matter.
    """
    with absent_device():
        given = [on_device(value) if isinstance(value, Tensor) else value for value in inputs]
        return trace(module_on_device(module), given, speeds, backward, options)


def trace(
    module: Callable[..., Any],
    inputs: Sequence[Any],
    speeds: Speeds,
    backward: bool = True,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Prediction:
    """The same inside of `absent_device()`, of tensors that are there.

    options: torch.compile's. kwargs: the module's.
    """
    torch._dynamo.reset()
    compiler = Compiler(speeds)
    with torch.set_grad_enabled(backward):
        call = torch.compile(module, backend=compiler, dynamic=False, fullgraph=True, options=options)
        out = call(*inputs, **kwargs)
    if backward:
        outputs = [tensor for tensor in tensors(out) if tensor.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    forward, *rest = compiler.graphs
    return Prediction(forward, rest[0] if rest else None)


def main() -> None:
    options = _options()
    told = {name: json.loads(value) for name, value in (pair.split("=") for pair in options.inductor)}
    if options.block:
        told = {"layout_optimization": False} | told  # as inductor decides for the whole UNet
    with absent_device():
        network = computing_unet(paper(), options.attention)
        if options.block:
            args, kwargs = block_inputs(network, options.block, options.rows)
            made = trace(network.get_submodule(options.block), args, SPEEDS, options=told, **kwargs)
        else:
            made = trace(network, unet_inputs(options.rows), SPEEDS, options=told, return_dict=False)
    print(f"{options.block or 'UNet'}, {options.attention} attention: PREDICTED for an H200, not measured")
    print(made.table(options.rows))
    if options.kernels:
        for name, graph in made.graphs().items():
            print(f"{name}: predicted us a row, MB a row, kernel")
            for k in graph.kernels:
                print(f"{1e6 * k.seconds / options.rows:8.2f}{k.bytes / 1e6 / options.rows:9.2f}  {k.name}")
    if options.out:
        options.out.write_text(json.dumps({"predicted": True, "rows": options.rows} | made.to_json(), indent=1) + "\n")
    if options.code:
        options.code.write_text(made.forward.code + made.backward.code)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", default="", help="a module of the UNet (default: all of it)")
    parser.add_argument("--rows", type=int, default=32, help="of the batch: two for each sample (default: 32)")
    parser.add_argument("--attention", default="flash", choices=BACKENDS, help="who computes it")
    parser.add_argument("--inductor", nargs="*", default=[], help="its options, such as layout_optimization=false")
    parser.add_argument("--kernels", action="store_true", help="also list every kernel")
    parser.add_argument("--out", type=Path, help="every kernel as JSON")
    parser.add_argument("--code", type=Path, help="what inductor wrote, forward then backward")
    return parser.parse_args()


if __name__ == "__main__":
    main()
