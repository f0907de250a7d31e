"""The guard's rule on sequences written by hand."""

import math
import random

import pytest

from fastgrpo.guard.alarm import (
    ALIGNMENT,
    BETWEEN,
    MEMORY,
    WATCHED,
    WITHIN,
    Comparison,
    Condition,
    Running,
    begun,
    ended,
    excess,
    standing,
)
from fastgrpo.settings.schema import GuardConfig

GUARD = GuardConfig()


def alarms(rows: str, patience: int) -> tuple[str, list[int]]:
    """x is beyond the limit. Returns whether the alarm is on after each iteration, A, and `since` of each."""
    condition, on, since = Condition(), "", []
    for iteration, row in enumerate(rows, start=1):
        condition = condition.after(iteration, row == "x", patience)
        on += "A" if condition.alarmed else "."
        since.append(condition.since)
    return on, since


@pytest.mark.parametrize(
    ("patience", "rows", "expected"),
    [
        (1, ".x.xx..", ".A.AA.."),
        (3, ".xx.xx.", "......."),
        (3, ".xxx...", "...AAA."),
        (3, "xxx.x..x.x...", "..AAAAAAAAAA."),
        (2, "xx..xx", ".AA..A"),
    ],
)
def test_an_alarm_begins_and_ends_after_as_many_iterations_in_a_row(patience: int, rows: str, expected: str) -> None:
    assert alarms(rows, patience)[0] == expected


def test_since_is_the_first_iteration_of_the_row() -> None:
    #                  12345678901234
    on, since = alarms(".x.xxx.x...xx.", 3)
    assert on == ".....AAAAA...."
    assert since == [0, 2, 0, 4, 4, 4, 4, 4, 4, 4, 0, 12, 12, 0]


def test_the_running_mean_weighs_prompts_whatever_the_iterations() -> None:
    """Against the closed form: every prompt has exp(-age / MEMORY), in iterations of 3 as in those of 12."""
    few = many = Running(1.0, 2.0)
    for _ in range(4):
        few = few.after(Comparison(0.5, 1.5, 3))
    many = many.after(Comparison(0.5, 1.5, 12))
    left = math.exp(-12 / MEMORY)
    for running in (few, many):
        assert running.policy == pytest.approx(left * 1.0 + (1 - left) * 0.5, rel=1e-12)
        assert running.base == pytest.approx(left * 2.0 + (1 - left) * 1.5, rel=1e-12)
    assert few.value(BETWEEN) == pytest.approx(few.policy / few.base)


def test_an_honest_policy_is_rarely_suspected() -> None:
    """500 runs of 32 iterations of 8 prompts, distances with a standard deviation of half their mean, no collapse."""
    generator, suspected = random.Random(0), 0
    for _ in range(500):
        running, condition = Running(1.0, 1.0), Condition()
        alarmed = False
        for iteration in range(1, 33):
            # A policy's distance is a mean over many pairs; the base model's has one pair a prompt.
            policy, base = (sum(generator.gammavariate(4, 0.25) for _ in range(8)) / 8 for _ in range(2))
            running = running.after(Comparison(policy, base, 8))
            condition = condition.after(iteration, excess(BETWEEN, running.value(BETWEEN), GUARD) > 0, GUARD.patience)
            alarmed |= condition.alarmed
        suspected += alarmed
    assert suspected <= 25


def test_a_fall_to_half_is_noticed_within_the_memory() -> None:
    running, condition, iteration = Running(1.0, 1.0), Condition(), 0
    while not condition.alarmed:
        iteration += 1
        running = running.after(Comparison(0.5, 1.0, 8))
        condition = condition.after(iteration, excess(BETWEEN, running.value(BETWEEN), GUARD) > 0, GUARD.patience)
    # 0.5 + 0.5 exp(-8 n / 32) < 0.8 from n = 3 on; then patience.
    assert (condition.since, iteration) == (3, 5)


def test_excess_is_in_parts_of_the_limit() -> None:
    assert excess(WITHIN, 0.5, GUARD) == 0
    assert excess(BETWEEN, 0.4, GUARD) == pytest.approx(1.0)
    assert excess(ALIGNMENT, -0.3, GUARD) == pytest.approx(0.2)
    assert excess(ALIGNMENT, 0.48, GUARD) < 0
    assert excess(WITHIN, 0.0, GUARD) == math.inf
    assert max(excess(name, 1.0, GUARD) for name in WATCHED) < 0
    never = GuardConfig(diversity_within=0.0)
    assert excess(WITHIN, 0.0, never) <= 0


def test_pictures_that_are_all_one_before_and_after_have_not_changed() -> None:
    for name in (WITHIN, BETWEEN):
        assert Running(0.0, 0.0).value(name) == 1
        assert Running(0.1, 0.0).value(name) == math.inf


def test_alignment_is_a_difference_in_standard_deviations() -> None:
    assert Running(1.5, 2.25).value(ALIGNMENT) == -0.75


def test_sentences() -> None:
    assert begun(BETWEEN, 0.72, GUARD) == (
        "the diversity between positive prompts' images has been below 80% of the base model's for 3 iterations: "
        "it is 72% of it"
    )
    assert begun(ALIGNMENT, -0.512, GuardConfig(patience=1)) == (
        "how well positive prompts' images match them has been more than 0.25 standard deviations below the base "
        "model's for an iteration: it is -0.51"
    )
    assert ended(WITHIN, 0.55, GUARD) == (
        "the diversity of a positive prompt's images is no longer below 50% of the base model's: it is 55% of it"
    )
    assert standing({WITHIN: 0.4, BETWEEN: 0.9, ALIGNMENT: -0.5}, GUARD) == [
        "the diversity of a positive prompt's images 40% of it, below 50% of the base model's",
        "how well positive prompts' images match them -0.50, more than 0.25 standard deviations below the base model's",
    ]
