"""Servers of rewards: a small one in the test's process that fails as it is told, and the example as a process."""

import base64
import importlib.util
import io
import json
import multiprocessing
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from support import ROOT
from support.processes import SERVER, free_port

TOKEN = "hunter2-hunter2"


@dataclass
class Fake:
    """Scores `blue`, the mean of the blue channel's bytes, and `red`. By the protocol's text alone: without fastgrpo.

    faults: what it does instead, request by request, names as in `_Handler`; later ones are answered well. always: in
    place of a fault for every request. hello: what GET / says. requests: (path, headers, body) of all. most: how many
    it had at once. before: called before each answer.
    """

    faults: list[str] = field(default_factory=list)
    always: str = ""
    hello: Any = field(default_factory=lambda: {"protocol": 1, "scores": ["blue", "red"]})
    seconds: float = 0.0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    most: int = 0
    before: Callable[[], object] = lambda: None
    port: int = 0

    def __post_init__(self) -> None:
        self.lock, self._now = threading.Lock(), 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def posts(self) -> list[bytes]:
        return [body for path, _, body in self.requests if path == "/score"]

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            yield
        finally:
            with self.lock:
                self._now -= 1

    @contextmanager
    def running(self) -> Iterator["Fake"]:
        class Handler(_Handler):
            fake = self

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def read_images(headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """What a request says beside its images, and these, [N, h, w, 3] uint8."""
    if headers["Content-Type"] == "application/json":
        told = json.loads(body)
        files = [io.BytesIO(base64.b64decode(text)) for text in told.pop("images")]
        return told, np.stack([np.asarray(Image.open(file)) for file in files])
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    told = {name: json.loads(text) for name, text in header["__metadata__"].items()}
    start, end = header["images"]["data_offsets"]
    assert header["images"]["dtype"] == "U8"
    flat = np.frombuffer(body[8 + size + start : 8 + size + end], dtype=np.uint8)
    return told, flat.reshape(header["images"]["shape"]).transpose(0, 2, 3, 1)


class _Handler(BaseHTTPRequestHandler):
    fake: Fake

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._note(b"")
        hello = self.fake.hello
        if isinstance(hello, int):
            self._reply(hello, json.dumps({"error": f"no: {self.headers['Authorization']}"}).encode())
        else:
            self._reply(200, hello if isinstance(hello, bytes) else json.dumps(hello).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._note(body)
        fake = self.fake
        with fake.counted():
            with fake.lock:
                fault = fake.always or (fake.faults.pop(0) if fake.faults else "")
            fake.before()
            time.sleep(fake.seconds)
        # Not counted any more: who has the answer may ask again before this thread goes on.
        self._answer(fault, body)

    def _answer(self, fault: str, body: bytes) -> None:
        told, images = read_images(dict(self.headers), body)
        found = {"blue": images[..., 2], "red": images[..., 0]}
        scores = {name: found[name].mean(axis=(1, 2)).tolist() for name in told["scores"]}
        first = told["scores"][0]
        if fault == "slow":
            time.sleep(1.0)
        elif fault == "short":
            scores[first].pop()
        elif fault == "nan":
            scores[first][-1] = float("nan")
        elif fault == "null":
            scores[first][-1] = None
        elif fault == "text":
            scores[first][0] = "good"
        elif fault == "missing":
            del scores[first]
        elif fault.isdigit():
            self._reply(int(fault), json.dumps({"error": f"because of {self.headers['Authorization']}"}).encode())
            return
        elif fault == "garbage":
            self._reply(200, b"\x80\x04.pickled? Bearer " + TOKEN.encode())
            return
        elif fault == "dead":
            self.close_connection = True
            return
        elif fault == "cut":
            self._reply(200, b'{"scores"', length=1000)
            return
        elif fault == "large":
            self._reply(200, b"[" * 2**22)
            return
        self._reply(200, json.dumps({"scores": scores}).encode())

    def _note(self, body: bytes) -> None:
        with self.fake.lock:
            self.fake.requests.append((self.path, dict(self.headers), body))

    def _reply(self, status: int, body: bytes, length: int | None = None) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # who asked has left
            self.close_connection = True


def serving(**settings: Any) -> Callable[[Any], None]:
    """For a Scene of support.mistakes: a Fake, and service.toml, the config that asks it."""

    def start(scene: Any) -> None:
        fake = scene.cleanup.enter_context(Fake(**settings).running())
        table = f'extends = "tiny.toml"\nreward.terms = ["service:blue"]\nreward.service.urls = ["{fake.url}"]\n'
        (scene.here / "service.toml").write_text(table)

    return start


def example() -> ModuleType:
    """examples/reward_server.py."""
    spec = importlib.util.spec_from_file_location("reward_server", ROOT / "examples" / "reward_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(argv: Sequence[str], output: Path, environment: dict[str, str]) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os._exit(example().main(argv))


@contextmanager
def served(
    output: Path, *argv: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[str, multiprocessing.Process]]:
    """The example in a process of its own: its address, once it answers, and the process."""
    port = free_port()
    process = SERVER.Process(target=_serve, args=([*argv, "--port", str(port)], output, environment or {}))
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, process, output)
        yield url, process
    finally:
        process.kill()
        process.join()


def _await(url: str, process: multiprocessing.Process, output: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.is_alive():
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except urllib.error.HTTPError:  # it asks for a token
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"the server does not answer: {output.read_text()}")
