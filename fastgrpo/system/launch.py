"""What the environment says of who started this process: a person, or a launcher that started others beside it."""

import os
from dataclasses import dataclass

from fastgrpo.system.errors import ConfigError

_TORCHRUN = "torchrun --nproc-per-node N -m ..."


@dataclass(frozen=True)
class Launch:
    """What a launcher, such as torchrun, says of this process.

    index: 0 ... count - 1. local: the same among the processes of this machine. address: HOST:PORT where they meet.
    elastic: torchrun itself started it, and ends it when another of them fails. agent_store: whether torchrun's agent
    hosts the store at `address`; else the first process does. restarts: how often torchrun has started them again.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    address: str = ""
    elastic: bool = False
    agent_store: bool = False
    restarts: int = 0


def read_launch() -> Launch:
    """Read the environment. Raises ConfigError where it is left over from something else, or half a launcher's."""
    count = _number("WORLD_SIZE", 1, 2**31) if os.environ.get("WORLD_SIZE") else 1
    if count == 1:
        _refuse_half_an_accelerate()
        return Launch()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = '{count}': without {', '.join(missing)} beside it; accepted is to unset it, for one "
            f"process, or {_TORCHRUN}, which sets all."
        )
    address = f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT', 1, 2**16)}"
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = _number("TORCHELASTIC_RESTART_COUNT", 0, 2**31) if os.environ.get("TORCHELASTIC_RESTART_COUNT") else 0
    own = _number("RANK", 0, count), count, _number("LOCAL_RANK", 0, count)
    return Launch(*own, address, elastic, agent_store, restarts)


def _number(name: str, low: int, end: int) -> int:
    """An environment variable as a whole number, `low` or more and below `end`."""
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdecimal() and low <= int(text) < end):
        up_to = "or more" if end == 2**31 else f"to {end - 1}"
        raise ConfigError(
            f"{name} = {os.environ[name]!r}: accepted is {low} {up_to}, as torchrun sets it; unset WORLD_SIZE for one "
            "process."
        )
    return int(text)


def _refuse_half_an_accelerate() -> None:
    """Refuse to wait for processes that accelerate has not started: without several GPUs it starts only one."""
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate was asked for several processes and started one, as it does where there are not several GPUs; "
            f"accepted are {_TORCHRUN} and accelerate launch --num_processes 1."
        )
