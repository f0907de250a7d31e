"""The settings of a resumed run: its own, but for what cannot change the result."""

from pathlib import Path

import pytest

from fastgrpo.settings.command_line import changed_fields, parse_command
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import dump_toml, load_toml
from fastgrpo.system.errors import ConfigError


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


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.toml in it"):
        parse_command(["--resume", str(tmp_path)])
