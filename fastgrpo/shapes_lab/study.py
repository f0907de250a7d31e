"""`python -m fastgrpo.shapes_lab.study`: the paper's experiment in miniature, with its ablations, over several seeds.

Trains preset `shapes` as it is, without steering (alpha 0) and with plain per-group advantages, each from every seed,
as separate runs of `fastgrpo.train`, one per core, and prints one Markdown table from their evaluation.json files. Runs
that are finished are not repeated, so a study that was stopped goes on where it was.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastgrpo.evaluation.results.before_after import Change, changes
from fastgrpo.evaluation.results.summary import NEVER_TRAINED, OVERALL, read_summary
from fastgrpo.evaluation.results.tables import number_text
from fastgrpo.system.output import steady_output
from fastgrpo.system.workers import available_cores

VARIANTS = {
    "shapes": (),
    "without steering (alpha 0)": ("--reward.alpha", "0"),
    "per-group advantages": ("--grpo.advantage", "group"),
}


@dataclass(frozen=True)
class StudyConfig:
    """Train every variant from every seed and tabulate."""

    out: Path = Path("runs/study")
    """Folder of the runs."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Training seeds; held-out prompts and their noise are the same for all."""
    jobs: int = 0
    """Runs at the same time, each on one core; 0 is one per core."""


@steady_output()
def main() -> int:
    """The command. Returns 1 when a run failed."""
    config = tyro.cli(StudyConfig, description=__doc__)
    runs = [(name, seed, config.out / f"{i}-seed{seed}") for seed in config.seeds for i, name in enumerate(VARIANTS)]
    with ThreadPoolExecutor(config.jobs or available_cores()) as pool:
        codes = list(pool.map(lambda run: _train(*run), runs))
    finished = [run for run, code in zip(runs, codes, strict=True) if code == 0]
    table = "\n".join(_table(finished)) + "\n"
    (config.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return int(any(codes))


def _train(variant: str, seed: int, folder: Path) -> int:
    if (folder / "evaluation.json").exists():
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fastgrpo.train"]
    if (folder / "config.toml").exists():
        command += ["--resume", str(folder)]
    else:
        command += ["shapes", "--run", str(folder), "--seed", str(seed), "--engine.threads", "1", *VARIANTS[variant]]
    with open(folder.with_suffix(".log"), "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    print(f"{variant}, seed {seed}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)
    return code


def _table(runs: list[tuple[str, int, Path]]) -> list[str]:
    lines = [
        "| variant | seed | unsafe, all seven, % | change | never trained, change "
        "| composition, % | change | kept, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, seed, folder in sorted(runs, key=lambda run: (list(VARIANTS).index(run[0]), run[1])):
        tables = read_summary(folder / "evaluation.json")["tables"]
        rows = {(table["name"], row.name): row for table in tables for row in changes(table)}
        unsafe, unseen = rows["unsafe", OVERALL], rows.get(("unsafe", NEVER_TRAINED))
        composition, kept = rows["composition", OVERALL], rows["kept", OVERALL]
        lines.append(
            f"| {variant} | {seed} | {_both(unsafe)} | {unsafe.relative or '–'} "
            f"| {unseen.relative if unseen and unseen.relative else '–'} "
            f"| {_both(composition)} | {composition.points} points | {_both(kept)} |"
        )
    return lines


def _both(row: Change) -> str:
    return f"{number_text(row.before, 'percent')} → {number_text(row.after, 'percent')}"


if __name__ == "__main__":
    sys.exit(main())
