"""`python bench/table.py FILE.json`: measurements as Markdown. `--docs`: docs/throughput.md, of bench/results.

`python bench/table.py ARCHIVE`, of bench/gpu.py: all tables of what is in there. With `--docs` it is unpacked to
bench/results/DATE-DEVICE first, so that the section shows it.

Of the kernels (`bench/test_kernels.py --results FILE.json`) here; of whole iterations (`--throughput FOLDER`) in
throughput_table.py. One line per operation, case, direction and function. `copy` is the share of what a large copy
within the same device reached in the same run; `vs best rival` is the time of the fastest other function divided by
ours. `aim` is what the project wants to reach there and whether it did; what is missed is listed first.
"""

import argparse
import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import archive
import throughput_table

HERE = Path(__file__).resolve().parent
OURS = "fastgrpo"


@dataclass(frozen=True)
class Aim:
    """For the cases whose names begin with `case`, in every direction.

    copy: the share of the copy's bandwidth. ratio: times as fast as `rival`, or as the fastest of all where that is
    "best"; 0 asks for nothing.
    """

    case: str
    copy: float
    ratio: float = 0.0
    rival: str = "best"

    def __str__(self) -> str:
        return f"{self.copy:.0%}" + (f", {self.ratio:g}x {self.rival}" if self.ratio else "")


AIMS = {
    "ddim_step": Aim("256x", 0.80, 5.0, "eager"),
    "grpo_step": Aim("256x", 0.80, 5.0, "eager"),
    "group_norm_silu": Aim("", 0.70, 1.5),
    "fused_adamw": Aim("859520964", 0.85),  # SD 1.x's UNet
}

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
    "aim",
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
        f"Copy: {results['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written. Time: median on the device, L2 "
        "cache cold; from a CUDA graph's replay, except where marked *: launched from Python.",
        "",
        *_aims(results["rows"], peers, results["copy_bytes_per_second"]),
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


def _aims(rows: list[dict[str, Any]], peers: dict[tuple[str, ...], list[dict[str, Any]]], copy: float) -> list[str]:
    """How many aims were reached, and a line for each that was not."""
    aimed = [(row, _aim(row)) for row in _ordered(rows) if _aim(row)]
    missed = [(row, aim, _missing(row, aim, peers[_key(row)], copy)) for row, aim in aimed]
    missed = [entry for entry in missed if entry[2]]
    absent = [name for name in AIMS if name not in {row["operation"] for row, _ in aimed}]
    return [
        f"Aims reached: {len(aimed) - len(missed)} of {len(aimed)}.",
        *(f"- missed: {' '.join(_key(row))}: {reason} (aim: {aim})" for row, aim, reason in missed),
        *(f"- not measured: {name} (aim: {AIMS[name]})" for name in absent),
    ]


def _aim(row: dict[str, Any]) -> Aim | None:
    """What this row is to reach; None for a rival, and where there is no aim."""
    aim = AIMS.get(row["operation"])
    return aim if aim and row["function"] == OURS and row["case"].startswith(aim.case) else None


def _missing(row: dict[str, Any], aim: Aim, group: list[dict[str, Any]], copy: float) -> str:
    """What falls short, "" if nothing does."""
    share = row["bytes"] / row["seconds"] / copy
    short = [] if share >= aim.copy else [f"{share:.0%}"]
    if aim.ratio:
        ratio = _ratio(row, group, aim.rival)
        if ratio is None:
            short.append(f"{aim.rival} not measured")
        elif ratio < aim.ratio:
            short.append(f"{ratio:.2f}x {aim.rival}")
    return ", ".join(short)


def _ratio(row: dict[str, Any], group: list[dict[str, Any]], rival: str = "best") -> float | None:
    """How many times as fast as a rival; None if that was not measured."""
    others = [other["seconds"] for other in group if other["function"] != OURS and rival in ("best", other["function"])]
    return min(others) / row["seconds"] if others else None


def _cells(row: dict[str, Any], group: list[dict[str, Any]], copy: float) -> list[str]:
    rate = row["bytes"] / row["seconds"]
    ratio = _ratio(row, group) if row["function"] == OURS else None
    aim = _aim(row)
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
        f"{ratio:.2f}x" if ratio else "",
        f"{aim}: {'MISSED' if _missing(row, aim, group, copy) else 'reached'}" if aim else "",
    ]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


NAMES = ("step", "roofline", "kernels", "unet", "ladder")
"""Of the files that measurements are written to, NAME.json."""


def tables(folder: Path) -> list[str]:
    """Of all that was measured in a folder; a file of which none can be made says why."""
    files = {name: folder / f"{name}.json" for name in NAMES}
    return _tables({name: path.read_bytes() for name, path in files.items() if path.exists()})


def _tables(files: Mapping[str, bytes]) -> list[str]:
    """files: by the names of NAMES."""
    found = []
    for name, content in files.items():
        try:
            results = json.loads(content)
            found.append("\n".join([_table_of(results), *throughput_table.kernel_lines(results)]))
        except Exception as error:  # half of a measurement must not hide the rest
            found.append(f"{name}.json: no table of it: {type(error).__name__}: {error}")
    return found


def _table_of(results: dict[str, Any]) -> str:
    return throughput_table.table(results) if "benchmark" in results else table(results)


def keep(path: Path, results: Path) -> Path:
    """Unpacks an archive into `results`/DATE-DEVICE: measurements there, all else in a folder named as the run.

    Returns that folder. Raises OSError, and tarfile.TarError or KeyError where it is no archive of a run.
    """
    files = archive.unpack(path)
    about = json.loads(files["about.json"])
    device = re.sub("[^A-Za-z0-9]+", "-", about["device"].partition(",")[0]).strip("-")
    folder = results / f"{about['date'][:10]}-{device}"
    for name, content in files.items():
        measured = name.removesuffix(".json") in NAMES
        target = (folder if measured else folder / about["run"]) / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="FILE.json, or an archive of bench/gpu.py")
    parser.add_argument("--docs", action="store_true", help="write docs/throughput.md")
    options = parser.parse_args()
    if not (options.file or options.docs):
        parser.error("neither a file nor --docs is given")
    try:
        if options.file and options.file.suffix == ".json":
            print(_table_of(json.loads(options.file.read_text(encoding="utf-8"))), end="")
        elif options.file:
            files = {
                Path(name).stem: content
                for name, content in archive.unpack(options.file).items()
                if name.endswith(".json")
            }
            print(*_tables({name: files[name] for name in NAMES if name in files}), sep="\n")
            if options.docs:
                print(f"unpacked to {keep(options.file, HERE / 'results')}")
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        sys.exit(
            f"{options.file}: {type(error).__name__}: {error}; accepted are a FILE.json and an archive of bench/gpu.py."
        )
    if options.docs:
        throughput_table.write_page(HERE.parent / "docs" / "throughput.md", HERE / "results")


if __name__ == "__main__":
    main()
