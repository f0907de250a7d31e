"""Terms service:NAME: what is sent, and what is made of every way to fail."""

import json
import re
import threading
from collections.abc import Callable

import pytest
import torch

from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.service import client, wire
from fastgrpo.rewards.service.addresses import read_addresses
from fastgrpo.rewards.terms import BrokenReward, ServiceFailed, parse_terms
from fastgrpo.settings.schema import ServiceConfig
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import POSITIVE, Prompt
from support.reward_service import TOKEN, Fake, read_images
from support.rewards import GROUP, PROMPTS, pictures
from support.service_requests import IMAGES, config, means


def scores(*servers: Fake, broken: list[BrokenReward] | None = None, **settings) -> dict[str, torch.Tensor]:
    return load_reward(config(*servers, **settings), "cpu").score(IMAGES, PROMPTS, GROUP, broken)


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
    first, second = fake(), fake(hello={"protocol": 1, "scores": ["blue"]})
    full = threading.Event()

    def hold() -> None:
        """Until both have as many as they may: neither can do all the work before the other has begun."""
        if first.most == second.most == 2:
            full.set()
        assert full.wait(50.0)

    first.before = second.before = hold
    prompts = [Prompt(f"{number} dogs", POSITIVE, id=number) for number in range(8)]
    images = pictures(64)
    reward = load_reward(
        config(first, second, terms=("service:blue", "service:red"), batch=4, requests=2, timeout=60.0), "cpu"
    )
    raw = reward.score(images, prompts, 8)
    want = (images.double() * 255).round().mean(dim=(2, 3)).float()
    assert torch.equal(raw["blue"].flatten(), want[:, 2])
    assert torch.equal(raw["red"].flatten(), want[:, 0])
    assert len(first.posts) + len(second.posts) == 2 * 16
    assert second.posts, "one has done everything"
    assert all(json.loads(body)["scores"] == ["blue"] for body in second.posts)
    assert (first.most, second.most) == (2, 2)


@pytest.mark.parametrize("fault", ["500", "429", "503", "dead", "cut", "slow"])
def test_a_failure_is_tried_again(fake: Callable[..., Fake], fault: str) -> None:
    server = fake(fault, fault)
    # A machine that is busy may be slow as well, which is tried again often enough.
    waits = {"timeout": 0.3, "retries": 50} if fault == "slow" else {}
    assert torch.equal(scores(server, requests=2, batch=6, **waits)["blue"], means(2))
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
        reward = load_reward(config(lost, other, batch=1, requests=1, timeout=60.0), "cpu")
    assert torch.equal(reward.score(IMAGES, PROMPTS, GROUP)["blue"], means(2))
    assert not lost.posts
    asked = threading.Event()
    lost.before, other.before = asked.set, lambda: asked.wait(50.0)
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
