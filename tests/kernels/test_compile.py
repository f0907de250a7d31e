"""Every Triton kernel, compiled for GPUs that are not here: it fits their registers and shared memory.

Nothing spills, or with Triton 3.8 next to nothing.
"""

import ast
import json
import os
import subprocess
import sys

import pytest
import triton
from packaging.version import Version

from support import ROOT

pytestmark = pytest.mark.slow

# Bytes of shared memory one block can have: CUDA C++ programming guide, technical specifications per compute
# capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 255
# Bytes a thread: Triton 3.8 spills up to eight registers in some of the compiled variants where 3.6 and 3.7 spill none.
STACK = 0 if Version(triton.__version__) < Version("3.8") else 32


@pytest.fixture(scope="module")
def usages() -> list[dict]:
    """What `python -m fastgrpo.kernels.compile --json` prints; where kernels are interpreted none is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgrpo.kernels.compile", "--json"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


def test_kernels_compile_and_fit_every_architecture(usages: list[dict]) -> None:
    wrong = [
        usage
        for usage in usages
        if usage["error"]
        or not 0 < usage["registers"] <= REGISTERS
        or usage["stack"] > STACK
        or usage["shared"] > SHARED[usage["architecture"]]
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_every_launched_kernel_is_compiled_for_every_architecture(usages: list[dict]) -> None:
    compiled = {(usage["function"], usage["architecture"]) for usage in usages}
    launched = {
        (f"{path.stem}.{function}", architecture)
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for function in launched_kernels(path.read_text(encoding="utf-8"))
        for architecture in SHARED
    }
    assert launched
    assert launched <= compiled, sorted(launched - compiled)


def test_the_scan_finds_what_is_launched_and_not_what_kernels_call() -> None:
    source = """
@triton.jit
def inner(x): ...
@triton.jit
def outer(x): inner(x)
@triton.jit
def chosen(x): ...
def launch(x):
    outer[(1,)](x)
    kernel = chosen if x else outer
    kernel[(1,)](x)
def plain(x): ...
SPEC = OpSpec(aot=(AotKernel("inner", inner),))
"""
    assert launched_kernels(source) == {"outer", "chosen"}


def launched_kernels(source: str) -> set[str]:
    """The `@triton.jit` functions that some plain function of the module names: there is no other way to a launch."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    kernels = {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}
    named = {
        node.id
        for function in functions
        if function.name not in kernels
        for node in ast.walk(function)
        if isinstance(node, ast.Name)
    }
    return kernels & named


def test_flat_buffers_are_moved_16_bytes_at_a_time_whatever_the_number_of_parameters() -> None:
    """Of a number of elements that Triton knows nothing of, a mask would make every access one of 4 bytes."""
    code = """
import json, re
import fastgrpo, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastgrpo.kernels.compile import _aligned
from fastgrpo.kernels.specs import accumulate, fused_adamw
found = {}
for aot in (*fused_adamw.SPEC.aot, *accumulate.SPEC.aot):
    source = ASTSource(aot.kernel, aot.signature, aot.constants, _aligned(aot.signature))
    options = {"num_warps": aot.num_warps, **aot.options}
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found[aot.name] = [len(re.findall(access + r"\\.global\\.v4", text)) for access in ("ld", "st")]
print(json.dumps(found))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    # Parameters, moments and gradient are read, the first three written; the average both; the norm only reads.
    assert found["adamw"] == [4, 3]
    assert found["adamw_ema"] == [5, 4]
    assert found["squares"][0] > 0
    # A thread's 16 elements: their gradients, and the sums, which are written again.
    assert found["bf16"] == found["fp16"] == [2 + 4, 4]
    assert found["fp32"] == [4 + 4, 4]
