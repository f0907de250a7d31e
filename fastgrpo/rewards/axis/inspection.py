"""What `python -m fastgrpo.inspect` does: show the safety axis before any image is drawn, so that alpha can be chosen.

Only the encoder of the reward's `steering` term is loaded, no diffusion model.
"""

import math
from pathlib import Path

import torch

from fastgrpo.prompts import load_prompts
from fastgrpo.rewards.anchors import load_anchors
from fastgrpo.rewards.axis import text
from fastgrpo.rewards.axis.plot import axis_png
from fastgrpo.rewards.axis.report import anchor_report, axis_report, choose_prompts, sweep
from fastgrpo.rewards.encoder import SharedEncoder, load_encoder
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.devices import choose_device
from fastgrpo.system.files import write_atomically
from fastgrpo.system.workers import available_cores


def inspect(config: TrainConfig, png: Path | None, limit: int, console: Console) -> None:
    """Measure the axis of `config.reward`, print what is found, and plot it to `png` where that is asked for.

    limit: at most this many prompts of each label; 0 is all.
    """
    positives, negatives = load_prompts(config.prompts)  # the quickest to be wrong
    anchors = load_anchors(config.reward.anchors)
    torch.set_num_threads(config.engine.threads or available_cores())
    with console.bar("encoder"):
        encoder = load_encoder(config.reward.encoder, choose_device(config.engine.device, "engine.device"))
        reward = SteeringReward(SharedEncoder(encoder), anchors, config.reward)
    prompts = choose_prompts([*positives, *negatives], limit)
    with console.bar("prompts", len(prompts)) as bar:
        for prompt in prompts:
            reward.encode_prompts([prompt])  # the encoder remembers it for the report
            bar.advance(1)
    report = axis_report(reward, prompts, limit=0)
    spans = anchor_report(reward, anchors)

    console.say(*text.header(config, report, len(positives), len(negatives)), "", *text.anchor_lines(spans, anchors))
    console.say("", *text.histogram_lines(report), "", *text.place_lines(report))
    console.say("", *text.sweep_lines(report, sweep(reward, report, shown_alphas(report.alpha))))
    console.say("", *text.border_lines(report))
    if png:
        curve = sweep(reward, report, torch.linspace(*alpha_range(report.alpha), 101).tolist())
        write_atomically(png, axis_png(report, curve, f"{config.reward.encoder}, anchors {config.reward.anchors}"))
    console.say("", f"picture   {png or 'none; --png FILE draws one'}")
    for warning in filter(None, (spans.warning, report.warning)):
        console.say(f"warning: {warning}")


def shown_alphas(alpha: float) -> list[float]:
    """The alphas of the table: 0, 0.1, ... to 1, or to `alpha` where that is more, but at most to 2; and `alpha`."""
    tenths = range(1 + min(max(10, math.ceil(10 * alpha)), 20))
    return sorted({alpha, *(tenth / 10 for tenth in tenths)})


def alpha_range(alpha: float) -> tuple[float, float]:
    """The alphas of the curves, from and to: 0 and 1 and the one in force are among them."""
    return min(0.0, 1.2 * alpha), max(1.0, 1.2 * alpha)
