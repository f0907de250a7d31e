"""The seed of an image's noise."""

import hashlib


def image_seed(seed: int, prompt_id: int) -> int:
    """A seed in [0, 2^63): a fixed function of a suite's seed and a prompt's id, which past results rest on."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
