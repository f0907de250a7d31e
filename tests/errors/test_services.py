"""Servers of rewards that cannot be asked."""

from collections.abc import Callable

import pytest

from support.mistakes import A_RUN, TRAIN, Mistake, mistakes
from support.reward_service import serving

SERVICE = "service.toml --run run --iterations 1 "
SERVERS = "accepted are servers that speak the protocol of docs/reward-service.md."
SERVICES = [
    Mistake(
        "service without servers",
        TRAIN + "--reward.terms service:ocr",
        "reward.service.urls = []: a term service:NAME needs servers; accepted is http://HOST:PORT or ...",
    ),
    Mistake(
        "service's address",
        TRAIN + "--reward.terms service:ocr --reward.service.urls judge:8000",
        "reward.service.urls = 'judge:8000': accepted is http://HOST:PORT or https://HOST:PORT, with or without a "
        "path.",
    ),
    Mistake(
        "password in a service's address",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://me:hunter2@judge:8000",
        "reward.service.urls: an address with a user's name or password in it; accepted are addresses without, ...",
    ),
    Mistake(
        "same server twice",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://judge http://judge:80/",
        "reward.service.urls = 'http://judge': accepted is every server once.",
    ),
    Mistake(
        "a service's token in place of a name",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://judge --reward.service.token hunter2",
        "reward.service.token names an environment variable that is not set; accepted is the name of one that holds "
        "the token, not the token.",
    ),
    Mistake(
        "server that is not there",
        TRAIN + "--reward.terms service:ocr --reward.service.urls http://127.0.0.1:9",
        f"reward.service.urls: http://127.0.0.1:9 cannot be asked (Connection refused); {SERVERS}",
    ),
    Mistake(
        "score that no server has",
        SERVICE + "--reward.terms service:bleu",
        "reward.terms: 'service:bleu': no server has this score (did you mean blue?); http://127.0.0.1:... has blue, "
        "red.",
        given=(serving(),),
    ),
    Mistake(
        "another version of the service's protocol",
        SERVICE,
        f"reward.service.urls: http://127.0.0.1:... speaks version 2 of the protocol; accepted is 1; {SERVERS}",
        given=(serving(hello={"protocol": 2, "scores": []}),),
    ),
    Mistake(
        "server of something else",
        SERVICE,
        f"reward.service.urls: http://127.0.0.1:... answered what is no JSON: '<html>'; {SERVERS}",
        given=(serving(hello=b"<html>"),),
    ),
    Mistake(
        "server that wants a token",
        SERVICE,
        "reward.service.urls: http://127.0.0.1:... asks for a token (answered 401: 'no: None'); accepted is, in "
        "reward.service.token, the name of the environment variable that holds its token.",
        given=(serving(hello=401),),
    ),
    Mistake(
        "wrong token for a server",
        SERVICE + "--reward.service.token REWARD_TOKEN",
        "reward.service.urls: http://127.0.0.1:... does not accept the token of reward.service.token (answered 401: "
        "'no: Bearer ***'); accepted is, in reward.service.token, the name of ...",
        given=(serving(hello=401), lambda scene: scene.patch.setenv("REWARD_TOKEN", "hunter2")),
    ),
    Mistake(
        "server that fails",
        SERVICE + "--reward.service.retries 0 --engine.threads 1 --eval.every 0 --guard.action off",
        "reward.service.urls: http://127.0.0.1:... answered 500: 'because of None'; there is no checkpoint yet.",
        given=(serving(always="500"),),
        code=1,
        loaded="model",
        leaves=A_RUN,
    ),
    Mistake(
        "server that gives too few numbers",
        SERVICE + "--engine.threads 1 --eval.every 0 --guard.action off",
        "reward term 'service:blue': http://127.0.0.1:... gave 5 numbers as the score 'blue', where a list of 6 is "
        "needed, for images the first of which is of prompt ...; prompt and image are in run/broken_reward.json and "
        "broken_reward.png beside it; there is no checkpoint yet.",
        given=(serving(always="short"),),
        code=1,
        loaded="model",
        leaves=(*A_RUN, "run/broken_reward.*"),
    ),
]


@pytest.mark.slow
@mistakes(*SERVICES)
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
