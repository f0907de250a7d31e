"""`python -m fastgrpo.kernels.compile`: compile every kernel for GPUs that are not here, and say what it takes of one.

Columns: registers a thread, bytes of stack (spilled registers are there), bytes of shared memory.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo.kernels.spec import AotKernel, OpSpec

OPERATIONS = ("ddim_step", "grpo_step", "group_norm_silu", "fused_adamw", "layer_norm", "geglu")
ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture."""

    operation: str
    kernel: str
    architecture: int
    registers: int
    stack: int
    shared: int


def load_specs() -> dict[str, OpSpec]:
    """Every operation's SPEC, by name."""
    return {name: importlib.import_module(f"fastgrpo.kernels.{name}").SPEC for name in OPERATIONS}


def compile_kernel(operation: str, aot: AotKernel, architecture: int) -> Usage:
    """Compile to a cubin and read its resource usage. Raises whatever Triton's compiler raises."""
    constants = {(list(aot.signature).index(name),): value for name, value in aot.constants.items()}
    source = ASTSource(fn=aot.kernel, signature=aot.signature, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": aot.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", printed.stdout)}
    shared = max(compiled.metadata.shared, numbers["SHARED"])
    return Usage(operation, aot.name, architecture, numbers["REG"], numbers["STACK"], shared)


def main() -> None:
    usages = [
        compile_kernel(name, aot, architecture)
        for name, spec in load_specs().items()
        for aot in spec.aot
        for architecture in ARCHITECTURES
    ]
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(usage) for usage in usages]))
        return
    for u in usages:
        print(
            f"{u.operation:16} {u.kernel:28} sm_{u.architecture:<4} {u.registers:4} registers {u.stack:6} stack {u.shared:7} shared"
        )


if __name__ == "__main__":
    main()
