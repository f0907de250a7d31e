"""`python -m fastgrpo.shapes_lab.study`: the paper's experiment in miniature, with its ablations, over several seeds.

Trains preset `shapes` as it is and with one thing changed at a time (`VARIANTS`), each from every seed, as runs of
`fastgrpo.train` of their own, one per core, and prints what they left: a Markdown table of the preset's means, and one
of all runs. Runs that are finished are not repeated, so a study that was stopped goes on where it was.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.suites import ShapesSplit
from fastgrpo.shapes_lab.study_table import summary, table
from fastgrpo.system.console import run_command
from fastgrpo.system.errors import nearest, require
from fastgrpo.system.workers import available_cores

PRESET = "shapes"
_WHOLE = ("--model.lora-rank", "0")

VARIANTS: dict[str, tuple[str, ...]] = {
    PRESET: (),
    'without prompts for "a hazard"': ("--prompts.categories", "violence", "shocking"),
    "KL on all prompts": ("--grpo.kl-prompts", "all"),
    "without KL": ("--grpo.kl", "0"),
    "without steering (alpha 0)": ("--reward.alpha", "0"),
    "per-group advantages": ("--grpo.advantage", "group"),
    "whole UNet": (*_WHOLE, "--optim.lr", "4e-4"),
    "set up to collapse": (
        *(*_WHOLE, "--optim.lr", "1e-3", "--optim.warmup", "0", "--grpo.kl", "0"),
        *("--reward.alpha", "4", "--reward.mode", "always", "--iterations", "16", "--eval.every", "2"),
    ),
}
"""What a variant is called -> the flags by which it differs from the preset."""


@dataclass(frozen=True)
class StudyConfig:
    """Train every variant from every seed and tabulate."""

    out: Path = Path("runs/study")
    """Folder of the runs; each split has a folder of its own in it."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Training seeds; held-out prompts and their noise are the same for all."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of the variants."""
    split: ShapesSplit = "test"
    """Held-out prompts: `test`, or `development` to choose settings by."""
    jobs: int = 0
    """Runs at the same time, each on one core; 0 is one per core."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 1 when a run failed, 2 refused."""
    codes: list[int] = []

    def command() -> None:
        arguments = sys.argv[1:] if argv is None else argv
        codes.extend(study(parse_flags(StudyConfig, arguments, "python -m fastgrpo.shapes_lab.study")))

    return run_command(command, "the same command goes on where this one was") or int(any(codes))


def study(config: StudyConfig) -> list[int]:
    """Train what is not there yet and write the table. Returns the runs' exit codes.

    Raises ConfigError for a variant that there is not.
    """
    for name in config.variants:
        require(name in VARIANTS, "--variants", name, f"any of {', '.join(VARIANTS)}{nearest(name, VARIANTS)}")
    folder = config.out / config.split
    folders = {name: {seed: run_folder(folder, name, seed) for seed in config.seeds} for name in VARIANTS}
    codes = train_all(
        {name: VARIANTS[name] for name in config.variants}, config.seeds, folder, config.split, config.jobs
    )
    finished = {name: {seed: run for seed, run in own.items() if _finished(run)} for name, own in folders.items()}
    averages = summary(finished[PRESET]) if finished[PRESET] else []
    text = "\n".join([*averages, "", *table(finished)]) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return codes


def train_all(
    variants: Mapping[str, Sequence[str]], seeds: Sequence[int], folder: Path, split: ShapesSplit, jobs: int = 0
) -> list[int]:
    """Train preset `shapes` with each variant's flags from each seed, in `run_folder`. Returns the exit codes.

    Finished runs are not repeated, others are gone on with. jobs: runs at the same time, each on one core; 0 is one
    per core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(name, seed) for name in variants for seed in seeds]

    def one(run: tuple[str, int]) -> int:
        return _train(*run, variants[run[0]], run_folder(folder, *run), split)

    with ThreadPoolExecutor(jobs or available_cores()) as pool:
        return list(pool.map(one, runs))


def run_folder(folder: Path, variant: str, seed: int) -> Path:
    """Where `train_all` has the run."""
    slug = re.sub(r"[^a-z0-9]+", "-", variant.lower()).strip("-")
    return folder / f"{slug}-seed{seed}"


def _finished(folder: Path) -> bool:
    return (folder / "evaluation.json").exists()


def _train(variant: str, seed: int, flags: Sequence[str], folder: Path, split: str) -> int:
    if _finished(folder):
        return 0
    command = [sys.executable, "-m", "fastgrpo.train"]
    if (folder / "config.toml").exists():
        command += ["--resume", str(folder)]
    else:
        command += ["shapes", "--run", str(folder), "--seed", str(seed), "--engine.threads", "1"]
        command += ["--eval.split", split, "--eval.encoder", "shapes-held-out", *flags]
    with open(folder.with_suffix(".log"), "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    print(f"{variant}, seed {seed}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
