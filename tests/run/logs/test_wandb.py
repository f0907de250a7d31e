"""The real library, offline: what it wrote is read back from its own files."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import fastgrpo
from fastgrpo.run.logs.registry import SINKS
from fastgrpo.run.logs.worker import Logs
from fastgrpo.settings.schema import TrainConfig
from support import ROOT
from support.logs import TABLE, a_run, entry, texts_in, values_of, wandb_records

pytest.importorskip("wandb")
KEY = "5" * 40
PASSWORD = "correct-horse"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever this machine is logged in to."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))


def test_an_offline_run_holds_all_that_was_logged_and_a_resumed_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_hub")
    folder = tmp_path / "my-run"
    folder.mkdir()
    Image.new("RGB", (4, 3), (250, 0, 0)).save(folder / "grid.png")
    config = TrainConfig(seed=7)
    terms = (f"mine.py:f?at=https://me:{PASSWORD}@judge.example/x", "hf_secret_of_the_hub")
    config = replace(config, reward=replace(config.reward, terms=terms))
    log = {"project": "safe", "tags": ("a", "two words"), "mode": "offline", "config": config}
    try:
        run = a_run(folder, "wandb", **log)
        first = Logs(run, SINKS)
        first.put(entry(0, pictures={"samples": folder / "grid.png"}))
        first.put(entry(1))
        first.put(entry(2, tables={"evaluation/shapes/unsafe": TABLE}))
        first.close()
        again = Logs(a_run(folder, "wandb", finished=2, **log), SINKS)
        again.put(entry(3))
        again.close()
    finally:
        wandb.teardown()
    assert [*first.warnings(), *again.warnings()] == []
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1  # one id for both
    assert files[0].stem.removeprefix("run-") == json.loads((folder / "wandb.json").read_text())["id"]
    records = [record for file in files for record in wandb_records(file)]
    (told, _) = [record.run for record in records if record.HasField("run")]
    assert (told.display_name, told.project, list(told.tags)) == ("my-run", "safe", ["a", "two words"])
    settings = values_of(told.config.update)
    assert json.loads(settings["seed"]) == 7
    assert json.loads(settings["rollout"])["steps"] == config.rollout.steps
    assert json.loads(settings["fastgrpo_version"]) == fastgrpo.__version__
    assert json.loads(settings.get("git_commit", '""')) == run.commit
    history = [values_of(record.history.item) for record in records if record.HasField("history")]
    assert [json.loads(row["_step"]) for row in history] == [0, 1, 2, 3]
    assert [json.loads(row["reward/mean"]) for row in history] == [0, 0.25, 0.5, 0.75]
    picture = files[0].parent / "files" / json.loads(history[0]["samples/path"])
    with Image.open(picture) as image, Image.open(folder / "grid.png") as saved:
        assert image.tobytes() == saved.tobytes()
    path = json.loads(history[2]["evaluation/shapes/unsafe/path"])
    written = json.loads((files[0].parent / "files" / path).read_text())
    assert (written["columns"], written["data"]) == (list(TABLE.columns), [list(row) for row in TABLE.rows])
    for file, content in texts_in(folder).items():
        for secret in (KEY, PASSWORD, "hf_secret_of_the_hub"):
            assert secret.encode() not in content, file


HANGING = """
import sys, time
from pathlib import Path
from fastgrpo.run.logs import worker
from fastgrpo.run.logs.registry import SINKS
from support.logs import a_run, entry
worker.CLOSING = 1.0
run = a_run(Path(sys.argv[1]), "wandb", mode="online")
SINKS["wandb"].check(run.settings)
logs = worker.Logs(run, SINKS)
began = time.monotonic()
for step in range(1000):
    logs.put(entry(step))
assert time.monotonic() - began < 30
while logs._workers[0]._called is None or "wandb.sdk.wandb_init" not in sys.modules:
    time.sleep(0.05)
while not (Path(sys.argv[1]) / "wandb").is_dir():
    time.sleep(0.05)
logs.close()
print(*logs.warnings(), sep="\\n")
"""


@pytest.mark.slow
def test_a_server_that_never_answers_keeps_no_program_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left alone, wandb's hook at the program's end would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        path = [str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)]
        monkeypatch.setenv("PYTHONPATH", ":".join(path))
        call = [sys.executable, "-c", HANGING, str(tmp_path)]
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    full, late, lacks = done.stdout.splitlines()
    assert "256 iterations wait" in full
    assert "was not done 1 s after the end" in late
    assert "1000 of 1000 iterations are not there" in lacks
    assert KEY not in done.stdout + done.stderr
