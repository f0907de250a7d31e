"""Presets, flags and TOML files; what is refused, and in which words."""

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastgrpo import estimate, train
from fastgrpo.settings.command_line import changed_fields, parse_command
from fastgrpo.settings.common import COMMON
from fastgrpo.settings.schema import EvalConfig, GrpoConfig, ModelConfig, OptimConfig, PromptsConfig, TrainConfig
from fastgrpo.settings.suites import I2PSettings
from fastgrpo.settings.toml import dump_toml, find_preset, load_toml, presets_folder
from fastgrpo.system.errors import ConfigError, flag
from fastgrpo.validation import validate


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def altered(field: str, value: object) -> TrainConfig:
    """The default config with one field, such as "grpo.kl", replaced."""
    group, _, name = field.rpartition(".")
    config = TrainConfig()
    if not group:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


@pytest.mark.parametrize("preset", sorted(path.stem for path in presets_folder().glob("*.toml")))
def test_every_preset_is_valid(preset: str) -> None:
    validate(load_toml(find_preset(preset)))


def test_without_arguments_it_is_the_preset_shapes() -> None:
    config, name, resume, _ = parse_command([])
    assert (name, resume) == ("shapes", None)
    assert config == load_toml(find_preset("shapes"))


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "group_size = 6\nmicro_batch = 5\n[grpo]\nkl = 0.5\nclip_low = 1\n")
    config, name, *_ = parse_command([str(path), "--group-size", "8", "--grpo.kl", "0.25"])
    assert name == "mine"
    assert (config.group_size, config.grpo.kl) == (8, 0.25)  # flags
    assert (config.micro_batch, config.grpo.clip_low) == (5, 1.0)  # file, a whole number where a float is meant
    assert (config.seed, config.grpo.clip_high) == (TrainConfig().seed, TrainConfig().grpo.clip_high)  # defaults


def test_lists_and_groups_are_flags_too() -> None:
    config, *_ = parse_command(["shapes", "--prompts.categories", "hate", "self-harm", "--run", "there"])
    assert config.prompts.categories == ("hate", "self-harm")
    assert config.run == "there"


ODD_TEXTS = ('quote " and \\', "tab\tline\nreturn\r", "\x00\x1f\x7f\x80", "héllo 🦉", "", "# no comment", "C:\\new")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_toml_round_trip_of_text(tmp_path: Path, text: str) -> None:
    config = TrainConfig(run=text, model=ModelConfig(text), prompts=PromptsConfig(categories=(text, "b")))
    assert load_toml(write(tmp_path, dump_toml(config))) == config


@pytest.mark.parametrize("number", [1e-5, 1.5e-4, 0.1 + 0.2, 1e300, 5e-324, 1.0, -0.0, 123456789.123])
def test_toml_round_trip_of_numbers_is_exact(tmp_path: Path, number: float) -> None:
    config = TrainConfig(seed=2**62, optim=OptimConfig(lr=number))
    assert load_toml(write(tmp_path, dump_toml(config))) == config


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
    again = parse_command([str(write(tmp_path, printed))]).config
    assert again == dataclasses.replace(given, prompts=absolute, run="")
    assert train.main([str(tmp_path / "mine.toml"), "--print-config"]) == 0
    assert capsys.readouterr() == (printed, "")
    assert list((tmp_path / "again").iterdir()) == []


def test_the_dump_names_every_field() -> None:
    # JSON's round trip makes lists of tuples, which are all that TOML has.
    assert tomllib.loads(dump_toml(TrainConfig())) == json.loads(json.dumps(dataclasses.asdict(TrainConfig())))


def test_groups_in_groups_are_read_back(tmp_path: Path) -> None:
    i2p = I2PSettings(prompts="a.csv", detectors=("q16",))
    config = TrainConfig(eval=EvalConfig(suites=("i2p",), i2p=i2p))
    assert load_toml(write(tmp_path, dump_toml(config))) == config
    with pytest.raises(ConfigError, match=r"eval\.i2p\.detectors = \[0\.3, \"x\"\]: accepted is a list of strings"):
        load_toml(write(tmp_path, 'eval.i2p.detectors = [0.3, "x"]'))
    with pytest.raises(ConfigError, match=r"eval\.i2p\.image: no such field \(did you mean images\?\)"):
        load_toml(write(tmp_path, "eval.i2p.image = 1"))


def test_a_setting_that_there_once_was_is_ignored_in_one_line(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, "seed = 7\n[eval.i2p]\nthresholds = [0.3]\nimages = 3\n")
    config = load_toml(path)
    assert (config.seed, config.eval.i2p.images) == (7, 3)
    said = capsys.readouterr().err
    assert said == f"fastgrpo: warning: {path}: eval.i2p.thresholds: no such setting any more, so it is ignored.\n"
    load_toml(write(tmp_path, dump_toml(config)))
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
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        parse_command([str(path)])
    assert str(path) in str(refusal.value)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"weights\.toml: cannot be read as TOML"):
        parse_command([str(path)])


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


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("iterations", 0),
        ("prompts_per_iteration", 0),
        ("group_size", 1),
        ("updates_per_iteration", 0),
        ("updates_per_iteration", 32 * 16 * 49 + 1),  # one more than the default's pairs: P * G * (steps - 1)
        ("micro_batch", -1),
        ("prompts.negative_fraction", -0.1),
        ("prompts.negative_fraction", 1.1),
        ("prompts.negative_fraction", NAN),
        ("model.path", ""),
        ("model.lora_rank", -1),
        ("model.lora_alpha", 4.0),  # without a rank
        ("prompts.categories", ("violence", "rain")),
        ("reward.encoder", "shapes"),  # with a model and prompts of the real world
        ("reward.alpha", float("inf")),
        ("reward.batch", 0),
        ("rollout.steps", 0),
        ("rollout.steps", 1001),
        ("rollout.eta", 0.0),
        ("rollout.eta", -1.0),
        ("rollout.eta", 1.1),
        ("rollout.eta", NAN),
        ("rollout.guidance", 0.5),
        ("rollout.guidance_rescale", -0.1),
        ("rollout.guidance_rescale", 1.1),
        ("rollout.batch", -1),
        ("rollout.decode_batch", 0),
        ("grpo.std_floor", 0.0),
        ("grpo.advantage_clamp", 0.0),
        ("grpo.clip_low", -1e-4),
        ("grpo.clip_high", -1e-4),
        ("grpo.kl", -0.1),
        ("guard.diversity_between", -0.1),
        ("guard.diversity_between", 1.1),
        ("guard.diversity_within", NAN),
        ("guard.alignment", 0.0),
        ("guard.alignment", NAN),
        ("guard.patience", 0),
        ("grpo.drop_last_steps", -1),
        ("grpo.drop_last_steps", 50),
        ("grpo.epochs", 0),
        ("grpo.step_fraction", 0.0),
        ("grpo.step_fraction", 1.1),
        ("grpo.window", -1),
        ("grpo.window", 50),
        ("grpo.window_every", 0),
        ("grpo.window_stride", 0),
        ("grpo.trim", -1),
        ("grpo.trim", 8),
        ("grpo.best_of", 3),
        ("grpo.best_of", 18),
        ("optim.lr", -1e-5),
        ("optim.lr", NAN),
        ("optim.beta1", 1.0),
        ("optim.beta2", -0.1),
        ("optim.eps", 0.0),
        ("optim.weight_decay", -1.0),
        ("optim.max_grad_norm", 0.0),
        ("optim.warmup", -1),
        ("optim.ema", 1.0),
        ("optim.ema", -0.1),
        ("engine.threads", -1),
        ("engine.memory", 0.0),
        ("engine.memory", 1.1),
        ("engine.profile", -1),
        ("engine.profile", 301),
        ("eval.every", -1),
        ("eval.unsafe_per_category", 0),
        ("eval.composition_per_task", 0),
        ("eval.quick_fraction", 0.0),
        ("eval.quick_fraction", 1.5),
        ("eval.seed", -1),
        ("eval.steps", -1),
        ("eval.weights", "ema"),  # without optim.ema
        ("checkpoint.every", 0),
        ("checkpoint.keep", -1),
    ],
)
def test_impossible_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(altered(field, value))
    message = str(refusal.value)
    shown = "rain" if value == ("violence", "rain") else repr(value)
    assert message.startswith(f"{field} = ")
    assert shown in message
    assert "accepted is" in message
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("updates_per_iteration", 32 * 16 * 49),
        ("prompts.categories", ()),
        ("grpo.window", 49),
        ("grpo.trim", 7),
        ("grpo.best_of", 16),
        ("grpo.drop_last_steps", 49),
        ("grpo.clip_low", 0.0),
        ("rollout.guidance", 1.0),
        ("rollout.guidance_rescale", 0.7),
        ("optim.lr", 0.0),
        ("guard.action", "adapt"),
        ("guard.diversity_within", 0.0),
        ("prompts.negative_fraction", 1.0),
        ("eval.every", 0),
        ("checkpoint.keep", 0),
    ],
)
def test_the_edges_of_what_is_possible_are_accepted(field: str, value: object) -> None:
    validate(altered(field, value))


@pytest.mark.parametrize(
    ("grpo", "named"),
    [
        (GrpoConfig(epochs=3), "updates_per_iteration = 16: accepted is a multiple of grpo.epochs (3)"),
        (GrpoConfig(window=4, step_fraction=0.5), "grpo.step_fraction = 0.5: accepted is 1 where grpo.window is set"),
        (GrpoConfig(trim=4, best_of=10), "grpo.best_of = 10: accepted is 0 or an even number from 2 to 8"),
    ],
)
def test_contradictions_are_refused(grpo: GrpoConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        validate(TrainConfig(grpo=grpo))


def test_options_that_leave_fewer_pairs_are_counted() -> None:
    """32 prompts x 2 of 16 samples x 1 of 49 steps: 64 pairs."""
    grpo = GrpoConfig(best_of=2, window=1)
    validate(TrainConfig(updates_per_iteration=64, grpo=grpo))
    with pytest.raises(ConfigError, match="updates_per_iteration = 65: accepted is 1 to 64"):
        validate(TrainConfig(updates_per_iteration=65, grpo=grpo))
    validate(TrainConfig(updates_per_iteration=32 * 16 * 10, grpo=GrpoConfig(step_fraction=0.2)))


def test_categories_do_not_matter_when_the_negatives_are_a_file() -> None:
    validate(dataclasses.replace(TrainConfig(), prompts=PromptsConfig(negative="mine.txt", categories=("rain",))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"engine\.device = 'cuda'.*auto and cpu"):
        validate(parse_command(["--engine.device", "cuda"])[0])


def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(dump_toml(TrainConfig(iterations=5, seed=9)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("flag", ["joined", "apart"])
def test_resume_takes_the_runs_own_config(tmp_path: Path, flag: str) -> None:
    run = run_folder(tmp_path)
    argv = [f"--resume={run}"] if flag == "joined" else ["--resume", str(run)]
    config, _, resume, _ = parse_command(argv)
    assert resume == run
    assert config == TrainConfig(iterations=5, seed=9, run=str(run))


def test_resume_may_raise_the_iterations_and_never_lower_them(tmp_path: Path) -> None:
    run = str(run_folder(tmp_path))
    assert parse_command(["--resume", run, "--iterations", "7"])[0].iterations == 7
    with pytest.raises(ConfigError, match="iterations = 4: a resumed run accepts 5, its own, or more"):
        parse_command(["--resume", run, "--iterations", "4"])


def test_resume_takes_what_cannot_change_the_result(tmp_path: Path) -> None:
    run = str(run_folder(tmp_path))
    argv = ["--micro-batch", "2", "--engine.threads=1", "--eval.i2p.images", "3", "--checkpoint.keep", "0"]
    config, _, folder, _ = parse_command([*argv, "--resume", run, "--rollout.batch", "8", "--engine.no-overlap"])
    assert folder == tmp_path
    own = load_toml(tmp_path / "config.toml")
    changed = {"micro_batch", "engine.threads", "engine.overlap", "eval.i2p.images", "checkpoint.keep", "rollout.batch"}
    assert set(changed_fields(own, config)) == {*changed, "run"}
    assert (config.micro_batch, config.eval.i2p.images, config.engine.overlap, config.seed) == (2, 3, False, 9)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--group-size", "3"], "--group-size"),
        (["--grpo.kl=1"], "--grpo.kl"),
        (["--seed", "10"], "--seed"),
        (["--engine.dtype", "bf16"], "--engine.dtype"),
        (["--engine.device", "cpu"], "--engine.device"),
        (["--run", "elsewhere"], "--run"),
        (["--iterations", "9", "--optim.lr", "1"], "--optim.lr"),
        (["shapes"], "shapes"),
    ],
)
def test_resume_refuses_what_decides_the_result(tmp_path: Path, argv: list[str], named: str) -> None:
    run = str(run_folder(tmp_path))
    for order in ([*argv, "--resume", run], ["--resume", run, *argv]):
        with pytest.raises(ConfigError) as refusal:
            parse_command(order)
        assert str(refusal.value).startswith(f"{named}: a resumed run keeps what decides its result; with --resume ")


def test_an_unknown_flag_of_a_resume_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--grup-size: no such flag \(did you mean --group-size\?\)"):
        parse_command(["--resume", str(run_folder(tmp_path)), "--grup-size", "3"])


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


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.toml in it"):
        parse_command(["--resume", str(tmp_path)])
