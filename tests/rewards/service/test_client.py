"""Terms service:NAME: what is sent, what is made of every way to fail, and trainings by servers' rewards."""

import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fastgrpo import train
from fastgrpo.assembly import load_training
from fastgrpo.engine.fixed_passes import FixedPasses
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.service import client, wire
from fastgrpo.rewards.service.addresses import read_addresses
from fastgrpo.rewards.terms import BrokenReward, ServiceFailed, parse_terms
from fastgrpo.run import checkpoint
from fastgrpo.run.metrics import read_metrics
from fastgrpo.settings.schema import RewardConfig, ServiceConfig
from fastgrpo.settings.toml import load_toml
from fastgrpo.system.console import Console
from fastgrpo.system.errors import ConfigError
from fastgrpo.training import iterate
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support import ROOT
from support.processes import together
from support.reward_service import TOKEN, Fake, read_images, served
from support.rewards import GROUP, PROMPTS, pictures
from support.training import TIMED, altered

IMAGES = pictures(len(PROMPTS) * GROUP)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    """Starts servers, which end with the test."""
    with ExitStack() as running:
        yield lambda *faults, **settings: running.enter_context(Fake(list(faults), **settings).running())


def config(*servers: Fake, terms: tuple[str, ...] = ("service:blue",), **settings) -> RewardConfig:
    urls = tuple(server.url for server in servers)
    given = {"batch": 5, "timeout": 5.0, "retries": 2, "token": "REWARD_TOKEN"} | settings
    return RewardConfig(terms=terms, service=ServiceConfig(urls=urls, **given))


def scores(*servers: Fake, broken: list[BrokenReward] | None = None, **settings) -> dict[str, torch.Tensor]:
    return load_reward(config(*servers, **settings), "cpu").score(IMAGES, PROMPTS, GROUP, broken)


def means(channel: int) -> torch.Tensor:
    """[P, G] float32: the mean of a channel's bytes, whose sum float64 has exactly."""
    return (IMAGES[:, channel].double() * 255).round().mean(dim=(1, 2)).float().view(len(PROMPTS), GROUP)


# --- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "raw"])
def test_what_a_server_gets(fake: Callable[..., Fake], form: str) -> None:
    """As documented, read without fastgrpo: the rounded pixels, each image's prompt, all names at once."""
    server = fake()
    raw = scores(server, terms=("service:red=2", "compressibility", "service:blue"), format=form)
    assert list(raw) == ["red", "compressibility", "blue"]
    assert torch.equal(raw["blue"], means(2))
    assert torch.equal(raw["red"], means(0))
    (_, headers, _), *posted = server.requests
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert [path for path, *_ in posted] == ["/score"] * 3
    parts = [read_images(headers, body) for _, headers, body in posted]
    seen = {}
    for told, images in parts:
        assert told["protocol"] == 1
        assert told["scores"] == ["red", "blue"]
        for prompt, image in zip(told["prompts"], images, strict=True):
            seen.setdefault(prompt["text"], []).append((prompt["label"], image))
    for number, prompt in enumerate(PROMPTS):
        labels, images = zip(*seen[prompt.text], strict=True)
        assert set(labels) == {prompt.label}
        want = (IMAGES[number * GROUP : (number + 1) * GROUP] * 255).round().byte().permute(0, 2, 3, 1)
        assert sorted(image.tobytes() for image in images) == sorted(image.numpy().tobytes() for image in want)
    for _, headers, body in posted:
        assert headers["Content-Type"] == wire.FORMATS[form]
        request = wire.decode(headers["Content-Type"], body)
        assert {prompt.text for prompt in request.prompts} <= {prompt.text for prompt in PROMPTS}
        assert torch.equal(request.images.permute(0, 2, 3, 1), torch.from_numpy(read_images(headers, body)[1].copy()))


def test_64_images_are_shared_out_and_no_server_has_more_at_once_than_it_may(fake: Callable[..., Fake]) -> None:
    """The second has one score only, so the other is asked of the first alone."""
    first, second = fake(seconds=0.02), fake(seconds=0.02, hello={"protocol": 1, "scores": ["blue"]})
    prompts = [Prompt(f"{number} dogs", POSITIVE, id=number) for number in range(8)]
    images = pictures(64)
    reward = load_reward(
        config(first, second, terms=("service:blue", "service:red"), batch=4, requests=2), torch.device("cpu")
    )
    raw = reward.score(images, prompts, 8)
    want = (images.double() * 255).round().mean(dim=(2, 3)).float()
    assert torch.equal(raw["blue"].flatten(), want[:, 2])
    assert torch.equal(raw["red"].flatten(), want[:, 0])
    assert len(first.posts) + len(second.posts) == 2 * 16
    assert second.posts, "one has done everything"
    assert all(json.loads(body)["scores"] == ["blue"] for body in second.posts)
    assert (first.most, second.most) == (2, 2)


@pytest.mark.slow
def test_scores_are_asked_for_while_the_next_images_are_drawn(
    fake: Callable[..., Fake], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers nothing until the third of four chunks is being drawn; the first group is whole before."""
    third, draws, chunk = threading.Event(), [], FixedPasses.denoiser
    held: list[bool] = []
    server = fake(before=lambda: held.append(third.wait(20.0)))

    def drawing(self, embeds, part, keep_mean):
        draws.append(part)
        if len(draws) == 3:
            end = time.monotonic() + 10.0
            while not server.posts and time.monotonic() < end:  # it is on its way
                time.sleep(0.01)
            assert len(server.posts) == 1
            third.set()
        return chunk(self, embeds, part, keep_mean)

    monkeypatch.setattr(FixedPasses, "denoiser", drawing)
    own = {"engine.graphs": "on", "micro_batch": 3, "prompts_per_iteration": 4, "guard.action": "off"}
    base = altered(load_toml(config_file), own | {"reward": config(server, timeout=30.0, retries=0)})
    training = load_training(base, threads=1, say=lambda line: None)
    draws.clear()
    assert math.isfinite(iterate(training, 1, Console())["reward/mean"])
    assert len(draws) == 4
    assert held == [True] * 4


# --- servers that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "429", "503", "dead", "cut", "slow"])
def test_a_failure_is_tried_again(fake: Callable[..., Fake], fault: str) -> None:
    server = fake(fault, fault)
    assert torch.equal(scores(server, timeout=0.3, requests=2, batch=6)["blue"], means(2))
    assert len(server.posts) > 2
    assert {path for path, *_ in server.requests[1:]} == {"/", "/score"}, "it is asked how it is before"


@pytest.mark.parametrize("fault", ["500", "dead", "short", "nan", "null", "text", "missing", "garbage", "large", "401"])
def test_another_server_answers(fake: Callable[..., Fake], fault: str) -> None:
    """Whatever is wrong with the first, it does not come through; what it answered wrongly it is not asked again."""
    first, second = fake(always=fault), fake()
    assert torch.equal(scores(first, second, requests=1, batch=3)["blue"], means(2))
    if fault not in ("500", "dead"):
        assert len(set(first.posts)) == len(first.posts)


SENTENCES = {
    "short": "gave 4 numbers as the score 'blue', where a list of 5 is needed",
    "text": "gave 'good' among the numbers of the score 'blue'",
    "missing": "gave no score 'blue'",
    "garbage": "answered what is no JSON: '.*pickled\\? Bearer \\*\\*\\*'",
    "large": "answered more than 65856 bytes",
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_wrong_answers_of_all_servers_are_named(fake: Callable[..., Fake], fault: str) -> None:
    server = fake(always=fault)
    with pytest.raises(BrokenReward) as caught:
        scores(server, requests=1)
    message = (
        f"reward term 'service:blue': {server.url} {SENTENCES[fault]}, for images the first of which is of prompt "
        f"'{PROMPTS[0].text}'"
    )
    assert re.fullmatch(message, str(caught.value)), caught.value
    assert caught.value.prompt == PROMPTS[0]
    assert torch.equal(caught.value.image, IMAGES[0])
    assert len(set(server.posts)) == len(server.posts), "it is not asked again"


@pytest.mark.parametrize("fault", ["nan", "null"])
def test_no_number_is_a_reward_that_is_not_finite(fake: Callable[..., Fake], fault: str) -> None:
    """Of the first five images the last has none: the second of the second prompt."""
    server = fake(fault)
    with pytest.raises(BrokenReward, match=f"'service:blue' of {server.url} returned nan for an image of prompt"):
        scores(server, requests=1)
    server.faults[:] = [fault]
    broken: list[BrokenReward] = []
    raw = scores(server, requests=1, broken=broken)["blue"]
    assert raw.isnan().nonzero().tolist() == [[1, 1]]
    assert broken[0].prompt == PROMPTS[1]
    assert torch.equal(raw[~raw.isnan()], means(2)[~raw.isnan()])


def test_what_is_said_once_all_is_tried(fake: Callable[..., Fake]) -> None:
    """Without the token, which the server repeats. A request that is refused is not tried again."""
    server = fake(always="500")
    with pytest.raises(ServiceFailed) as caught:
        scores(server)
    assert str(caught.value) == (
        f"reward.service.urls: {server.url} answered 500: 'because of Bearer ***' after 3 tries"
    )
    refuses = fake(always="400")
    with pytest.raises(ServiceFailed) as caught:
        scores(refuses, requests=1)
    assert str(caught.value) == f"reward.service.urls: {refuses.url} answered 400: 'because of Bearer ***'"
    assert len(set(refuses.posts)) == len(refuses.posts)
    with Fake().running() as gone:
        reward = load_reward(config(gone, server, terms=("service:red",), retries=1), "cpu")
    with pytest.raises(ServiceFailed) as caught:
        reward.score(IMAGES, PROMPTS, GROUP)
    assert re.fullmatch(
        rf"reward.service.urls: {gone.url} cannot be asked \(.*\), and {server.url} answered 500: .* after 2 tries",
        str(caught.value),
    ), caught.value


def test_a_server_that_comes_back_is_asked_again(fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one withholds its first answer until then, so that it cannot do all the work before."""
    monkeypatch.setattr(client, "_LONGEST_PAUSE", 0.05)
    lost, other = Fake(), fake(seconds=0.05)
    with lost.running():
        reward = load_reward(config(lost, other, batch=1, requests=1), "cpu")
    assert torch.equal(reward.score(IMAGES, PROMPTS, GROUP)["blue"], means(2))
    assert not lost.posts
    asked = threading.Event()
    lost.before, other.before = asked.set, lambda: asked.wait(4.0)
    with lost.running():
        assert torch.equal(reward.score(IMAGES, PROMPTS, GROUP)["blue"], means(2))
        assert lost.posts


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (("service",), "'service' names no score of a server; accepted is service:NAME"),
        (("service:",), "'service:' names no score"),
        (("service:a/b",), "'service:a/b' names no score"),
        (("service:std",), "'service:std' cannot be called 'std'"),
        (("clip", "service:clip"), "'clip' and 'service:clip' are both called clip"),
    ],
)
def test_what_is_no_score(terms: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_terms(terms)
    (term,) = parse_terms(("service:my-judge.v2=-3",))
    assert (term.service, term.label, term.place, term.weight) == ("my-judge.v2", "my_judge.v2", "", -3.0)
    assert not term.has_encoder


@pytest.mark.parametrize("url", ["judge:8000", "ftp://judge", "http://", "http://judge:no", "http://a b", "http://a?b"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^reward.service.urls = .*: accepted is http://HOST:PORT or https"):
        read_addresses(ServiceConfig(urls=("http://judge:8000/path/", url)))
    (address,) = read_addresses(ServiceConfig(urls=("https://judge/path/",)))
    assert (address.host, address.port, address.path, address.secure) == ("judge", 443, "/path", True)


# --- requests that are wrong -----------------------------------------------------------------------------------------


def body(**changes) -> bytes:
    prompts = [{"text": "a cat"}, {"text": "blood", "label": NEGATIVE, "category": "violence", "id": 3, "later": None}]
    request = wire.Request(("blue",), (Prompt("", POSITIVE),) * 2, wire.pixels(IMAGES[:2]))
    return json.dumps(json.loads(wire.encode(request, "png")) | {"prompts": prompts} | changes).encode()


PNG = json.loads(body())["images"][0]
LARGE = wire.Request(("blue",), (Prompt("", POSITIVE),), torch.zeros(1, 3, 4000, 4000, dtype=torch.uint8))
TENSORS = wire.encode(wire.Request(("blue",), (Prompt("a", POSITIVE),), wire.pixels(IMAGES[:1])), "raw")
WRONG = {
    "no JSON": (wire.JSON, b"\x80\x04K\x01.", "no JSON"),
    "nested": (wire.JSON, b"[" * 100_000, "no JSON"),
    "a list": (wire.JSON, b"[]", "accepted is an object"),
    "protocol": (wire.JSON, body(protocol=2), "protocol is 2; accepted is 1"),
    "scores": (wire.JSON, body(scores="blue"), "scores is 'blue'; accepted is a list of names"),
    "no prompts": (wire.JSON, body(prompts=[]), "prompts is []"),
    "prompt": (wire.JSON, body(prompts=[{"text": "a"}, {"text": 3}]), "prompt 1 has the text 3; accepted is a text"),
    "label": (wire.JSON, body(prompts=[{"text": "a", "label": "bad"}] * 2), "prompt 0 has the label 'bad'"),
    "count": (wire.JSON, body(images=[PNG]), "there are 1 images and 2 prompts"),
    "no base64": (wire.JSON, body(images=["%%%", PNG]), "image 0 is no PNG file in base64"),
    "no PNG": (wire.JSON, body(images=["R0lGODdhAQABAIAAAP///////ywAAAAAAQABAAACAkQBADs=", PNG]), "image 0 is no PNG"),
    "bomb": (wire.JSON, wire.encode(LARGE, "png"), "the images have 48000000 bytes; accepted are 40000000"),
    "pickle": ("application/octet-stream", b"\x80\x04K\x01.", "accepted are application/json and application/x-safe"),
    "tensors cut": (wire.SAFETENSORS, TENSORS[:20], "ends within its header"),
    "no tensors": (wire.SAFETENSORS, TENSORS[:-5], "no safetensors file"),
    "no metadata": (wire.SAFETENSORS, save({"images": torch.zeros(1)}), "the metadata is null"),
    "float": (
        wire.SAFETENSORS,
        save({"images": torch.zeros(1, 3, 2, 2)}, {"protocol": "1", "scores": '["a"]', "prompts": '[{"text": "a"}]'}),
        "the tensor images is [1, 3, 2, 2] of float32; accepted is [N, 3, h, w] of uint8",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_is_wrong(name: str) -> None:
    kind, sent, says = WRONG[name]
    with pytest.raises(wire.WrongRequest, match=re.escape(says)):
        wire.decode(kind, sent, 40_000_000)


def test_a_request_that_is_right() -> None:
    request = wire.decode(wire.JSON, body())
    assert request.prompts == (Prompt("a cat", POSITIVE), Prompt("blood", NEGATIVE, "violence", 3))
    assert torch.equal(request.images, wire.pixels(IMAGES[:2]))


def test_the_documentation_shows_the_very_bytes() -> None:
    page = (ROOT / "docs" / "reward-service.md").read_text(encoding="utf-8")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2).contiguous()
    (sent,) = re.findall(r'^\{"protocol": 1, .*"images".*$', page, flags=re.MULTILINE)
    (length,) = re.findall(r"^Content-Length: (\d+)$", page, flags=re.MULTILINE)
    assert len(sent) == int(length)
    size, header, spaces, tensor = re.findall(
        r"^((?:[0-9a-f]{2} ){8}).*\n(\{.*\}) .*spaces up to (\d+) bytes.*\n((?:[0-9a-f]{2} ){12})",
        page,
        flags=re.MULTILINE,
    )[0]
    raw = bytes.fromhex(size) + header.encode().ljust(int(spaces)) + bytes.fromhex(tensor)
    for kind, shown in ((wire.JSON, sent.encode()), (wire.SAFETENSORS, raw)):
        request = wire.decode(kind, shown)
        assert request.scores == ("ocr",)
        assert request.prompts == (Prompt("a red square", POSITIVE, id=7),)
        assert torch.equal(request.images, red)
    assert wire.read_hello(re.findall(r'^\{"protocol": 1, "scores": .*\]\}$', page, flags=re.MULTILINE)[0].encode())
    (answer,) = re.findall(r'^\{"scores": .*$', page, flags=re.MULTILINE)
    assert wire.read_scores(answer.encode(), ["ocr"], 1) == {"ocr": [0.25]}
    (error,) = re.findall(r'^\{"error": .*$', page, flags=re.MULTILINE)
    assert wire.read_error(error.encode()).startswith(": ")


# --- trainings, and the server of the examples -----------------------------------------------------------------------

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


@pytest.mark.slow
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

    serving = [*local, "--token-env", "REWARD_TOKEN", "--megabytes", "40", "--config", str(config_file)]
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
        assert ask(url + "/score", bytes(40_000_001), token=TOKEN)[0] == 413
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
