"""Kernels compiled beforehand: what a later launch looks for is what was written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import ROOT

PROGRAM = """
import json, sys
import torch, triton
device, architecture = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, "bench")
from triton.runtime.jit import JITFunction
import kernel_launches as prewarm
from fastgrpo.kernels.accumulate import _launch_accumulate as launch_accumulate
from fastgrpo.kernels.fused_adamw import clip_coefficient
from fastgrpo.kernels.geglu import geglu, _launch_forward as launch_geglu
from fastgrpo.kernels.layer_norm import _launch_backward as launch_layer_norm

def uses(device):
    "Several kernels; one of a view whose address is no multiple of 16."
    x = torch.empty(48, 40, device=device, dtype=torch.bfloat16)
    statistics = torch.empty(48, device=device)
    odd = torch.empty(49, dtype=torch.bfloat16, device=device)[1:].view(8, 6)
    yield lambda: launch_geglu(x, None)
    yield lambda: launch_geglu(odd, None)
    yield lambda: launch_layer_norm(x, x, x[0], statistics, statistics, True, None)
    yield lambda: launch_accumulate(statistics, [x[0], x[1]], [0, 32])  # tensors and numbers in tuples

with prewarm.recording() as found:
    geglu(torch.empty(48, 40, device="meta", dtype=torch.bfloat16))  # an operator, through the dispatcher
    clip_coefficient(torch.empty(1, device="meta"), 1.0)
    for use in uses("meta"):
        use()
names = [f"{launch.name} {launch.module.rpartition('.')[2]}" for launch in found.values()]
failed = [reason for _, reason in prewarm.compile_launches(list(found.values()), architecture, processes=2) if reason]

looked_up = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **about: looked_up.append([src.name, cache_hit])
if device == "cpu":  # a launch as it is on a GPU, of real tensors, up to where the device would be told of it
    triton.runtime.driver.set_active(prewarm.PretendedDriver(architecture))
    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, grid, warmup, **options: run(kernel, *args, grid=grid, warmup=True,
    **options)
for use in uses(device):
    use()
launch_geglu(torch.empty(48, 128, device=device, dtype=torch.bfloat16), None)  # of a kind that was not recorded
print(json.dumps({"names": names, "failed": failed, "looked_up": looked_up}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_launch_finds_what_was_compiled_from_its_record(device: str, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device, str(10 * major + minor)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["names"] == [
        "_forward_kernel geglu",
        "_clip_kernel fused_adamw",
        "_forward_kernel geglu",  # of the view; the operator's call was of the same kind as the other
        "_backward_kernel layer_norm",
        "_sum_kernel program_sums",
        "_accumulate_kernel accumulate",
    ]
    assert not result["failed"]
    assert [hit for _, hit in result["looked_up"]] == [True, True, True, True, True, False]
