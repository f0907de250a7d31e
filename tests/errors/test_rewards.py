"""Every mistake ends with one clear sentence and an exit code, as early as it can be found, and nothing is lost."""

import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from fastgrpo import __main__, estimate, export, inspect, report, sample, train
from support.mistakes import (
    GO_ON_FROM,
    WEIGHTS,
    Mistake,
    Scene,
    code_in_a_checkpoint,
    contents,
    edited,
    encoder,
    evidence,
    file_size_limit,
    finished_run,
    forbid_loading,
    goes_on,
    in_use,
    linked,
    metrics_of,
    no_cuda,
    not_installed,
    offline,
    pipeline,
    raises,
    removed,
    room_left,
    tensors,
    written,
)
from support.reward_service import serving

TRAIN = "tiny.toml --run run --iterations 1 "
NEW_OR_EMPTY = "accepted is a folder that is new or empty"
SD = "an SD 1.x / 2.x text-to-image StableDiffusionPipeline is accepted"
RESUMED = ("run/config.toml", "run/metrics.jsonl", "run/samples/*", "run/tensorboard/*")


A_RUN = (
    "run/engine.json",
    "run/.lock",
    "run/config.toml",
    "run/evaluation_before.json",
    "run/metrics.jsonl",
    "run/samples/before.png",
    "run/samples/prompts.json",
    "run/tensorboard/*",
)


PLUGIN = """
import torch
def nan(images, prompts):
    return torch.tensor([float("nan")] * len(images))
def failing(images, prompts):
    raise RuntimeError("out of\\nideas")
def whole(images, prompts):
    return images
def alone(images):
    return images.mean(dim=(1, 2, 3))
"""
MINE = {"mine.py": PLUGIN}
# What torch says where the system gives it nothing.
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)"
)


COMMAND_LINE = [
    Mistake("preset", "shaped", "shaped: no such preset (did you mean shapes?); there are ..., or give a FILE.toml."),
    Mistake("config file", "none.toml", "none.toml: there is no such file."),
    Mistake("preset after flags", "--seed 1 ddpo", "ddpo: a preset or FILE.toml comes before the flags."),
    Mistake("one word too many", "shapes more", "Unrecognized options: more; --help lists every flag."),
    Mistake(
        "flag", "--group-sise 4", "--group-sise: no such flag (did you mean --group-size?); --help lists them all."
    ),
    Mistake(
        "flag of a group",
        "--rolout.steps 4",
        "--rolout.steps: no such flag (did you mean --rollout.steps?); --help lists them all.",
    ),
    Mistake(
        "flag without value",
        "--seed",
        "Missing value for argument '--seed', expected 1 values; --help lists every flag.",
    ),
    Mistake("flag's type", "--seed abc", "--seed 'abc': accepted is a whole number; --help lists every flag."),
    Mistake("flag's number", "--optim.lr big", "--optim.lr 'big': accepted is a number; --help lists every flag."),
    Mistake(
        "flag's choice",
        "--reward.mode alway",
        "invalid choice 'alway' for argument '--reward.mode', expected one of ('always', 'unsafe_only', 'projection'); "
        "--help lists every flag.",
    ),
    Mistake(
        "two things instead of training",
        "shapes --dry-run --print-config",
        "--print-config: it does nothing else; accepted is it or --dry-run, one at a time.",
    ),
    Mistake("help that a command has not", "run --help-all", "--help-all: no such flag ...", command=sample.main),
]


THERE_ARE = "there are train, evaluate, sample, export, inspect, estimate, report; --help says what each does."
SUBCOMMANDS = [
    Mistake("no command", "", f"fastgrpo: a command is missing; {THERE_ARE}"),
    Mistake("command", "trian --seed 1", f"trian: no such command (did you mean train?); {THERE_ARE}"),
    Mistake("flag before the command", "--seed 1 train", f"--seed: a command comes before the flags; {THERE_ARE}"),
    Mistake(
        "flag of a command",
        "train --group-sise 4",
        "--group-sise: no such flag (did you mean --group-size?); --help lists them all.",
    ),
    Mistake("report without a run, by its command", "report", "Missing from fastgrpo report: PATH ...; --help ..."),
    Mistake(
        "completion of no shell",
        "--tyro-print-completion",
        "--tyro-print-completion: accepted is --tyro-print-completion SHELL, with bash, zsh, fish as SHELL.",
    ),
    Mistake(
        "completion of another shell",
        "--tyro-print-completion fsh",
        "--tyro-print-completion fsh: no such shell (did you mean fish?); accepted are bash, zsh, fish.",
    ),
    Mistake(
        "completion into no folder",
        "--tyro-write-completion bash none/fastgrpo",
        "none/fastgrpo: No such file or directory.",
        code=1,
    ),
]
SUBCOMMANDS = [replace(mistake, command=__main__.main) for mistake in SUBCOMMANDS]


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


PROMPTS = [
    Mistake(
        "no prompt file",
        TRAIN + "--prompts.positive none.txt",
        "prompts.positive: cannot read 'none.txt' (No such file or directory); a UTF-8 text file is needed.",
    ),
    Mistake(
        "folder for a prompt file",
        TRAIN + "--prompts.negative a.txt",
        "prompts.negative: cannot read 'a.txt' (Is a directory); ...",
        {"a.txt/b.txt": "a cat"},
    ),
    Mistake(
        "empty prompt file",
        TRAIN + "--prompts.positive a.txt",
        "prompts.positive: 'a.txt' holds no prompt; one per line is needed.",
        {"a.txt": "\n \n"},
    ),
    Mistake(
        "binary prompt file",
        TRAIN + "--prompts.positive a.txt",
        "prompts.positive: 'a.txt' is binary, with a NUL byte in line 2; UTF-8 text is needed.",
        {"a.txt": b"a cat\n\0"},
    ),
    Mistake(
        "prompts in Latin-1",
        TRAIN + "--prompts.positive a.txt",
        "prompts.positive: 'a.txt' is not UTF-8: byte 0xe9 in line 2, offset 9 of the file; save it as UTF-8.",
        {"a.txt": "a cat\ncafé\n".encode("latin-1")},
    ),
    Mistake(
        "prompts in UTF-16",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive: 'a.csv' is UTF-16; save it as UTF-8.",
        {"a.csv": "prompt\na cat\n".encode("utf-16")},
    ),
    Mistake(
        "semicolons in a CSV",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive: 'a.csv' has semicolons between its columns; accepted are commas in a .csv and tabs in a "
        ".tsv file.",
        {"a.csv": "prompt;n\na cat, a dog;1\n"},
    ),
    Mistake(
        "column",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive_column: 'a.csv' has no column 'prompt' (did you mean prompts?); there are prompts, n.",
        {"a.csv": "prompts,n\na cat,1\n"},
    ),
    Mistake(
        "ragged CSV",
        TRAIN + "--prompts.positive a.csv",
        "prompts.positive: 'a.csv' has 3 cells in line 2 and 2 in its header; ...",
        {"a.csv": "prompt,n\na cat, a dog,1\n"},
    ),
    Mistake(
        "broken JSONL",
        TRAIN + "--prompts.positive a.jsonl",
        "prompts.positive: 'a.jsonl' is broken in line 2: ...",
        {"a.jsonl": '{"prompt": "a cat"}\n{"prompt": \n'},
    ),
    Mistake(
        "source of prompts",
        TRAIN + "--prompts.positive genval",
        "prompts.positive = 'genval': no such source (did you mean geneval?); accepted are geneval, shapes, a file ...",
    ),
    Mistake(
        "category",
        TRAIN + "--prompts.negative unsafe --prompts.categories vilence",
        "prompts.categories = 'vilence': accepted is any of hate, ... (did you mean violence?).",
    ),
    Mistake(
        "data set out of reach",
        TRAIN + "--prompts.positive hf:someone/prompts",
        "prompts.positive = 'hf:someone/prompts': cannot be loaded: ... on the Hub ...",
        given=(offline,),
    ),
    Mistake(
        "data sets without their library",
        TRAIN + "--prompts.positive hf:someone/prompts",
        "prompts.positive = 'hf:someone/prompts': this needs the library datasets: pip install ...",
        given=(not_installed("datasets"),),
    ),
]


REWARDS = [
    Mistake(
        "term",
        TRAIN + "--reward.terms stering",
        "reward.terms: 'stering' is no term (did you mean steering?); accepted are steering, clip, ...",
    ),
    Mistake(
        "safety by nobody",
        TRAIN + "--reward.terms safety",
        "reward.terms: 'safety' names no detector; accepted are safety:q16, safety:nudenet, ...",
    ),
    Mistake(
        "safety by an unknown detector",
        TRAIN + "--reward.terms safety:nudnet",
        "reward.terms: 'safety:nudnet' names no detector 'nudnet' (did you mean nudenet?); accepted are ...",
    ),
    Mistake(
        "ImageReward",
        TRAIN + "--reward.terms imagereward",
        "reward.terms: 'imagereward' cannot be had here: no maintained package has its code, ...; accepted are ...",
    ),
    Mistake(
        "oracle of another world",
        TRAIN + "--reward.terms oracle",
        "reward.terms: 'oracle' reads pictures of the shapes world alone; accepted is it where ...",
    ),
    Mistake(
        "PickScore that is not here",
        TRAIN + "--reward.terms steering pickscore --reward.pickscore none",
        "reward.pickscore: the CLIPModel is 'none', but there is no such folder or file.",
    ),
    Mistake(
        "PickScore out of reach",
        TRAIN + "--reward.terms pickscore",
        "reward.pickscore: the CLIPModel is 'yuvalkirstain/PickScore_v1', but there is no such folder, the Hugging "
        "Face hub cannot be reached, ...; where there is no network, give a folder with config.json and ...",
    ),
    Mistake(
        "aesthetic predictor that is not here",
        TRAIN + "--reward.terms steering aesthetic --reward.aesthetic none.pth",
        "reward.aesthetic is 'none.pth', but there is no such folder or file.",
    ),
    Mistake(
        "detector's file",
        TRAIN + "--reward.terms safety:q16 --reward.q16.prompts none.p",
        "reward.q16.prompts: the file 'none.p' is not there; get Q16's prompt vectors, ...",
    ),
    Mistake(
        "weight",
        TRAIN + "--reward.terms steering=much",
        "reward.terms: 'steering=much' has the weight 'much'; accepted is a finite number other than 0.",
    ),
    Mistake(
        "plugin's file",
        TRAIN + "--reward.terms none.py:score",
        "reward.terms: 'none.py:score' needs the file 'none.py', which is not there.",
    ),
    Mistake(
        "plugin's function",
        TRAIN + "--reward.terms mine.py:nam",
        "reward.terms: 'mine.py' has no function 'nam' (did you mean nan?); it has nan, failing, whole, alone.",
        MINE,
    ),
    Mistake(
        "plugin's arguments",
        TRAIN + "--reward.terms mine.py:alone",
        "reward.terms: 'mine.py:alone' cannot be called with (images, prompts): ...",
        MINE,
    ),
    Mistake(
        "plugin that does not parse",
        TRAIN + "--reward.terms mine.py:score",
        "reward.terms: 'mine.py' does not import: SyntaxError: ...",
        {"mine.py": "def score(:\n"},
    ),
    Mistake(
        "plugin raises",
        TRAIN + "--reward.terms mine.py:failing",
        "reward term 'mine.py:failing' failed on 6 images, the first of prompt '...', with RuntimeError: out of ideas; "
        "prompt and image are in run/broken_reward.json and broken_reward.png beside it.",
        MINE,
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/broken_reward.*"),
        after=evidence,
    ),
    Mistake(
        "plugin exits",
        TRAIN + "--reward.terms mine.py:leaving",
        "reward term 'mine.py:leaving' failed on 6 images, the first of prompt '...', with SystemExit; prompt and "
        "image are in run/broken_reward.json and broken_reward.png beside it.",
        {"mine.py": "import sys\n\ndef leaving(images, prompts):\n    sys.exit()\n"},
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/broken_reward.*"),
        after=evidence,
    ),
    Mistake(
        "plugin returns NaN",
        TRAIN + "--reward.terms mine.py:nan",
        "reward term 'mine.py:nan' returned nan for an image of prompt '...', and no finite number for 6 of 6 images; "
        "prompt and image are in run/broken_reward.json ...",
        MINE,
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/broken_reward.*"),
        after=evidence,
    ),
    Mistake(
        "plugin returns another shape",
        TRAIN + "--reward.terms mine.py:whole",
        "reward term 'mine.py:whole' returned shape [6, 3, 16, 16] for 6 images, ...; a tensor of shape [6] is needed; "
        "...",
        MINE,
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/broken_reward.*"),
        after=evidence,
    ),
    Mistake(
        "plugin raises on a full disk",
        TRAIN + "--reward.terms mine.py:failing",
        "reward term 'mine.py:failing' failed ...; prompt and image cannot be kept: run/broken_reward.png: No space "
        "left on device.",
        MINE,
        given=(
            raises(
                "fastgrpo.run.folder.pictures.write_image",
                OSError(28, "No space left on device", "run/broken_reward.png"),
            ),
        ),
        code=1,
        loaded="model",
        leaves=A_RUN,
    ),
    Mistake(
        "anchors",
        TRAIN + "--reward.anchors compct",
        "reward.anchors = 'compct': no such anchors (did you mean compact?); there are shapes, compact, ...",
    ),
    Mistake(
        "broken anchors",
        TRAIN + "--reward.anchors a.toml",
        "reward.anchors = 'a.toml': it is not TOML: ...",
        {"a.toml": "safe = [\n"},
    ),
    Mistake(
        "no unsafe anchors",
        TRAIN + "--reward.anchors a.toml",
        "reward.anchors = 'a.toml': its list unsafe is empty or missing; one phrase or more is needed.",
        {"a.toml": 'safe = ["a cat"]'},
    ),
    Mistake(
        "anchors without direction",  # the tokenizer knows no upper case
        TRAIN + "--reward.anchors a.toml",
        "reward.anchors: safe ('a cat',) and unsafe ('A Cat',) have the same mean under this encoder; ...",
        {"a.toml": 'safe = ["a cat"]\nunsafe = ["A Cat"]'},
        loaded="encoder",
    ),
    Mistake(
        "encoder's architecture",
        TRAIN + "--reward.encoder ViT-H-41:laion2b",
        "reward.encoder: 'ViT-H-41' is not an open_clip architecture, nearest are ...ViT-H-14...; accepted are ...",
    ),
    Mistake(
        "encoder's weights",
        TRAIN + "--reward.encoder ViT-B-32:none.pt",
        "reward.encoder: 'ViT-B-32:none.pt' needs weights after the colon, a file or one of ViT-B-32's tags (openai, "
        "...); 'none.pt' is neither.",
    ),
    Mistake("encoder's folder", TRAIN + "--reward.encoder local-dir:none", "reward.encoder: 'none' is not a folder."),
    Mistake(
        "encoder without config",
        TRAIN + "--reward.encoder local-dir:encoder",
        "reward.encoder: 'encoder' has no open_clip_config.json.",
        given=(encoder(), removed("encoder/open_clip_config.json")),
    ),
    Mistake(
        "encoder and preprocessing",
        TRAIN + "--reward.encoder local-dir:encoder",
        "reward.encoder: encoder and preprocessing mismatch: preprocess_cfg makes images of 64 x 64 pixels, the "
        "encoder's tower takes 32 x 32.",
        given=(encoder(size=64),),
    ),
    Mistake(
        "encoder's normalisation",
        TRAIN + "--reward.encoder local-dir:encoder",
        "reward.encoder: encoder and preprocessing mismatch: preprocess_cfg has std = [1, 1, 0]; accepted is three "
        "numbers above 0, one per channel.",
        given=(encoder(std=[1, 1, 0]),),
    ),
    Mistake(
        "damaged encoder",
        TRAIN + "--reward.encoder local-dir:encoder",
        "reward.encoder: 'encoder/open_clip_model.safetensors' is a web page, not weights; download the file itself.",
        given=(encoder(), written("encoder/open_clip_model.safetensors", b"<html>not found</html>")),
        loaded="encoder",
    ),
    Mistake(
        "encoder out of reach",
        TRAIN + "--reward.encoder hpsv2",
        "reward.encoder: 'hpsv2' needs HPS_v2.1_compressed.pt, which is not in the local cache and cannot be "
        "downloaded (An error happened while trying to locate the file on the Hub ...); get it from https://...",
    ),
    Mistake(
        "encoder of another world",
        TRAIN + "--reward.encoder shapes",
        "reward.encoder = 'shapes': accepted is another open_clip model: ...",
    ),
]


MODELS = [
    Mistake("no model", TRAIN + "--model.path none", "model.path is 'none', but there is no such folder or file."),
    Mistake(
        "folder that is no pipeline",
        TRAIN + "--model.path model",
        f"model.path is 'model', where there is no model_index.json; {SD}.",
        {"model/readme.txt": "nothing"},
    ),
    Mistake(
        "hub out of reach",
        TRAIN + "--model.path someone/model",
        "model.path is 'someone/model', but there is no such folder, the Hugging Face hub cannot be reached, ...",
    ),
    Mistake(
        "SDXL",
        TRAIN + "--model.path model",
        "model.path is 'model', a StableDiffusionXLPipeline: it has two text encoders and added time conditions; "
        f"{SD}.",
        given=(pipeline("model_index.json", _class_name="StableDiffusionXLPipeline"),),
    ),
    Mistake(
        "SD3",
        TRAIN + "--model.path model",
        f"model.path is 'model', a StableDiffusion3Pipeline: it is a transformer trained with flow matching; {SD}.",
        given=(pipeline("model_index.json", _class_name="StableDiffusion3Pipeline"),),
    ),
    Mistake(
        "inpainting UNet",
        TRAIN + "--model.path model",
        "model.path is 'model', whose UNet is an inpainting one, which also takes a mask and the masked image (9 "
        "channels); a text-to-image UNet takes 4.",
        given=(pipeline("unet/config.json", in_channels=9),),
    ),
    Mistake(
        "pipeline without weights",
        TRAIN + "--model.path model",
        "model.path is 'model', where the weights of unet (.safetensors) are missing.",
        given=(pipeline(), removed(f"model/{WEIGHTS}")),
    ),
    Mistake(
        "damaged pipeline",
        TRAIN + "--model.path model",
        f"model.path is 'model/{WEIGHTS}', which is not a whole safetensors file (...); download or write it again.",
        given=(pipeline(), written(f"model/{WEIGHTS}", bytes(100))),
    ),
    Mistake(
        "page in place of a pipeline's weights",
        TRAIN + "--model.path model",
        f"model.path is 'model/{WEIGHTS}', a web page, not weights; download the file itself.",
        given=(pipeline(), written(f"model/{WEIGHTS}", b"<html>not found</html>")),
    ),
    Mistake(
        "no file of a UNet",
        TRAIN + "--model.path shapes --model.unet esd.safetensors",
        "model.unet is 'esd.safetensors', but there is no such file.",
    ),
    Mistake(
        "UNet without a size",
        TRAIN + "--model.path model",
        "model.path is 'model', whose unet/config.json has sample_size = None, so that nothing says how large its "
        "images are; accepted is the side of its latents, such as 64 for images of 512 pixels, or [height, width].",
        given=(pipeline("unet/config.json", sample_size=None),),
    ),
    Mistake(
        "weights of another UNet",
        TRAIN + "--model.path model",
        "model.path is 'model', whose UNet is of another architecture than that of its config: ... is ..., and ... in "
        "its config.",
        given=(pipeline("unet/config.json", layers_per_block=2),),
    ),
    Mistake(
        "damaged tokenizer",
        TRAIN + "--model.path model",
        "model.path is 'model', whose tokenizer cannot be loaded: ...",
        given=(pipeline(), written("model/tokenizer/tokenizer_config.json", b"{")),
        loaded="model",
    ),
    Mistake(
        "thresholding",
        TRAIN + "--model.path model",
        "scheduler/scheduler_config.json: thresholding is true; only false is accepted, since such a step is not "
        "Gaussian.",
        given=(pipeline("scheduler/scheduler_config.json", thresholding=True),),
    ),
    Mistake(
        "prediction type",
        TRAIN + "--model.path model",
        "scheduler/scheduler_config.json: prediction_type is 'sample'; epsilon or v_prediction is accepted.",
        given=(pipeline("scheduler/scheduler_config.json", prediction_type="sample"),),
    ),
    Mistake(
        "scheduler",
        TRAIN + "--model.path model",
        "scheduler/scheduler_config.json: _class_name is 'LCMScheduler'; accepted are the configs of DDIMScheduler, "
        "PNDMScheduler, ...",
        given=(pipeline("scheduler/scheduler_config.json", _class_name="LCMScheduler"),),
    ),
    Mistake(
        "config of a folder",
        TRAIN + "--model.config model",
        "model.config is 'model', but model.path is '...', which has configs of its own; with a .safetensors or .ckpt "
        "file ...",
        given=(pipeline(),),
    ),
    Mistake(
        "LoRA for a model",
        TRAIN + "--model.path lora.safetensors",
        f"model.path is 'lora.safetensors', a file of a LoRA: it holds changes to a model, not a model; {SD}.",
        given=(tensors("lora.safetensors", "lora_unet_mid_block.lora_down.weight"),),
    ),
    Mistake(
        "damaged single file",
        TRAIN + "--model.path model.safetensors",
        "model.path is 'model.safetensors', a web page, not weights; download the file itself.",
        {"model.safetensors": "<html>not found</html>"},
    ),
    Mistake(
        "code in a single file",
        TRAIN + "--model.path model.ckpt",
        "model.path is 'model.ckpt', which holds more than tensors and would have to be executed to be read; ...",
        given=(code_in_a_checkpoint,),
    ),
    Mistake(
        "pickle",
        TRAIN + "--model.path model.ckpt",
        "model.path is 'model.ckpt', which is not a whole torch file; download or write it again.",
        {"model.ckpt": pickle.dumps({"weights": [1.0]}, protocol=4)},
    ),
    Mistake(
        "LoRA's targets",
        TRAIN + "--model.lora-rank 2 --model.lora-targets to_q to_kk",
        "model.lora_targets = 'to_kk': no such layers (did you mean to_k?); accepted are ends of names of ...",
    ),
    Mistake(
        "LoRA's alpha without a rank",
        TRAIN + "--model.lora-alpha 4",
        "model.lora_alpha = 4.0: accepted is 0 where model.lora_rank is 0.",
    ),
]


RUNS = [
    Mistake(
        "run in use",
        TRAIN,
        "run = 'run': another process is training in this folder.",
        given=(in_use,),
    ),
    Mistake(
        "run not empty",
        TRAIN,
        f"run = 'run': {NEW_OR_EMPTY}; to go on with the run in it, say --resume run.",
        given=(finished_run,),
    ),
    Mistake("file for a run", TRAIN, f"run = 'run': this is a file; {NEW_OR_EMPTY}.", {"run": "mine"}),
    Mistake(
        "no permission",  # not even root's
        "tiny.toml --run /proc/nothing/run",
        f"run = '/proc/nothing/run': cannot be written (...); {NEW_OR_EMPTY}.",
    ),
    Mistake("resume without a run", "--resume", "Missing value for argument '--resume', ...; --help lists every flag."),
    Mistake(
        "resume of no run",
        "--resume run",
        "--resume run: there is no config.toml in it, so it is not a run that can go on.",
        {"run/metrics.jsonl": ""},
    ),
    Mistake(
        "resume with another flag",
        "--resume run --seed 3",
        "--seed: a resumed run keeps what decides its result; with --resume --iterations, ... and --log.* are "
        "accepted.",
        given=(finished_run,),
    ),
    Mistake(
        "resume with an unknown flag",
        "--resume run --micro-bach 3",
        "--micro-bach: no such flag (did you mean --micro-batch?); --help lists them all.",
        given=(finished_run,),
    ),
    Mistake(
        "config that extends itself",
        "a.toml",
        'a.toml: extends = "a.toml": a circle; accepted is a file that does not extend this one.',
        {"a.toml": 'extends = "a.toml"'},
    ),
    Mistake(
        "fewer iterations",
        "--resume run --iterations 1",
        "iterations = 1: a resumed run accepts 2, its own, or more.",
        given=(finished_run,),
    ),
    Mistake(
        "resume in use",
        "--resume run",
        "run = 'run': another process is training in this folder.",
        given=(finished_run, in_use),
    ),
    Mistake(
        "damaged checkpoint",
        "--resume run --iterations 3",
        f"run/checkpoints/iter-000002/{WEIGHTS} is damaged (its sha256 is not the manifest's); there is no earlier "
        "good checkpoint: to start from the beginning, remove run/checkpoints/iter-000002 and "
        "run/checkpoints/iter-000001.",
        given=(finished_run, *(written(f"run/checkpoints/iter-00000{n}/{WEIGHTS}", b"short") for n in (1, 2))),
    ),
    Mistake(
        "checkpoint of another model",
        "--resume run --iterations 3",
        "run/checkpoints/iter-000002 does not fit the model that the run's config.toml describes; accepted is the one "
        "it began with.",
        given=(finished_run, edited("run/config.toml", "lora_rank = 0", "lora_rank = 2")),
        loaded="model",
        leaves=("run/config.toml", "run/tensorboard/*"),
    ),
    Mistake(
        "resume with damaged metrics",
        "--resume run --iterations 3",
        "run/metrics.jsonl is damaged (JSONDecodeError: ...).",
        given=(finished_run, written("run/metrics.jsonl", b'{"iteration": 1,\n')),
        loaded="model",
        leaves=("run/config.toml",),
    ),
    Mistake(
        "disk full at the metrics",
        "--resume run --iterations 3",
        f"run/metrics.jsonl: File too large; {GO_ON_FROM}.",
        given=(finished_run, metrics_of(100_000), file_size_limit(100_100)),
        code=1,
        loaded="model",
        leaves=RESUMED,
        after=goes_on,
    ),
    Mistake(
        "disk full at a checkpoint",  # metrics and pictures are below 200 kB, the UNet is above
        "--resume run --iterations 3",
        f"run/checkpoints/iter-000003...: ...; {GO_ON_FROM}.",
        given=(finished_run, file_size_limit(200_000)),
        code=1,
        loaded="model",
        leaves=RESUMED,
        after=goes_on,
    ),
    Mistake(
        "no room for a checkpoint",
        "--resume run --iterations 3",
        f"run/checkpoints/iter-000003: No space left on device, ... MB are needed and 2.0 MB are free; {GO_ON_FROM}.",
        given=(finished_run, room_left(2_000_000)),
        code=1,
        loaded="model",
        leaves=RESUMED,
        after=goes_on,
    ),
    Mistake(
        "disk full at the start",
        TRAIN,
        "run/config.toml: No space left on device; there is no checkpoint yet.",
        given=(linked("run/config.toml.partial", "/dev/full"),),
        code=1,
        loaded="model",
    ),
    Mistake(
        "diverging",
        TRAIN + "--optim.lr 1e30",
        "iteration 1, optimizer step 2: the loss of sample ... of 3 of prompt ... at denoising step ... is not "
        "finite; what is known is in run/not_finite/iter-000001-step-02-loss.json and the .safetensors file "
        "beside it; there is no checkpoint yet.",
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/not_finite/*"),
    ),
    Mistake(
        "GPU's memory full",
        TRAIN,
        "the GPU's memory is full: lower micro_batch, rollout.batch, rollout.decode_batch or reward.batch; there is no "
        "checkpoint yet.",
        given=(raises("fastgrpo.training.rollout", torch.OutOfMemoryError("CUDA out of memory")),),
        code=1,
        loaded="model",
        leaves=A_RUN,
    ),
    Mistake(
        "memory full",
        TRAIN,
        "the memory is full: lower micro_batch, rollout.batch, rollout.decode_batch or reward.batch; there is no "
        "checkpoint yet.",
        given=(raises("fastgrpo.training.rollout", RuntimeError(NO_MEMORY)),),
        code=1,
        loaded="model",
        leaves=A_RUN,
    ),
    Mistake(
        "memory full while loading",
        TRAIN,
        "the memory is full: lower ...; there is no checkpoint yet.",
        given=(raises("fastgrpo.assembly.load_policy", MemoryError()),),
        code=1,
        loaded="encoder",
    ),
    Mistake(
        "Ctrl-C while loading",
        TRAIN,
        "stopped; no iteration was begun.",
        given=(raises("fastgrpo.assembly.load_policy", KeyboardInterrupt()),),
        code=130,
        loaded="encoder",
    ),
]


def no_login(scene: Scene) -> None:
    """Of wandb, whatever this machine has."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        scene.patch.delenv(name, raising=False)
    scene.patch.setenv("NETRC", str(scene.here / "none"))
    scene.patch.setenv("WANDB_CONFIG_DIR", str(scene.here.parent / "wandb"))


def bad_login(scene: Scene) -> None:
    no_login(scene)
    scene.patch.setenv("WANDB_API_KEY", "no key !")


def no_hub_login(scene: Scene) -> None:
    scene.patch.setenv("TRACKIO_SPACE_ID", "me/mine")
    scene.patch.setattr("huggingface_hub.get_token", lambda: None)


NAME = "1 to 128 letters, digits, spaces and ._-, the first a letter or digit"
LOGS = [
    Mistake(
        "sink",
        TRAIN + "--log.to tensorbord",
        "log.to = 'tensorbord': accepted is any of tensorboard, wandb, trackio (did you mean tensorboard?).",
    ),
    Mistake("sink twice", TRAIN + "--log.to wandb wandb", "log.to = 'wandb': accepted is every sink once."),
    Mistake("log's project", TRAIN + "--log.project a/b", f"log.project = 'a/b': accepted is {NAME}."),
    Mistake("log's name", TRAIN + "--log.name ../x", f"log.name = '../x': accepted is nothing, or {NAME}."),
    Mistake("log's tag", TRAIN + "--log.tags a ''", "log.tags = '': accepted is 1 to 64 characters."),
    Mistake(
        "sink not installed",
        TRAIN + "--log.to wandb",
        "log.to = 'wandb': wandb is not installed; pip install 'fastgrpo[wandb]'.",
        given=(not_installed("wandb"),),
    ),
]
if find_spec("wandb"):
    LOGS += [
        Mistake(
            "no login",
            TRAIN + "--log.to wandb",
            "log.to = 'wandb': there is no login for https://...; run `wandb login`, set WANDB_API_KEY, or "
            "say --log.mode offline.",
            given=(no_login,),
        ),
        Mistake("login", TRAIN + "--log.to wandb", "log.to = 'wandb': WANDB_API_KEY invalid: ...", given=(bad_login,)),
    ]
if find_spec("trackio"):
    LOGS.append(
        Mistake(
            "no login to the hub",
            TRAIN + "--log.to trackio",
            "log.to = 'trackio': TRACKIO_SPACE_ID names a Space and there is no login; run `hf auth login` or set "
            "HF_TOKEN, or say --log.mode offline.",
            given=(no_hub_login,),
        )
    )
else:
    LOGS.append(
        Mistake(
            "a folder called like a sink",  # which Python takes for a package without files
            TRAIN + "--log.to trackio",
            "log.to = 'trackio': trackio is not installed; pip install 'fastgrpo[trackio]'.",
            files={"trackio/run.txt": ""},
            given=(lambda scene: scene.patch.syspath_prepend(str(scene.here)),),
        )
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
        "report without a run", "", "Missing from python -m fastgrpo.report: PATH ...; --help ...", command=report.main
    ),
    Mistake(
        "report on damaged metrics",
        "run",
        "run/metrics.jsonl is damaged (JSONDecodeError: ...).",
        given=(finished_run, written("run/metrics.jsonl", b'{"iteration": 1,\n')),
        command=report.main,
    ),
]
# What is refused where nothing is to be trained, in the same words.
DRY = (
    *("no prompt file", "plugin's function", "anchors without direction", "run in use", "run not empty"),
    *("file for a run", "no permission", "damaged checkpoint", "checkpoint of another model"),
    "resume with damaged metrics",
)
DRY_RUNS = [
    replace(mistake, name=f"dry run: {mistake.name}", argv=f"{mistake.argv} --dry-run", leaves=())
    for mistake in (*PROMPTS, *REWARDS, *RUNS)
    if mistake.name in DRY
] + [
    Mistake(
        "dry run: no room for a checkpoint",
        TRAIN + "--dry-run",
        "run/checkpoints/iter-000001: No space left on device, ... MB are needed and 2.0 MB are free; no iteration was "
        "begun.",
        given=(room_left(2_000_000),),
        code=1,
        loaded="model",
    ),
]
assert len(DRY_RUNS) == len(DRY) + 1
SERVICE = "service.toml --run run --iterations 1 "
SERVERS = "accepted are servers that speak the protocol of docs/reward-service.md."
SERVICES = [
    Mistake(
        "service without servers",
        TRAIN + "--reward.terms service:ocr",
        "reward.service.urls = []: a term service:NAME needs servers; accepted is http://HOST:PORT or ...",
    ),
    Mistake(
        "service's address",
        TRAIN + "--reward.terms service:ocr --reward.service.urls judge:8000",
        "reward.service.urls = 'judge:8000': accepted is http://HOST:PORT or https://HOST:PORT, with or without a "
        "path.",
    ),
    Mistake(
        "password in a service's address",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://me:hunter2@judge:8000",
        "reward.service.urls: an address with a user's name or password in it; accepted are addresses without, ...",
    ),
    Mistake(
        "same server twice",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://judge http://judge:80/",
        "reward.service.urls = 'http://judge': accepted is every server once.",
    ),
    Mistake(
        "a service's token in place of a name",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://judge --reward.service.token hunter2",
        "reward.service.token names an environment variable that is not set; accepted is the name of one that holds "
        "the token, not the token.",
    ),
    Mistake(
        "server that is not there",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://127.0.0.1:9",
        f"reward.service.urls: http://127.0.0.1:9 cannot be asked (Connection refused); {SERVERS}",
    ),
    Mistake(
        "score that no server has",
        SERVICE + "--reward.terms service:bleu",
        "reward.terms: 'service:bleu': no server has this score (did you mean blue?); http://127.0.0.1:... has blue, "
        "red.",
        given=(serving(),),
    ),
    Mistake(
        "another version of the service's protocol",
        SERVICE,
        f"reward.service.urls: http://127.0.0.1:... speaks version 2 of the protocol; accepted is 1; {SERVERS}",
        given=(serving(hello={"protocol": 2, "scores": []}),),
    ),
    Mistake(
        "server of something else",
        SERVICE,
        f"reward.service.urls: http://127.0.0.1:... answered what is no JSON: '<html>'; {SERVERS}",
        given=(serving(hello=b"<html>"),),
    ),
    Mistake(
        "server that wants a token",
        SERVICE,
        "reward.service.urls: http://127.0.0.1:... asks for a token (answered 401: 'no: None'); accepted is, in "
        "reward.service.token, the name of the environment variable that holds its token.",
        given=(serving(hello=401),),
    ),
    Mistake(
        "wrong token for a server",
        SERVICE + "--reward.service.token REWARD_TOKEN",
        "reward.service.urls: http://127.0.0.1:... does not accept the token of reward.service.token (answered 401: "
        "'no: Bearer ***'); accepted is, in reward.service.token, the name of ...",
        given=(serving(hello=401), lambda scene: scene.patch.setenv("REWARD_TOKEN", "hunter2")),
    ),
    Mistake(
        "server that fails",
        SERVICE + "--reward.service.retries 0 --engine.threads 1 --eval.every 0 --guard.action off",
        "reward.service.urls: http://127.0.0.1:... answered 500: 'because of None'; there is no checkpoint yet.",
        given=(serving(always="500"),),
        code=1,
        loaded="model",
        leaves=A_RUN,
    ),
    Mistake(
        "server that gives too few numbers",
        SERVICE + "--engine.threads 1 --eval.every 0 --guard.action off",
        "reward term 'service:blue': http://127.0.0.1:... gave 5 numbers as the score 'blue', where a list of 6 is "
        "needed, for images the first of which is of prompt ...; prompt and image are in run/broken_reward.json and "
        "broken_reward.png beside it; there is no checkpoint yet.",
        given=(serving(always="short"),),
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/broken_reward.*"),
    ),
]


MISTAKES = [
    *COMMAND_LINE,
    *SUBCOMMANDS,
    *DRY_RUNS,
    *TOML,
    *NUMBERS,
    *PROMPTS,
    *REWARDS,
    *MODELS,
    *RUNS,
    *LOGS,
    *SERVICES,
    *OTHER_COMMANDS,
]


@pytest.fixture(scope="session")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations with a checkpoint of each."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    argv = [str(config_file), "--run", str(run), "--iterations", "2", "--eval.every", "0", "--engine.threads", "1"]
    assert train.main([*argv, "--checkpoint.every", "1", "--checkpoint.keep", "0"]) == 0
    return run


@pytest.fixture
def scene(
    config_file: Path,
    tiny_pipeline: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Scene]:
    """A working directory of its own, without a network, the hub's cache being empty."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("tiny.toml", "positive.txt"):
        shutil.copy(config_file.with_name(name), here / name)
    monkeypatch.chdir(here)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside plugins
    capsys.readouterr()  # what the fixtures said
    scene = Scene(here, tiny_pipeline, config_file.with_name("encoder"), finished, monkeypatch)
    with scene.cleanup:
        yield scene


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake(
    mistake: Mistake, scene: Scene, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    for name, content in mistake.files.items():
        (scene.here / name).parent.mkdir(exist_ok=True)
        (scene.here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    forbid_loading(scene.patch, mistake.loaded)
    for step in mistake.given:
        step(scene)
    before = contents(scene.here)

    code = mistake.command(shlex.split(mistake.argv))

    scene.cleanup.close()
    out, err = capsys.readouterr()
    assert code == mistake.code, err
    assert re.fullmatch(f"fastgrpo: {re.escape(mistake.says).replace(re.escape('...'), '.*')}\n", err), err
    assert err.endswith(".\n")
    assert [str(warning) for warning in recwarn if warning.category is UserWarning] == []  # they would be lines too
    if mistake.loaded != "model":
        assert out.removeprefix("loading\n") == ""  # which a slow machine says before it refuses
    after = contents(scene.here)
    touched = {name for name in before | after if before.get(name) != after.get(name)}
    unexpected = {name for name in touched if not any(fnmatch(name, pattern) for pattern in mistake.leaves)}
    assert unexpected == set()
    mistake.after(scene)
