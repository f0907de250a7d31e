"""Trainings by the rewards of servers."""

import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo import train
from fastgrpo.assembly import load_training
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.rewards.service import wire
from fastgrpo.run import checkpoint
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.training import iterate
from support.processes import together
from support.reward_service import TOKEN, Fake, served
from support.service_requests import WRONG, body, config
from support.training import TIMED, altered

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_scores_are_asked_for_while_the_next_images_are_drawn(
    fake: Callable[..., Fake], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers nothing until the third of four chunks is being drawn; the first group is whole before."""
    third, draws, chunk = threading.Event(), [], FixedPasses.denoiser
    held: list[bool] = []
    server = fake(before=lambda: held.append(third.wait(100.0)))

    def drawing(self, embeds, part, *others):
        draws.append(part)
        if len(draws) == 3:
            end = time.monotonic() + 50.0
            while not server.posts and time.monotonic() < end:  # it is on its way
                time.sleep(0.01)
            assert len(server.posts) == 1
            third.set()
        return chunk(self, embeds, part, *others)

    monkeypatch.setattr(FixedPasses, "denoiser", drawing)
    own = {"engine.graphs": "on", "micro_batch": 3, "prompts_per_iteration": 4, "guard.action": "off"}
    base = altered(load_toml(config_file), own | {"reward": config(server, timeout=120.0, retries=0)})
    training = load_training(base, threads=1, say=lambda line: None)
    draws.clear()
    assert math.isfinite(iterate(training, 1, Console())["reward/mean"])
    assert len(draws) == 4
    assert held == [True] * 4


# Bytes are summed, which float32 does exactly in any order: so it gives the same for pictures that were rounded before.
JUDGE = """
import os, signal
from pathlib import Path

LEFT = Path(__file__).with_name("left")

def judge(images, prompts):
    if LEFT.exists():
        left = int(LEFT.read_text())
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        LEFT.write_text(str(left - 1))
    return (images * 255).round().sum(dim=(1, 2, 3)) / 1e4
"""


def ask(url: str, sent: bytes | None = None, kind: str = wire.JSON, token: str = "") -> tuple[int, dict]:
    headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, sent, headers), timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.slow(15)
def test_a_training_by_a_server_that_is_killed_ends_as_one_without(config_file: Path, tmp_path: Path, capfd) -> None:
    """64 images an iteration, and a server that dies in the second of two: a checkpoint of the first, which goes on."""
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    log, token = tmp_path / "server.log", {"REWARD_TOKEN": TOKEN}
    flags = [str(config_file), "--iterations", "2", "--prompts-per-iteration", "8", "--group-size", "8"]
    flags += ["--engine.threads", "1", "--eval.every", "0", "--checkpoint.every", "2", "--guard.action", "off"]
    flags += ["--optim.ema", "0.5", "--grpo.kl", "0", "--micro-batch", "64", "--rollout.steps", "2"]
    here, there = tmp_path / "here", tmp_path / "there"
    terms = ["compressibility=0.1", "{}judge"]
    local = [term.format(f"{judge}:") for term in terms]
    assert train.main([*flags, "--run", str(here), "--reward.terms", *local]) == 0

    serving = [*local, "--token-env", "REWARD_TOKEN", "--megabytes", "4", "--config", str(config_file)]
    serving[0] = "compressibility"
    remote = ["service:compressibility=0.1", "service:judge"]
    with served(log, *serving, environment=token) as (url, process):
        assert ask(url) == (401, {"error": "a token is needed, as Authorization: Bearer TOKEN"})
        assert ask(url, token=TOKEN) == (200, {"protocol": 1, "scores": ["compressibility", "judge"]})
        assert ask(url + "/score", body(), token=TOKEN + "x")[0] == 401
        status, told = ask(url + "/score", body(), token=TOKEN)
        assert (status, told["error"]) == (400, "there is no score 'blue'; there are compressibility, judge")
        for kind, sent, says in WRONG.values():
            status, told = ask(url + "/score", sent, kind, token=TOKEN)
            assert status == 400
            assert says in told["error"]
        assert ask(url + "/score", bytes(4_000_001), token=TOKEN)[0] == 413
        (tmp_path / "left").write_text("6")  # of four requests an iteration
        service = ["--reward.service.token", "REWARD_TOKEN", "--reward.service.urls", url]
        capfd.readouterr()
        ends = ["--reward.terms", *remote, *service, "--reward.service.retries", "1"]
        assert train.main([*flags, "--run", str(there), *ends]) == 1
        assert not process.is_alive()
    out, err = capfd.readouterr()
    newest = there / "checkpoints" / "iter-000001"
    assert re.fullmatch(
        rf"fastgrpo: reward.service.urls: {url} cannot be asked \(.*\) after 2 tries; the newest checkpoint is "
        rf"{newest}\.\n",
        err,
    ), err
    assert f"Stopped after 1 iterations. To go on: python -m fastgrpo.train --resume {there}" in out
    assert checkpoint.newest(there) == newest
    assert TOKEN not in out + err + (there / "config.toml").read_text()

    (tmp_path / "left").unlink()
    with served(log, *serving, environment=token) as (url, _):
        resumed = ["--reward.service.urls", url, "--reward.service.format", "raw", "--reward.service.batch", "7"]
        assert train.main(["--resume", str(there), *resumed]) == 0
    for name in (WEIGHTS, "trainer/optimizer.safetensors", "trainer/ema.safetensors"):
        last = Path("checkpoints") / "iter-000002" / name
        assert (here / last).read_bytes() == (there / last).read_bytes(), name
    one, two = (
        [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in read_metrics(path)]
        for path in (here / "metrics.jsonl", there / "metrics.jsonl")
    )
    assert one == two
    assert all(row["reward/judge"] > 0 > row["reward/compressibility"] for row in two)


@pytest.mark.slow
def test_two_processes_stop_together(config_file: Path, tmp_path: Path) -> None:
    """One of the second iteration's two requests is refused: both end, one speaks, and both halves are saved."""
    run = tmp_path / "run"
    with Fake(["", "", "400"]).running() as server:
        flags = [str(config_file), "--iterations", "3", "--engine.threads", "1", "--eval.every", "0"]
        flags += ["--guard.action", "off", "--engine.shard", "optimizer", "--checkpoint.every", "3"]
        flags += ["--reward.terms", "service:blue", "--reward.service.urls", server.url]
        both = together(2, *flags, "--run-folder", str(run))
    assert [each.returncode for each in both] == [1, 1], both
    lines = re.findall(r"^fastgrpo: (.*)$", "".join(each.stderr for each in both), flags=re.MULTILINE)
    newest = run / "checkpoints" / "iter-000001"
    assert lines == [
        f"reward.service.urls: {server.url} answered 400: 'because of None'; the newest checkpoint is {newest}."
    ]
    assert checkpoint.newest(run) == newest
    assert os.listdir(run / "checkpoints") == ["iter-000001"]
