"""Reward functions of the user's own, from a file or a module that the settings name.

A reward function is a plain function

    def brightness(images, prompts):
        return images.mean(dim=(1, 2, 3))

images: [N, 3, h, w] float32 in [0, 1] on the training device. prompts: the N `fastgrpo.types.Prompt` they were drawn
for. It returns a tensor [N], or as many numbers in a list or array, larger where the image is better. Loading it runs
its file. What the file sets of the process's global state holds in it alone (apart.py).
"""

import importlib
import importlib.util
import inspect
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

from torch import Tensor

from fastgrpo.rewards.apart import Apart
from fastgrpo.rewards.terms import BrokenReward, RewardFunction, Term
from fastgrpo.system.errors import ConfigError, nearest, quoted
from fastgrpo.types import Prompt


def load_plugins(terms: Sequence[Term]) -> dict[str, RewardFunction]:
    """Load the function of each term, by its name; a file or module that several terms name is run once.

    Raises ConfigError where it does not import, has no such function, or has one of another signature.
    """
    apart = {term.place: Apart() for term in terms}
    modules = {term.place: _import(term, apart[term.place]) for term in {t.place: t for t in terms}.values()}
    return {term.name: _guarded(term, _function(term, modules[term.place]), apart[term.place]) for term in terms}


def given_function(term: Term, given: Mapping[str, RewardFunction]) -> RewardFunction:
    """The function of a term given:NAME. Raises ConfigError where the program that trains has not handed it over."""
    if term.given not in given:
        raise ConfigError(
            f"reward.terms: {term.name!r} is a function that a program hands to fastgrpo.Trainer as "
            f"rewards={{{term.given!r}: ...}}; there are {', '.join(given) or 'none'}."
        )
    _check_signature(term, given[term.given])
    return _guarded(term, given[term.given], nullcontext)


def _import(term: Term, apart: Apart) -> ModuleType:
    try:
        with apart():
            return _run_file(Path(term.place)) if term.place.endswith(".py") else importlib.import_module(term.place)
    except BaseException as error:  # the user's code may raise anything
        if _is_ctrl_c(error):
            raise
        raise ConfigError(f"reward.terms: {term.place!r} does not import: {one_line(error)}.") from error


def _run_file(path: Path) -> ModuleType:
    name = f"fastgrpo_plugin_{path.stem}"  # the prefix keeps a file called torch.py from replacing torch
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a loader for .py there always is
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function(term: Term, module: ModuleType) -> Callable[..., Tensor]:
    if not hasattr(module, term.label):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ConfigError(
            f"reward.terms: {term.place!r} has no function {term.label!r}{nearest(term.label, own)}; it has "
            f"{', '.join(own) or 'none'}."
        )
    function = getattr(module, term.label)
    _check_signature(term, function)
    return function


def _check_signature(term: Term, function: object) -> None:
    if not callable(function):
        raise ConfigError(
            f"reward.terms: {term.name!r} is of type {type(function).__name__}; accepted is a function "
            "(images, prompts)."
        )
    try:
        inspect.signature(function).bind("images", "prompts")
    except TypeError as error:
        raise ConfigError(
            f"reward.terms: {term.name!r} cannot be called with (images, prompts): {error}; accepted is a function of "
            "these two."
        ) from error
    except ValueError:
        pass  # a function written in C may have no signature to look at


def _guarded(
    term: Term, function: Callable[..., Tensor], apart: Callable[[], AbstractContextManager[object]]
) -> RewardFunction:
    """The function, its exceptions as BrokenReward, an exit too: it would end the training without a word."""

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        try:
            with apart():
                # A copy: what the function does to it in place must reach neither other terms nor saved pictures.
                return function(images.clone(), list(prompts))
        except BaseException as error:
            if _is_ctrl_c(error):
                raise
            message = (
                f"reward term {term.name!r} failed on {len(prompts)} images, the first of prompt "
                f"{quoted(prompts[0].text)}, with {one_line(error)}"
            )
            raise BrokenReward(message, prompts[0], images[0]) from error

    return score


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether it may be the user's; while a training handles the signal itself, it is the code's own."""
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def one_line(error: BaseException) -> str:
    """Type and message of an exception, at most 300 characters of it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": .")
