"""The presets for small cards: their plans fit, and are what tensors without values hold, stage by stage."""

import pytest
import small_cards

from fastgrpo.settings.toml import find_preset, load_toml


@pytest.mark.slow(25)
@pytest.mark.parametrize("preset", ["sd15-8gb", "sd15-24gb-full"])  # `python bench/small_cards.py` traces all four
def test_the_plan_fits_the_card_and_is_what_is_held(preset: str) -> None:
    config = load_toml(find_preset(preset))
    held, (plan, most) = small_cards.traced(config), small_cards.planned(config)
    assert most <= small_cards.usable(preset)
    assert set(held) == {"texts", "rollout", "decode", "reward", "update"}
    assert {stage: plan[stage] for stage in held} == pytest.approx(held, rel=0.05)
