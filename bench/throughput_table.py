"""The Markdown of step.json, ladder.json, roofline.json and unet.json, and the page docs/throughput.md made of them.

What a machine was measured at is in bench/results/DATE-DEVICE. The page shows the newest file of each kind from a GPU
and from a CPU, and says so where there is none from a GPU.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "fastgrpo"
START, END = "<!-- throughput -->", "<!-- /throughput -->"
SHOWN = ("step", "ladder", "roofline")
"""Of what is measured, what the page shows."""
FORECAST = "forecast.json"
"""In bench/results, what bench/forecast.py wrote of an iteration before it was measured."""
FORETOLD = {"rollout": ("rollout", "decoding"), "reward": ("reward",), "update": ("update", "optimizer")}

_STAGES = ("rollout", "reward", "update")
_SPEEDS = ("rollout, FLOP/s (of matmul)", "update, FLOP/s (of matmul)")
_SPEED = "throughput/images_per_s"

# What an iteration is to reach, on an H200: name, unit, at least or at most, how to read it from step.json.
GPU_AIMS = (
    ("update", "TFLOP/s", ">=", 420.0, lambda rows: median_of(rows, OURS, "throughput/update_tflops")),
    ("rollout", "TFLOP/s", ">=", 500.0, lambda rows: median_of(rows, OURS, "throughput/rollout_tflops")),
    ("64 images", "s", "<=", 50.0, lambda rows: 64 / median_of(rows, OURS, _SPEED)),
    ("ratio to the plain trainer", "x", ">=", 2.5, lambda rows: _speedup(rows)),
)
CPU_AIMS = (("ratio to the plain trainer", "x", ">=", 2.0, lambda rows: _speedup(rows)),)

Rows = Sequence[Mapping[str, Any]]


def table(results: Mapping[str, Any]) -> str:
    """Markdown of one file's content."""
    return "\n".join([_measured_on(results), "", *_TABLES[results["benchmark"]](results)]) + "\n"


def page_section(folder: Path) -> str:
    """What stands between the page's markers. folder: bench/results."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))]
    files = [file for file in files if file.get("benchmark") in SHOWN]
    sections = []
    for kind, ours in (("GPU", [f for f in files if "cuda" in f]), ("CPU", [f for f in files if "cuda" not in f])):
        newest = {file["benchmark"]: file for file in sorted(ours, key=lambda file: file["date"])}
        if kind == "GPU" and (missing := [name for name in SHOWN if name not in newest]):
            sections.append(
                f"**Not yet measured on a GPU: {', '.join(f'`{name}`' for name in missing)}.** `python bench/gpu.py` "
                "on one measures it, and `python bench/table.py ARCHIVE --docs` fills it in."
            )
        for name in SHOWN:
            if name in newest:
                sections.append(table(newest[name]).rstrip())
        if kind == "GPU" and "step" in newest and (folder / FORECAST).exists():
            foretold = json.loads((folder / FORECAST).read_text(encoding="utf-8"))
            sections.append("\n".join(beside_forecast(newest["step"], foretold)))
    return "\n\n".join(sections)


def beside_forecast(results: Mapping[str, Any], foretold: Mapping[str, Any]) -> list[str]:
    """Of step.json, what `bench/forecast.py` predicted of its stages beside what they took."""
    stages = {
        stage: sum(row["seconds"] for row in foretold["phases"] if row["phase"] in phases)
        for stage, phases in FORETOLD.items()
    }
    took = {stage: median_of(results["rows"], OURS, f"time/{stage}_s") for stage in stages}
    if None in took.values():
        return [f"The forecast stands beside nothing: {OURS} has no whole iteration."]
    lines = [
        f"Predicted by `bench/forecast.py`, commit {foretold['commit']}, {foretold['date'][:10]}, and measured:",
        "",
    ]
    lines += _head(("stage", "predicted, s", "measured, s", "measured / predicted"), 1)
    for stage, (seconds, measured) in {
        **{stage: (stages[stage], took[stage]) for stage in stages},
        "iteration": (foretold["seconds"], sum(took.values())),
    }.items():
        lines.append(_line([stage, f"{seconds:.3g}", f"{measured:.3g}", f"{measured / seconds:.2f}"]))
    return lines


def write_page(page: Path, folder: Path) -> None:
    """Put the section in its place. folder: bench/results. Raises ValueError where the markers are not there."""
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{page}: there is no {START} ... {END}")
    page.write_text(f"{before}{START}\n{page_section(folder)}\n{END}{after}", encoding="utf-8")


def _measured_on(results: Mapping[str, Any]) -> str:
    cuda = f", driver {results['driver']}, CUDA {results['cuda']}" if "cuda" in results else ""
    rates = results["rates"]
    return (
        f"`{results['benchmark']}` on {results['device']}{cuda}, torch {results['torch']}, Python {results['python']}, "
        f"commit {results['commit']}, {results['date'][:10]}. {_short(rates['matmul'])}FLOP/s of "
        f"{rates['dtype'].removeprefix('torch.')} matmul, {_short(rates['copy'])}B/s of copies, measured in the same "
        "run."
    )


def _step(results: Mapping[str, Any]) -> list[str]:
    rows, names = results["rows"], list(dict.fromkeys(row["name"] for row in results["rows"]))
    ours = next((name for name in (OURS, *names) if name in names and name.startswith(OURS)), OURS)
    lines = [
        f"{results['what']}, {results['steps']} denoising steps, {counted(results['updates'], 'optimizer step')}; "
        f"{counted(min((len(_named(rows, name)) for name in names), default=0), 'iteration')} of each, median [least, "
        "most].",
        "",
        *_head(("trainer", "images/s", *(f"{stage}, s" for stage in _STAGES), *_SPEEDS, "fastgrpo is faster by"), 1),
    ]
    for name in sorted(names, key=lambda name: -median_of(rows, name, _SPEED)):
        cells = [
            _spread(rows, name, _SPEED),
            *(f"{median_of(rows, name, f'time/{stage}_s'):.3g}" for stage in _STAGES),
            *(_speed(rows, name, "throughput/", stage) for stage in ("rollout", "update")),
            _ratio_text(_ratios(rows, ours, name, _SPEED)) if name != ours else "",
        ]
        lines.append(_line([name, *cells]))
    lines += ["", *(f"- {name}: {reason}" for name, reason in results.get("failed", {}).items())]
    for name, stages in results.get("reached", {}).items():
        if name not in names:
            took = ", ".join(f"{stage} {seconds:.3g} s" for stage, seconds in stages.items())
            lines.append(f"- {name}: no whole iteration; {took}")
    if OURS in names:
        for name, unit, way, aim, read in GPU_AIMS if "cuda" in results else CPU_AIMS:
            found = read(rows)
            reached = found is not None and (found >= aim if way == ">=" else found <= aim)
            shown = "not measured" if found is None else f"{found:.3g} {unit}"
            lines.append(f"- aim: {name} {way} {aim:g} {unit}: {shown}, {'reached' if reached else 'MISSED'}")
    for name, places in results.get("waits", {}).items() if "cuda" in results else ():
        seen = ", ".join(f"{count} x {place}" for place, count in list(places.items())[:5]) or "none seen"
        lines.append(f"- {name}: waits for the device in a whole iteration, by PyTorch's own watch: {seen}")
    # On a CPU there is no device to wait for.
    for name, checks in results.get("checks", {}).items() if "cuda" in results else ():
        lines += [
            f"- {name}: {check['name']}: {'holds' if check['holds'] else 'DOES NOT HOLD'} ({check['seen']})"
            for check in checks
        ]
    return lines


def kernel_lines(results: Mapping[str, Any], most: int = 12) -> list[str]:
    """Of step.json: what one replay of each graph spends its time on, as far as it was looked at."""
    lines = []
    for training, replays in results.get("kernels", {}).items():
        for replay, kernels in replays.items():
            whole = sum(kernel["seconds"] for kernel in kernels) or 1.0
            lines += [
                "",
                f"{training}: one replay of `{replay}`, {whole * 1e3:.2f} ms in the {len(kernels)} costliest kernels.",
                "",
            ]
            lines += _head(("kernel", "calls", "ms", "share"), 1)
            for kernel in kernels[:most]:
                name = kernel["name"].replace("|", "\\|")[:100]
                lines.append(
                    _line(
                        [
                            name,
                            str(kernel["calls"]),
                            f"{kernel['seconds'] * 1e3:.3f}",
                            f"{kernel['seconds'] / whole:.0%}",
                        ]
                    )
                )
    return lines


def _ladder(results: Mapping[str, Any]) -> list[str]:
    rows, failed = results["rows"], results.get("failed", {})
    first = results["rungs"][0]
    lines = _head(("with all above it, and", "images/s", "ratio", *_SPEEDS), 1)
    for name in results["rungs"]:
        speed = median_of(rows, name, "images_per_s")
        if speed is None:
            lines.append(_line([name, f"not measured: {failed.get(name, 'out of time')}", "", "", ""]))
            continue
        stages = [_speed(rows, name, "", stage) for stage in ("rollout", "update")]
        ratio = _ratio_text(_ratios(rows, name, first, "images_per_s"))
        lines.append(_line([name, _spread(rows, name, "images_per_s"), ratio, *stages]))
    return lines


def _roofline(results: Mapping[str, Any]) -> list[str]:
    lines = _head(("phase", "FLOP", "optimizer, bytes", "floor, s", "reached, s", "floor / reached"), 1)
    rows = list(results["rows"])
    keys = ("flop", "bytes", "floor", "reached")
    rows.append({"name": "iteration", **{key: sum(row[key] for row in results["rows"]) for key in keys}})
    for row in rows:
        work = [_short(row["flop"]), _short(row["bytes"]) if row["bytes"] else ""]
        times = [f"{row[key]:.3g}" for key in ("floor", "reached")]
        lines.append(_line([row["name"], *work, *times, f"{row['floor'] / row['reached']:.0%}"]))
    return lines


def _unet(results: Mapping[str, Any]) -> list[str]:
    lines = _head(("pass", "rows", "attention", "layers it serves", "ms", "FLOP/s"), 1)
    for row in results["rows"]:
        speed = row["flop"] / row["seconds"]
        share = speed / results["rates"]["matmul"]
        cells = [row["direction"], row["rows"], row["backend"], f"{row['served']} of {row['layers']}"]
        lines.append(_line([*map(str, cells), f"{row['seconds'] * 1e3:.1f}", f"{_short(speed)} ({share:.0%})"]))
    return lines


_TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "step": _step,
    "ladder": _ladder,
    "roofline": _roofline,
    "unet": _unet,
}


def _named(rows: Rows, name: str) -> list[Mapping[str, float]]:
    """The iterations that count: without the first, where it compiled and captured and is not alone."""
    found = [row for row in rows if row["name"] == name]
    counted = [row["values"] for row in found if not row.get("first")]
    return counted or [row["values"] for row in found]


def median_of(rows: Rows, name: str, key: str) -> float | None:
    """Of the iterations of a training that count; None where there is none."""
    numbers = [values[key] for values in _named(rows, name)]
    return statistics.median(numbers) if numbers else None


def _spread(rows: Rows, name: str, key: str) -> str:
    numbers = [values[key] for values in _named(rows, name)]
    few = f"{statistics.median(numbers):.3g}"
    return few if len(numbers) == 1 else f"{few} [{min(numbers):.3g}, {max(numbers):.3g}]"


def _speed(rows: Rows, name: str, prefix: str, stage: str) -> str:
    """For example "430 T (54%)": FLOP/s, and the share of the matmul rate."""
    flops = 1e12 * median_of(rows, name, f"{prefix}{stage}_tflops")
    share = median_of(rows, name, f"{prefix}{stage}_share")
    return f"{_short(flops)} ({share:.0%})"


def _short(number: float) -> str:
    """Three digits and a prefix: 430 T, 31.2 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g}"


def _ratios(rows: Rows, name: str, other: str, key: str) -> list[float]:
    """How many times as fast as `other` it was, turn by turn: what else a machine does then meets both."""
    return [one[key] / two[key] for one, two in zip(_named(rows, name), _named(rows, other), strict=False)]


def _ratio_text(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    few = f"{statistics.median(ratios):.2f}x"
    return few if len(ratios) == 1 else f"{few} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _speedup(rows: Rows) -> float | None:
    """Beside the fastest way to run the plain trainer."""
    plain = {row["name"] for row in rows if not row["name"].startswith(OURS)}
    return min((statistics.median(_ratios(rows, OURS, name, _SPEED)) for name in plain), default=None)


def counted(count: int, what: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _head(columns: Sequence[str], left: int) -> list[str]:
    return [_line(columns), _line(["---"] * left + ["---:"] * (len(columns) - left))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
