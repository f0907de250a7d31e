"""A training that counts what its process does: python -m support.counted FOLDER ARGUMENTS.

FOLDER/RANK.json has `painted`, `looked_at`, `pictures` and `base`, the numbers of images of every call, and `pairs`, of
each optimizer step; FOLDER/RANK.safetensors the gradient of the first step, summed over the processes.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastgrpo import base_pictures, train
from fastgrpo.engine.passes import Passes
from fastgrpo.engine.trainable import Trainable
from fastgrpo.evaluation import samples
from fastgrpo.evaluation.images.painters import DdimPainter
from fastgrpo.evaluation.suites.shapes import ShapesSuite


def main(arguments: Sequence[str]) -> int:
    folder, *argv = arguments
    counts: dict[str, list[int]] = {name: [] for name in ("painted", "looked_at", "pictures", "base", "pairs")}
    file = Path(folder) / os.environ.get("RANK", "0")

    def counted(name: str, call: Callable[..., Any], number: Callable[..., int]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            counts[name].append(number(*args))
            return call(*args, **options)

        return counting

    step = Trainable.step

    def stepped(trainable: Trainable, *args: Any) -> Any:
        if not file.with_suffix(".safetensors").exists():
            weights = trainable.optimizer.weights
            gradients = weights.views(weights.collect_gradients())
            save_file(
                {name: each.clone(memory_format=torch.contiguous_format) for name, each in gradients.items()},
                file.with_suffix(".safetensors"),
            )
        return step(trainable, *args)

    places: list[tuple[str, Any, str, Callable[..., int]]] = [
        ("painted", DdimPainter, "__call__", lambda painter, rows: len(rows)),
        ("looked_at", ShapesSuite, "_detect", lambda suite, images, rows: len(rows)),
        ("pictures", samples, "draw_images", lambda policy, embeds, *_: len(embeds)),
        ("base", base_pictures, "draw_images", lambda policy, embeds, *_: len(embeds)),
        ("pairs", Passes, "learn", lambda engine, pairs, *_: len(pairs)),
    ]
    for name, place, attribute, number in places:
        setattr(place, attribute, counted(name, getattr(place, attribute), number))
    Trainable.step = stepped  # type: ignore[method-assign]
    code = train.main(argv)
    file.with_suffix(".json").write_text(json.dumps(counts))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
