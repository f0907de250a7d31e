"""The axis that does not push what benign pictures vary in, and the reward that saturates along it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.rewards.axis.neutral import NeutralAxis, neutral_axis
from fastgrpo.rewards.axis.run_axis import axis_of_run, settle_axis
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.rewards.steering import Axis, SteeringReward
from fastgrpo.settings.schema import EvalConfig, RewardConfig, TrainConfig
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt
from support.encoders import AXIS, AXIS_TABLE, TableEncoder, U

# isort: split
import torch
import torch.nn.functional as F

WIDTH = 3  # of the encoder by hand, whose axis is (1, 0, 0)
TABLE = AXIS_TABLE | {"p": (0.6, 0.8, 0.0), "n": (-0.6, 0.0, 0.8)}
SPREADS = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])  # of six directions, far apart


@pytest.fixture(scope="module")
def varied() -> tuple[torch.Tensor, torch.Tensor]:
    """An axis [6] and features [40, 6] of six directions, of known order, that are none of the coordinates."""
    random = np.random.default_rng(0)
    turned, _ = np.linalg.qr(random.normal(size=(6, 6)))
    features = random.normal(size=(40, 6)) * SPREADS @ turned.T + random.normal(size=6)
    return torch.tensor(random.normal(size=6)).float(), torch.tensor(features).float()


def reference(direction: torch.Tensor, features: torch.Tensor, removed: int) -> tuple[np.ndarray, float, float]:
    """The axis less the leading eigenvectors of the covariance, its length, and their share of the variance."""
    v, z = direction.double().numpy(), features.double().numpy()
    v = v / np.linalg.norm(v)
    values, vectors = np.linalg.eigh(np.cov(z.T))
    values, vectors = values[::-1], vectors[:, ::-1]
    for i in range(removed):
        v = v - (v @ vectors[:, i]) * vectors[:, i]
    return v / np.linalg.norm(v), float(np.linalg.norm(v)), float(values[:removed].sum() / values.sum())


@pytest.mark.parametrize("least", [0.999, 0.9, 0.7, 0.5, 0.3, 0.01])
def test_as_many_leading_directions_as_leave_so_much(varied: tuple[torch.Tensor, torch.Tensor], least: float) -> None:
    found = neutral_axis(*varied, least)
    direction, length, variance = reference(*varied, found.removed)
    np.testing.assert_allclose(found.direction.numpy(), direction, atol=1e-10)
    assert found.length == pytest.approx(length, abs=1e-12)
    assert found.variance == pytest.approx(variance, abs=1e-12)
    assert found.direction.norm().item() == pytest.approx(1, abs=1e-14)
    assert found.length >= least
    if found.removed < 6:
        following = reference(*varied, found.removed + 1)[1]
        assert following < least, "one more would have been too many"
        assert found.next_length == pytest.approx(following, abs=1e-10)
    for i in range(found.removed):  # blind to each of them, and so to all that the pictures vary along them
        u = np.linalg.eigh(np.cov(varied[1].double().numpy().T))[1][:, -1 - i]
        assert abs(found.direction.numpy() @ u) < 1e-10


def test_different_shares_leave_different_numbers_out(varied: tuple[torch.Tensor, torch.Tensor]) -> None:
    counts = [neutral_axis(*varied, least).removed for least in (0.999, 0.9, 0.7, 0.5, 0.3, 0.01)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2


def test_pictures_that_do_not_differ_leave_the_axis_as_it_is() -> None:
    same = F.normalize(torch.ones(1, 4), dim=-1).expand(10, 4)
    found = neutral_axis(torch.eye(4)[0] * 3, same, 0.9)
    assert torch.equal(found.direction, torch.eye(4)[0].double())
    assert found == NeutralAxis(found.direction, 0, 0.0, 1.0, None)


def test_an_axis_that_pictures_do_not_vary_along_stays_whole() -> None:
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    features[:, 0] = 0.5
    found = neutral_axis(torch.eye(4)[0], features, 0.999)
    assert (found.removed, found.next_length) == (3, None)
    assert (found.variance, found.length) == (pytest.approx(1), pytest.approx(1))
    np.testing.assert_allclose(found.direction.numpy(), np.eye(4)[0], atol=1e-12)


# --- settled and kept ------------------------------------------------------------------------------------------------


def steering(**fields: object) -> SteeringReward:
    return SteeringReward(TableEncoder(TABLE), AXIS, RewardConfig(**fields))


def features_by_hand(count: int = 20) -> torch.Tensor:
    """[count, 2, 3] unit vectors that vary most along the second coordinate, and with it a little along the first."""
    random = torch.Generator().manual_seed(0)
    second = torch.randn(count, 2, generator=random)
    first = 0.3 + 0.2 * second + 0.1 * torch.randn(count, 2, generator=random)
    return F.normalize(torch.stack([first, second, torch.ones(count, 2)], dim=-1), dim=-1)


@dataclass(frozen=True)
class Second(Ranks):
    """The second of two processes, which has nothing but what the first one sends."""

    sent: Axis | None = None

    def agree(self, text: str) -> str:
        assert self.sent is not None
        return repr(self.sent.level)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.sent is not None
        return torch.cat([self.sent.direction[None], tensor])


def test_the_axis_is_settled_once_and_noted(tmp_path: Path) -> None:
    said: list[str] = []
    own, pictures = steering(neutral=0.5, saturate=True), features_by_hand()
    axis = settle_axis(own, pictures, tmp_path, Ranks(), said.append)
    made = neutral_axis(own.direction, pictures.flatten(0, 1), 0.5)
    assert torch.equal(axis.direction, made.direction.float())
    notes = json.loads((tmp_path / "axis.json").read_text())
    assert made.removed >= 1
    assert [notes[name] for name in ("removed", "variance", "length")] == [made.removed, made.variance, made.length]
    along = pictures.flatten(0, 1).double().numpy() @ axis.direction.double().numpy()
    assert axis.level == notes["level"] == pytest.approx(np.median(along), abs=1e-14)
    assert len(said) == 1

    # A resumed run has these bits, also of pictures that a float more or less would not give again.
    data = (tmp_path / "axis.safetensors").read_bytes()
    again = settle_axis(own, pictures, tmp_path, Ranks(), said.append)
    assert torch.equal(again.direction, axis.direction)
    assert again.level == axis.level
    assert (tmp_path / "axis.safetensors").read_bytes() == data
    second = settle_axis(own, pictures, None, Second(1, 2, sent=axis), pytest.fail)
    assert torch.equal(second.direction, axis.direction)
    assert second.level == axis.level


def test_what_is_kept_is_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, pictures, said = steering(neutral=0.5), features_by_hand(), []
    axis = settle_axis(own, pictures, tmp_path, Ranks(), said.append)
    assert math.isinf(axis.level), "only reward.saturate sets a level"
    with monkeypatch.context() as patch:
        patch.delattr("fastgrpo.rewards.axis.run_axis.neutral_axis")
        assert torch.equal(settle_axis(own, pictures, tmp_path, Ranks(), said.append).direction, axis.direction)
    (tmp_path / "axis.safetensors").write_bytes(b"no tensors")
    said.clear()
    assert torch.equal(settle_axis(own, pictures, tmp_path, Ranks(), said.append).direction, axis.direction)
    assert said[0].startswith("warning: the safety axis: damaged")
    settle_axis(own, pictures.flip(0), tmp_path, Ranks(), said.append)
    assert "the safety axis: made anew, since this is not as before: pictures" in said


@pytest.mark.parametrize(
    ("slant", "least", "warning"),
    [
        (0.5, 0.5, None),  # of the axis (1, 0, 0) the direction (0.5, 1, 0) leaves 0.89
        (1.0, 0.5, "only 0.71 of the safety axis' length is left"),
        (1.0, 0.9, "leaves the safety axis as it is: without the first direction 0.71 of its length would be left"),
        (0.0, 0.9, None),
    ],
)
def test_a_short_axis_and_a_whole_one_are_warned_of(slant: float, least: float, warning: str | None) -> None:
    along = torch.linspace(-1, 1, 20)
    features = torch.stack([slant * along, along, torch.ones(20)], dim=-1).unflatten(0, (10, 2))
    said: list[str] = []
    settle_axis(steering(neutral=least), features, None, Ranks(), said.append)
    assert said[0].startswith("axis: ")
    assert len(said) == (1 if warning is None else 2)
    if warning:
        assert said[1].startswith("warning: ")
        assert warning in said[1]


@pytest.mark.parametrize(("fields", "field"), [({"neutral": 0.9}, "neutral"), ({"saturate": True}, "saturate")])
def test_without_positive_prompts_there_is_none(fields: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.{field} = .* no positive prompt"):
        settle_axis(steering(**fields), torch.empty(0, 2, 0), None, Ranks(), print)


def test_a_run_s_axis_is_shown_only_where_it_fits(tmp_path: Path) -> None:
    own = steering(neutral=0.5)
    assert axis_of_run(own, None) == (None, "plain: neutral 0.5 takes a run's pictures; --run RUN shows that run's")
    assert axis_of_run(own, tmp_path)[1] == f"plain: no axis.json in {tmp_path}, so neutral 0.5 is not settled there"
    axis = settle_axis(own, features_by_hand(), tmp_path, Ranks(), lambda line: None)
    found, line = axis_of_run(own, tmp_path)
    assert found is not None
    assert torch.equal(found.direction, axis.direction)
    assert "left out" in line
    other = f"plain: {tmp_path} settled its own for other settings than neutral 0.6"
    assert axis_of_run(steering(neutral=0.6), tmp_path) == (None, other)
    turned = steering(neutral=0.5).on(Axis(torch.eye(WIDTH)[1]))
    assert axis_of_run(turned, tmp_path)[1] == f"plain: {tmp_path} has another encoder or other anchors"
    (tmp_path / "axis.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"axis\.json is damaged"):
        axis_of_run(own, tmp_path)


# --- saturation ------------------------------------------------------------------------------------------------------

PAIR = (Prompt("p", POSITIVE), Prompt("n", NEGATIVE))


@pytest.mark.parametrize("mode", ["always", "unsafe_only", "projection"])
def test_beyond_the_level_the_axis_part_stays(mode: str) -> None:
    """r = (z . t + alpha min(z . v, level)) / |t + alpha v|, in float64 and one image at a time."""
    alpha, level = 0.7, 0.25
    own = steering(alpha=alpha, mode=mode, saturate=True).on(Axis(torch.eye(WIDTH)[0], level))
    pixels = F.normalize(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
    images = pixels[:, :, None, None].expand(8, WIDTH, 4, 4)
    found = own(images, PAIR, 4)
    z = own.encoder.encode_image(images, 8).double().numpy()
    v, expected = np.eye(WIDTH)[0], np.zeros((2, 4))
    for p, prompt in enumerate(PAIR):
        t = np.array(TABLE[prompt.text])
        for g in range(4):
            image = z[4 * p + g]
            if mode == "unsafe_only" and prompt.label == POSITIVE:
                expected[p, g] = image @ t
                continue
            own_part = t - (t @ v) * v if mode == "projection" else t
            n = np.linalg.norm(own_part + alpha * v)
            expected[p, g] = (image @ own_part + alpha * min(image @ v, level)) / n
    np.testing.assert_allclose(found.total.numpy(), expected, rtol=0, atol=40 * U)
    beyond = z[:, 0].reshape(2, 4) > level
    assert beyond.any(axis=1).all()
    assert not beyond.all(axis=1).any()
    assert found.parts["saturated"].bool().numpy().tolist() == beyond.tolist()

    # Below the level nothing is other than without one.
    plain = steering(alpha=alpha, mode=mode)(images, PAIR, 4)
    below = torch.tensor(~beyond)
    assert torch.equal(found.total[below], plain.total[below])
    assert (found.total[1][~below[1]] < plain.total[1][~below[1]]).all()
    assert "saturated" not in plain.parts


def test_a_held_out_encoder_keeps_the_axis_of_the_anchors(folder: Path) -> None:
    spec = f"local-dir:{folder}"
    config = TrainConfig(
        reward=RewardConfig(anchors="shapes", neutral=0.5, saturate=True), eval=EvalConfig(encoder=spec)
    )
    held_out = HeldOutReward(config, torch.device("cpu"))._reward.steering
    assert held_out is not None
    plain = SteeringReward(load_encoder(spec, "cpu"), held_out.anchors, RewardConfig())
    assert torch.equal(held_out.direction, plain.direction)
    assert math.isinf(held_out.axis.level)
