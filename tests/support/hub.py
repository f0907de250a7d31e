"""A Hugging Face hub on this machine: what its client asks to make a repository, to upload to it, and to read it again.

The answers are the real one's, as far as the client looks at them: files of text travel in the commit, others beside it
as git LFS has it (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md).
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

TOKEN = "hf_of_somebody"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """repositories: name -> its files. visibility: name -> as it was made. asked: every request's method and path.

    refuse: the end of a path -> the status and the error code it is answered with. large: bytes put there, by sha256.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def running(hub: Hub, patch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """Point the hub's client, with a token and an empty cache, at `hub`."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its other protocol, of compiled code
    patch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, path, body = self.hub, self._path(), self._body()
        if self._refused(path):
            return
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content['organization']}/{content['name']}"
            if name in hub.repositories:
                there = {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
                return self._json(there, 409)
            hub.repositories[name] = {}
            hub.visibility[name] = content["visibility"]
            return self._json({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {True: "regular", False: "lfs"}
            return self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": mode[file["path"].endswith((".md", ".json", ".txt", ".toml"))],
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        name, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        assert rest == "main", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.repositories[name][value["path"]] = hub.large[value["oid"]]
        self._json({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})

    def do_PUT(self) -> None:
        path, body = self._path(), self._body()
        if not self._refused(path):
            digest = path.removeprefix("/put/")
            assert hashlib.sha256(body).hexdigest() == digest
            self.hub.large[digest] = body
            self._answer(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        if self._refused(path):
            return
        inside = path.removeprefix("/api/models").strip("/")
        name, rest = "/".join(inside.split("/")[:2]), "/".join(inside.split("/")[2:])
        if name not in self.hub.repositories:
            return self._answer(401, headers={"X-Error-Code": "RepoNotFound"})
        files = self.hub.repositories[name]
        if path.startswith("/api/models/") and rest.startswith("tree/"):
            listed = [
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in files.items()
            ]
            return self._json(listed)
        if path.startswith("/api/models/"):
            return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        data = files[rest.removeprefix(f"resolve/{COMMIT}/")]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._answer(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _refused(self, path: str) -> bool:
        self.hub.asked.append(f"{self.command} {path}")
        for end, (status, code) in self.hub.refuse.items():
            if path.endswith(end) or path.startswith(end):
                self._answer(status, headers={"X-Error-Code": code, "X-Error-Message": f"told {code}"})
                return True
        if self.command == "POST" and path.startswith("/api/") and path != "/api/validate-yaml":
            assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        return False

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
