"""Rewards of the user's own that change the process, exit, or return other things than float32 tensors."""
# ruff: noqa: NPY002 (rewards draw from numpy's old generator)

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, backends

from fastgrpo.rewards import apart
from fastgrpo.rewards.registry import load_reward
from fastgrpo.rewards.terms import BrokenReward
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import Prompt
from support.rewards import GROUP, PROMPTS, config, pictures, write_plugin

COUNT = len(PROMPTS) * GROUP

# What a file may do, and what tells whether it did, other than by the functions under test where that is possible.
CHANGES: dict[str, tuple[str, Callable[[], Any]]] = {
    "gradients off": ("torch.set_grad_enabled(False)", lambda: (torch.ones(1, requires_grad=True) * 2).requires_grad),
    "gradients on": ("torch.set_grad_enabled(True)", lambda: (torch.ones(1, requires_grad=True) * 2).requires_grad),
    "inference mode": (
        "guard = torch.inference_mode(); guard.__enter__()",
        lambda: (torch.ones(1).is_inference(), torch.is_grad_enabled()),
    ),
    "default dtype": ("torch.set_default_dtype(torch.float64)", lambda: torch.ones(1).dtype),
    "default device": ("torch.set_default_device('meta')", lambda: torch.ones(1).device),
    "threads": ("torch.set_num_threads(5)", torch.get_num_threads),
    "determinism": ("torch.use_deterministic_algorithms(True)", torch.are_deterministic_algorithms_enabled),
    "determinism, warnings": (
        "torch.use_deterministic_algorithms(True, warn_only=True)",
        torch.is_deterministic_algorithms_warn_only_enabled,
    ),
    "anomalies": ("torch.autograd.set_detect_anomaly(True)", torch.is_anomaly_enabled),
    "autocast": (
        "torch.autocast('cpu', torch.bfloat16).__enter__()",
        lambda: (torch.ones(2, 2, dtype=torch.float32) @ torch.ones(2, 2, dtype=torch.float32)).dtype,
    ),
    "matmul precision": ("torch.set_float32_matmul_precision('medium')", torch.get_float32_matmul_precision),
    "matmul precision, new": (
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        lambda: backends.cuda.matmul.fp32_precision,
    ),
    "mkldnn precision": (
        "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
        lambda: backends.mkldnn.conv.fp32_precision,
    ),
    "all precisions": ("torch.backends.fp32_precision = 'ieee'", lambda: backends.fp32_precision),
    "tf32 of matmul": ("torch.backends.cuda.matmul.allow_tf32 = True", lambda: backends.cuda.matmul.allow_tf32),
    "tf32 of cudnn": ("torch.backends.cudnn.allow_tf32 = False", lambda: backends.cudnn.allow_tf32),
    "half sums": (
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False",
        lambda: backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    ),
    "cudnn": ("torch.backends.cudnn.enabled = False", lambda: backends.cudnn.enabled),
    "cudnn's benchmark": ("torch.backends.cudnn.benchmark = True", lambda: backends.cudnn.benchmark),
    "cudnn's determinism": ("torch.backends.cudnn.deterministic = True", lambda: backends.cudnn.deterministic),
    "attention": ("torch.backends.cuda.enable_flash_sdp(False)", backends.cuda.flash_sdp_enabled),
    "mkldnn": ("torch.backends.mkldnn.enabled = False", lambda: backends.mkldnn.enabled),
    "denormals": (
        "torch.set_flush_denormal(True)",
        lambda: (torch.full((1,), 1e-310, dtype=torch.float64, device="cpu") / 2).item() > 0,
    ),
    "folder": ("os.chdir('/')", os.getcwd),
    "streams": ("sys.stdout = open(os.devnull, 'w')", lambda: sys.stdout.name),
    "warnings": ("warnings.simplefilter('error')", lambda: list(warnings.filters)),
    "warnings, shown": ("warnings.showwarning = print", lambda: warnings.showwarning),
}

PROBING = """
import os, random, sys, warnings
import numpy as np, torch

def change():
    {change}

{at_import}

def mine(images, prompts):
    seen.append(probe())
    {in_call}
    seen.append(probe())
    return torch.zeros(len(images), device="cpu")
"""


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    """What a failing test leaves would make others fail."""
    whole = apart.Apart()
    with whole():
        yield


@pytest.mark.parametrize("place", ["import", "call"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_file_changes_holds_in_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    change, probe = CHANGES[name]
    seen: list[Any] = []
    monkeypatch.setattr("builtins.probe", probe, raising=False)
    monkeypatch.setattr("builtins.seen", seen, raising=False)
    monkeypatch.chdir(tmp_path)
    text = PROBING.format(
        change=change,
        at_import="exec(" + repr(change) + ")" if place == "import" else "",
        in_call="exec(" + repr(change) + ", globals())" if place == "call" else "pass",
    )
    # As in training: without gradients, but for the test in which that is what changes.
    with torch.set_grad_enabled(name != "gradients on"):
        before, images = probe(), pictures(COUNT)
        states = {key: state.read() for key, state in apart._STATES.items()}
        reward = load_reward(config(f"{write_plugin(tmp_path, text)}:mine"), "cpu")
        for call in (1, 2):
            assert probe() == before
            assert reward._functions["mine"](images, PROMPTS * GROUP).shape == (COUNT,)
            assert probe() == before
            assert {key: state.read() for key, state in apart._STATES.items()} == states
            assert seen[1] != before, "the file finds what it set"
            # Inference mode, which no function turns on, is over with the call that began it.
            if place == "import" or (call == 2 and name != "inference mode"):
                assert seen[0] == seen[1]
            seen.clear()


DRAWING = """
import random
import numpy as np, torch

{seed}

def mine(images, prompts):
    drawn.append((torch.rand(1).item(), float(np.random.rand()), random.random()))
    return torch.zeros(len(images))
"""


@pytest.mark.parametrize("seed", ["torch.manual_seed(3); np.random.seed(4); random.seed(5)", ""])
def test_random_numbers_are_the_file_s_own_and_never_the_same_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    drawn: list[tuple[float, float, float]] = []
    monkeypatch.setattr("builtins.drawn", drawn, raising=False)
    images = pictures(COUNT)

    def ours() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    torch.manual_seed(0), np.random.seed(1), random.seed(2)
    undisturbed = [ours() for _ in range(3)]
    torch.manual_seed(0), np.random.seed(1), random.seed(2)
    disturbed = [ours()]
    reward = load_reward(config(f"{write_plugin(tmp_path, DRAWING.format(seed=seed))}:mine"), "cpu")
    for _ in range(2):
        reward(images, PROMPTS, GROUP)
        disturbed.append(ours())
    assert disturbed == undisturbed
    if seed:
        torch.manual_seed(3), np.random.seed(4), random.seed(5)
        assert drawn == [ours(), ours()]
    assert all(one != other for one, other in zip(*drawn, strict=True))


def test_handlers_of_signals_stay_the_training_s(tmp_path: Path) -> None:
    text = (
        "import signal, torch\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n\ndef mine(images, prompts):\n"
        "    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    return torch.zeros(len(images))\n"
    )
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    reward = load_reward(config(f"{write_plugin(tmp_path, text)}:mine"), "cpu")
    for _ in range(2):
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
        reward(pictures(COUNT), PROMPTS, GROUP)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_files_do_not_share_what_they_set(tmp_path: Path) -> None:
    one = write_plugin(
        tmp_path,
        "import torch\ntorch.set_default_dtype(torch.float64)\n\ndef one(images, prompts):\n    return "
        "torch.zeros(len(images))\n",
        "one.py",
    )
    two = write_plugin(
        tmp_path,
        "import torch\n\ndef two(images, prompts):\n    assert torch.get_default_dtype() == torch.float32\n"
        "    return torch.zeros(len(images))\n",
        "two.py",
    )
    reward = load_reward(config(f"{one}:one", f"{two}:two"), "cpu")
    for _ in range(2):
        reward(pictures(COUNT), PROMPTS, GROUP)


def test_what_a_failing_file_changed_is_put_back(tmp_path: Path) -> None:
    text = "import torch\ntorch.set_default_dtype(torch.float64)\nraise ValueError('no')\n"
    with pytest.raises(ConfigError, match="ValueError: no"):
        load_reward(config(f"{write_plugin(tmp_path, text)}:mine"), "cpu")
    assert torch.get_default_dtype() == torch.float32


# --- exits -----------------------------------------------------------------------------------------------------------

EXITS = {
    "import sys; sys.exit()": "SystemExit",
    "import sys; sys.exit('no weights found')": "SystemExit: no weights found",
    "quit(3)": "SystemExit: 3",
    "import asyncio; raise asyncio.CancelledError": "CancelledError",
    "raise GeneratorExit": "GeneratorExit",
    "raise BaseException('odd')": "BaseException: odd",
}


@pytest.mark.parametrize("exit", EXITS)
def test_an_exit_is_a_broken_reward(tmp_path: Path, exit: str) -> None:
    with pytest.raises(ConfigError, match=rf"does not import: {EXITS[exit]}\.$"):
        load_reward(config(f"{write_plugin(tmp_path, exit, 'first.py')}:mine"), "cpu")
    images = pictures(COUNT)
    text = f"def mine(images, prompts):\n    {exit}\n"
    reward = load_reward(config(f"{write_plugin(tmp_path, text)}:mine"), "cpu")
    with pytest.raises(BrokenReward, match=rf"failed on {COUNT} images, .*, with {EXITS[exit]}$") as raised:
        reward(images, PROMPTS, GROUP)
    assert torch.equal(raised.value.image, images[0])


def test_a_keyboard_interrupt_is_the_user_s_or_where_the_training_handles_it_the_reward_s(tmp_path: Path) -> None:
    text = "def mine(images, prompts):\n    raise KeyboardInterrupt\n"
    reward = load_reward(config(f"{write_plugin(tmp_path, text)}:mine"), "cpu")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(pictures(COUNT), PROMPTS, GROUP)
        signal.signal(signal.SIGINT, lambda number, frame: None)
        with pytest.raises(BrokenReward, match=r"with KeyboardInterrupt$"):
            reward(pictures(COUNT), PROMPTS, GROUP)
    finally:
        signal.signal(signal.SIGINT, before)


# --- what is returned ------------------------------------------------------------------------------------------------

RETURNED = {
    "float64": "values.double()",
    "half": "values.half()",
    "bfloat16": "values.bfloat16()",
    "int64": "values.long()",
    "uint8": "values.byte()",
    "a gradient": "torch.nn.Parameter(values.clone()) * 1",
    "inference": "inferred(values)",
    "a view": "wide(values)[:, 1]",
    "sparse": "values.to_sparse()",
    "a list": "values.tolist()",
    "a tuple of ints": "tuple(int(v) for v in values)",
    "a list of tensors": "list(values)",
    "an array": "values.numpy()",
    "an array of float64": "values.double().numpy()",
    "a list of numpy's numbers": "list(values.numpy())",
}

RETURNING = """
import torch

def wide(values):
    return torch.stack([values, values + 100], 1).flip(1)

@torch.inference_mode()
def inferred(values):
    return values + 0

@torch.enable_grad()
def mine(images, prompts):
    values = torch.arange(len(images), dtype=torch.float32)
    return {returned}
"""


@pytest.mark.parametrize("kind", RETURNED)
def test_numbers_of_any_kind_are_the_right_ones(tmp_path: Path, kind: str) -> None:
    file = write_plugin(tmp_path, RETURNING.format(returned=RETURNED[kind]))
    raw = load_reward(config(f"{file}:mine"), "cpu").score(pictures(COUNT), PROMPTS, GROUP)["mine"]
    assert raw.dtype == torch.float32
    assert not raw.requires_grad
    assert not raw.is_inference()
    assert raw.flatten().tolist() == list(range(COUNT))


def test_booleans_are_zero_and_one(tmp_path: Path) -> None:
    file = write_plugin(tmp_path, RETURNING.format(returned="values > 3"))
    raw = load_reward(config(f"{file}:mine"), "cpu").score(pictures(COUNT), PROMPTS, GROUP)["mine"]
    assert raw.flatten().tolist() == [float(index > 3) for index in range(COUNT)]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("values.to(torch.complex64)", f"shape [{COUNT}] of complex64 on cpu"),
        ("values.to('meta')", f"shape [{COUNT}] of float32 on meta"),
        ("torch.nested.nested_tensor([values, values[1:]])", "a nested tensor"),
        ("[str(v) for v in values]", "a list"),
        ("[[1.0], [2.0, 3.0]]", "a list"),
        ("values.numpy().astype(object)", f"an array of shape [{COUNT}] of object"),
        ("values.numpy()[:3]", "shape [3]"),
        ("values[:, None].long()", f"shape [{COUNT}, 1] of int64 on cpu"),
        ("{index: v for index, v in enumerate(values)}", "a dict"),
        ("(v for v in values)", "a generator"),
        ("float(values.mean())", "a float"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_row_of_numbers_is_said(tmp_path: Path, returned: str, said: str) -> None:
    (tmp_path / "broken").mkdir()
    file = write_plugin(tmp_path, RETURNING.format(returned=returned))
    with pytest.raises(BrokenReward) as raised:
        load_reward(config(f"{file}:mine"), "cpu")(pictures(COUNT), PROMPTS, GROUP)
    assert f"returned {said} for {COUNT} images, " in raised.value.message
    assert "\n" not in raised.value.message


def test_images_are_the_function_s_to_spoil(tmp_path: Path) -> None:
    """It changes them in place and returns a view of them; other terms, and who calls, find them as they were."""
    text = "def mine(images, prompts):\n    return images.mul_(2).sub_(9)[:, 0, 0, 0]\n"
    images = pictures(COUNT)
    kept = images.clone()
    file = write_plugin(tmp_path, text)
    raw = load_reward(config(f"{file}:mine", "compressibility"), "cpu").score(images, PROMPTS, GROUP)
    assert torch.equal(images, kept)
    assert torch.equal(raw["mine"].flatten(), 2 * kept[:, 0, 0, 0] - 9)
    alone = load_reward(config("compressibility"), "cpu").score(kept, PROMPTS, GROUP)
    assert torch.equal(raw["compressibility"], alone["compressibility"])


def test_a_tensor_that_is_used_again_does_not_change_what_was_returned(tmp_path: Path) -> None:
    text = (
        "import torch\nbuffer = torch.zeros(12)\n\ndef mine(images, prompts):\n    buffer.add_(1)\n    return buffer\n"
    )
    reward = load_reward(config(f"{write_plugin(tmp_path, text)}:mine"), "cpu")
    found: list[Tensor] = [reward.score(pictures(COUNT), PROMPTS, GROUP)["mine"] for _ in range(2)]
    assert [values.unique().tolist() for values in found] == [[1.0], [2.0]]


def test_a_prompt_of_any_length_is_cut_in_the_sentence(tmp_path: Path) -> None:
    endless = [Prompt("z" * 20_000, "positive")]
    text = (
        "import torch\n\ndef fails(images, prompts):\n    raise KeyError(1)\n\ndef nan(images, prompts):\n    "
        "return images[:, 0, 0, 0] * torch.nan\n\ndef none(images, prompts):\n    pass\n"
    )
    file = write_plugin(tmp_path, text)
    for function in ("fails", "nan", "none"):
        with pytest.raises(BrokenReward) as raised:
            load_reward(config(f"{file}:{function}"), "cpu")(pictures(GROUP), endless, GROUP)
        assert "prompt '" + "z" * 80 + "...'" in raised.value.message
        assert len(raised.value.message) < 400 + len(str(tmp_path))
        assert raised.value.prompt is endless[0]
