"""Made-up runs for the report: everything that a run keeps for its page, without a training."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from fastgrpo.settings.schema import ModelConfig, TrainConfig
from fastgrpo.settings.toml import dump_toml
from fastgrpo.system.sheets import CAPTION_WIDTH, GAP
from fastgrpo.types import NEGATIVE, POSITIVE
from support.evaluation import result_of

EVERY = 5  # iterations between two evaluations
ATTACK = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
"""A prompt that must stay text."""


def write_run(
    folder: Path, iterations: int = 100, side: int = 64, metrics: int = 6, model: str = "shapes", seed: int = 0
) -> Path:
    """A finished run. side: of its pictures, in pixels. metrics: how many names of no chart of their own it logged."""
    (folder / "samples").mkdir(parents=True)
    config = TrainConfig(iterations=iterations, seed=seed, model=ModelConfig(path=model))
    (folder / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    lines = [json.dumps(_record(i, iterations, metrics, seed)) for i in range(1, iterations + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = {"metrics": {"eval/unsafe": 0.8, "eval/composition": 0.5}}
    (folder / "evaluation_before.json").write_text(json.dumps(before), encoding="utf-8")
    _write_samples(folder / "samples", iterations, side)
    _write_evaluation(folder)
    sides = {
        label: [
            {"text": ATTACK, "category": "hate", "before": at + k / 100, "after": at + k / 100 + shift}
            for k in range(20)
        ]
        for label, at, shift in ((POSITIVE, 0.1, 0.0), (NEGATIVE, -0.4, 0.3))
    }
    axis = {"alpha": 0.3, "mode": "unsafe_only", "prompts": sides}
    (folder / "axis.json").write_text(json.dumps(axis), encoding="utf-8")
    return folder


def _record(iteration: int, iterations: int, metrics: int, seed: int) -> dict[str, float]:
    share = iteration / iterations
    record = {"iteration": iteration, "seconds": 10.0 * iteration, "reward/mean": 0.1 + share / (2 + seed)}
    record |= {"reward/positive_mean": 0.3, "reward/negative_mean": share, "clip/fraction": 0.25 * (iteration % 7) / 7}
    record |= {"reward/safety_positive": 0.2, "reward/safety_negative": share - 0.5, "grad/norm": 1.23456789 + share}
    record |= {f"other/{k}": (k + 1) * share + iteration % (k + 3) for k in range(metrics)}
    if iteration % EVERY == 0:
        record |= {"eval/unsafe": 0.8 - 0.6 * share, "eval/composition": 0.5 + 0.2 * share}
    return record


def _write_samples(folder: Path, iterations: int, side: int) -> None:
    """Grids of four pictures for each of eight prompts, with as much in them as photographs."""
    texts = [ATTACK, *(f"a photo of prompt {k}, with a rather long text that has to be broken" for k in range(7))]
    rows = [
        {"text": text, "label": NEGATIVE if k < 4 else POSITIVE, "category": "hate" if k < 4 else "", "id": k}
        for k, text in enumerate(texts)
    ]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    small = Image.effect_noise((4 * 24, len(rows) * 24), 90).convert("RGB")
    sheet = Image.new("RGB", (CAPTION_WIDTH + 4 * (side + GAP), len(rows) * (side + GAP)), "white")
    sheet.paste(small.resize((4 * (side + GAP), sheet.height), Image.Resampling.BICUBIC), (CAPTION_WIDTH, 0))
    ImageDraw.Draw(sheet).text((4, 4), "caption", "black")
    sheet.save(folder / "before.png", compress_level=1)
    data = (folder / "before.png").read_bytes()
    for iteration in range(EVERY, iterations, EVERY):
        (folder / f"iter-{iteration:06d}.png").write_bytes(data)
    (folder / "after.png").write_bytes(data)


def _write_evaluation(run: Path) -> None:
    result = result_of(
        ({"hate": (16, 20), "violence": (12, 20)}, {"counting": (5, 10)}),
        ({"hate": (4, 20), "violence": (14, 20)}, {"counting": (7, 10)}),
        ("violence",),
    )
    root = run / "evaluation" / "in-training"
    for stage, hits in (("before", 10), ("after", 25)):
        folder = root / stage / "shapes"
        (folder / "images").mkdir(parents=True)
        ids = [f"{k:06d}" for k in range(40)]
        values = {id: float(k < hits) for k, id in enumerate(ids)}
        metric = {"name": "unsafe", "binary": True, "better": "lower", "values": values}
        (folder / "shapes.verdicts.json").write_text(json.dumps({"metrics": [metric]}), encoding="utf-8")
        rows = [{"id": id, "text": f"{ATTACK} {id}"} for id in ids]
        (folder / "manifest.json").write_text(json.dumps({"images": rows}), encoding="utf-8")
        for id in ids:
            Image.effect_noise((32, 32), 60).save(folder / "images" / f"{id}.png")
    (root / "evaluation.json").write_text(json.dumps(result), encoding="utf-8")
