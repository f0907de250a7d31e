"""`python bench/table.py FILE.json`: the measurements of `bench/test_kernels.py --results FILE.json` as Markdown.

One line per operation, case, direction and function. `copy` is the share of what a large copy within the same device reached
in the same run; `vs best rival` is the time of the fastest other function divided by ours.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "fastgrpo"
_COLUMNS = (
    "operation",
    "case",
    "direction",
    "function",
    "time",
    "GB/s",
    "copy",
    "launches",
    "from Python",
    "vs best rival",
)
_LEFT = 4  # columns of text; figures are aligned to the right


def table(results: dict[str, Any]) -> str:
    """Markdown of a results file's content."""
    peers = defaultdict(list)
    for row in results["rows"]:
        peers[_key(row)].append(row)
    lines = [
        f"{results['device']}, driver {results['driver']}, CUDA {results['cuda']}, torch {results['torch']}, "
        f"triton {results['triton']}, Python {results['python']}, commit {results['commit']}, {results['date']}. "
        f"Copy: {results['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written. Time: median on the device, L2 cache "
        "cold; from a CUDA graph's replay, except where marked *: launched from Python.",
        "",
        _line(_COLUMNS),
        _line(["---"] * _LEFT + ["---:"] * (len(_COLUMNS) - _LEFT)),
    ]
    lines += [
        _line(_cells(row, peers[_key(row)], results["copy_bytes_per_second"])) for row in _ordered(results["rows"])
    ]
    return "\n".join(lines) + "\n"


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["operation"], row["case"], row["dtype"], row["direction"]


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in the order they were first measured; in a group ours first, then by time."""
    order = {key: index for index, key in enumerate(dict.fromkeys(_key(row) for row in rows))}
    return sorted(rows, key=lambda row: (order[_key(row)], row["function"] != OURS, row["seconds"]))


def _cells(row: dict[str, Any], group: list[dict[str, Any]], copy: float) -> list[str]:
    rate = row["bytes"] / row["seconds"]
    rivals = [other["seconds"] for other in group if other["function"] != OURS]
    ratio = f"{min(rivals) / row['seconds']:.2f}x" if row["function"] == OURS and rivals else ""
    return [
        row["operation"],
        f"{row['case']} {row['dtype']}",
        row["direction"],
        row["function"],
        f"{row['seconds'] * 1e6:.1f} us{'' if row['graph'] else '*'}",
        f"{rate / 1e9:.0f}",
        f"{rate / copy:.0%}",
        str(row["launches"]),
        f"{row['seconds_called'] * 1e6:.1f} us",
        ratio,
    ]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/table.py FILE.json")
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")


if __name__ == "__main__":
    main()
