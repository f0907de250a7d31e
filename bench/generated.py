"""The kernels that inductor would generate for a module on a GPU, with bytes, FLOP and a predicted time; no GPU is needed.

    python bench/generated.py                                     the UNet of SD 1.5 as it is trained
    python bench/generated.py --block down_blocks.0.resnets.0     one of its modules, in seconds; --rows, --list, --out FILE.json

`predict(module, inputs)` does it for any module. torch.compile's own stages trace the module forward and backward, lower it and
generate code for an H200 that is not there (absent.py). Each kernel is counted as it stands there: bytes are those of all it reads
and writes, once each; FLOP those of convolutions, products and attention, which is padded as kernels pad its heads. A time is
the longer of both at the `Speeds`, which are assumptions. **Everything here is a prediction.**
"""

import argparse
import copy
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from absent import absent_device, on_device, without_autograd
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._inductor import compile_fx, config, ir
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import get_fused_kernel_name
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from workload import paper

from fastgrpo.config import TrainConfig
from fastgrpo.costs import sd1_architecture
from fastgrpo.engine.attention import AttentionPlan, Choice, attention_shapes, use
from fastgrpo.engine.compilation import _replace_upsamplers
from fastgrpo.engine.patch import patch_unet
from fastgrpo.trainable import Trainable, make_trainable

CLASSES = ("convolutions", "attention", "GEMMs", "norms and GEGLU", "adds, clones, sums")
LATENT, TOKENS, WIDTH = (4, 64, 64), 77, 768
_HEADS = (32, 64, 96, 128, 192, 256)  # widths that FlashAttention's kernels have


@dataclass(frozen=True)
class Speeds:
    """What kernels are assumed to reach on an H200: FLOP/s in bfloat16, bytes/s, and seconds between two kernels of a graph."""

    convolution: float = 450e12
    product: float = 650e12
    attention: float = 350e12
    attention_backward: float = 300e12
    single: float = 0.5  # share of these that float32 reaches as TF32
    memory: float = 0.85 * 4.3e12
    gap: float = 0.0


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
    elif "attention" in name:
        kind, speed = CLASSES[1], speeds.attention_backward if backward else speeds.attention
    elif flop:
        kind, speed = CLASSES[2], speeds.product
    else:
        norm = name.startswith("fastgrpo::") or name.startswith("aten::native_")
        kind, speed = CLASSES[3] if norm else CLASSES[4], speeds.product
    speed *= speeds.single if single else 1
    return Kernel(name, kind, flop, moved, max(flop / speed, moved / speeds.memory) + speeds.gap)


def operation(func: Any, args: Any, kwargs: Any, out: Any, speeds: Speeds) -> Kernel:
    """Of an operator that is called as it is. args, kwargs, out: with tensors that have no values."""
    given, made = _tensors((args, kwargs)), _tensors(out)
    written = [t for t, argument in zip(args, func._schema.arguments, strict=False) if _is_written(t, argument)]
    moved = sum(map(_bytes, (*given, *made, *written))) if not written else sum(map(_bytes, (*given, *written)))
    flop = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) if _has_flop(func) else 0
    name = func._schema.name
    if "attention" in name and flop:
        width = max(t.shape[-1] for t in given[:3] if t.ndim == 4)
        flop *= next((head for head in _HEADS if head >= width), width) / width
    return kernel(name, flop, moved, speeds, single=bool(flop) and given[0].dtype == torch.float32)


def _has_flop(func: Any) -> bool:
    return getattr(func, "_overloadpacket", None) in flop_registry


def _is_written(value: Any, argument: Any) -> bool:
    return isinstance(value, Tensor) and argument.alias_info is not None and argument.alias_info.is_write


def _tensors(values: Any) -> list[Tensor]:
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
class Graph:
    """What one compiled graph launches. code: what inductor wrote."""

    kernels: tuple[Kernel, ...]
    code: str


class Compiler:
    """A backend of torch.compile that generates code, counts it and returns what only makes outputs.

    graphs: of all that it was given, the forward graph before the backward one.
    """

    def __init__(self, speeds: Speeds):
        self.graphs: list[Graph] = []
        self._speeds = speeds

    def __call__(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None
    ) -> Callable[..., Any]:
        compiler = functools.partial(self._compile, told=_CONFIG | (options or {}))
        with config.patch(_CONFIG | (options or {})), torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx.compile_fx(module, inputs, inner_compile=compiler)

    def _compile(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], told: dict[str, Any], **kwargs: Any
    ) -> Callable[..., Any]:
        values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in _outputs(module)]
        strides: list[tuple[int, ...] | None] = []

        def generate(graph: GraphLowering) -> None:
            code, _ = graph.codegen()
            self.graphs.append(Graph(tuple(self._kernels(graph)), code.value))
            strides.extend(_strides(output) for output in graph.graph_outputs)
            raise _Generated

        generating = mock.patch.object(GraphLowering, "compile_to_module", generate)
        with suppress(_Generated), without_autograd(), config.patch(told), generating:
            compile_fx.compile_fx_inner(module, inputs, **kwargs)
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            context.output_strides.extend(strides)

        def run(given: list[Any]) -> list[Any]:
            given.clear()
            return [_like(value, stride) for value, stride in zip(values, strides, strict=True)]

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
                yield kernel(f"triton {name}", 0, _generated_bytes(node), self._speeds)

    def _extern(self, node: BaseSchedulerNode) -> Kernel:
        """As the operator of the traced graph that it came from."""
        origins = [node.node.get_origin_node(), *node.node.origins]
        origins = [origin for origin in origins if isinstance(getattr(origin, "target", None), torch._ops.OpOverload)]
        # Of what is called through PyTorch the operator is known. Origins may also be what comes before or after.
        own = node.node.op_overload if isinstance(node.node, ir.FallbackKernel) else None
        origin = next((o for o in origins if (o.target is own if own else _has_flop(o.target))), None)
        if origin is None:
            return kernel(
                f"extern {node.get_name()}", 0, sum(d.numbytes_hint() for d in node.read_writes.reads), self._speeds
            )

        def value(of: Any) -> Any:
            return of.meta["val"] if isinstance(of, torch.fx.Node) else of

        args, kwargs = torch.fx.map_arg((origin.args, origin.kwargs), value)
        return operation(origin.target, args, kwargs, origin.meta["val"], self._speeds)


class _Generated(BaseException):
    """Leaves inductor once the code is there. Not an Exception: those it catches."""


def _outputs(module: torch.fx.GraphModule) -> Sequence[Any]:
    (node,) = module.graph.find_nodes(op="output")
    return node.args[0]


def _strides(output: Any) -> tuple[int, ...] | None:
    return tuple(int(stride) for stride in output.get_stride()) if output.has_tensor_output() else None


def _like(value: Any, stride: tuple[int, ...] | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, stride or value.stride(), dtype=value.dtype, device=value.device)


def _generated_bytes(node: BaseSchedulerNode) -> int:
    """Of a Triton kernel: of each buffer what it reads and what it writes, but not what lives within the kernel only."""
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

    def table(self, rows: int) -> str:
        """Predicted microseconds a row by class."""
        lines = [f"{'predicted, a row of ' + str(rows):26}{'launches':>9}{'MB':>9}{'GFLOP':>9}{'us':>9}"]
        for name, graph in (("forward", self.forward), ("backward", self.backward)):
            for kind in (*CLASSES, "") if graph else ():
                some = [k for k in graph.kernels if k.kind.startswith(kind)]
                moved, flop = (sum(values) / rows for values in ([k.bytes for k in some], [k.flop for k in some]))
                took = sum(k.seconds for k in some) / rows
                lines.append(
                    f"{name if not kind else '  ' + kind:26}{len(some):9}{moved / 1e6:9.1f}{flop / 1e9:9.1f}{1e6 * took:9.1f}"
                )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        passes = {"forward": self.forward, "backward": self.backward}
        return {name: [asdict(k) for k in graph.kernels] for name, graph in passes.items() if graph}


def predict(
    module: nn.Module,
    inputs: Sequence[Any],
    speeds: Speeds = SPEEDS,
    backward: bool = True,
    options: dict[str, Any] | None = None,
) -> Prediction:
    """module, inputs: on any device, the meta device too; only shapes, strides and dtypes matter. It stays as it is.

    The gradient is towards all parameters that want one and all inputs in floating point that are on their way, which with
    `backward` are those that require it.
    """
    with absent_device():
        weights = [*module.parameters(), *module.buffers()]
        twin = copy.deepcopy(module, {id(weight): on_device(weight) for weight in weights})
        given = [on_device(value) if isinstance(value, Tensor) else value for value in inputs]
        return trace(twin, given, speeds, backward, options)


def trace(
    module: Callable[..., Any],
    inputs: Sequence[Any],
    speeds: Speeds,
    backward: bool = True,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Prediction:
    """The same inside of `absent_device()`, of tensors that are there. options: torch.compile's. kwargs: the module's."""
    torch._dynamo.reset()
    compiler = Compiler(speeds)
    with torch.set_grad_enabled(backward):
        call = torch.compile(module, backend=compiler, dynamic=False, fullgraph=True, options=options)
        out = call(*inputs, **kwargs)
    if backward:
        outputs = [tensor for tensor in _tensors(out) if tensor.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    forward, *rest = compiler.graphs
    return Prediction(forward, rest[0] if rest else None)


# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# The UNet, or one of its modules


def trained_unet(config: TrainConfig, backend: str) -> tuple[Trainable, UNet2DConditionModel]:
    """SD 1.5's as an engine on CUDA has it before it is compiled; inside of `absent_device()`. backend: of all attention."""
    cuda = torch.device("cuda")
    with unset_fake_temporarily(), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(sd1_architecture().unet)).to(memory_format=torch.channels_last)
    unet = copy.deepcopy(unet, {id(weight): on_device(weight) for weight in unet.parameters()})
    trainable = make_trainable(unet.eval(), config, cuda, torch.bfloat16)
    network = trainable.network
    patch_unet(network)
    shapes = attention_shapes(network, 2, LATENT, TOKENS)
    use(network, AttentionPlan(backend, tuple(Choice(shape, backend) for shape in shapes)))
    _replace_upsamplers(network)
    return trainable, network


def unet_inputs(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and contexts on the device."""
    with torch.device("cuda"):
        latents, contexts = torch.empty(rows, *LATENT, dtype=dtype), torch.empty(rows, TOKENS, WIDTH, dtype=dtype)
        return latents, torch.empty(rows, dtype=torch.int64), contexts


def block_inputs(network: UNet2DConditionModel, name: str, rows: int) -> tuple[list[Any], dict[str, Any]]:
    """What the module `name` is called with in a pass of the UNet; with gradients, as within a pass."""
    found = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, kwargs))

    handle = network.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        network(*unet_inputs(rows), return_dict=False)
    handle.remove()
    args, kwargs = found[0]

    def wanting(value: Any) -> Any:
        wants = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if wants else value

    return [wanting(value) for value in args], {key: wanting(value) for key, value in kwargs.items()}


def main() -> None:
    options = _options()
    told = {name: json.loads(value) for name, value in (pair.split("=") for pair in options.inductor)}
    if options.block:
        told = {"layout_optimization": False} | told  # as inductor decides for the whole UNet
    with absent_device():
        _, network = trained_unet(paper(), options.attention)
        if options.list:
            print("\n".join(name for name, _ in network.named_modules() if name))
            return
        if options.block:
            args, kwargs = block_inputs(network, options.block, options.rows)
            made = trace(network.get_submodule(options.block), args, SPEEDS, options=told, **kwargs)
        else:
            made = trace(network, unet_inputs(options.rows), SPEEDS, options=told, return_dict=False)
    print(f"{options.block or 'UNet'}, {options.attention} attention: PREDICTED for an H200, not measured")
    print(made.table(options.rows))
    if options.kernels:
        for name, graph in (("forward", made.forward), ("backward", made.backward)):
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
    parser.add_argument(
        "--attention", default="flash", choices=("flash", "cudnn", "efficient", "sdpa"), help="who computes it"
    )
    parser.add_argument("--inductor", nargs="*", default=[], help="its options, such as layout_optimization=false")
    parser.add_argument("--kernels", action="store_true", help="also list every kernel")
    parser.add_argument("--list", action="store_true", help="list the UNet's modules")
    parser.add_argument("--out", type=Path, help="every kernel as JSON")
    parser.add_argument("--code", type=Path, help="what inductor wrote, forward then backward")
    return parser.parse_args()


if __name__ == "__main__":
    main()
