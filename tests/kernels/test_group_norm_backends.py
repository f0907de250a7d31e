"""The choice between Triton and CUDA C++: measured once for every kind of call, kept and restored."""

import json
import logging
from collections.abc import Callable

import pytest
import torch

from fastgrpo.kernels import group_norm_silu as module
from fastgrpo.kernels import native
from fastgrpo.kernels.group_norm_silu import BACKENDS, Backends, _kind, group_norm_silu

CALLS = {"triton": lambda: 2.0, "native": lambda: 1.0}
MISSING = "group_norm_silu: triton only, since native cannot be used: "


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """The calls that were timed, under a clock by which a call takes as long as it says; native is at hand."""
    calls: list[Callable] = []

    def clock(call: Callable[[], float]) -> float:
        calls.append(call)
        return call()

    monkeypatch.setattr(module, "device_milliseconds", clock)
    monkeypatch.setattr(native, "available", lambda: None)
    # A torch without CUDA cannot say whether a graph is being captured.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch, timed: list[Callable]) -> None:
    monkeypatch.setattr(native, "available", lambda: "nvcc is not on the PATH")


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_faster_is_found_once_for_every_kind_of_call(timed: list[Callable]) -> None:
    chooser = Backends()
    for _ in range(2):
        assert chooser.choose("first", CALLS) == "native"
        assert chooser.choose("second", {"triton": lambda: 1.0, "native": lambda: 2.0}) == "triton"
    assert len(timed) == 4
    assert chooser.choices() == {"first": "native", "second": "triton"}


def test_choices_that_were_kept_are_not_measured_again(timed: list[Callable]) -> None:
    before = Backends()
    before.choose("first", CALLS)
    kept = json.loads(json.dumps(before.choices()))
    after = Backends()
    after.choose("of another run", CALLS)
    timed.clear()
    after.set_choices(kept)
    # This time the clock would say triton.
    assert after.choose("first", {"triton": lambda: 1.0, "native": lambda: 2.0}) == "native"
    assert not timed
    assert after.choices() == {"first": "native"}
    after.choices()["first"] = "triton"
    kept["first"] = "triton"
    assert after.choices() == {"first": "native"}, "copies, both ways"


def test_a_kept_choice_that_cannot_be_had_is_given_up_with_one_line(
    no_native: None, timed: list[Callable], caplog: pytest.LogCaptureFixture
) -> None:
    chooser = Backends()
    chooser.set_choices({"first": "native", "second": "triton"})
    for kind in ("first", "second", "third", "first"):
        assert chooser.choose(kind, CALLS) == "triton"
    assert messages(caplog) == [MISSING + "nvcc is not on the PATH"]
    assert chooser.choices() == {"first": "triton", "second": "triton", "third": "triton"}
    assert not timed


def test_a_backend_that_fails_is_not_chosen(timed: list[Callable], caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> float:
        raise native.LaunchError("no such cluster")

    chooser = Backends()
    for _ in range(2):
        assert chooser.choose("first", {"triton": lambda: 2.0, "native": fails}) == "triton"
    assert messages(caplog) == [MISSING + "no such cluster"]
    assert chooser.choose("second", CALLS) == "native"


def test_what_is_first_met_inside_of_a_graph_stays_with_the_backend_of_the_graph(
    timed: list[Callable], monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser = Backends()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chooser.choose("first", CALLS) == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chooser.choose("first", CALLS) == "triton"
    assert not timed
    assert chooser.choices() == {"first": "triton"}


def test_a_backend_asked_for_by_name_computes_everything(timed: list[Callable]) -> None:
    chooser = Backends()
    chooser.set_choices({"first": "native"})
    chooser.set("triton")
    assert [chooser.choose(kind, CALLS) for kind in ("first", "second")] == ["triton"] * 2
    assert chooser.choices() == {"first": "native"}
    chooser.set("auto")
    assert chooser.choose("first", CALLS) == "native"
    assert not timed


def test_what_cannot_be_set(no_native: None) -> None:
    chooser = Backends()
    with pytest.raises(
        ValueError, match=r"^the backend of group_norm_silu cannot be 'native': nvcc is not on the PATH$"
    ):
        chooser.set("native")
    with pytest.raises(
        ValueError, match=r"^the backend of group_norm_silu is 'fast'; auto, triton, native are accepted$"
    ):
        chooser.set("fast")
    with pytest.raises(ValueError, match=r"chosen for 'first' is 'fast'; triton and native are accepted$"):
        chooser.set_choices({"second": "triton", "first": "fast"})
    assert chooser.choices() == {}


def test_kinds_of_calls_of_group_norm_silu() -> None:
    """Whatever decides how long a call takes is in its name, and what does not is not."""
    x, weight, temb = torch.zeros(2, 6, 4, 3, dtype=torch.bfloat16), torch.zeros(6), torch.zeros(2, 6)
    assert (
        _kind("forward", x, weight, 3, True, temb) == "forward 2x6x4x3, bfloat16, weight float32, groups 3, silu, temb"
    )
    different = [
        ("backward", x, weight, 3, True, temb),
        ("forward", x.transpose(2, 3), weight, 3, True, temb),
        ("forward", x.half(), weight, 3, True, temb),
        ("forward", x, weight.bfloat16(), 3, True, temb),
        ("forward", x, weight, 2, True, temb),
        ("forward", x, weight, 3, False, temb),
        ("forward", x, weight, 3, True, None),
    ]
    assert len({_kind(*arguments) for arguments in different} | {_kind("forward", x, weight, 3, True, temb)}) == 8


@pytest.mark.gpu
def test_on_a_gpu_what_is_chosen_is_remembered() -> None:
    before = BACKENDS.choices()
    try:
        BACKENDS.set_choices({})
        x = torch.randn(2, 64, 16, 16, device="cuda").to(memory_format=torch.channels_last)
        weight = torch.ones(64, device="cuda")
        first = group_norm_silu(x, weight, weight, 32, 1e-5)
        chosen = BACKENDS.choices()
        assert list(chosen) == [_kind("forward", x, weight, 32, True, None)]
        BACKENDS.set_choices(chosen)
        assert torch.equal(group_norm_silu(x, weight, weight, 32, 1e-5), first)
        assert BACKENDS.choices() == chosen
    finally:
        BACKENDS.set_choices(before)
