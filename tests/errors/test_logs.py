"""Mistakes in where metrics are logged to."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from support.mistakes import TRAIN, Mistake, Scene, mistakes, not_installed


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


@pytest.mark.slow
@mistakes(*LOGS)
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
