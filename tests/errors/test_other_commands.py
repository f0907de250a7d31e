"""Mistakes with the commands that do not train."""

from collections.abc import Callable

import pytest
import torch

from fastgrpo import estimate, export, inspect, report, sample
from support.mistakes import (
    NO_MEMORY,
    WEIGHTS,
    Mistake,
    file_size_limit,
    finished_run,
    linked,
    mistakes,
    raises,
    written,
)

OTHER_COMMANDS = [
    Mistake(
        "sample with the memory full",
        "run",
        "the memory is full; no comparison was written.",
        given=(finished_run, raises("fastgrpo.run.sample.load_policy", RuntimeError(NO_MEMORY))),
        code=1,
        command=sample.main,
    ),
    Mistake(
        "sample with the GPU's memory full",
        "run",
        "the GPU's memory is full; no comparison was written.",
        given=(finished_run, raises("fastgrpo.run.sample.load_policy", torch.OutOfMemoryError("CUDA"))),
        code=1,
        command=sample.main,
    ),
    Mistake(
        "estimate with the memory full",
        "tiny.toml",
        "the memory is full.",
        given=(raises("fastgrpo.costs.estimate.count_model", MemoryError()),),
        code=1,
        command=estimate.main,
    ),
    Mistake(
        "inspect without steering",
        "tiny.toml --reward.terms compressibility",
        "reward.terms = ['compressibility']: without `steering` there is no safety axis to inspect.",
        command=inspect.main,
    ),
    Mistake(
        "inspect's flag",
        "tiny.toml --pgn a.png",
        "--pgn: no such flag (did you mean --png?); --help lists them all.",
        command=inspect.main,
    ),
    Mistake(
        "inspect's picture",
        "tiny.toml --png none/axis.png",
        "--png none/axis.png: cannot write in 'none' (No such file or directory).",
        command=inspect.main,
    ),
    Mistake(
        "inspect with a full disk",
        "tiny.toml --png axis.png",
        "axis.png: No space left on device; no picture was written.",
        given=(linked("axis.png.partial", "/dev/full"),),
        code=1,
        loaded="model",
        command=inspect.main,
    ),
    Mistake(
        "sample of no run",
        "none",
        "none: there is no such folder; accepted is the folder of a run.",
        command=sample.main,
    ),
    Mistake(
        "sample of a table",  # whose lines would be drawn, header and all
        "run --prompt-file a.csv",
        "--prompt-file a.csv: this is a table; accepted is a text file with one prompt per line.",
        {"a.csv": "prompt,seed\na cat,1\n"},
        given=(finished_run,),
        command=sample.main,
    ),
    Mistake(
        "sample's checkpoint",
        "run --checkpoint 7",
        "--checkpoint 7: run has no such checkpoint; there are 1, 2.",
        given=(finished_run,),
        command=sample.main,
    ),
    Mistake(
        "sample's average",
        "run --weights ema",
        "--weights ema: the run kept no moving average (its optim.ema is 0); accepted is trained.",
        given=(finished_run,),
        command=sample.main,
    ),
    Mistake(
        "sample of a damaged checkpoint",
        "run",
        f"run/checkpoints/iter-000002/{WEIGHTS} is damaged (...); the last good one is --checkpoint 1.",
        given=(finished_run, written(f"run/checkpoints/iter-000002/{WEIGHTS}", b"short")),
        command=sample.main,
    ),
    Mistake(
        "sample's steps",
        "run --steps 1000",
        "--steps is 1000; ... fewer are accepted.",
        given=(finished_run,),
        command=sample.main,
    ),
    Mistake(
        "export of adapters without any",
        "run --format lora --output out",
        "--format lora: run trained the whole UNet and has no adapters; accepted are diffusers and single-file.",
        given=(finished_run,),
        command=export.main,
    ),
    Mistake(
        "kohya's layout of a whole model",
        "run --format diffusers --layout kohya --output out",
        "--layout kohya: a layout of adapters, not of diffusers; accepted is diffusers.",
        given=(finished_run,),
        command=export.main,
    ),
    Mistake(
        "a push to no repository",
        "run --format diffusers --output out --push mine",
        "--push mine: accepted is OWNER/NAME, both of letters, digits, -, _ and ., without -- and .., such as "
        "me/safer-sd15.",
        given=(finished_run,),
        command=export.main,
    ),
    Mistake(
        "resuming from no repository",
        "--resume hf:mine",
        "--resume hf:mine: accepted is hf:OWNER/NAME, a repository on the Hugging Face hub.",
    ),
    Mistake(
        "export over something",
        "run --format diffusers --output out",
        "--output out: it is there already; accepted is a folder that is new or empty.",
        {"out/mine.txt": "mine"},
        given=(finished_run,),
        command=export.main,
    ),
    Mistake(
        "export without permission",
        "run --format diffusers --output /proc/out",
        "--output /proc/out: cannot write in '/proc' (...); accepted is a place in a folder that exists and can be "
        "written.",
        given=(finished_run,),
        command=export.main,
    ),
    Mistake(
        "export to a full disk",
        "run --format diffusers --output out",
        "...out...: ...; nothing was exported.",
        given=(finished_run, file_size_limit(5000)),
        code=1,
        loaded="model",
        command=export.main,
    ),
    Mistake(
        "estimate for no processes",
        "tiny.toml --processes 0",
        "--processes 0: accepted is 1 or more.",
        command=estimate.main,
    ),
    Mistake(
        "report on no run",
        "none",
        "none is not the folder of a run: there is no config.toml in it.",
        command=report.main,
    ),
    Mistake(
        "report without a run", "", "Missing from python -m fastgrpo.report: RUN ...; --help ...", command=report.main
    ),
    Mistake(
        "report on a run twice",
        "run ./run",
        "run: this run is named twice; accepted are different ones.",
        given=(finished_run,),
        command=report.main,
    ),
    Mistake(
        "report into a folder",
        "run --output run",
        "--output run: this is a folder; accepted is the name of a file.",
        given=(finished_run,),
        command=report.main,
    ),
    Mistake(
        "report into a folder that is not there",
        "run --output none/page.html",
        "--output none/page.html: there is no folder none; accepted is a place in one that is.",
        given=(finished_run,),
        command=report.main,
    ),
    Mistake(
        "report on damaged metrics",
        "run",
        "run/metrics.jsonl is damaged (JSONDecodeError: ...).",
        given=(finished_run, written("run/metrics.jsonl", b'{"iteration": 1,\n')),
        command=report.main,
    ),
]


@pytest.mark.slow
@mistakes(*OTHER_COMMANDS)
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
