"""Random numbers without state: every generator is a function of the run's seed, the iteration and the stage.

Nothing draws from torch's global generator, so a resumed run needs the iteration's number and nothing else.
"""

import hashlib

import torch


def seed_for(seed: int, iteration: int, stage: str) -> int:
    """A seed in [0, 2^63): the first 8 bytes of SHA-256 over the three, less the sign bit."""
    digest = hashlib.sha256(f"{seed}:{iteration}:{stage}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, iteration: int, stage: str, device: torch.device | str) -> torch.Generator:
    """A fresh generator on `device` for one stage ("rollout", "update", ...) of one iteration."""
    return torch.Generator(device).manual_seed(seed_for(seed, iteration, stage))
