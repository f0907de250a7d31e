"""FLOPs and speeds against arithmetic done here, rates against a clock that is made up, and the files of a profile."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fastgrpo.costs.counting import count_passes
from fastgrpo.costs.profile import COSTLIEST, Kernel, kernel_table, profiled
from fastgrpo.costs.rates import Rates, best_seconds, measure_rates
from fastgrpo.costs.throughput import Accounting, Rows, memory_peak
from fastgrpo.system.workers import Workers
from fastgrpo.unet.gradient_checkpointing import checkpoint_blocks
from support.costs import MODEL

CPU = torch.device("cpu")
RATES = Rates("a device", "torch.float32", 1, matmul=1e6, copy=1e6)


@pytest.mark.parametrize("again", [False, True])
def test_flop_of_a_small_unet_by_hand(again):
    """One ResNet block, no attention: 3 x 3 convolutions and linear layers, each 2 FLOP for a weight and an output."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            norm_num_groups=8,
        )
        inputs = torch.empty(3, 4, 8, 8), torch.empty(3, dtype=torch.int64), torch.empty(3, 5, 1280)
    pixels, embedding = 64, 4 * 16

    def resnet(channels: int) -> int:
        shortcut = 0 if channels == 16 else channels * 16 * pixels
        return (9 * channels * 16 + 9 * 16 * 16) * pixels + embedding * 16 + shortcut

    time = 16 * embedding + embedding * embedding
    # Down one block; up two, whose inputs have the maps of the way down beside them.
    products = 9 * 4 * 16 * pixels + resnet(16) + 2 * resnet(32) + time + 9 * 16 * 4 * pixels
    if again:
        checkpoint_blocks(unet)
    forward, both = count_passes(unet, inputs)
    assert forward == 3 * 2 * products
    # Backward each layer has two products of the size of its own, but for the gradients of the first layers' inputs.
    expected = 3 * 2 * (3 * products - 9 * 4 * 16 * pixels - 16 * embedding)
    if again:
        # Gradient checkpointing adds the blocks' products but for each block's last one, whose result nothing needs.
        last = 9 * 16 * 16 * pixels + 2 * 32 * 16 * pixels
        expected += 3 * 2 * (resnet(16) + 2 * resnet(32) - last)
    assert both == expected


def test_metrics_closed_form():
    accounting = Accounting(MODEL, encode=701, rates=RATES)
    work = {
        "rollout": Rows(forward=1000, decoded=10, encoded=7),
        "update": Rows(forward=50, forward_backward=2000),
    }
    rollout, update = 1000 * 101 + 10 * 503 + 7 * 701, 50 * 101 + 2000 * 307
    assert accounting.metrics(work, {"rollout": 0.5, "reward": 1.0, "update": 4.0}, images=20) == {
        "throughput/rollout_tflops": pytest.approx(rollout / 0.5 / 1e12),
        "throughput/rollout_images_per_s": 40.0,
        "throughput/rollout_share": pytest.approx(rollout / 0.5 / 1e6),
        "throughput/update_tflops": pytest.approx(update / 4 / 1e12),
        "throughput/update_images_per_s": 5.0,
        "throughput/update_share": pytest.approx(update / 4 / 1e6),
    }


def test_an_update_that_computed_nothing():
    """All groups flat: no rows, hardly any time, no speed to divide by zero for."""
    values = Accounting(MODEL, 0, RATES).metrics({"rollout": Rows(1), "update": Rows()}, {"rollout": 1, "update": 0}, 1)
    assert values["throughput/rollout_tflops"] == 101e-12
    assert not any("update" in name for name in values)


def test_memory_peak_of_the_process():
    """At least a gigabyte that was there and has gone; and less than the machine has."""
    buffer = torch.ones(2**28)
    size = buffer.nbytes
    del buffer
    assert size / 1e9 < memory_peak(CPU)["memory/peak_gb"] < 1000


# ---------------------------------------------------------------------------------------------------------------------
# Rates.


def test_best_seconds_leaves_out_the_first_and_fills_its_time():
    """The first call compiles; then 50, 20 and 80 ms make 0.15 s."""
    spans = [9.0, 0.05, 0.02, 0.08, 0.001]
    moments = iter([moment for span in spans for moment in (0.0, span)])
    calls: list[None] = []
    assert best_seconds(lambda: calls.append(None), CPU, lambda: next(moments)) == 0.02
    assert len(calls) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_measured_rates(workers):
    rates = measure_rates(CPU, torch.float32, Workers(workers))
    assert rates.workers == workers
    # A core that computes at all does 1e8 a second; none does 1e13. Memory likewise.
    assert 1e8 < rates.matmul < workers * 1e13
    assert 1e7 < rates.copy < workers * 1e12
    assert "float32 matmul" in rates.line()


def test_a_rate_counts_what_all_workers_do(monkeypatch):
    """With every round a second long: a product of 512 x 512 matrices, and 128 MB read and written, shared out."""
    monkeypatch.setattr("fastgrpo.costs.rates.best_seconds", lambda call, device: call() and 1.0)
    for workers in (1, 2):
        rates = measure_rates(CPU, torch.float32, Workers(workers))
        assert rates.matmul == workers * 2 * 512**3
        assert rates.copy == 2 * 2**27


# ---------------------------------------------------------------------------------------------------------------------
# Profiles.


def rows_of(table: str) -> dict[str, tuple[float, float, int, float]]:
    """Name -> share in percent, milliseconds, calls, microseconds a call."""
    cells = [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in table.splitlines()[4:]]
    return {c[0]: (float(c[1][:-1]), float(c[2]), int(c[3].replace(",", "")), float(c[4])) for c in cells}


def test_table_closed_form():
    kernels = [Kernel(f"k{n}", n, n * 1e-3) for n in range(1, 13)] + [Kernel("a|b" + "x" * 200, 4, 22e-3)]
    table = kernel_table(kernels)
    rows = rows_of(table)
    assert len(rows) == COSTLIEST
    assert table.startswith("10 costliest of 13 kernels, which took 100.0 ms together")
    first, second, *_ = rows
    assert first.startswith("a\\|b")
    assert len(first) <= 101
    assert rows[first] == (22.0, 22.0, 4, 5500.0)
    assert second == "k12"
    assert rows["k12"] == (12.0, 12.0, 12, 1000.0)
    assert list(rows)[-1] == "k4"


def test_a_table_of_nothing():
    assert "| kernel |" in kernel_table([])
    assert rows_of(kernel_table([Kernel("idle", 1, 0.0)])) == {}


def test_profile_files_show_what_workers_did(tmp_path):
    """Products in threads that were there before, and one in this thread."""
    workers, matrix = Workers(2), torch.ones(300, 300)
    list(workers.map(torch.exp, [matrix] * 4))
    with profiled(tmp_path, wanted=True):
        list(workers.map(matrix.mm, [matrix] * 20))
        matrix.mm(matrix)
    rows = rows_of((tmp_path / "profile" / "kernels.md").read_text(encoding="utf-8"))
    share, milliseconds, calls, each = rows["aten::mm"]
    assert calls == 21
    assert each == pytest.approx(1e3 * milliseconds / 21, abs=0.05 + 1e3 * 0.005 / 21)  # both are rounded
    assert share > 50  # 54 million FLOP each, beside what only starts them
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 21
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["kernels.md", "trace.json.gz"]


def test_no_profile_unless_wanted_or_when_it_fails(tmp_path):
    with profiled(tmp_path, wanted=False):
        torch.ones(3).exp()
    with pytest.raises(ValueError, match="broken"), profiled(tmp_path, wanted=True):
        raise ValueError("broken")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    missing = tmp_path / "gone"
    with pytest.raises(OSError, match="gone") as caught, profiled(missing, wanted=True):
        torch.ones(3).exp()
    assert str(caught.value.filename) == str(missing / "profile")


@pytest.mark.gpu
def test_profile_lists_the_devices_kernels(tmp_path):
    matrix = torch.ones(1024, 1024, device="cuda")
    with profiled(tmp_path, wanted=True):
        for _ in range(5):
            matrix = matrix.mm(matrix).mul(1e-3)
    rows = rows_of(Path(tmp_path / "profile" / "kernels.md").read_text(encoding="utf-8"))
    assert sum(calls == 5 for _, _, calls, _ in rows.values()) >= 2
    assert not any(name.startswith("aten::") for name in rows)


@pytest.mark.gpu
def test_memory_peak_of_a_device_starts_anew():
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    memory_peak(device)
    before = memory_peak(device)["memory/peak_gb"]
    buffer = torch.empty(2**28, dtype=torch.int8, device=device)
    del buffer
    torch.cuda.empty_cache()
    assert memory_peak(device)["memory/peak_gb"] == pytest.approx(before + 2**28 / 1e9, abs=1e-3)
    assert memory_peak(device)["memory/peak_gb"] == pytest.approx(before, abs=1e-3)
