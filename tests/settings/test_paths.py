"""`~` in settings: wherever one may name a file or folder, on the command line and in files, and nowhere else."""

import dataclasses
import functools
import shutil
import typing
from itertools import chain
from pathlib import Path

import pytest

import fastgrpo  # noqa: F401  (prepares torch's import)
from fastgrpo import estimate, evaluate, export, inspect, report, sample
from fastgrpo.models.check import SHAPES_PIPELINE, describe
from fastgrpo.prompts import load_prompts
from fastgrpo.prompts import loading as prompt_sources
from fastgrpo.rewards.anchors import ANCHORS, load_anchors
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.rewards.encoder_files import SHIPPED_ENCODERS
from fastgrpo.rewards.registry import load_reward
from fastgrpo.settings import command_line
from fastgrpo.settings.command_line import parse_command, parse_flags, parse_with_preset
from fastgrpo.settings.paths import NAMES, PathText, PathTexts, absolute, expand_home, with_absolute_paths, with_homes
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.validation import validate

COMMANDS = (
    TrainConfig,
    command_line.Start,
    command_line._Resume,
    evaluate.Evaluate,
    sample.Sample,
    export.Export,
    inspect.Inspect,
    estimate.Estimate,
    report.Report,
)
# Texts that name no file.
NO_PATHS = {
    "push",  # a repository
    "preset",  # looked for before the others are read, and expanded there
    "variant",
    "revision",
    *("to", "project", "entity", "name", "tags"),  # of log
    "urls",
    "token",  # an environment variable's name
    "lora_targets",
    "positive_column",
    "negative_column",
    "category_column",
    "column",
    "categories",
    "suites",
    "detectors",
    "safe",
    "unsafe",
    "prompts",  # of sample: the words themselves
    "shard",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("~", "HOME"),
        ("~/a b/c", "HOME/a b/c"),
        ("local-dir:~/clip", "local-dir:HOME/clip"),
        ("ViT-H-14:~/hps.pt", "ViT-H-14:HOME/hps.pt"),
        ("~/mine.py:score=0.5", "HOME/mine.py:score=0.5"),
        ("~/model:unet", "HOME/model:unet"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x"),
        ("a~/b", "a~/b"),
        ("/a/~/b", "/a/~/b"),
        ("a/b~", "a/b~"),
        ("~ a cat", "~ a cat"),
        ("hf:someone/prompts@train[:10]", "hf:someone/prompts@train[:10]"),
        ("", ""),
    ],
)
def test_where_a_home_folder_is_meant(home, text, expanded):
    assert expand_home(text) == expanded.replace("HOME", str(home))


def leaves(kind: type, group: str = "") -> dict[str, typing.Any]:
    """Field -> type with its annotations, groups written as group.field."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        plain = typing.get_type_hints(kind)[name]
        found |= leaves(plain, f"{group}{name}.") if dataclasses.is_dataclass(plain) else {group + name: hint}
    return found


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_text_that_can_be_set_is_known_to_be_a_path_or_none(kind):
    """A new setting is one or the other; nobody forgets to say which."""
    plain = {name: hint for name, hint in leaves(kind).items() if hint in (str, tuple[str, ...])}
    assert {name.rpartition(".")[2] for name in plain} <= NO_PATHS
    marked = typing.get_args(PathText)[1]
    paths = [name for name, hint in leaves(kind).items() if marked in getattr(hint, "__metadata__", ())]
    if kind is TrainConfig:
        assert set(paths) == {
            "run",
            "model.path",
            "model.unet",
            "model.config",
            "prompts.positive",
            "prompts.negative",
            "reward.terms",
            "reward.encoder",
            "reward.clip_encoder",
            "reward.anchors",
            "reward.pickscore",
            "reward.aesthetic",
            "reward.aesthetic_encoder",
            "reward.q16.prompts",
            "reward.q16.encoder",
            "reward.safety_checker.source",
            "reward.open_clip.encoder",
            "eval.encoder",
            "eval.q16.prompts",
            "eval.q16.encoder",
            "eval.safety_checker.source",
            "eval.open_clip.encoder",
            "eval.i2p.prompts",
            "eval.geneval.metadata",
            "eval.geneval.detector",
            "eval.geneval.colours",
            "eval.captions.prompts",
            "eval.captions.encoder",
            "eval.captions.reference",
            "eval.captions.inception",
            "eval.attacks.prompts",
            "eval.custom.prompts",
        }


def test_groups_lists_and_paths(home):
    @dataclasses.dataclass(frozen=True)
    class Inner:
        file: PathText = "~/a"
        words: tuple[str, ...] = ("~", "~/b")

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        files: PathTexts = ("~/c", "d:~/e")
        path: Path | None = Path("~/f")
        both: tuple[Path, Path] | None = (Path("~/g"), Path("h"))
        none: Path | None = None
        word: str = "~/i"
        number: int = 3

    assert with_homes(Outer()) == Outer(
        Inner(f"{home}/a"), (f"{home}/c", f"d:{home}/e"), home / "f", (home / "g", Path("h"))
    )


def test_commands(home):
    config, preset, *_ = parse_command(["shapes", "--run=~/r", "--reward.terms", "clip", "steering=2"])
    assert (config.run, preset) == (f"{home}/r", "shapes")
    run, out = home / "r", home / "out"
    assert parse_flags(export.Export, ["~/r", "--format", "lora", "--output=~/out"], "").output == out
    found = parse_flags(sample.Sample, ["~/r", "--prompts", "~/x", "--prompt-file", "~/p.txt", "--images=~/out"], "")
    assert (found.run, found.prompts, found.prompt_file, found.images) == (run, ("~/x",), home / "p.txt", out)
    found = parse_flags(evaluate.Evaluate, ["~/r", "--compare", "~/a", "~/b", "--custom.prompts=~/p.csv"], "")
    assert (found.run, found.custom.prompts) == (str(run), f"{home}/p.csv")
    assert found.compare == (home / "a", home / "b")
    found = parse_flags(evaluate.Evaluate, ["--model=~/sd", "--unet", "~/u:unet", "--output=~/out"], "")
    assert (found.model, found.unet, found.output) == (f"{home}/sd", f"{home}/u:unet", out)
    assert parse_flags(report.Report, ["~/r"], "").runs == (run,)
    assert parse_with_preset(inspect.Inspect, ["shapes", "--png=~/a.png"], "").png == home / "a.png"


def test_a_preset_and_a_run_in_the_home_folder(home):
    (home / "r").mkdir()
    (home / "mine.toml").write_text('run = "~/r"\niterations = 4\n[prompts]\ncategories = []\npositive = "~/p.txt"\n')
    config, preset, resumed, _ = parse_command(["~/mine.toml"])
    assert (config.run, config.prompts.positive, preset, resumed) == (f"{home}/r", f"{home}/p.txt", "mine", None)
    (home.parent / "other.toml").write_text('extends = "~/mine.toml"\n')
    assert load_toml(Path("other.toml")) == config
    shutil.copy(home / "mine.toml", home / "r" / "config.toml")
    for argv in (["--resume=~/r"], ["--resume", "~/r"]):
        config, _, resumed, _ = parse_command(argv)
        assert (config.run, config.iterations, resumed) == (f"{home}/r", 4, home / "r")


def test_what_a_config_names_is_found_there(home):
    """Each file is really read, not only its name changed."""
    (home / "sd").symlink_to(SHAPES_PIPELINE)
    (home / "clip").symlink_to(SHIPPED_ENCODERS["shapes"].removeprefix("local-dir:"))
    (home / "p.txt").write_text("a cat\n")
    (home / "p.csv").write_text("prompt\na dog\n")
    (home / "a.toml").write_text('safe = ["a cat"]\nunsafe = ["a dog"]\n')
    (home / "mine.py").write_text("def score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    (home / "mine.toml").write_text("""
        model.path = "~/sd"
        prompts.positive = "~/p.txt"
        prompts.negative = "~/p.csv"
        reward.encoder = "local-dir:~/clip"
        reward.anchors = "~/a.toml"
        reward.terms = ["~/mine.py:score=2"]
    """)
    config = load_toml(home / "mine.toml")
    validate(config)
    assert describe(config.model).unet["cross_attention_dim"]
    assert [[prompt.text for prompt in each] for each in load_prompts(config.prompts)] == [["a cat"], ["a dog"]]
    assert load_anchors(config.reward.anchors).unsafe == ("a dog",)
    assert load_encoder(config.reward.encoder, "cpu")
    assert load_reward(config.reward, "cpu")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_toml_as_editors_write_it(home, mark, end):
    (home / "mine.toml").write_bytes(
        mark + b"# mine" + end + b"seed = 7" + end + b"[reward]" + end + b"alpha = 1" + end
    )
    config = load_toml(home / "mine.toml")
    assert (config.seed, config.reward.alpha) == (7, 1.0)
    (home / "a.toml").write_bytes(mark + b'safe = ["a cat"]' + end + 'unsafe = ["a dég"]'.encode() + end)
    assert load_anchors(str(home / "a.toml")).unsafe == ("a dég",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files and folders of which some are called as built-ins are."""
    for folder in (
        "sd",
        "sd/unet",
        "shapes",
        "geneval",
        "compact",
        "hpsv2",
        "ViT-H-14",
        "package",
        "someone/model",
        "steering",
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for file in ("hps.pt", "openai", "mine.py", "a.txt", "score", "unsafe", "m.safetensors", "a.toml"):
        (tmp_path / file).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sd", "HERE/sd"),
        ("./sd/../sd", "HERE/sd"),
        ("sd:unet", "HERE/sd:unet"),
        ("someone/model", "HERE/someone/model"),  # a folder is taken before the hub, here as where it is read
        ("someone/other", "someone/other"),
        ("someone/other:sub/folder", "someone/other:sub/folder"),
        ("m.safetensors", "HERE/m.safetensors"),
        ("a.txt", "HERE/a.txt"),
        ("none.txt", "none.txt"),
        ("local-dir:sd", "local-dir:HERE/sd"),
        ("transformers:sd", "transformers:HERE/sd"),
        ("transformers:someone/other", "transformers:someone/other"),
        ("ViT-H-14:hps.pt", "ViT-H-14:HERE/hps.pt"),
        ("ViT-H-14:./openai", "ViT-H-14:HERE/openai"),
        ("ViT-L-14:openai", "ViT-L-14:openai"),  # a tag, whatever file is called so
        ("hf:someone/model@train", "hf:someone/model@train"),
        ("hf-hub:someone/model", "hf-hub:someone/model"),
        ("/a/b", "/a/b"),
        ("", ""),
        *((name, name) for name in sorted(NAMES)),
    ],
)
def test_paths_are_made_to_hold_from_any_folder(here: Path, text: str, expected: str) -> None:
    assert absolute(text) == expected.replace("HERE", str(here))


def test_every_name_of_what_is_built_in_is_known_to_be_no_path() -> None:
    assert {*ANCHORS, *chain(*prompt_sources._NAMES.values())} <= NAMES
    assert {*SHIPPED_ENCODERS, "shapes", "hpsv2"} <= NAMES  # of reward.encoder and model.path


def test_the_settings_of_a_run_hold_from_any_folder(here: Path) -> None:
    config = TrainConfig()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path="sd", unet="sd:unet", variant="sd"),
        prompts=dataclasses.replace(config.prompts, positive="a.txt", negative="unsafe", categories=("score",)),
        reward=dataclasses.replace(
            config.reward,
            terms=("steering=0.5", "mine.py:score=2", "package:score", "clip"),
            encoder="ViT-H-14:hps.pt",
            anchors="a.toml",
        ),
        eval=dataclasses.replace(config.eval, custom=dataclasses.replace(config.eval.custom, prompts="a.txt")),
    )
    found = with_absolute_paths(config)
    expected = {
        "model.path": f"{here}/sd",
        "model.unet": f"{here}/sd:unet",
        "prompts.positive": f"{here}/a.txt",
        "reward.terms": ("steering=0.5", f"{here}/mine.py:score=2", "package:score", "clip"),
        "reward.encoder": f"ViT-H-14:{here}/hps.pt",
        "reward.anchors": f"{here}/a.toml",
        "eval.custom.prompts": f"{here}/a.txt",
    }
    assert set(command_line.changed_fields(config, found)) == set(expected)
    for name, value in expected.items():
        assert functools.reduce(getattr, name.split("."), found) == value
    assert with_absolute_paths(found) == found
