"""The real library, where it is installed: what it wrote is read back from its database."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import fastgrpo
from support import ROOT

pytest.importorskip("trackio")

# In a process of its own: trackio reads where its database is when it is imported.
PROGRAM = """
import sys
from pathlib import Path
from fastgrpo.run.logs.registry import SINKS
from fastgrpo.run.logs.worker import Logs
from support.logs import TABLE, a_run, entry
folder = Path(sys.argv[1])
log = {"project": "safe", "tags": ("a", "b"), "mode": "offline"}
SINKS["trackio"].check(a_run(folder, "trackio", **log).settings)
first = Logs(a_run(folder, "trackio", **log), SINKS)
first.put(entry(0, pictures={"samples": folder / "grid.png"}))
first.put(entry(1, tables={"evaluation/shapes/unsafe": TABLE}))
first.put(entry(2))
first.close()
again = Logs(a_run(folder, "trackio", finished=1, **log), SINKS)
for step in (0, 2, 3):
    again.put(entry(step))
again.close()
assert [*first.warnings(), *again.warnings()] == []
from trackio.sqlite_storage import SQLiteStorage
(record,) = SQLiteStorage.get_run_records("safe")
logs = SQLiteStorage.get_logs("safe", record["name"], run_id=record["id"])
config = SQLiteStorage.get_run_config("safe", record["name"], run_id=record["id"])
import json
print(json.dumps({"run": record, "logs": logs, "config": config}, default=str))
"""


@pytest.mark.slow
def test_a_run_is_in_the_database_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    Image.new("RGB", (4, 3), (250, 0, 0)).save(folder / "grid.png")
    path = ":".join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
    variables = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": path}
    variables |= {"TRACKIO_SPACE_ID": "nobody/nowhere", "HF_TOKEN": "hf_secret_of_the_hub"}
    call = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=variables, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["run"]["name"] == "my-run"
    assert found["run"]["id"] == json.loads((folder / "trackio.json").read_text())["id"]
    assert [(row["step"], row["reward/mean"]) for row in found["logs"]] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    picture = tmp_path / "trackio" / "media" / found["logs"][0]["samples"]["file_path"]
    with Image.open(picture) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (250, 0, 0)
    table = found["logs"][1]["evaluation/shapes/unsafe"]
    assert table["_value"][1]["before"] == "–"
    config = found["config"]
    assert (config["fastgrpo_version"], config["tags"]) == (fastgrpo.__version__, ["a", "b"])
    assert config["rollout"]["steps"] == 50
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"hf_secret_of_the_hub" not in file.read_bytes(), file
