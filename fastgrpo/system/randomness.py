"""Random numbers without state: every generator is a function of the run's seed, the iteration and the stage.

Nothing draws from torch's global generator, so a resumed run needs the iteration's number and nothing else.
"""

import hashlib

import torch


def seed_for(seed: int, iteration: int, stage: str) -> int:
    """The seed, in [0, 2^63), of one stage ("rollout", "update", ...) of one iteration."""
    return _seed(f"{seed}:{iteration}:{stage}")


def image_seed(seed: int, prompt_id: int) -> int:
    """The seed, in [0, 2^63), of the noise of a prompt's evaluated image. Past results rest on it: it never changes."""
    return _seed(f"{seed}:{prompt_id}")


def generator_for(seed: int, iteration: int, stage: str, device: torch.device | str) -> torch.Generator:
    """A fresh generator on `device` for one stage ("rollout", "update", ...) of one iteration."""
    return torch.Generator(device).manual_seed(seed_for(seed, iteration, stage))


def _seed(text: str) -> int:
    """The first 8 bytes of SHA-256 over the text, less the sign bit."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
