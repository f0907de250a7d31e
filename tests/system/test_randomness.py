"""Random numbers depend on the seed, the iteration and what they are for."""

import torch

from fastgrpo.system.randomness import generator_for, seed_for


def test_generators_depend_on_every_argument_and_on_nothing_else() -> None:
    arguments = [(0, 1, "rollout"), (1, 1, "rollout"), (0, 2, "rollout"), (0, 1, "update"), (11, 1, "x"), (1, 11, "x")]
    seeds = [seed_for(*each) for each in arguments]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(5)
    first = torch.randn(4, generator=generator_for(0, 1, "rollout", "cpu"))
    torch.manual_seed(6)
    assert torch.equal(first, torch.randn(4, generator=generator_for(0, 1, "rollout", "cpu")))
    # printf '42:7:rollout' | sha256sum, the first 16 digits as a number, halved: it must not change between versions.
    assert seed_for(42, 7, "rollout") == 146307993067995178
