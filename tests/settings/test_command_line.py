"""Presets, files and flags on the command line, and what --help says of them."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgrpo import estimate, train
from fastgrpo.settings.command_line import parse_command
from fastgrpo.settings.common import COMMON
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.errors import ConfigError, flag
from support.files import write_toml


def test_without_arguments_it_is_the_preset_shapes() -> None:
    config, name, resume, _ = parse_command([])
    assert (name, resume) == ("shapes", None)
    assert config == load_toml(find_preset("shapes"))


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    path = write_toml(tmp_path, "group_size = 6\nmicro_batch = 5\n[grpo]\nkl = 0.5\nclip_low = 1\n")
    config, name, *_ = parse_command([str(path), "--group-size", "8", "--grpo.kl", "0.25"])
    assert name == "mine"
    assert (config.group_size, config.grpo.kl) == (8, 0.25)  # flags
    assert (config.micro_batch, config.grpo.clip_low) == (5, 1.0)  # file, a whole number where a float is meant
    assert (config.seed, config.grpo.clip_high) == (TrainConfig().seed, TrainConfig().grpo.clip_high)  # defaults


def test_lists_and_groups_are_flags_too() -> None:
    config, *_ = parse_command(["shapes", "--prompts.categories", "hate", "self-harm", "--run", "there"])
    assert config.prompts.categories == ("hate", "self-harm")
    assert config.run == "there"


def test_print_config_prints_what_gives_the_same_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("a cat\n")
    changes = ["--seed", "7", "--prompts.positive", "mine.txt", "--optim.lr", "3e-7", "--run", "there"]
    assert train.main(["ddpo", *changes, "--print-config"]) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    given = parse_command(["ddpo", *changes]).config
    absolute = dataclasses.replace(given.prompts, positive=str(tmp_path / "mine.txt"))  # it may be read from anywhere
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    again = parse_command([str(write_toml(tmp_path, printed))]).config
    assert again == dataclasses.replace(given, prompts=absolute, run="")
    assert train.main([str(tmp_path / "mine.toml"), "--print-config"]) == 0
    assert capsys.readouterr() == (printed, "")
    assert list((tmp_path / "again").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["shaped"], ["shaped", "did you mean shapes?"]),
        (["nowhere.toml"], ["nowhere.toml", "no such file"]),
        (["--seed", "1", "mine.toml"], ["mine.toml", "before the flags"]),
    ],
)
def test_presets_are_named_and_come_first(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_command(argv)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--grup-size", "3"], ["--grup-size", "--group-size"]),
        (["--grpo.klx", "3"], ["--grpo.klx", "--grpo.kl"]),
        (["--group-size", "three"], ["--group-size", "three"]),
        (["--grpo.advantage", "batch"], ["--grpo.advantage", "batch", "global"]),
        (["--group-size"], ["--group-size", "Missing value"]),
    ],
)
def test_wrong_flags_are_one_sentence_with_the_nearest_name(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_command(argv)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert message.endswith("--help lists them all." if "did you mean" in message else "--help lists every flag.")
    assert "\n" not in message
    assert capsys.readouterr() == ("", "")


def names_of_fields(group: object, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        inner = dataclasses.is_dataclass(value)
        yield from names_of_fields(value, f"{prefix}{field.name}.") if inner else [prefix + field.name]


def test_the_settings_that_people_set_most_are_there_and_in_order() -> None:
    names = list(names_of_fields(TrainConfig()))
    assert [name for name in names if name in COMMON] == list(COMMON)
    assert 15 <= len(COMMON) <= 25


@pytest.mark.parametrize(
    ("main", "own"),
    [
        (train.main, {"--resume", "--dry-run", "--print-config"}),
        (estimate.main, {"--tflops", "--processes", "--link-gb-s", "--gpu-gb"}),
    ],
)
def test_help_explains_these_alone_as_the_preset_has_them(
    main: Callable[..., int], own: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["ddpo", "--help"], "fastgrpo something")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fastgrpo something ")
    explained = re.findall(r"^\W (-[\w.-]*\w)", printed, flags=re.MULTILINE)  # the first of a setting's flags
    assert len(set(explained)) == len(explained)
    assert set(explained) == {*own, "-h", "--run-folder"} | {flag(name) for name in COMMON if name != "run"}
    assert f"{len(COMMON)} of {len(list(names_of_fields(TrainConfig())))} settings are listed here" in printed
    assert re.search(r"--group-size INT\s[^-]*\(default: 8\)", printed)
    assert re.search(r"--optim\.lr FLOAT\s[^-]*\(default: 0\.0003\)", printed)


def test_help_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command(["--help-all"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in names_of_fields(TrainConfig()):
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", printed), name
    assert "--resume" in printed
    assert "FILE.toml" in printed
