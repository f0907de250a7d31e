"""An iteration's requests: a queue that servers' threads take from, while the next images are drawn.

Every server has as many threads as it may have requests at once, so what is encoded and on its way is bounded; what
waits are 8-bit images of one iteration, since its rewards are needed before the next begins.

A server that gives no answer is left alone for a while, longer after each failure in a row; its request goes to another
one that has the same scores. After that while one thread asks it what scores it has, then sends one request, and only
when that is answered do the others go on. An answer that is wrong, or a refusal, excludes the server for that request.
"""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field

from torch import Tensor

from fastgrpo.rewards.service.addresses import read_addresses, read_token
from fastgrpo.rewards.service.exchange import Down, Refused, Server
from fastgrpo.rewards.service.wire import Request, WrongAnswer, encode, pixels
from fastgrpo.rewards.terms import ServiceFailed
from fastgrpo.settings.schema import ServiceConfig
from fastgrpo.system.errors import ConfigError, nearest
from fastgrpo.system.pulse import PULSE
from fastgrpo.types import Prompt

_HELLO = 10.0  # seconds to say which scores there are
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
_LOOK = 1.0  # seconds between signs of life while scores are waited for


class WrongScores(Exception):
    """All servers that have a score answered wrongly. message: begins with the url. image: the first concerned."""

    def __init__(self, message: str, name: str, image: int) -> None:
        super().__init__(message)
        self.name, self.image = name, image


@dataclass
class _Health:
    """What is known of a server. failures: in a row. until: when it may be asked again. answers: whether it has since
    said what it has. busy: threads that ask it now. last: when the last failure was known. why: it failed."""

    failures: int = 0
    until: float = 0.0
    answers: bool = True
    busy: int = 0
    last: float = 0.0
    why: str = ""


@dataclass(eq=False)
class _Job:
    """A request, and what has become of it. start: its first image's number among those of `Service.begin`.

    round: of `Service.cancel`. excluded: index of a server -> why it is not asked again. without: an answer that had no
    number for some image.
    """

    request: Request
    servers: tuple[int, ...]
    start: int
    round: int
    answer: "Future[tuple[dict[str, list[float]], str]]" = field(default_factory=Future)
    failed: Counter[int] = field(default_factory=Counter)
    excluded: dict[int, WrongAnswer | Refused] = field(default_factory=dict)
    without: tuple[dict[str, list[float]], str] | None = None


@dataclass(frozen=True)
class Scores:
    """A score's numbers, one for each image, and the url of the server that gave each."""

    values: list[float]
    servers: list[str]


class Answers:
    """The scores of some images, which are on their way."""

    def __init__(self, service: "Service", jobs: Sequence[_Job]) -> None:
        self._service, self._jobs = service, jobs

    def result(self) -> dict[str, Scores]:
        """Wait for them. Name -> scores, in the images' order.

        Raises ServiceFailed where no server gives an answer, and WrongScores; nothing is asked any more then.
        """
        try:
            answers = [(job, *_waited(job)) for job in self._jobs]
        except (ServiceFailed, WrongScores):
            self._service.cancel()
            raise
        found: dict[str, Scores] = {}
        for job, values, url in answers:
            for name in job.request.scores:
                scores = found.setdefault(name, Scores([], []))
                scores.values.extend(values[name])
                scores.servers.extend([url] * len(job.request))
        return found


def _waited(job: _Job) -> tuple[dict[str, list[float]], str]:
    while True:
        PULSE.mark()  # this process is not stuck: how long a server may take is known
        try:
            return job.answer.result(timeout=_LOOK)
        except NotYet:
            continue


class Service:
    """All servers, and the threads that ask them. Made by `connect`."""

    def __init__(self, servers: Sequence[Server], has: Sequence[Sequence[str]], config: ServiceConfig) -> None:
        """has: the names of each server's scores."""
        self._servers, self._config = tuple(servers), config
        self._has = tuple(frozenset(names) for names in has)
        self._health = [_Health() for _ in servers]
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._chance = random.Random()  # nobody else's: training draws none of its numbers from here
        self._began, self._round = False, 0

    def begin(self, names: Sequence[str], images: Tensor, prompts: Sequence[Prompt]) -> Answers:
        """Ask for these scores of images [N, 3, h, w] float32 in [0, 1] on any device, drawn for N prompts.

        Returns at once, with the images copied. Scores that the same servers have are asked for together.
        """
        whole, size = pixels(images), self._config.batch
        jobs = []
        for start in range(0, len(whole), size):
            part = slice(start, start + size)
            for servers, together in self._groups(names).items():
                jobs.append(_Job(Request(together, tuple(prompts[part]), whole[part]), servers, start, self._round))
        self._start()
        with self._changed:
            self._waiting.extend(jobs)
            self._changed.notify_all()
        return Answers(self, jobs)

    def cancel(self) -> None:
        """Ask for nothing more of what was begun, whether it waits or would be tried again."""
        with self._changed:
            self._round += 1
            self._waiting.clear()

    def _groups(self, names: Sequence[str]) -> dict[tuple[int, ...], tuple[str, ...]]:
        groups: dict[tuple[int, ...], tuple[str, ...]] = {}
        for name in names:
            servers = tuple(index for index, has in enumerate(self._has) if name in has)
            groups[servers] = (*groups.get(servers, ()), name)
        return groups

    def _start(self) -> None:
        if self._began:
            return
        self._began = True
        for index in range(len(self._servers)):
            for _ in range(self._config.requests):
                # A daemon: a program that ends does not wait for what it has asked.
                threading.Thread(target=self._work, args=(index,), daemon=True, name="reward service").start()

    # -----------------------------------------------------------------------------------------------------------------
    # The threads of a server

    def _work(self, index: int) -> None:
        health = self._health[index]
        while True:
            with self._changed:
                job = self._next(index)
                health.busy += 1
            began = time.monotonic()
            try:
                if job:
                    self._ask(index, job, began)
                else:
                    self._look(index, began)
            finally:
                with self._changed:
                    health.busy -= 1
                    self._changed.notify_all()

    def _next(self, index: int) -> _Job | None:
        """Wait until there is something to do: a request, or None where the server is to be looked at first."""
        health = self._health[index]
        while True:
            job = next((job for job in self._waiting if self._may(index, job)), None)
            pause = health.until - time.monotonic() if health.failures else 0.0
            if job and (not health.failures or (not health.busy and pause <= 0)):
                if health.failures and not health.answers:
                    return None
                self._waiting.remove(job)
                return job
            self._changed.wait(pause if job and pause > 0 else None)

    def _may(self, index: int, job: _Job) -> bool:
        return index in job.servers and index not in job.excluded and job.failed[index] <= self._config.retries

    def _look(self, index: int, began: float) -> None:
        try:
            self._servers[index].names(_HELLO)
        except (Down, Refused, WrongAnswer) as error:
            self._failed(index, error, began)
        else:
            self._health[index].answers = True

    def _ask(self, index: int, job: _Job, began: float) -> None:
        server, request, health = self._servers[index], job.request, self._health[index]
        try:
            body = encode(request, self._config.format)
            values = server.scores(body, self._config.format, request.scores, len(request))
        except Down as error:
            job.failed[index] += 1
            self._failed(index, error, began, job)
            return
        except (WrongAnswer, Refused) as error:
            job.excluded[index] = error
        except BaseException as error:  # the thread would end, and the training wait for ever
            job.answer.set_exception(error)
            return
        else:
            with self._changed:
                health.failures, health.answers = 0, True
            if all(map(_all_finite, values.values())):
                job.answer.set_result((values, server.url))
                return
            job.without = values, server.url
            job.excluded[index] = WrongAnswer("gave no finite number")
        with self._changed:
            self._settle(job)

    def _failed(self, index: int, error: Exception, began: float, job: _Job | None = None) -> None:
        """Leave a server alone for a while. What several threads have met at the same time is one failure."""
        health = self._health[index]
        with self._changed:
            now = time.monotonic()
            if began >= health.last:
                health.failures += 1
                pause = min(_FIRST_PAUSE * 2 ** (health.failures - 1), _LONGEST_PAUSE)
                pause = max(pause * self._chance.uniform(0.5, 1.5), getattr(error, "wish", 0.0))
                health.until, health.last = now + pause, now
            health.answers, health.why = False, str(error)
            if job:
                self._settle(job)
            for other in [each for each in self._waiting if index in each.servers]:
                if self._lost(other):
                    self._waiting.remove(other)
                    self._settle(other)

    def _lost(self, job: _Job) -> bool:
        """Whether no server is left that may answer."""
        tries = self._config.retries
        left = [index for index in job.servers if index not in job.excluded]
        return not any(self._health[each].failures <= tries and job.failed[each] <= tries for each in left)

    def _settle(self, job: _Job) -> None:
        """Put a request back to the front of the queue, or say what has become of it."""
        if job.round != self._round:
            return
        if not self._lost(job):
            self._waiting.appendleft(job)
            self._changed.notify_all()
            return
        down = [index for index in job.servers if index not in job.excluded]
        urls = {index: self._servers[index].url for index in job.servers}
        if down:
            reasons = ", and ".join(f"{urls[index]} {self._health[index].why}" for index in down)
            again = f" after {self._config.retries + 1} tries" if self._config.retries else ""
            job.answer.set_exception(ServiceFailed(f"reward.service.urls: {reasons}{again}"))
        elif job.without:
            job.answer.set_result(job.without)  # engine.not_finite says what becomes of it
        else:
            wrong = [index for index, error in job.excluded.items() if isinstance(error, WrongAnswer)]
            index = next(iter(wrong or job.excluded))
            message = f"{urls[index]} {job.excluded[index]}"
            if wrong:
                job.answer.set_exception(WrongScores(message, job.request.scores[0], job.start))
            else:
                job.answer.set_exception(ServiceFailed(f"reward.service.urls: {message}"))


def _all_finite(values: Sequence[float]) -> bool:
    return all(value - value == 0 for value in values)


def connect(config: ServiceConfig, names: Sequence[str]) -> Service:
    """Ask all servers which scores they have, and look whether every one of `names` is among them. Raises ConfigError.

    Nothing is tried twice here: whoever starts a training can mend it at once.
    """
    token = read_token(config)
    servers = [Server(address, token, config.timeout) for address in read_addresses(config)]
    has = [_hello(server, bool(token)) for server in servers]
    for name in names:
        if not any(name in each for each in has):
            known = sorted({each for scores in has for each in scores})
            asked = f"reward.terms: 'service:{name}': no server has this score{nearest(name, known)}"
            told = [f"{server.url} has {', '.join(each) or 'none'}" for server, each in zip(servers, has, strict=True)]
            raise ConfigError(f"{asked}; {'; '.join(told)}.")
    return Service(servers, has, config)


def _hello(server: Server, shows_token: bool) -> tuple[str, ...]:
    accepted = "accepted are servers that speak the protocol of docs/reward-service.md"
    try:
        return server.names(_HELLO)
    except Refused as error:
        if error.status in (401, 403):
            what = "does not accept the token of reward.service.token" if shows_token else "asks for a token"
            accepted = "accepted is, in reward.service.token, the name of the environment variable that holds its token"
            raise ConfigError(f"reward.service.urls: {server.url} {what} ({error}); {accepted}.") from error
        raise ConfigError(f"reward.service.urls: {server.url} {error}; {accepted}.") from error
    except (Down, WrongAnswer) as error:
        raise ConfigError(f"reward.service.urls: {server.url} {error}; {accepted}.") from error
