"""Mistakes in what rewards are made of."""

from collections.abc import Callable

import pytest

from support.mistakes import (
    A_RUN,
    TRAIN,
    Mistake,
    dry,
    encoder,
    evidence,
    mistakes,
    raises,
    removed,
    written,
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


@pytest.mark.slow
@mistakes(*REWARDS, *dry(REWARDS, "plugin's function", "anchors without direction"))
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
