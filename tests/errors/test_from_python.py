"""Wrong use from Python ends with an exception whose message is one clear sentence, and nothing is lost."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo import ConfigError, Prompt, Step, Trainer, draw_images, evaluate_model, load_config


def redness(images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


def trainer(**given: Any) -> Trainer:
    config = load_config("shapes", {"reward.terms": ["steering", "given:redness"]})
    return Trainer(**{"config": config, "rewards": {"redness": redness}} | given)


# What is wrong -> the call and its sentence, in which * stands for what a library or this machine says.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "settings as a dictionary": (
        lambda: trainer(config={"iterations": 3}),
        "config is of type dict; accepted is a preset's name, a FILE.toml or what load_config returns.",
    ),
    "preset": (lambda: load_config("shaped"), "shaped: no such preset (did you mean shapes?); there are *."),
    "a setting's name": (
        lambda: load_config("shapes", {"grpo.klx": 1.0}),
        "grpo.klx: no such field (did you mean kl?).",
    ),
    "a setting's value": (
        lambda: Trainer(load_config("shapes", {"group_size": 1})),
        "group_size = 1: accepted is *.",
    ),
    "rewards as a function": (
        lambda: trainer(rewards=redness),
        "rewards is of type function; accepted is a dictionary of functions by their names.",
    ),
    "a reward that is no function": (
        lambda: trainer(rewards={"redness": 3}),
        "reward.terms: 'given:redness' is of type int; accepted is a function (images, prompts).",
    ),
    "a reward of one argument": (
        lambda: trainer(rewards={"redness": lambda images: images}),
        "reward.terms: 'given:redness' cannot be called with (images, prompts): too many positional arguments; "
        "accepted is a function of these two.",
    ),
    "a reward that is missing": (
        lambda: trainer(rewards={"red": redness}, config=load_config("shapes", {"reward.terms": ["given:redness"]})),
        "rewards: no term asks for 'red'; accepted is it where reward.terms has 'given:red', with or without =WEIGHT.",
    ),
    "no rewards": (
        lambda: trainer(rewards=None),
        "reward.terms: 'given:redness' is a function that a program hands to fastgrpo.Trainer as rewards={'redness': "
        "...}; there are none.",
    ),
    "a source without batch": (
        lambda: trainer(source=["a cat"]),
        "source is of type list, which has no batch(iteration) to call.",
    ),
    "a callback that is not in a list": (
        lambda: trainer(callbacks=print),
        "callbacks is of type builtin_function_or_method; accepted is a list, also of one function.",
    ),
    "a callback that is no function": (
        lambda: trainer(callbacks=[print, "look"]),
        "callbacks[1] is of type str; accepted is a function of a fastgrpo.Step.",
    ),
    "a callback without an argument": (
        lambda: trainer(callbacks=[lambda: None]),
        "callbacks[0] cannot be called with (step): too many positional arguments; accepted is a function of a "
        "fastgrpo.Step.",
    ),
    "going on with no run": (
        lambda: trainer().resume("nowhere"),
        "resume nowhere: there is no config.toml in it, so it is not a run that can go on.",
    ),
    "suite": (
        lambda: evaluate_model(suites=["shape"]),
        "--suites shape: no such suite (did you mean shapes?); there are *.",
    ),
    "suites as a text": (
        lambda: evaluate_model(suites="shapes"),
        "suites = 'shapes': accepted is a list of names, also of one.",
    ),
    "a flag of evaluate": (
        lambda: evaluate_model(settings={"stepz": 3}),
        "stepz: no such field (did you mean steps?).",
    ),
    "a flag of evaluate's group": (
        lambda: evaluate_model(settings={"i2p.image": 1}),
        "i2p.image: no such field (did you mean images?).",
    ),
    "a flag's value": (
        lambda: evaluate_model(settings={"steps": "ten"}),
        'steps = "ten": accepted is a whole number or None.',
    ),
    "an argument among the flags": (
        lambda: evaluate_model(settings={"suites": ["shapes"]}),
        "settings: 'suites' is none of them; there it is an argument or is left out.",
    ),
    "a run to evaluate": (
        lambda: evaluate_model("runs/none"),
        "runs/none: there is no such folder; accepted is the folder of a run.",
    ),
    "a run and a model": (
        lambda: evaluate_model("runs/none", model="sd15"),
        "--model: runs/none says what its model is; accepted is either.",
    ),
    "a run to draw with": (
        lambda: draw_images("runs/none", ["a cat"]),
        "runs/none: there is no such folder; accepted is the folder of a run.",
    ),
    "a prompt as a text": (
        lambda: draw_images("runs/none", "a cat"),
        "prompts = 'a cat': accepted is a list of texts, also of one.",
    ),
    "a flag of sample": (
        lambda: draw_images("runs/none", ["a cat"], {"output": "a.png"}),
        "settings: 'output' is none of them; there it is an argument or is left out.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_in_a_sentence(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, sentence = REFUSED[what]
    with pytest.raises(ConfigError) as refused:
        call()
    assert fnmatchcase(str(refused.value), sentence.replace("[", "[[]"))
    assert not list(tmp_path.iterdir()), "nothing is begun"


BROKEN: dict[str, tuple[Callable[..., object], str]] = {
    "shape": (
        lambda images, prompts: images,
        "reward term 'given:redness' returned shape [[]6, 3, 16, 16] for 6 images, the first of prompt '*'; a tensor "
        "of shape [[]6] is needed",
    ),
    "not a number": (
        lambda images, prompts: images.mean((1, 2, 3)) * torch.nan,
        "reward term 'given:redness' returned nan for an image of prompt '*', and no finite number for 6 of 6 images",
    ),
    "exception": (
        lambda images, prompts: prompts[100],
        "reward term 'given:redness' failed on 6 images, the first of prompt '*', with IndexError: list index out of "
        "range",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_reward_is_said_and_kept(what: str, config_file: Path, tmp_path: Path) -> None:
    """After an iteration that went well: it can be gone on from, and the prompt and the image are kept."""
    function, sentence = BROKEN[what]
    steps: list[Step] = []

    def first_well(images: torch.Tensor, prompts: Sequence[Prompt]) -> object:
        return function(images, prompts) if steps else redness(images, prompts)

    changes = {"reward.terms": ["given:redness"], "run": str(tmp_path / "run"), "iterations": 2}
    config = load_config(config_file, changes | {"checkpoint.every": 1, "eval.every": 0})
    with pytest.raises(RuntimeError) as raised:
        Trainer(config, rewards={"redness": first_well}, callbacks=[steps.append], quiet=True).train()
    assert fnmatchcase(str(raised.value), sentence)
    (note,) = raised.value.__notes__
    checkpoint = tmp_path / "run" / "checkpoints" / "iter-000001"
    assert checkpoint.is_dir()
    found = re.fullmatch(r"(?s).*; prompt and image are in (.+) and (.+) beside it", note)
    assert found is not None
    assert Path(found[1]).is_file()
    assert Path(found[1]).with_name(found[2]).is_file()
