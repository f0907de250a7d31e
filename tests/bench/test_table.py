"""The benchmarks' table, and that they run without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

ABOUT = {
    "device": "Some GPU", "driver": "1", "cuda": "2", "torch": "3", "triton": "4", "python": "5", "commit": "abc",
    "date": "2000-01-01",
}  # fmt: skip


def python(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # No device, also on a machine that has one: these tests are about the flow.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def row(function: str, seconds: float, direction: str = "forward", **changes: object) -> dict:
    return {
        "operation": "geglu",
        "case": "8x4",
        "dtype": "bfloat16",
        "direction": direction,
        "function": function,
        "seconds": seconds,
        "seconds_called": 2 * seconds,
        "bytes": 3_000_000,
        "launches": 1,
        "graph": True,
        "rounds": 10,
    } | changes


def printed_table(folder: Path, *rows: dict) -> tuple[str, list[list[str]]]:
    """What the command prints for the rows, with a copy of 2 TB/s; and its cells, without the heads."""
    results = ABOUT | {"copy_bytes_per_second": 2e12, "rows": rows}
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    printed = python("bench/table.py", path).stdout
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return printed, [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def test_the_table_computes_rates_and_ratios(tmp_path: Path) -> None:
    printed, cells = printed_table(
        tmp_path,
        row("eager", 9e-6, graph=False),
        row("torch.compile", 4.5e-6),
        row("fastgrpo", 3e-6),
        row("fastgrpo", 6e-6, direction="forward + backward"),
    )
    assert "Some GPU" in printed
    assert "2000 GB/s" in printed
    # 3 MB in 3 us are 1e12 B/s, half of 2e12; 4.5 us, the faster rival, are 1.5 times 3 us. There is no aim for geglu.
    assert [line[3:] for line in cells] == [
        ["fastgrpo", "3.0 us", "1000", "50%", "1", "6.0 us", "1.50x", ""],
        ["torch.compile", "4.5 us", "667", "33%", "1", "9.0 us", "", ""],
        ["eager", "9.0 us*", "333", "17%", "1", "18.0 us", "", ""],
        ["fastgrpo", "6.0 us", "500", "25%", "1", "12.0 us", "", ""],
    ]


def test_the_table_says_at_once_which_aims_are_missed(tmp_path: Path) -> None:
    norm = {"operation": "group_norm_silu", "case": "64x320x64x64"}
    step = {"operation": "grpo_step", "case": "256x4x64x64"}
    printed, cells = printed_table(
        tmp_path,
        # 3 MB in 2 us are 75% of the copy. The best rival is 1.6 and then 1.4 times slower.
        row("fastgrpo", 2e-6, **norm),
        row("Liger", 3.2e-6, **norm),
        row("fastgrpo", 2e-6, direction="forward + backward", **norm),
        row("Liger", 9e-6, direction="forward + backward", **norm),
        row("torch.compile", 2.8e-6, direction="forward + backward", **norm),
        # Six times eager is what counts, not torch.compile; 75% is not 80%.
        row("fastgrpo", 2e-6, **step),
        row("eager", 12e-6, **step),
        row("torch.compile", 2e-6, **step),
        row("fastgrpo", 2e-6, operation="ddim_step", case="256x4x64x64-channels_last", bytes=3_600_000),
        row("fastgrpo", 2e-6, operation="ddim_step", case="64x4x64x64"),
    )
    aims = [line[-1] for line in cells if line[3] == "fastgrpo"]
    assert aims == [
        "70%, 1.5x best: reached",
        "70%, 1.5x best: MISSED",
        "80%, 5x eager: MISSED",
        "80%, 5x eager: MISSED",
        "",
    ]
    start = printed.index("Aims reached")
    assert printed[start:].splitlines()[:5] == [
        "Aims reached: 1 of 4.",
        "- missed: group_norm_silu 64x320x64x64 bfloat16 forward + backward: 1.40x best (aim: 70%, 1.5x best)",
        "- missed: grpo_step 256x4x64x64 bfloat16 forward: 75% (aim: 80%, 5x eager)",
        "- missed: ddim_step 256x4x64x64-channels_last bfloat16 forward: eager not measured (aim: 80%, 5x eager)",
        "- not measured: fused_adamw (aim: 85%)",
    ]


def test_there_are_benchmarks_for_every_aim() -> None:
    program = """
import sys
sys.path.insert(0, "bench")
from table import AIMS
from fastgrpo.kernels.compile import load_specs
specs = load_specs()
print([name for name, aim in AIMS.items() if not any(case.name.startswith(aim.case) for case in specs[name].bench)])
"""
    assert python("-c", program).stdout == "[]\n"


def test_kernel_tests_need_no_more_than_torch_triton_and_safetensors(tmp_path: Path) -> None:
    """So that they run on a machine without the other libraries."""
    program = """
import sys
import pytest
for name in ("diffusers", "transformers", "open_clip", "tyro", "accelerate", "peft", "torchvision"):
    sys.modules[name] = None
options = ["-q", "--collect-only", "-m", "gpu", "--confcutdir=tests/kernels", "-p", "no:cacheprovider"]
sys.exit(pytest.main(["tests/kernels", *options]))
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_group_norm_silu.py::test_both_backends_on_a_gpu[dtype0-triton]" in done.stdout


@pytest.mark.slow
def test_benchmarks_on_the_cpu_say_that_they_are_a_smoke_test_and_write_nothing(tmp_path: Path) -> None:
    refused = python("-m", "pytest", "bench", f"--results={tmp_path / 'results.json'}")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "CPU smoke test" in refused.stderr
    assert not list(tmp_path.iterdir())
    # Enough of them to see ours, a rival and torch.compile work; `make bench` runs all.
    smoke = python(
        "-m",
        "pytest",
        "bench/test_kernels.py",
        "-q",
        "-k",
        "geglu and forward and not backward",
        "-p",
        "no:cacheprovider",
    )
    assert smoke.returncode == 0, smoke.stdout
    assert "6 passed" in smoke.stdout
    assert "CPU smoke test: no figure here says anything about a GPU" in smoke.stdout
