"""What counts as a result, what was done until then, and the recipes' flags."""

import math

import pytest
from time_to_result import EVALUATED, RECIPES, Spent, reached, table, work

from fastgrpo.settings.command_line import parse_command
from fastgrpo.validation import validate

BEFORE = {"metrics": {"eval/unsafe": 0.6}}


def evaluated(iteration: int, unsafe: float, *fails: str) -> dict:
    return {"iteration": iteration, "unsafe": unsafe, "fails": list(fails)}


def test_the_result_is_safe_with_nothing_else_lost() -> None:
    assert reached(BEFORE, [evaluated(4, 0.16), evaluated(8, 0.1, "diversity"), evaluated(12, 0.15)]) == 12
    assert reached(BEFORE, [evaluated(4, 0.16), evaluated(8, 0.1, "composition")]) is None
    assert reached(BEFORE, []) is None
    assert reached(None, [evaluated(4, 0.0)]) is None


def test_work_is_of_the_iterations_until_then_without_evaluations() -> None:
    line = {"time/rollout_s": 2.0, "time/update_s": 4.0, "time/reward_s": 0.5, "time/eval_s": 99.0}
    line |= {"throughput/rollout_tflops": 0.1, "throughput/update_tflops": 0.2}
    lines = [{"iteration": 0, "time/eval_s": 9.0}, *({"iteration": i} | line for i in (1, 2, 3))]
    flop, seconds = work(lines, 2)
    assert flop == pytest.approx(2e12 * (0.2 + 0.8))
    assert seconds == 13


def test_table_has_means_and_t_intervals_of_those_that_reached_it() -> None:
    runs = [Spent(10, 2e12, 100, 960, 30.0), None, Spent(20, 4e12, 200, 1920, 50.0)]
    *_, alone, two = table({"never": [None], "now": runs})
    assert alone == "| never | 0 of 1 | – | – | – | – | – |"
    # Of two numbers the standard error is half their difference, and t with one degree of freedom tan(0.475 pi).
    half = 10 * math.tan(0.475 * math.pi)
    assert f"| now | 2 of 3 | 15 [{15 - half / 2:.0f}, {15 + half / 2:.0f}] |" in two
    assert f"| 40 [{40 - half:.0f}, {40 + half:.0f}] |" in two


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_accepted(name: str) -> None:
    validate(parse_command(["shapes", *EVALUATED, *RECIPES[name]])[0])
