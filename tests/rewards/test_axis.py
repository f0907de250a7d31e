"""The safety axis: measured numbers against float64 formulas and hand-made vectors."""

import math

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.anchors import ANCHORS, Anchors
from fastgrpo.rewards.axis.report import AxisSide, Bins, Spread, anchor_report, axis_report, choose_prompts, sweep
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.rewards.steering import SteeringReward
from fastgrpo.settings.schema import RewardConfig
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.encoders import AXIS, AXIS_TABLE, TEXTS, TableEncoder, U, reference_direction, unit, write_folder

# isort: split
import torch

MODES = ("always", "unsafe_only", "projection")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_folder(folder)
    return load_encoder(f"local-dir:{folder}", "cpu")


def axis_prompts(positions: list[float], label: str) -> tuple[dict, list[Prompt]]:
    """Prompts at z . v = positions, and the table that puts them there."""
    table = {f"{label} {x}": (x, math.sqrt(1 - x * x), 0.0) for x in positions}
    return table, [Prompt(text, label) for text in table]


NEGATIVE_POSITIONS = [
    -i / 32 for i in range(1, 21)
]  # exact in float32; 19 of the 20 cross at 19/32, the mean at 10.5/32
POSITIVE_POSITIONS = [0.25, 0.5]


def report_at(alpha: float, mode: str = "always"):
    negative_table, negatives = axis_prompts(NEGATIVE_POSITIONS, NEGATIVE)
    positive_table, positives = axis_prompts(POSITIVE_POSITIONS, POSITIVE)
    encoder = TableEncoder(AXIS_TABLE | negative_table | positive_table)
    reward = SteeringReward(encoder, AXIS, RewardConfig(alpha=alpha, mode=mode))
    report = axis_report(reward, positives + negatives)
    # Independently of the crossing formula: on which side the targets really are.
    targets = reward.targets(reward.encode_prompts(negatives), negatives) @ reward.direction
    assert report.still_unsafe == pytest.approx((targets < 0).double().mean().item())
    return report


@pytest.mark.parametrize("mode", ["always", "unsafe_only"])
def test_axis_report_warns_up_to_the_alpha_it_names(mode):
    report = report_at(0.1, mode)
    assert report.alpha_mean == pytest.approx(10.5 / 32)
    assert report.alpha_most == pytest.approx(19 / 32)
    assert report.still_unsafe == 17 / 20  # those beyond 3.2 / 32
    assert "--reward.alpha 0.33" in report.warning  # 10.5 / 32 = 0.328, rounded up
    assert "--reward.alpha 0.60" in report.warning  # 19 / 32 = 0.594
    assert report_at(0.59, mode).warning is not None
    assert report_at(0.60, mode).warning is None


def test_axis_report_spreads():
    report = report_at(0.5, "unsafe_only")
    positive, negative = report.sides[POSITIVE], report.sides[NEGATIVE]
    assert (len(positive), len(negative)) == (2, 20)
    assert torch.equal(positive.after, positive.before)
    assert positive.before.tolist() == POSITIVE_POSITIONS
    assert negative.before.tolist() == NEGATIVE_POSITIONS
    assert Spread.of(positive.before) == Spread(mean=0.375, low=0.25, high=0.5)
    # cos of the steered target: (z . v + a) / |z + a v|
    steered = [(x + 0.5) / math.sqrt(1 + 2 * 0.5 * x + 0.25) for x in NEGATIVE_POSITIONS]
    assert negative.after.tolist() == pytest.approx(steered, abs=32 * U)
    text = "\n".join(report.lines())
    assert "negative (20 prompts)  -0.33 [-0.62, -0.03]" in text
    assert "20%" in text  # 17 / 32 to 20 / 32, four of twenty, lie beyond 0.5


def test_axis_report_projection_needs_a_positive_alpha():
    assert report_at(0.1, "projection").warning is None
    assert report_at(-0.1, "projection").still_unsafe == 1.0


def test_axis_report_with_one_label_and_a_limit():
    table, positives = axis_prompts([i / 100 for i in range(100)], POSITIVE)
    reward = SteeringReward(TableEncoder(AXIS_TABLE | table), AXIS, RewardConfig(alpha=0.0))
    report = axis_report(reward, positives, limit=10)
    assert set(report.sides) == {POSITIVE}
    assert report.sides[POSITIVE].before.tolist() == pytest.approx([i / 10 for i in range(10)])
    assert report.warning is None
    assert not any("negative" in line for line in report.lines())


# --- against the features of a real open_clip model -------------------------------------------------------------------


def features(encoder, texts) -> np.ndarray:
    """[N, E] float64."""
    return np.stack([encoder.encode_text([text])[0].double().numpy() for text in texts])


@pytest.mark.parametrize("mode", MODES)
def test_axis_report_is_the_formula_on_raw_features(encoder, mode):
    prompts = [Prompt(text, POSITIVE if i % 2 else NEGATIVE) for i, text in enumerate(TEXTS)]
    alpha = 0.3
    report = axis_report(SteeringReward(encoder, ANCHORS["shapes"], RewardConfig(alpha=alpha, mode=mode)), prompts)
    v, length = reference_direction(encoder, ANCHORS["shapes"])
    # v errs by some 8 U over the difference's length, a dot product of 32 terms by 32 U; steering chains three of them
    # and divides by a norm that is at least 0.7.
    bound = U * (2 * 3 * 32 + 2 * 8 / length)
    for label in (POSITIVE, NEGATIVE):
        side = report.sides[label]
        assert side.prompts == tuple(prompt for prompt in prompts if prompt.label == label)
        z = features(encoder, [prompt.text for prompt in side.prompts])
        target = z + alpha * v
        if mode == "projection":
            target = z - np.outer(z @ v, v) + alpha * v
        elif mode == "unsafe_only" and label == POSITIVE:
            target = z
        np.testing.assert_allclose(side.before.numpy(), z @ v, rtol=0, atol=bound)
        np.testing.assert_allclose(side.after.numpy(), unit(target) @ v, rtol=0, atol=bound)
        assert np.abs(unit(target) @ v - z @ v).max() > 20 * bound or (mode, label) == ("unsafe_only", POSITIVE)


@pytest.mark.parametrize("name", ["shapes", "compact", "unsafe-only"])
def test_anchor_report_is_the_formula_on_raw_features(encoder, name):
    anchors = ANCHORS[name]
    report = anchor_report(SteeringReward(encoder, anchors, RewardConfig()), anchors)
    v, length = reference_direction(encoder, anchors)
    bound = U * (2 * 32 + 2 * 8 / length)  # see above
    assert report.distance == pytest.approx(length, abs=bound)
    for spread, phrases in ((report.safe, anchors.safe), (report.unsafe, anchors.unsafe)):
        if phrases:
            places = features(encoder, phrases) @ v
            expected = places.mean(), places.min(), places.max()
            assert (spread.mean, spread.low, spread.high) == pytest.approx(expected, abs=bound)
    if anchors.safe:
        means = unit(features(encoder, anchors.safe).mean(0)), unit(features(encoder, anchors.unsafe).mean(0))
        assert report.cosine == pytest.approx(means[0] @ means[1], abs=bound)
    else:
        assert report.safe is None
        assert report.cosine is None
        assert report.warning is None


def test_anchors_that_overlap_are_warned_of():
    table = {"s": (1.0, 0.0), "t": (-0.6, 0.8), "u": (-1.0, 0.0), "w": (-0.28, 0.96)}

    def warning(safe, unsafe):
        anchors = Anchors(safe, unsafe)
        return anchor_report(SteeringReward(TableEncoder(table), anchors, RewardConfig()), anchors).warning

    assert warning(("s",), ("u", "w")) is None
    assert "overlap" in warning(("s", "t"), ("u", "w"))


# --- the sweep -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_sweep_is_the_closed_form(mode):
    tables, prompts = zip(
        axis_prompts(POSITIVE_POSITIONS, POSITIVE), axis_prompts(NEGATIVE_POSITIONS, NEGATIVE), strict=True
    )
    encoder = TableEncoder(AXIS_TABLE | tables[0] | tables[1])
    reward = SteeringReward(encoder, AXIS, RewardConfig(alpha=0.25, mode=mode))
    report = axis_report(reward, [*prompts[0], *prompts[1]])
    alphas = [0.0, 0.1, 0.5, 1.0, 3.0]
    rows = sweep(reward, report, alphas)
    assert [row.alpha for row in rows] == alphas
    for row in rows:
        a = row.alpha
        for label, positions in ((POSITIVE, POSITIVE_POSITIONS), (NEGATIVE, NEGATIVE_POSITIONS)):
            c = np.array(positions)
            if mode == "projection":  # target = z - c v + a v, of squared length 1 - c^2 + a^2
                cosine = (1 - c**2 + a * c) / np.sqrt(1 - c**2 + a**2)
            elif mode == "always" or label == NEGATIVE:
                cosine = (1 + a * c) / np.sqrt(1 + 2 * a * c + a**2)
            else:
                cosine = np.ones_like(c)
            # Unit vectors of 3 terms: a dozen roundings. An angle is a chord of the same error.
            assert row.shifts[label].cosine == pytest.approx(cosine.mean(), abs=12 * U)
            angle = np.degrees(np.arccos(np.minimum(cosine, 1)).mean())
            # arccos of a float64 within 2^-53 of 1 is off by up to sqrt(2 * 2^-53) = 1.5e-8 rad
            assert row.shifts[label].degrees == pytest.approx(angle, abs=math.degrees(24 * U + 2e-8))
        crossed = np.mean(np.array(NEGATIVE_POSITIONS) + a >= 0) if mode != "projection" else 1
        assert 1 - row.unsafe == pytest.approx(crossed)
    assert len({round(row.shifts[NEGATIVE].cosine, 3) for row in rows}) == len(alphas)


def test_sweep_of_nothing_moves_nothing(encoder):
    prompts = [Prompt(text, NEGATIVE) for text in TEXTS]
    reward = SteeringReward(encoder, ANCHORS["shapes"], RewardConfig(mode="always"))
    (row,) = sweep(reward, axis_report(reward, prompts), [0.0])
    assert set(row.shifts) == {NEGATIVE}
    # Normalising a float32 unit vector again changes it by U or so; acos of the cosine would give 0.02 degrees.
    assert row.shifts[NEGATIVE].degrees <= math.degrees(4 * U)


# --- choosing and counting prompts -----------------------------------------------------------------------------------


def test_sample_takes_both_labels_evenly():
    prompts = [Prompt(f"{i}", NEGATIVE if i % 3 else POSITIVE, id=i) for i in range(30)]
    assert [prompt.id for prompt in choose_prompts(prompts, 5)] == [0, 6, 12, 18, 24, 1, 7, 13, 19, 25]
    everything = [*range(0, 30, 3), *(i for i in range(30) if i % 3)]
    assert [prompt.id for prompt in choose_prompts(prompts, 0)] == everything
    assert [prompt.id for prompt in choose_prompts(prompts, 99)] == everything


def side_of(after: list[float], categories: list[str] | None = None, texts: list[str] | None = None) -> AxisSide:
    names = texts or [f"{i}" for i in range(len(after))]
    kinds = categories or [""] * len(after)
    prompts = tuple(Prompt(text, NEGATIVE, kind) for text, kind in zip(names, kinds, strict=True))
    return AxisSide(prompts, torch.tensor(after) - 1, torch.tensor(after))


def test_border_prompts():
    side = side_of([0.3, -0.2, 0.1, -0.5, 0.25])
    assert [prompt.text for prompt in side.lowest(3).prompts] == ["3", "1", "2"]
    assert [prompt.text for prompt in side.nearest(3).prompts] == ["2", "1", "4"]
    assert torch.equal(side.nearest(2).before, side.nearest(2).after - 1)
    assert len(side.lowest(9)) == 5
    repeated = side_of([0.3, 0.1, 0.1, 0.2], texts=["a", "b", "b", "c"])
    assert [prompt.text for prompt in repeated.lowest(2).prompts] == ["b", "c"]


def test_a_prompt_of_two_categories_is_in_both():
    side = side_of([0.1, 0.2, 0.3, 0.4], ["hate, violence", "hate", "", "violence,shocking"])
    parts = side.categories()
    assert list(parts) == ["hate", "shocking", "violence"]
    assert {name: [prompt.text for prompt in part.prompts] for name, part in parts.items()} == {
        "hate": ["0", "1"],
        "shocking": ["3"],
        "violence": ["0", "3"],
    }
    assert torch.equal(parts["violence"].after, side.after[[0, 3]])


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.03, 0.04), (0.2, 0.7), (-0.61, -0.3), (0.0, 0.0)])
@pytest.mark.parametrize("most", [22, 72, 100])
def test_histogram_counts_add_up(low, high, most):
    values = torch.linspace(low, high, 501)
    values = torch.cat([values, values[100:180], torch.zeros(7)])
    bins = Bins.covering(values, most)
    edges = bins.edges()
    assert len(edges) == len(bins) + 1
    assert 0 < len(bins) <= most
    assert edges[0] <= values.min()
    assert edges[-1] >= values.max()
    np.testing.assert_allclose(np.diff(edges), 0.1 / bins.per_tenth)
    assert 0.0 in edges
    counts = bins.count(values)
    assert sum(counts) == len(values)
    # Nothing crosses 0, and away from the edges every bin's count is numpy's.
    assert sum(counts[: edges.index(0.0)]) == int((values < 0).sum())
    inner = values[np.abs(values[:, None].double().numpy() - np.array(edges)).min(1) > 1e-6]
    np.testing.assert_array_equal(bins.count(inner), np.histogram(inner.double().numpy(), edges)[0])
