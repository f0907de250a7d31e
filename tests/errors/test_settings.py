"""Mistakes in settings: files that are no TOML, fields that are none, values that cannot be."""

from collections.abc import Callable

import pytest

from support.mistakes import TRAIN, Mistake, mistakes, no_cuda

TOML = [
    Mistake(
        "no TOML",
        "bad.toml",
        "bad.toml: cannot be read as TOML: Invalid value (at line 2, column 8).",
        {"bad.toml": "# mine\nseed = \n"},
    ),
    Mistake(
        "binary TOML",
        "bad.toml",
        "bad.toml: cannot be read as TOML: it is binary, with a NUL byte in line 2; UTF-8 text is needed.",
        {"bad.toml": b"\xff\n\x00"},
    ),
    Mistake(
        "TOML in UTF-16",
        "bad.toml",
        "bad.toml: cannot be read as TOML: it is UTF-16; save it as UTF-8.",
        {"bad.toml": "seed = 3\n".encode("utf-16")},
    ),
    Mistake(
        "TOML in Latin-1",
        "bad.toml",
        "bad.toml: cannot be read as TOML: it is not UTF-8: byte 0xe9 in line 2, offset 14 of the file; save it as "
        "UTF-8.",
        {"bad.toml": 'seed = 3\nrun="\xe9"\n'.encode("latin-1")},
    ),
    Mistake(
        "key",
        "bad.toml",
        "bad.toml: group_sise: no such field (did you mean group_size?).",
        {"bad.toml": "group_sise = 4"},
    ),
    Mistake(
        "key of a group",
        "bad.toml",
        "bad.toml: rollout.step: no such field (did you mean steps?).",
        {"bad.toml": "rollout.step = 4"},
    ),
    Mistake(
        "group",
        "bad.toml",
        "bad.toml: rolout: no such field (did you mean rollout?).",
        {"bad.toml": "[rolout]\nsteps = 4"},
    ),
    Mistake("type", "bad.toml", 'bad.toml: seed = "7": accepted is a whole number.', {"bad.toml": 'seed = "7"'}),
    Mistake("type of a group", "bad.toml", "bad.toml: rollout = 3: accepted is a table.", {"bad.toml": "rollout = 3"}),
    Mistake(
        "type of a list",
        "bad.toml",
        'bad.toml: reward.terms = "clip": accepted is a list of strings.',
        {"bad.toml": 'reward.terms = "clip"'},
    ),
]


NUMBERS = [
    Mistake("eta 0", TRAIN + "--rollout.eta 0", "rollout.eta = 0.0: accepted is above 0 (...) and at most 1."),
    Mistake(
        "group of 1", TRAIN + "--group-size 1", "group_size = 1: accepted is 2 or more, since a group's images ..."
    ),
    Mistake("range", TRAIN + "--rollout.steps 1001", "rollout.steps = 1001: accepted is 1 to 1000."),
    Mistake("not a number", TRAIN + "--optim.lr nan", "optim.lr = nan: accepted is 0 or more."),
    Mistake(
        "more updates than pairs",  # 2 prompts x 3 images x 2 of 3 steps
        TRAIN + "--updates-per-iteration 13",
        "updates_per_iteration = 13: accepted is 1 to 12, the (sample, step) pairs of an iteration.",
    ),
    Mistake(
        "branches of another group",
        TRAIN + "--rollout.initial-noise per_prompt --rollout.branches 2",
        "rollout.branches = (2,): accepted is numbers above 1 whose product is group_size = 3, ...",
    ),
    Mistake(
        "branches of samples that start apart",
        TRAIN + "--rollout.branches 3",
        "rollout.initial_noise = 'independent': accepted is per_prompt or shared with rollout.branches, ...",
    ),
    Mistake(
        "branches and some samples only",
        TRAIN + "--rollout.initial-noise per_prompt --rollout.branches 3 --grpo.best-of 2",
        "grpo.best_of = 2: accepted is 0 with rollout.branches, where siblings are learned from together.",
    ),
    Mistake(
        "more updates than latents of a tree",  # 2 prompts x (1 + 3) latents before two of three steps
        TRAIN + "--rollout.initial-noise per_prompt --rollout.branches 3 --updates-per-iteration 9",
        "updates_per_iteration = 9: accepted is 1 to 8, the latents of an iteration that its steps are learned from.",
    ),
    Mistake(
        "updates and epochs",
        TRAIN + "--updates-per-iteration 3 --grpo.epochs 2",
        "updates_per_iteration = 3: accepted is a multiple of grpo.epochs (2), ...",
    ),
    Mistake(
        "window and fraction",
        TRAIN + "--grpo.window 1 --grpo.step-fraction 0.5",
        "grpo.step_fraction = 0.5: accepted is 1 where grpo.window is set: ...",
    ),
    Mistake(
        "guard that sees nothing",
        TRAIN + "--reward.terms compressibility --guard.action stop",
        "guard.action = 'stop': accepted is off or warn where no term of reward.terms has an encoder, ...",
    ),
    Mistake(
        "guard with one positive prompt",
        TRAIN + "--guard.action adapt",
        "guard.action = 'adapt': accepted is off or warn with 1 positive prompts an iteration, ...",
    ),
    Mistake(
        "clipped pairs left out though the guard may brake",
        TRAIN + "--grpo.kl 0 --grpo.skip-clipped --guard.action adapt",
        "grpo.skip_clipped = True: accepted is false with guard.action adapt, which has a gradient all the same.",
    ),
    Mistake(
        "best of odd", TRAIN + "--grpo.best-of 3", "grpo.best_of = 3: accepted is 0 or an even number from 2 to 3, ..."
    ),
    Mistake(
        "average without one",
        TRAIN + "--eval.weights ema",
        "eval.weights = 'ema': accepted is trained where optim.ema is 0.",
    ),
    Mistake(
        "steps beyond the first timestep",
        TRAIN + "--rollout.steps 1000",
        "rollout.steps is 1000; with the scheduler's steps_offset of 1 ... fewer are accepted.",
    ),
    Mistake(
        "pictures' steps beyond the first timestep",
        TRAIN + "--eval.steps 1000",
        "eval.steps is 1000; ... fewer are accepted.",
    ),
    Mistake(
        "CUDA",
        TRAIN + "--engine.device cuda",
        "engine.device = 'cuda': there is no CUDA device here; accepted are auto and cpu.",
        given=(no_cuda,),
    ),
    Mistake(
        "attention without CUDA",
        TRAIN + "--engine.device cpu --engine.attention xformers",
        "engine.attention = 'xformers': accepted is auto, flash or sdpa on a CPU; xformers and cudnn need CUDA.",
    ),
]


@pytest.mark.slow
@mistakes(*TOML, *NUMBERS)
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
