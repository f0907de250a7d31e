"""The benchmarks' table, and the one command for a GPU machine, rehearsed without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgrpo

ROOT = Path(fastgrpo.__file__).parent.parent


def python(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # No device, also on a machine that has one: these tests are about the flow.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def row(function: str, seconds: float, direction: str = "forward", **changes: object) -> dict:
    return {
        "operation": "geglu", "case": "8x4", "dtype": "bfloat16", "direction": direction, "function": function,
        "seconds": seconds, "seconds_called": 2 * seconds, "bytes": 3_000_000, "launches": 1, "graph": True, "rounds": 10,
    } | changes  # fmt: skip


def test_the_table_computes_rates_and_ratios(tmp_path: Path) -> None:
    results = {
        "device": "Some GPU", "driver": "1", "cuda": "2", "torch": "3", "triton": "4", "python": "5", "commit": "abc",
        "date": "2000-01-01", "copy_bytes_per_second": 2e12,
        "rows": [
            row("eager", 9e-6, graph=False),
            row("torch.compile", 4.5e-6),
            row("fastgrpo", 3e-6),
            row("fastgrpo", 6e-6, direction="forward + backward"),
        ],
    }  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    printed = python("bench/table.py", path).stdout
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")
    ]
    assert "Some GPU" in printed
    assert "2000 GB/s" in printed
    # 3 MB in 3 us are 1e12 B/s, half of 2e12; 4.5 us, the faster rival, are 1.5 times 3 us.
    assert [line[3:] for line in cells[2:]] == [
        ["fastgrpo", "3.0 us", "1000", "50%", "1", "6.0 us", "1.50x"],
        ["torch.compile", "4.5 us", "667", "33%", "1", "9.0 us", ""],
        ["eager", "9.0 us*", "333", "17%", "1", "18.0 us", ""],
        ["fastgrpo", "6.0 us", "500", "25%", "1", "12.0 us", ""],
    ]


def test_the_gpu_command_runs_through_without_a_gpu(tmp_path: Path) -> None:
    done = python("bench/gpu.py", "--out", tmp_path / "out", "--stages", "tests", "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary in done.stdout
    assert summary.count("no CUDA device: skipped") == 2
    assert not (tmp_path / "out" / "kernels.json").exists()


def test_a_stage_out_of_time_is_stopped_and_fails_the_gpu_command(tmp_path: Path) -> None:
    # Importing Triton alone takes longer than 15% of a second, so compiling cannot be done by then.
    done = python("bench/gpu.py", "--out", tmp_path / "out", "--seconds", "1")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "FAILED: out of time" in summary
    assert "all:" in summary


def test_benchmarks_on_the_cpu_say_that_they_are_a_smoke_test_and_write_nothing(tmp_path: Path) -> None:
    refused = python("-m", "pytest", "bench", f"--results={tmp_path / 'results.json'}")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "CPU smoke test" in refused.stderr
    assert not list(tmp_path.iterdir())
    # Enough of them to see ours, a rival and torch.compile work; `make bench` runs all.
    smoke = python("-m", "pytest", "bench", "-q", "-k", "geglu and forward and not backward", "-p", "no:cacheprovider")
    assert smoke.returncode == 0, smoke.stdout
    assert "6 passed" in smoke.stdout
    assert "CPU smoke test: no figure here says anything about a GPU" in smoke.stdout
