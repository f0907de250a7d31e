"""Models from the hub, for which a server on this machine stands, with the answers and headers of the real one."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from fastgrpo.models.check import describe
from fastgrpo.models.load import load_components
from fastgrpo.settings.schema import ModelConfig
from support.models import PARTS, assert_equal, refusal
from support.sd_pipelines import REVISION


class Hub(BaseHTTPRequestHandler):
    folder: Path
    log: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        repository = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        if repository not in ("someone/open", "someone/gated"):
            return self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        if "/absent" in path:
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith("/api/models/") and "/tree/" in path:
            return self.json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                    for name, file in files.items()
                ]
            )
        if path.startswith("/api/models/"):
            return self.json({"id": repository, "sha": REVISION, "siblings": [{"rfilename": name} for name in files]})
        if repository == "someone/gated":
            return self.answer(403, headers={"X-Error-Code": "GatedRepo"})
        name = path.partition(f"/resolve/{REVISION}/")[2]
        if self.command == "GET":
            self.log.append(name)
        content = files[name].read_bytes()
        return self.answer(200, content, {"ETag": f'"{abs(hash(content)):040d}"', "X-Repo-Commit": REVISION})

    def json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content=b"", headers=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """Point the hub's client, with an empty cache, at a server with the repositories someone/open and someone/gated."""
    folder = tmp_path / "repository"
    shutil.copytree(folders["sd1"], folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    handler = type("Handler", (Hub,), {"folder": folder, "log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_is_asked_for_what_is_needed_and_no_more(hub, pipelines):
    describe(ModelConfig(path="someone/open"))
    assert not any(name.endswith((".safetensors", ".bin")) for name in hub.log)
    components = load_components(ModelConfig(path="someone/open"), torch.float32)
    for part in PARTS:
        assert_equal(getattr(components, part), getattr(pipelines["sd1"], part))
    weights = [name for name in hub.log if name.endswith((".safetensors", ".bin"))]
    assert sorted(weights) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    (hub.folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "as .bin, which would have to be executed" in refusal(path="someone/open")


def test_what_is_in_the_way_of_the_hub_is_told_apart(hub, monkeypatch):
    assert "nor such a repository on the Hugging Face hub" in refusal(path="someone/absent")
    assert "gated" in (message := refusal(path="someone/gated"))
    assert "hf auth login" in message
    assert "has no revision 'absent'" in refusal(path="someone/open", revision="absent")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "hub cannot be reached" in (message := refusal(path="someone/new"))
    assert "give a diffusers folder" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "hub cannot be reached" in refusal(path="someone/new")
