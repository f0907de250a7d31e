"""`python -m fastgrpo.kernels.compile` compiles every kernel for GPUs that are not here, and says what it takes of one.

Columns: registers a thread, bytes of stack (spilled registers are there), bytes of shared memory. `--json` prints the
same as JSON. Must not run under TRITON_INTERPRET.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo.kernels.spec import AotKernel, OpSpec

OPERATIONS = sorted(path.stem for path in (Path(__file__).parent / "specs").glob("*.py"))
ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture. kernel: the name of its AotKernel.

    function: module and name of what `@triton.jit` made, "geglu._forward_kernel". error: "", or why it fails.
    """

    operation: str
    kernel: str
    function: str
    architecture: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    error: str = ""


def load_specs() -> dict[str, OpSpec]:
    """Returns every operator's SPEC, by name."""
    return {name: importlib.import_module(f"fastgrpo.kernels.specs.{name}").SPEC for name in OPERATIONS}


def compile_kernel(operation: str, aot: AotKernel, architecture: int) -> Usage:
    """Compiles to a cubin and reads its resource usage; pointers are taken to be 16-byte aligned, as PyTorch's are.

    Raises ValueError for constants that are not the kernel's, and whatever Triton's compiler raises.
    """
    if unknown := aot.constants.keys() - {*aot.kernel.arg_names}:
        raise ValueError(f"{operation}, {aot.name}: the kernel has no parameters {sorted(unknown)}")
    source = ASTSource(fn=aot.kernel, signature=aot.signature, constexprs=aot.constants, attrs=_aligned(aot.signature))
    options = {"num_warps": aot.num_warps, **aot.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", printed.stdout)}
    shared = max(compiled.metadata.shared, numbers["SHARED"])
    return Usage(operation, aot.name, _function(aot), architecture, numbers["REG"], numbers["STACK"], shared)


def _function(aot: AotKernel) -> str:
    return f"{aot.kernel.fn.__module__.rpartition('.')[2]}.{aot.kernel.fn.__name__}"


def _aligned(signature: dict[str, str | tuple[str, ...]]) -> dict[tuple[int, ...], list]:
    """Returns the attribute of every pointer, by its place: (parameter,), or (parameter, place within its tuple)."""
    places: dict[tuple[int, ...], str] = {}
    for index, kind in enumerate(signature.values()):
        places |= {(index,): kind} if isinstance(kind, str) else {(index, j): each for j, each in enumerate(kind)}
    return {place: [["tt.divisibility", 16]] for place, kind in places.items() if kind.startswith("*")}


def compile_all() -> Iterator[Usage]:
    """Compiles every kernel for every architecture on all cores; what does not compile says so in `error`."""
    jobs = [
        (name, index, architecture)
        for name, spec in load_specs().items()
        for index in range(len(spec.aot))
        for architecture in ARCHITECTURES
    ]
    # Forked, so that workers have what is imported here. A kernel does not pickle: they look it up.
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        yield from pool.imap(_compile_job, jobs)


def _compile_job(job: tuple[str, int, int]) -> Usage:
    operation, index, architecture = job
    aot = load_specs()[operation].aot[index]
    try:
        return compile_kernel(operation, aot, architecture)
    except Exception as error:  # of Triton, LLVM or ptxas: one kernel must not hide the others
        reason = (str(error).strip().splitlines() or ["no message"])[-1]
        return Usage(operation, aot.name, _function(aot), architecture, error=f"{type(error).__name__}: {reason}")


def main() -> None:
    as_json = "--json" in sys.argv[1:]
    if not as_json:
        print(f"{'operation':16} {'kernel':56} {'GPU':7} {'registers':>9} {'stack':>6} {'shared':>7}", flush=True)
    usages = []
    for u in compile_all():
        usages.append(u)
        if not as_json:
            figures = u.error or f"{u.registers:9} {u.stack:6} {u.shared:7}"
            print(f"{u.operation:16} {u.kernel:56} sm_{u.architecture:<4} {figures}", flush=True)
    if as_json:
        print(json.dumps([asdict(usage) for usage in usages]))
    if any(usage.error for usage in usages):
        sys.exit("Not every kernel compiles.")


if __name__ == "__main__":
    main()
