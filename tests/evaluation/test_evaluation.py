"""Evaluation: intervals against independent solutions, tallies, the JSON contract, the table, and the suite."""

import json
import math
import random
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from rich.console import Console

from fastgrpo.evaluation import suite as suite_module
from fastgrpo.evaluation.detectors import OracleDetector
from fastgrpo.evaluation.held_out_reward import HeldOutReward
from fastgrpo.evaluation.results.before_after import (
    Change,
    Comparison,
    changes,
    comparison_table,
    read_evaluation,
    write_evaluation,
)
from fastgrpo.evaluation.results.before_after import verdicts as outcome_sentences
from fastgrpo.evaluation.results.comparison import compare_examined
from fastgrpo.evaluation.results.summary import Evaluation, Examined, Row
from fastgrpo.evaluation.statistics.intervals import mean_of_rates, wilson
from fastgrpo.evaluation.suite import Suite, make_suite
from fastgrpo.rewards.registry import load_reward
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import EvalConfig, ModelConfig, PromptsConfig, TrainConfig
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.shapes.captions import heldout_prompts, parse, scene_for
from fastgrpo.shapes.world import HAZARDS, TASKS, paint
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.workers import Workers
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt, Verdict
from fastgrpo.validation import validate


def score_root(successes: int, n: int, side: int) -> float:
    """One end of the score interval by bisection on the test statistic itself, without the closed form."""
    z = NormalDist().inv_cdf(0.975)
    rate = successes / n
    inside, outside = rate, float(side > 0)

    def rejected(p: float) -> bool:
        return abs(rate - p) > z * math.sqrt(p * (1 - p) / n)

    for _ in range(200):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (1, 40), (17, 40), (137, 280)])
def test_wilson_ends_are_the_roots_of_the_score_test(successes: int, n: int) -> None:
    low, high = wilson(successes, n)
    # Bisection ends within one ulp; near a root at 0 or 1 the statistic's cancellation leaves some 1e-8.
    assert low == pytest.approx(score_root(successes, n, -1), abs=1e-7)
    assert high == pytest.approx(score_root(successes, n, +1), abs=1e-7)
    assert 0.0 <= low <= successes / n <= high <= 1.0


def test_wilson_gives_the_published_values() -> None:
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, n), limits in published.items():
        assert wilson(successes, n) == pytest.approx(limits, abs=5e-5)  # printed to four digits


def test_no_observation_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_wilson_covers_the_true_rate(p: float) -> None:
    n = 60
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(w for k, w in enumerate(weights) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
    # The sum is exact. A discrete distribution cannot hit 95%: whether one more k counts as covered is worth its
    # chance, which at the ends of these intervals is up to 3 points.
    assert 0.92 <= covered <= 0.98


def test_the_mean_of_one_rate_has_that_rates_interval() -> None:
    assert mean_of_rates([17], [40]) == pytest.approx(wilson(17, 40), abs=1e-12)


@pytest.mark.parametrize("rates", [(0.4, 0.5, 0.6, 0.5, 0.3, 0.7), (0.98, 0.95, 0.3, 0.75, 0.03, 0.06)])
def test_the_mean_of_rates_interval_covers_the_true_mean(rates: tuple[float, ...]) -> None:
    trials, n = 2000, 60
    hits = np.random.default_rng(0).binomial(n, rates, size=(trials, len(rates)))
    intervals = [mean_of_rates(row.tolist(), [n] * len(rates)) for row in hits]
    covered = sum(low <= np.mean(rates) <= high for low, high in intervals) / trials
    # A 95% interval; 2,000 trials have a standard error of 0.5%, the method itself is within 1% (Zou et al. 2009).
    assert 0.93 <= covered <= 0.975


def test_the_mean_of_rates_is_narrower_than_pooling_when_rates_differ() -> None:
    # Between-task spread is no sampling error: stratification must remove it.
    low, high = mean_of_rates([60, 0, 60, 0], [60] * 4)
    pooled_low, pooled_high = wilson(120, 240)
    assert low < 0.5 < high
    assert high - low < 0.75 * (pooled_high - pooled_low)


def verdicts_by_rate(unsafe: dict[str, tuple[int, int]], correct: dict[str, tuple[int, int]]):
    """Prompts and verdicts with the given (successes, n); the first half of every category also names an object."""
    prompts, verdicts = [], []
    for category, (hits, n) in unsafe.items():
        for i in range(n):
            prompts.append(Prompt(f"{category} {i}", NEGATIVE, category, len(prompts)))
            verdicts.append(Verdict(unsafe=i < hits, kept=i % 4 != 0 if i < n // 2 else None))
    for task, (hits, n) in correct.items():
        for i in range(n):
            prompts.append(Prompt(f"{task} {i}", POSITIVE, task, len(prompts)))
            verdicts.append(Verdict(unsafe=False, correct=i < hits))
    return prompts, verdicts


UNSAFE_BEFORE = dict(zip(HAZARDS, [(20, 40), (24, 40), (32, 40), (16, 40), (28, 40), (30, 40), (20, 40)], strict=True))
UNSAFE_AFTER = dict(zip(HAZARDS, [(5, 40), (6, 40), (0, 40), (4, 40), (7, 40), (0, 40), (10, 40)], strict=True))
CORRECT_BEFORE = dict(zip(TASKS, [(54, 60), (30, 60), (20, 60), (40, 60), (15, 50), (12, 60)], strict=True))
CORRECT_AFTER = dict(zip(TASKS, [(57, 60), (30, 60), (26, 60), (40, 60), (20, 50), (12, 60)], strict=True))
TRAINED = ("violence", "shocking")


@pytest.fixture
def before() -> Evaluation:
    return Evaluation.from_verdicts(*verdicts_by_rate(UNSAFE_BEFORE, CORRECT_BEFORE))


@pytest.fixture
def after() -> Evaluation:
    return Evaluation.from_verdicts(*verdicts_by_rate(UNSAFE_AFTER, CORRECT_AFTER))


def test_rates_do_not_depend_on_the_order_of_images(before: Evaluation) -> None:
    pairs = list(zip(*verdicts_by_rate(UNSAFE_BEFORE, CORRECT_BEFORE), strict=True))
    random.Random(3).shuffle(pairs)
    assert Evaluation.from_verdicts(*zip(*pairs, strict=True)) == before


def test_rates_are_those_put_in(before: Evaluation) -> None:
    for category, (hits, n) in UNSAFE_BEFORE.items():
        assert before.unsafe[category] == Row(hits / n, n, *wilson(hits, n))
    assert before.unsafe["overall"] == Row(170 / 280, 280, *wilson(170, 280))
    assert before.composition["counting"].rate == 20 / 60
    # The mean of the task rates, not the pooled 171 / 350: position has fewer prompts.
    mean = (54 / 60 + 30 / 60 + 20 / 60 + 40 / 60 + 15 / 50 + 12 / 60) / 6
    assert before.composition["overall"].rate == pytest.approx(mean, abs=1e-12)
    assert before.composition["overall"].n == 350
    # 20 prompts of each category name an object; every fourth of those lost it.
    assert before.kept["hate"].rate == 15 / 20
    assert before.kept["overall"] == Row(105 / 140, 140, *wilson(105, 140))


def test_a_group_nobody_measured_is_empty() -> None:
    only_hazards = Evaluation.from_verdicts([Prompt("x", NEGATIVE, "hate")], [Verdict(unsafe=True)])
    assert only_hazards.composition == only_hazards.kept == {}
    assert only_hazards.metrics() == {"eval/unsafe_hate": 1.0, "eval/unsafe": 1.0}


def test_a_missing_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Evaluation.from_verdicts([Prompt("x", NEGATIVE, "hate")] * 2, [Verdict(unsafe=True)])


def test_evaluation_json_is_the_contract_and_comes_back_equal(tmp_path, before: Evaluation, after: Evaluation) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, Comparison("shapes-oracle-v1", TRAINED, before, after))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert set(data) == {"protocol", "about", "trained_categories", "before", "after", "compared"}
    assert data["trained_categories"] == list(TRAINED)
    for stage in ("before", "after"):
        assert set(data[stage]["unsafe"]) == {*HAZARDS, "overall"}
        assert set(data[stage]["composition"]) == {*TASKS, "overall"}
        rows = [row for group in data[stage].values() for row in group.values()]
        assert all(set(row) == {"rate", "n", "low", "high"} for row in rows)
    loaded = read_evaluation(path)
    assert (loaded.before, loaded.after) == (before, after)
    assert (loaded.protocol, loaded.trained_categories) == ("shapes-oracle-v1", TRAINED)
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, before: Evaluation) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, Comparison("shapes-oracle-v1", TRAINED, before, before))
    old = path.read_bytes()
    broken = Evaluation({"hate": Row(math.nan, 1, 0.0, 1.0)}, {}, {})
    with pytest.raises(ValueError, match="JSON"):
        write_evaluation(path, Comparison("shapes-oracle-v1", TRAINED, before, broken))
    assert path.read_bytes() == old


def test_metric_names(before: Evaluation) -> None:
    metrics = before.metrics()
    expected = {"eval/unsafe", "eval/composition", "eval/kept", "eval/unsafe_self_harm", "eval/unsafe_illegal_activity"}
    assert expected | {"eval/composition_single_object"} <= set(metrics)
    assert len(metrics) == 1 + 7 + 1 + 6 + 1
    assert metrics["eval/unsafe_self_harm"] == 16 / 40
    assert not any(" " in name or "-" in name for name in metrics)


def lines_of(
    before: Evaluation, after: Evaluation, trained: tuple[str, ...] = TRAINED
) -> dict[tuple[str, str], Change]:
    return {(line.group, line.name): line for line in changes(Comparison("x", trained, before, after))}


def test_changes_are_in_points_and_relative_for_unsafe(before: Evaluation, after: Evaluation) -> None:
    found = lines_of(before, after)
    unsafe = {name: line for (group, name), line in found.items() if group == "unsafe"}
    assert list(unsafe) == [*HAZARDS, "all seven", "never trained"]
    assert [name for name, line in unsafe.items() if line.trained] == list(TRAINED)
    said = {name: (f"{line.points:+.1f}", line.relative) for name, line in unsafe.items()}
    assert said["hate"] == ("-37.5", "-75%")  # 20 -> 5 of 40
    assert said["violence"] == ("-80.0", "-100%")  # 32 -> 0
    assert said["illegal activity"] == ("-25.0", "-50%")  # 20 -> 10
    assert said["all seven"] == ("-49.3", "-81%")  # 170 -> 32 of 280
    assert said["never trained"] == ("-38.0", "-70%")  # 108 -> 32 of 200
    assert unsafe["never trained"].before == Row(108 / 200, 200, *wilson(108, 200))
    others = {key: line for key, line in found.items() if key[0] != "unsafe"}
    assert others["composition", "counting"].points == pytest.approx(10)  # 20 -> 26 of 60
    assert others["composition", "two_object"].points == 0
    assert others["composition", "overall"].points == pytest.approx(100 * (3 / 60 + 6 / 60 + 5 / 50) / 6)
    assert others["kept", "kept"].points == 0
    assert {line.relative for line in others.values()} == {""}
    assert {line.verdict for line in found.values()} == {""}  # rates alone cannot be tested


def test_nothing_is_called_never_trained_where_that_is_unknown(before: Evaluation, after: Evaluation) -> None:
    lines = lines_of(before, after, ()).values()
    assert {line.trained for line in lines} == {None}
    assert "never trained" not in {line.name for line in lines}
    assert [line.name for line in lines if line.headline] == ["all seven", "overall", "kept"]


@pytest.mark.parametrize(
    ("before", "after", "relative"),
    [
        ((0, 10), (1, 10), ""),
        ((5, 10), (9, 10), "+80%"),
        ((5, 9), (9, 9), ""),
        ((5, 10), (9, 9), ""),
        ((5, 9), (9, 10), ""),
    ],
)
def test_no_relative_change_from_zero_or_of_fewer_than_ten_images(before, after, relative: str) -> None:
    def found(hits: int, n: int) -> Evaluation:
        row = Row(hits / n, n, *wilson(hits, n))
        return Evaluation({"hate": row, "overall": row}, {}, {})

    lines = lines_of(found(*before), found(*after), ("hate",)).values()
    assert [line.name for line in lines] == ["hate", "all seven"]
    assert {line.relative for line in lines} == {relative}


def comparison(before: tuple, after: tuple) -> Comparison:
    """Of (unsafe, correct) by category, as in `verdicts_by_rate`."""
    one, two = (Examined(*map(tuple, verdicts_by_rate(*rates))) for rates in (before, after))
    return Comparison("x", TRAINED, one.rates, two.rates, compare_examined(one, two, TRAINED), "What it is of.")


BETTER_RUN = comparison((UNSAFE_BEFORE, CORRECT_BEFORE), (UNSAFE_AFTER, CORRECT_AFTER))
WORSE_RUN = comparison((UNSAFE_AFTER, CORRECT_AFTER), (UNSAFE_BEFORE, CORRECT_BEFORE))


def exact_p(only_before: int, only_after: int) -> float:
    """McNemar's, summed up in whole numbers."""
    n = only_before + only_after
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_before, only_after) + 1)) / 2**n)


def test_every_row_is_tested_on_its_own_images() -> None:
    # In these verdicts the first images of a row are the unsafe ones: a rate that falls by k images flips k, one way.
    unsafe = BETTER_RUN.compared["unsafe"]
    assert list(unsafe) == [*HAZARDS, "never trained", "overall"]
    for name in HAZARDS:
        flips = UNSAFE_BEFORE[name][0] - UNSAFE_AFTER[name][0]
        assert (unsafe[name]["only_a"], unsafe[name]["only_b"], unsafe[name]["n"]) == (flips, 0, 40)
        assert unsafe[name]["p"] == pytest.approx(exact_p(flips, 0), rel=1e-9)
        assert unsafe[name]["verdict"] == "better"
    assert (unsafe["never trained"]["only_a"], unsafe["never trained"]["n"]) == (108 - 32, 200)
    assert (unsafe["overall"]["only_a"], unsafe["overall"]["n"]) == (170 - 32, 280)
    assert unsafe["overall"]["p"] == pytest.approx(exact_p(138, 0), rel=1e-9)
    composition = BETTER_RUN.compared["composition"]
    assert composition["counting"]["p"] == pytest.approx(exact_p(0, 6), rel=1e-9)  # 1 / 32
    assert composition["counting"]["verdict"] == "better"
    assert composition["position"]["p"] == pytest.approx(exact_p(0, 5), rel=1e-9)  # 1 / 16
    assert composition["position"]["verdict"] == "undecided"
    assert BETTER_RUN.compared["kept"]["overall"]["verdict"] == "undecided"
    worse = {row["verdict"] for row in WORSE_RUN.compared["unsafe"].values()}
    assert worse == {WORSE_RUN.compared["composition"]["counting"]["verdict"]} == {"worse"}


def test_the_tested_composition_is_the_tables_even_where_tasks_have_other_numbers_of_prompts() -> None:
    overall = BETTER_RUN.compared["composition"]["overall"]
    rates = BETTER_RUN.before.composition["overall"].rate, BETTER_RUN.after.composition["overall"].rate
    assert (overall["a"], overall["b"]) == pytest.approx(rates, abs=1e-12)
    assert overall["difference"] == pytest.approx(rates[1] - rates[0], abs=1e-12)
    assert overall["test"] == "paired bootstrap over prompts"
    alike = comparison(({}, {"a": (3, 20), "b": (5, 20)}), ({}, {"a": (4, 20), "b": (9, 20)})).compared["composition"]
    assert alike["overall"]["test"] == "McNemar, exact"


def test_the_sentence_says_better_worse_or_undecided_in_points() -> None:
    assert [said.text for said in outcome_sentences(BETTER_RUN)] == [
        "unsafe: better, 60.7 -> 11.4%, 49.3 points fewer (paired test, p < 0.001)",
        "composition: better, 48.3 -> 52.5%, 4.2 points more (paired test, p < 0.001)",
    ]
    assert [said.text for said in outcome_sentences(WORSE_RUN)] == [
        "unsafe: worse, 11.4 -> 60.7%, 49.3 points more (paired test, p < 0.001)",
        "composition: worse, 52.5 -> 48.3%, 4.2 points fewer (paired test, p < 0.001)",
    ]
    little = comparison(({"hate": (0, 20)}, {"colors": (7, 20)}), ({"hate": (0, 20)}, {"colors": (9, 20)}))
    assert [said.text for said in outcome_sentences(little)] == [
        "unsafe: undecided, 0.0 -> 0.0%, no change (paired test, p = 1)",
        "composition: undecided, 35.0 -> 45.0%, 10.0 points more (paired test, p = 0.5)",
    ]
    assert outcome_sentences(Comparison("x", (), little.before, little.after)) == []


def test_tests_come_back_from_the_file_and_older_files_have_none(tmp_path) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, WORSE_RUN)
    assert read_evaluation(path) == WORSE_RUN
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: data[key] for key in ("protocol", "trained_categories", "before", "after")}))
    older = read_evaluation(path)
    assert older == replace(WORSE_RUN, compared={}, about="")
    assert shown(older)  # without verdicts, but whole


def shown(found: Comparison, width: int = 80, **options) -> list[str]:
    console = Console(width=width, **options)
    with console.capture() as capture:
        console.print(comparison_table(found))
    return capture.get().splitlines()


def test_table_shows_marks_rates_and_intervals() -> None:
    lines = shown(BETTER_RUN, markup=False)  # brackets must survive with and without markup
    assert shown(BETTER_RUN) == lines
    assert max(map(len, lines)) <= 80
    low, high = (100 * value for value in wilson(20, 40))
    hate = next(line for line in lines if " hate " in line)
    assert "○ hate" in hate
    assert f"50.0 [{low:.1f}, {high:.1f}]" in hate
    assert hate.split()[-3:] == ["-37.5", "-75%", "better"]
    assert any("● violence" in line for line in lines)
    assert any(
        "all seven" in line and "60.7" in line and line.split()[-3:] == ["-49.3", "-81%", "better"] for line in lines
    )
    assert any("never trained" in line and "54.0" in line and "-70%" in line for line in lines)
    assert next(line for line in lines if " counting " in line).split()[-2:] == ["+10.0", "better"]
    assert next(line for line in lines if " position " in line).split()[-1] == "+10.0"
    assert any("What it is of." in line for line in lines)
    wide = shown(replace(BETTER_RUN, about="word " * 50), soft_wrap=True)  # as the console of commands prints
    assert max(map(len, wide)) <= 80


def test_what_got_worse_says_so_and_is_red_on_a_terminal() -> None:
    hate = next(line for line in shown(WORSE_RUN) if " hate " in line)
    assert hate.split()[-3:] == ["+37.5", "+300%", "worse"]
    red = next(line for line in shown(WORSE_RUN, force_terminal=True, color_system="standard") if "hate" in line)
    assert "31m" in red
    green = next(line for line in shown(BETTER_RUN, force_terminal=True, color_system="standard") if "hate" in line)
    assert "32m" in green
    assert "31m" not in green


class RecordingDetector:
    """Keeps the mean colour of every image it is shown, by prompt id."""

    name = "recording"

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, ...]] = {}

    def __call__(self, images, prompts):
        colours = images.mean(dim=(2, 3)).tolist()
        self.seen |= {prompt.id: tuple(colour) for prompt, colour in zip(prompts, colours, strict=True)}
        return [Verdict(unsafe=red > 0.5, correct=red > 0.5) for red, _, _ in colours]


class FakePolicy:
    """The least that sampling needs: the third channel of an image is a number encoded from its prompt's text."""

    device = torch.device("cpu")
    dtype = torch.float32
    computing = None
    latent_shape = (3, 4, 4)
    workers = Workers(1)

    def encode(self, texts):
        return torch.tensor([len(text) / 20 for text in texts]).view(-1, 1, 1)

    def contexts(self, embeds, guidance):
        self.embeds = embeds
        return torch.cat([torch.zeros_like(embeds), embeds])  # of both halves, since the guidance below is not 1

    def forward(self, latents, timesteps, contexts):
        output = torch.tanh(latents)
        output[:, 2] = latents[:, 2] - contexts  # any function of latent and text will do
        output[: len(output) // 2] = 0
        return output

    def decode(self, latents, batch):
        images = torch.sigmoid(latents)
        images[:, 2] = self.embeds
        return images


PROMPTS = [Prompt("x" * i, NEGATIVE, "hate", i) for i in range(10)]
PROMPTS += [Prompt("y" * i, POSITIVE, "counting", 100 + i) for i in range(7)]
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def evaluate(prompts, seed=5, **options) -> tuple[Evaluation, dict]:
    detector = RecordingDetector()
    suite = Suite("test", prompts, seed, detector, quick_fraction=0.25)
    schedule = make_schedule(SCHEDULER, 3, 1.0, torch.device("cpu"))
    return suite.evaluate(FakePolicy(), schedule, 0.5, **options).rates, detector.seen


def test_an_image_depends_on_its_prompt_and_seed_only(monkeypatch) -> None:
    result, seen = evaluate(PROMPTS)
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    for chunk in (1, 3, 1000):
        monkeypatch.setattr(suite_module, "CHUNK", chunk)
        again, seen_again = evaluate(shuffled)
        # Equal but for the vectorised tanh and sigmoid, whose ends of a batch may differ by an ulp a step.
        assert seen_again.keys() == seen.keys()
        for key in seen:
            assert seen_again[key] == pytest.approx(seen[key], abs=1e-5)
        assert again == result
    for prompt in PROMPTS:
        assert seen[prompt.id][2] == pytest.approx(len(prompt.text) / 20)
    assert len({red for red, _, _ in seen.values()}) == len(PROMPTS)
    other = evaluate(PROMPTS, seed=6)[1]
    assert all(abs(other[key][0] - seen[key][0]) > 1e-4 for key in seen)


def test_a_quick_evaluation_is_a_prefix_of_every_category_with_the_same_images() -> None:
    _, seen = evaluate(PROMPTS)
    result, quick = evaluate(PROMPTS, quick=True)
    assert set(quick) == {0, 1, 2, 100, 101}  # a quarter of 10 and of 7, rounded up
    for key in quick:
        assert quick[key] == pytest.approx(seen[key], abs=1e-5)
    assert (result.unsafe["hate"].n, result.composition["counting"].n) == (3, 2)


def test_progress_counts_images(monkeypatch) -> None:
    monkeypatch.setattr(suite_module, "CHUNK", 8)
    calls = []
    evaluate(PROMPTS, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(8, 17), (16, 17), (17, 17)]


def test_seeds_never_change() -> None:
    suite = Suite("test", PROMPTS, 1234, RecordingDetector())
    # From `printf 1234:0 | sha256sum`, written down so that no rewrite changes the noise behind past results.
    assert suite.seeds(PROMPTS[:1]) == [0x7A7052027E0DF698 >> 1]
    seeds = suite.seeds(suite.prompts)
    assert len(set(seeds)) == len(PROMPTS)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_shapes_suite_holds_what_the_config_says() -> None:
    shapes = load_toml(find_preset("shapes"))
    suite = make_suite(replace(shapes, eval=EvalConfig(unsafe_per_category=8, composition_per_task=12)))
    assert suite.protocol == "shapes-oracle-v1"
    assert list(suite.prompts) == heldout_prompts(8, 12)
    assert len({prompt.id for prompt in suite.prompts}) == len(suite.prompts) == 7 * 8 + 6 * 12
    assert len(suite.quick_prompts()) == 7 * 2 + 6 * 3
    pictures = suite.picture_prompts()
    assert [p.category for p in pictures] == [*HAZARDS, *TASKS]
    assert set(pictures) <= set(suite.prompts)


def test_a_model_and_prompts_from_elsewhere_have_no_suite_yet() -> None:
    elsewhere = TrainConfig(
        model=ModelConfig(path="some/sd15"), prompts=PromptsConfig(positive="safe.txt", negative="unsafe.txt")
    )
    assert make_suite(elsewhere) is None


def test_the_oracle_detector_judges_drawn_scenes_right() -> None:
    rng = np.random.default_rng(0)
    prompts = heldout_prompts(3, 3)
    pictures = np.stack([paint(scene_for(parse(prompt.text), rng), rng) for prompt in prompts])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    verdicts = OracleDetector()(images, prompts)
    result = Evaluation.from_verdicts(prompts, verdicts)
    # Every picture shows exactly what its prompt asks for, hazards included; the oracle may miss the odd one.
    assert result.unsafe["overall"].rate > 0.9
    assert result.composition["overall"].rate > 0.9
    # The same pictures in another order answer the wrong prompts.
    assert (
        Evaluation.from_verdicts(prompts, OracleDetector()(images.flip(0), prompts)).composition["overall"].rate < 0.5
    )


def test_a_held_out_encoder_gives_the_steered_reward_of_its_own() -> None:
    """With the reward's encoder in its place it gives the reward itself; group for group, and label for label."""
    config = load_toml(find_preset("shapes"))
    prompts = [*heldout_prompts(1, 0)[:2], *heldout_prompts(0, 1)[:3]]
    images = torch.rand(len(prompts) * 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    held_out = HeldOutReward(replace(config, eval=replace(config.eval, encoder="shapes")), torch.device("cpu"))
    found = held_out(images, prompts, 2)
    total = load_reward(config.reward, "cpu").score(images, tuple(prompts), 2)["steering"]
    assert found["eval/held_out_mean"] == pytest.approx(total.mean().item(), abs=1e-6)
    assert found["eval/held_out_negative_mean"] == pytest.approx(total[:2].mean().item(), abs=1e-6)
    assert found["eval/held_out_positive_mean"] == pytest.approx(total[2:].mean().item(), abs=1e-6)
    with pytest.raises(ConfigError, match=r"eval\.encoder"):
        HeldOutReward(replace(config, eval=replace(config.eval, encoder="local-dir:nowhere")), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"eval\.encoder = 'shapes': accepted is another than reward\.encoder"):
        validate(replace(config, eval=replace(config.eval, encoder=config.reward.encoder)))
