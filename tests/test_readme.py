"""README's Python runs as it stands, in an interpreter that knows nothing of fastgrpo but that it is installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = ROOT / "fastgrpo" / "shapes" / "weights" / "pipeline"


@pytest.mark.slow
def test_readmes_python_runs_in_an_interpreter_of_its_own(tmp_path: Path) -> None:
    """Beside a CPU torch and torchvision's CUDA build, without a word of fastgrpo: its entry point is enough."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert any("from diffusers import" in block for block in blocks)
    (checkpoint,) = set(re.findall(r'"(runs/[^"]+)/unet"', "".join(blocks)))
    (tmp_path / checkpoint).mkdir(parents=True)
    (tmp_path / checkpoint / "unet").symlink_to(WEIGHTS / "unet")
    (tmp_path / WEIGHTS.relative_to(ROOT).parent).mkdir(parents=True)
    (tmp_path / WEIGHTS.relative_to(ROOT)).symlink_to(WEIGHTS)
    draws = 'print(pipe("a red circle", num_inference_steps=2, output_type="np").images.shape)'
    program = "\n".join([*blocks, draws])
    # -I: neither the folder nor the environment's variables add a place to import from.
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(1, 32, 32, 3)", done.stderr
