"""Settings as TOML: written and read back, extended, and what is no such file."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from fastgrpo.settings.command_line import changed_fields, parse_command
from fastgrpo.settings.schema import EvalConfig, ModelConfig, OptimConfig, PromptsConfig, RolloutConfig, TrainConfig
from fastgrpo.settings.suites import I2PSettings
from fastgrpo.settings.toml import dump_toml, find_preset, load_toml
from fastgrpo.system.errors import ConfigError
from support.files import write_toml

ODD_TEXTS = ('quote " and \\', "tab\tline\nreturn\r", "\x00\x1f\x7f\x80", "héllo 🦉", "", "# no comment", "C:\\new")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_toml_round_trip_of_text(tmp_path: Path, text: str) -> None:
    config = TrainConfig(run=text, model=ModelConfig(text), prompts=PromptsConfig(categories=(text, "b")))
    assert load_toml(write_toml(tmp_path, dump_toml(config))) == config


@pytest.mark.parametrize("number", [1e-5, 1.5e-4, 0.1 + 0.2, 1e300, 5e-324, 1.0, -0.0, 123456789.123])
def test_toml_round_trip_of_numbers_is_exact(tmp_path: Path, number: float) -> None:
    config = TrainConfig(seed=2**62, optim=OptimConfig(lr=number))
    assert load_toml(write_toml(tmp_path, dump_toml(config))) == config


def test_whole_numbers_in_a_list_are_read_back(tmp_path: Path) -> None:
    config = TrainConfig(rollout=RolloutConfig(branches=(2, 4)))
    assert load_toml(write_toml(tmp_path, dump_toml(config))) == config
    for other in ("[2, 4.0]", "[2, true]", '["2"]', "8"):
        with pytest.raises(ConfigError, match=r"rollout\.branches = .*: accepted is a list of whole numbers"):
            load_toml(write_toml(tmp_path, f"rollout.branches = {other}"))


def test_the_dump_names_every_field() -> None:
    # JSON's round trip makes lists of tuples, which are all that TOML has.
    assert tomllib.loads(dump_toml(TrainConfig())) == json.loads(json.dumps(dataclasses.asdict(TrainConfig())))


def test_groups_in_groups_are_read_back(tmp_path: Path) -> None:
    i2p = I2PSettings(prompts="a.csv", detectors=("q16",))
    config = TrainConfig(eval=EvalConfig(suites=("i2p",), i2p=i2p))
    assert load_toml(write_toml(tmp_path, dump_toml(config))) == config
    with pytest.raises(ConfigError, match=r"eval\.i2p\.detectors = \[0\.3, \"x\"\]: accepted is a list of strings"):
        load_toml(write_toml(tmp_path, 'eval.i2p.detectors = [0.3, "x"]'))
    with pytest.raises(ConfigError, match=r"eval\.i2p\.image: no such field \(did you mean images\?\)"):
        load_toml(write_toml(tmp_path, "eval.i2p.image = 1"))


def test_a_setting_that_there_once_was_is_ignored_in_one_line(tmp_path: Path, capsys) -> None:
    path = write_toml(tmp_path, "seed = 7\n[eval.i2p]\nthresholds = [0.3]\nimages = 3\n")
    config = load_toml(path)
    assert (config.seed, config.eval.i2p.images) == (7, 3)
    said = capsys.readouterr().err
    assert said == f"fastgrpo: warning: {path}: eval.i2p.thresholds: no such setting any more, so it is ignored.\n"
    load_toml(write_toml(tmp_path, dump_toml(config)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grup_size = 3", ["grup_size", "did you mean group_size?"]),
        ("[gpro]\nkl = 1.0", ["gpro", "did you mean grpo?"]),
        ("[grpo]\nklx = 1.0", ["grpo.klx", "did you mean kl?"]),
        ("seed = 'x'", ['seed = "x"', "a whole number"]),
        ("seed = 1.5", ["seed = 1.5", "a whole number"]),
        ("seed = true", ["seed = true", "a whole number"]),
        ("[optim]\nlr = '1e-5'", ["optim.lr", "a number"]),
        ("[grpo]\nadvantage = 'batch'", ["grpo.advantage", "batch", "group, global, none"]),
        ("[prompts]\ncategories = 'hate'", ["prompts.categories", "a list of strings"]),
        ("[prompts]\ncategories = [1]", ["prompts.categories = [1]", "a list of strings"]),
        ("grpo = 3", ["grpo = 3", "a table"]),
        ("[[grpo]]\nkl = 1.0", ["grpo", "a table"]),
        ("seed = = 3", ["cannot be read as TOML", "line 1"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write_toml(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        parse_command([str(path)])
    assert str(path) in str(refusal.value)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"weights\.toml: cannot be read as TOML"):
        parse_command([str(path)])


def test_a_file_extends_a_preset_or_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = load_toml(find_preset("shapes"))
    (tmp_path / "sub").mkdir()
    parent = 'extends = "shapes"\nseed = 1\n[grpo]\nkl = 0.5\nclip_low = 0.25\n[eval.i2p]\nimages = 3\n'
    (tmp_path / "parent.toml").write_text(parent)
    child = tmp_path / "sub" / "child.toml"
    child.write_text(
        'extends = "../parent.toml"\ngrpo.kl = 0.125\neval.i2p.threshold = 0.5\nprompts.categories = ["hate"]\n'
    )
    monkeypatch.chdir(tmp_path / "sub")  # a name is relative to the file that says it, not to this
    config = load_toml(child)
    expected = {"seed": 1, "grpo.kl": 0.125, "grpo.clip_low": 0.25, "eval.i2p.images": 3, "eval.i2p.threshold": 0.5}
    assert set(changed_fields(shapes, config)) == {*expected, "prompts.categories"}
    assert (config.seed, config.grpo.kl, config.grpo.clip_low) == (1, 0.125, 0.25)
    assert (config.eval.i2p.images, config.eval.i2p.threshold) == (3, 0.5)
    assert config.prompts.categories == ("hate",)  # a list is replaced, not added to
    assert parse_command([str(child), "--grpo.kl", "2"])[0].grpo.kl == 2
    assert "extends" not in dump_toml(config)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"mine": 'extends = "mine.toml"'}, 'mine.toml: extends = "mine.toml": a circle; accepted is'),
        (
            {"mine": 'extends = "b.toml"', "b": 'extends = "./c.toml"', "c": 'extends = "b.toml"'},
            'c.toml: extends = "b.toml": a circle; accepted is',
        ),
        (
            {"mine": 'extends = "shaped"'},
            'mine.toml: extends = "shaped": shaped: no such preset (did you mean shapes?)',
        ),
        ({"mine": 'extends = "none.toml"'}, 'mine.toml: extends = "none.toml": '),
        ({"mine": "extends = 3"}, "mine.toml: extends = 3: accepted is a preset's name or a FILE.toml."),
        ({"mine": "extends = ['shapes']"}, 'mine.toml: extends = ["shapes"]: accepted is'),
        ({"mine": 'extend = "shapes"'}, "mine.toml: extend: no such field (did you mean extends?)"),
        ({"mine": '[grpo]\nextends = "shapes"'}, "mine.toml: grpo.extends: no such field"),
        ({"mine": 'extends = "b.toml"', "b": "grpo.klx = 1"}, "b.toml: grpo.klx: no such field (did you mean kl?)"),
        ({"mine": 'extends = "b.toml"\ngrpo = 1', "b": "grpo.kl = 1"}, "mine.toml: grpo = 1: accepted is a table."),
        ({"mine": 'extends = "b.toml"\nseed.x = 1', "b": "seed = 1"}, "mine.toml: seed = "),
    ],
)
def test_a_chain_that_is_none_is_refused(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load_toml(tmp_path / "mine.toml")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
