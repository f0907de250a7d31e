"""`python -m fastgrpo.sample` on tiny runs: pictures, and where they go."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgrpo import rollout, sample
from fastgrpo.policy import Policy, load_policy
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system import pictures
from fastgrpo.system.workers import available_cores
from support.runs import CPU, NEGATIVES, POSITIVES, newest, resumed, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]


def pixels(images: Tensor) -> np.ndarray:
    """[N, h, w, 3] int, of images in [0, 1]."""
    return np.floor(images.permute(0, 2, 3, 1).numpy().astype(np.float64) * 255 + 0.5).astype(int)


def read(folder: Path, name: str) -> np.ndarray:
    """[N, h, w, 3] int: NAME-*.png in the order of their names."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{name}-*.png"))]).astype(int)


def draw(policy: Policy, texts: list[str], seeds: list[int], steps: int, guidance: float, eta: float) -> np.ndarray:
    embeds = torch.cat([policy.encode([text]) for text in texts for _ in seeds])
    schedule = make_schedule(policy.scheduler_config, steps, eta, CPU)
    return pixels(rollout.draw_images(policy, embeds, schedule, guidance, seeds * len(texts)))


@pytest.mark.parametrize(
    ("kind", "weights", "flags", "settings"),
    [
        ("full", "trained", [], (3, 5.0, 1.0)),
        ("full", "ema", ["--steps", "2", "--guidance", "2", "--eta", "0.5"], (2, 2.0, 0.5)),
        ("lora", "trained", [], (3, 5.0, 1.0)),
        ("lora", "ema", [], (3, 5.0, 1.0)),
    ],
)
def test_images_are_those_of_the_two_policies(
    runs: dict[str, Path],
    tiny_pipeline: Path,
    tmp_path: Path,
    kind: str,
    weights: str,
    flags: list[str],
    settings: tuple[int, float, float],
) -> None:
    texts, seeds = ["a cat by the sea", "blood", "x"], [7, 8, 9]
    argv = [str(runs[kind]), "--prompts", *texts, "--images-per-prompt", "3", "--seed", "7", "--weights", weights]
    argv += ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "both.png"), *flags]
    assert sample.main(argv) == 0
    assert (tmp_path / "images" / "prompts.txt").read_text().splitlines() == texts
    numbers = [f"000{prompt}-{image}.png" for prompt in (1, 2, 3) for image in (1, 2, 3)]
    names = {f"{name}-{number}" for name in ("base", "tuned") for number in numbers}
    assert {path.name for path in (tmp_path / "images").glob("*.png")} == names

    base, tuned = (read(tmp_path / "images", name) for name in ("base", "tuned"))
    policy = load_policy(ModelConfig(path=str(tiny_pipeline)), CPU, torch.float32, available_cores())
    assert np.array_equal(base, draw(policy, texts, seeds, *settings))
    training = resumed(runs[kind])
    with weights_of(training, weights):
        expected = draw(training.policy, texts, seeds, *settings)
    # Merged adapters compute the same with other roundings: a colour near the middle of two may become its neighbour.
    assert np.abs(tuned - expected).max() <= (1 if kind == "lora" else 0)
    assert np.abs(tuned - base).mean() > 2

    with Image.open(tmp_path / "both.png") as picture:
        sheet = np.asarray(picture).astype(int)
    side = 64  # an image of 16 pixels, each shown as 4 x 4
    for images, left in (
        (base, pictures.CAPTION_WIDTH),
        (tuned, pictures.CAPTION_WIDTH + 3 * (side + pictures.GAP) + 4 * pictures.GAP),
    ):
        for index, image in enumerate(images):
            y = pictures.HEADING_HEIGHT + index // 3 * (side + pictures.GAP)
            x = left + index % 3 * (side + pictures.GAP)
            assert np.array_equal(sheet[y : y + side : 4, x : x + side : 4], image)
    headings = sheet[: pictures.HEADING_HEIGHT, pictures.CAPTION_WIDTH :]
    assert headings.min() < 128  # there is ink


def test_an_image_depends_on_its_own_prompt_and_seed_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    def images(folder: str, *flags: str) -> dict[str, np.ndarray]:
        argv = [
            str(runs["full"]),
            "--images",
            str(tmp_path / folder),
            "--output",
            str(tmp_path / f"{folder}.png"),
            *flags,
        ]
        assert sample.main(argv) == 0
        return {path.stem: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / folder).glob("*.png")}

    many = images("many", "--prompts", "a cat", "a gun", "--images-per-prompt", "3", "--seed", "4", "--batch", "4")
    one = images("one", "--prompts", "a gun", "--images-per-prompt", "1", "--seed", "5")
    for name in ("base", "tuned"):
        # Of another batch: roundings may differ, so that a colour near the middle of two becomes its neighbour.
        assert np.abs(one[f"{name}-0001-1"] - many[f"{name}-0002-2"]).max() <= 1
        assert np.abs(one[f"{name}-0001-1"] - many[f"{name}-0002-1"]).mean() > 2
        assert np.abs(one[f"{name}-0001-1"] - many[f"{name}-0001-2"]).max() > 1


def test_by_default_the_runs_own_prompts_go_to_the_runs_folder(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "samples")
    assert sample.main([str(copied), "--images-per-prompt", "1", "--images", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "prompts.txt").read_text().splitlines() == [*POSITIVES[:4], *NEGATIVES]
    out = capsys.readouterr().out
    assert f"pictures  {copied / 'samples' / 'compare.png'}\n" in out
    assert f"weights   {newest(copied)}, trained\n" in out
    with Image.open(copied / "samples" / "compare.png") as picture:
        assert picture.height == pictures.HEADING_HEIGHT + 7 * (64 + pictures.GAP)


def test_a_comparison_never_replaces_another(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(copied), "--prompts", "a cat", "--images-per-prompt", "1", "--steps", "1"]
    (copied / "samples" / "compare-2.png").write_text("mine")
    contents = []
    for name in ("compare.png", "compare-3.png"):
        assert sample.main(argv) == 0
        assert f"pictures  {copied / 'samples' / name}\n" in capsys.readouterr().out
        contents.append((copied / "samples" / name).read_bytes())
    assert contents[0] == (copied / "samples" / "compare.png").read_bytes()
    assert (copied / "samples" / "compare-2.png").read_text() == "mine"


def test_prompts_of_a_file_come_after_those_of_the_command_line(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("one\n\ntwo\n")
    argv = [str(runs["full"]), "--prompts", "zero", "--prompt-file", str(tmp_path / "mine.txt")]
    argv += ["--images-per-prompt", "1", "--steps", "1", "--output", str(tmp_path / "a.png")]
    assert sample.main([*argv, "--images", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "prompts.txt").read_text() == "zero\none\ntwo\n"
