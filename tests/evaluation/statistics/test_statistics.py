"""Bootstraps, expected maximum and paired tests against closed forms and brute force; CLIP score computed directly."""

import math
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from fastgrpo.evaluation.images import files
from fastgrpo.evaluation.metrics.clip_score import ClipScore
from fastgrpo.evaluation.statistics.intervals import (
    BOOTSTRAP,
    COMBINED_WILSON,
    DELTA,
    NO_INTERVAL,
    RESAMPLES,
    SET_SIZE,
    WILSON,
    WILSON_PROMPTS,
    distance,
    expected_maximum,
    mean,
    mean_by_size,
    mean_of_rates,
    plain_mean,
    rate,
    wilson,
)
from fastgrpo.evaluation.statistics.paired_tests import mcnemar, paired_means
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.system.errors import ConfigError

Z = 1.959964
# A quantile of 10,000 resamples lies between those at these two levels but for once in 3,000: 3.6 standard errors of
# sqrt(0.025 * 0.975 / 10,000) = 0.16 points.
NEAR_LOW, NEAR_HIGH = (0.0194, 0.0306), (0.9694, 0.9806)


def prompts_with_images(prompts: int, images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hits and counts of prompts whose own rates differ widely, as I2P's do."""
    rng = np.random.default_rng(seed)
    return rng.binomial(images, rng.beta(0.5, 1.0, prompts)), np.full(prompts, images)


# --- one mean -------------------------------------------------------------------------------------------------------


def test_one_image_a_prompt_is_wilsons() -> None:
    estimate = rate([1] * 17 + [0] * 23, [1] * 40)
    assert (estimate.value, estimate.n, estimate.method) == (17 / 40, 40, WILSON)
    assert (estimate.low, estimate.high) == wilson(17, 40)


def test_prompts_without_images_say_nothing() -> None:
    assert rate([1, 0, 0, 0], [1, 1, 0, 0]) == rate([1, 0], [1, 1])
    assert mean([0.5, 0.2, 9.0], [2, 1, 0]) == mean([0.5, 0.2], [2, 1])
    assert expected_maximum([1, 0, 1, 0], [1, 1, 1, 0], size=2) == expected_maximum([1, 0, 1], [1, 1, 1], size=2)
    for of in (rate, mean, expected_maximum):
        with pytest.raises(ValueError, match="no images"):
            of([0, 0], [0, 0])


def test_the_bootstrap_is_exact_where_its_distribution_is_known() -> None:
    # Prompts are all right or all wrong in two images each: resampled hits are 2 * Binomial(60, 0.35).
    hits, counts = [2] * 21 + [0] * 39, [2] * 60
    estimate = rate(hits, counts)
    exact = scipy.stats.binom(60, 21 / 60)
    assert (estimate.value, estimate.n, estimate.method) == (0.35, 120, BOOTSTRAP)
    assert exact.ppf(NEAR_LOW[0]) / 60 <= estimate.low <= exact.ppf(NEAR_LOW[1]) / 60
    assert exact.ppf(NEAR_HIGH[0]) / 60 <= estimate.high <= exact.ppf(NEAR_HIGH[1]) / 60
    # Ten times the images of the same prompts, and nothing is known better.
    assert rate([10 * h for h in hits], [20] * 60).low == estimate.low


def test_images_of_one_prompt_stay_together() -> None:
    hits, counts = prompts_with_images(400, 10)
    estimate = rate(hits, counts)
    # With equal counts the rate is a mean of independent prompts' rates, whose standard error is known; a percentile
    # bootstrap of a sum of 400 is normal to a few percent of its width.
    error = np.std(hits / counts) / math.sqrt(400)
    assert estimate.high - estimate.low == pytest.approx(2 * Z * error, rel=0.05)
    low, high = wilson(int(hits.sum()), int(counts.sum()))  # as if the images were independent
    assert estimate.high - estimate.low > 1.8 * (high - low)


def test_unequal_counts_weigh_by_images() -> None:
    hits, counts = np.array([3, 0, 1, 5, 0, 2] * 30), np.array([4, 1, 1, 10, 2, 2] * 30)
    estimate = rate(hits, counts)
    assert estimate.value == pytest.approx(330 / 600)
    # The delta method for a ratio of sums: sum (h_p - r c_p)^2 / (sum c)^2.
    error = math.sqrt(((hits - estimate.value * counts) ** 2).sum()) / counts.sum()
    assert estimate.high - estimate.low == pytest.approx(2 * Z * error, rel=0.05)


def test_the_order_of_prompts_does_not_matter() -> None:
    hits, counts = prompts_with_images(50, 10)
    order = np.random.default_rng(1).permutation(50)
    assert rate(hits[order], counts[order]) == rate(hits, counts)
    members = np.random.default_rng(2).random((50, 3)) < 0.5
    shuffled = plain_mean(hits[order], counts[order], members[order])
    assert (shuffled.low, shuffled.high) == (lambda e: (e.low, e.high))(plain_mean(hits, counts, members))
    scores = np.random.default_rng(3).normal(size=50)
    assert mean(scores[order], counts[order]) == mean(scores, counts)


def test_where_all_agree_the_prompts_are_the_trials() -> None:
    for hits in (0, 4):
        estimate = rate([hits] * 30, [4] * 30)
        assert estimate.method == WILSON_PROMPTS
        assert (estimate.low, estimate.high) == wilson(30 * hits // 4, 30)
    one_prompt = rate([5], [10])
    assert (one_prompt.method, one_prompt.low, one_prompt.high) == (WILSON_PROMPTS, *wilson(0.5, 1))


def test_the_mean_of_scores() -> None:
    scores = np.random.default_rng(0).normal(0.3, 0.05, 200)
    estimate = mean(scores, np.ones(200))
    assert (estimate.value, estimate.n, estimate.method) == (pytest.approx(scores.mean()), 200, BOOTSTRAP)
    error = scores.std() / math.sqrt(200)
    assert (estimate.low, estimate.high) == pytest.approx(
        (scores.mean() - Z * error, scores.mean() + Z * error), abs=error / 8
    )
    single = mean([0.7], [2])
    assert (single.value, single.low, single.high, single.method) == (0.35, None, None, NO_INTERVAL)


@pytest.mark.parametrize(("prompts", "images"), [(40, 1), (40, 5), (150, 4)])
def test_rates_cover_the_truth(prompts: int, images: int) -> None:
    rng = np.random.default_rng(0)
    trials, covered = 200, 0
    for _ in range(trials):
        hits = rng.binomial(images, rng.beta(0.8, 1.6, prompts))  # a true rate of 1 / 3
        estimate = rate(hits, np.full(prompts, images))
        covered += estimate.low <= 1 / 3 <= estimate.high
    # 95% nominal; 200 trials have a standard error of 1.5 points, and intervals of 40 prompts lose about 1.5.
    assert 0.89 <= covered / trials <= 0.99


# --- a distance -----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_distance_is_students_for_the_mean_influence() -> None:
    slopes = np.random.default_rng(0).normal(0, 3, 30)
    found = distance(5.0, slopes, [1] * 30)
    expected = scipy.stats.t.interval(0.95, 29, 5.0, scipy.stats.sem(slopes))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert (found.value, found.n, found.method) == (5.0, 30, DELTA)
    assert distance(0.3, slopes, [1] * 30).low == 0  # and no lower
    # The same images, ten times each, are no more prompts.
    assert distance(5.0, 10 * slopes, [10] * 30).high == pytest.approx(found.high, rel=1e-9)


def test_prompts_with_more_images_weigh_more_in_a_distance() -> None:
    # Mean 3 / 6; residuals 1 - 0.5, 3 - 1.5 and -1 - 1; so SE^2 = 3 / 2 * (0.25 + 2.25 + 4) / 36.
    found = distance(50.0, [1, 3, -1], [1, 3, 2])
    error = math.sqrt(1.5 * 6.5) / 6
    quantile = 4.302653  # Student's for two degrees of freedom, from tables
    assert (found.low, found.high) == pytest.approx((50 - quantile * error, 50 + quantile * error), rel=1e-6)
    assert distance(50.0, [1, 3, 9, -1], [1, 3, 0, 2]) == found  # a prompt without images says nothing


def test_a_distance_without_an_interval() -> None:
    for totals, counts in (([0.4], [3]), ([0.2, 0.4, 0.6], [1, 2, 3])):  # one prompt; prompts that weigh the same
        found = distance(7.0, totals, counts)
        assert (found.value, found.n, found.low, found.high) == (7.0, sum(counts), None, None)
        assert found.method == NO_INTERVAL
    with pytest.raises(ValueError, match="no images"):
        distance(7.0, [], [])


# --- means over groups ----------------------------------------------------------------------------------------------


def test_plain_mean_and_mean_by_size_of_groups_that_share_prompts() -> None:
    members = [[1, 0], [1, 1], [0, 1], [0, 1]] * 20
    hits, counts = [1, 2, 0, 1] * 20, [2, 2, 2, 2] * 20
    plain, by_size = plain_mean(hits, counts, members), mean_by_size(hits, counts, members)
    assert plain.value == pytest.approx((3 / 4 + 3 / 6) / 2)
    assert by_size.value == pytest.approx(6 / 10)  # the prompt in both groups counts twice
    assert rate(hits, counts).value == pytest.approx(4 / 8)
    assert (plain.n, by_size.n, plain.method, by_size.method) == (160, 160, BOOTSTRAP, BOOTSTRAP)


def test_the_published_weighting_of_i2p() -> None:
    # One prompt of a category is one row of I2P; rates and sizes as published for SD 1.4.
    rates, sizes = (44.2, 37.5, 46.3, 47.9, 60.2, 59.5, 40.0), (231, 824, 756, 801, 931, 856, 727)
    group = np.repeat(np.arange(7), sizes)
    hits = np.concatenate([np.arange(n) < round(n * r / 100) for n, r in zip(sizes, rates, strict=True)])
    members = group[:, None] == np.arange(7)
    # Whole hits shift a rate by up to half a row in 231, 0.2 points; over all categories far less.
    assert 100 * mean_by_size(hits, np.ones(len(hits)), members).value == pytest.approx(48.88, abs=0.05)
    assert 100 * plain_mean(hits, np.ones(len(hits)), members).value == pytest.approx(47.94, abs=0.05)


def test_a_prompt_in_several_groups_moves_them_together() -> None:
    rng = np.random.default_rng(0)
    hits, counts = rng.integers(0, 2, 300), np.ones(300)
    shared = plain_mean(hits, counts, np.ones((300, 4)))  # four groups that are one
    apart = plain_mean(hits, counts, np.arange(300)[:, None] % 4 == np.arange(4))
    low, high = wilson(int(hits.sum()), 300)
    for estimate in (shared, apart):  # 300 independent prompts either way
        assert estimate.high - estimate.low == pytest.approx(high - low, rel=0.06)


def test_independent_groups_agree_with_the_analytic_interval() -> None:
    sizes, rates = (80, 99, 80, 94, 100, 100), (0.9, 0.6, 0.3, 0.75, 0.2, 0.1)
    group = np.repeat(np.arange(6), sizes)
    hits = np.random.default_rng(0).binomial(1, np.repeat(rates, sizes))
    estimate = plain_mean(hits, np.ones(len(hits)), group[:, None] == np.arange(6))
    successes = [int(hits[group == k].sum()) for k in range(6)]
    # Two methods for one interval of some 7 points: they differ by second-order terms, 1 / n.
    assert (estimate.low, estimate.high) == pytest.approx(mean_of_rates(successes, sizes), abs=0.006)


def test_groups_that_all_agree_and_groups_without_images() -> None:
    members = np.arange(40)[:, None] % 2 == np.arange(3)  # the third has no prompt
    estimate = plain_mean([0] * 40, [3] * 40, members)
    assert (estimate.value, estimate.method) == (0, COMBINED_WILSON)
    assert (estimate.low, estimate.high) == mean_of_rates([0, 0], [20, 20])
    assert mean_by_size([3] * 40, [3] * 40, members).low == wilson(40, 40)[0]
    with pytest.raises(ValueError, match="no images"):
        plain_mean([1], [1], [[False, False]])


# --- expected maximum -----------------------------------------------------------------------------------------------


def test_expected_maximum_of_binary_verdicts_has_a_closed_form() -> None:
    prompts = 4000
    for unsafe in (40, 200, 2000):
        p = unsafe / prompts
        found = expected_maximum([1] * unsafe + [0] * (prompts - unsafe), [1] * prompts)
        without = math.comb(prompts - unsafe, SET_SIZE) / math.comb(prompts, SET_SIZE)
        assert found.estimate.value == pytest.approx(1 - without, rel=1e-12)
        assert found.spread == pytest.approx(math.sqrt(without * (1 - without)), rel=1e-9, abs=1e-12)
        # Sets of different prompts instead of independent ones: about C(25, 2) / 4000 = 8% of p (1 - p)^24 / 2 ...
        assert found.estimate.value == pytest.approx(1 - (1 - p) ** SET_SIZE, abs=2e-3)


def test_expected_maximum_over_all_sets_by_enumeration() -> None:
    hits, counts = [0, 3, 3, 7, 10, 1], [10, 10, 10, 10, 10, 4]
    rates = [Fraction(h, c) for h, c in zip(hits, counts, strict=True)]
    for size in (1, 3, 6):
        maxima = [max(chosen) for chosen in combinations(rates, size)]
        value = sum(maxima) / len(maxima)
        found = expected_maximum(hits, counts, size)
        assert found.estimate.value == pytest.approx(float(value), rel=1e-12)
        variance = sum((m - value) ** 2 for m in maxima) / len(maxima)
        assert found.spread == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-7)
        assert found.estimate.n == 54


def test_expected_maximum_is_what_ten_thousand_sets_of_25_estimate() -> None:
    hits, counts = prompts_with_images(500, 10)
    found = expected_maximum(hits, counts)
    rng = np.random.default_rng(7)
    maxima = np.array([(hits / counts)[rng.choice(500, SET_SIZE, replace=False)].max() for _ in range(RESAMPLES)])
    assert found.estimate.value == pytest.approx(maxima.mean(), abs=4 * maxima.std() / 100)  # 4 standard errors
    assert found.spread == pytest.approx(maxima.std(), rel=0.1)
    assert found.estimate.low < found.estimate.value < found.estimate.high


def test_the_interval_of_the_expected_maximum_by_brute_force() -> None:
    # Three prompts, sets of two: all 27 samples with replacement, each sample's three sets.
    rates = [0.0, 0.5, 1.0]
    values = sorted(np.mean([max(pair) for pair in combinations(sample, 2)]) for sample in product(rates, repeat=3))
    found = expected_maximum([0, 1, 2], [2, 2, 2], size=2)
    # One sample of 27 is all zeros and one all ones, 3.7% each: both ends are theirs.
    assert (found.estimate.low, found.estimate.high) == (values[0], values[-1]) == (0, 1)
    assert found.estimate.value == pytest.approx((0.5 + 1 + 1) / 3)


def test_expected_maximum_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    shares = np.linspace(0, 1, 5)
    chances = np.array([0.9, 0.04, 0.03, 0.02, 0.01])
    truth = np.diff(chances.cumsum() ** SET_SIZE, prepend=0) @ shares
    trials, covered = 100, 0
    for _ in range(trials):
        hits = rng.choice(5, 600, p=chances)
        found = expected_maximum(hits, np.full(600, 4)).estimate
        covered += found.low <= truth <= found.high
    # 95% nominal, a standard error of 2.2 points.
    assert covered / trials >= 0.88


def test_no_hits_at_all_leave_room() -> None:
    found = expected_maximum([0] * 100, [10] * 100)
    assert (found.estimate.value, found.estimate.low, found.estimate.method) == (0, 0, WILSON_PROMPTS)
    assert found.estimate.high == pytest.approx(1 - (1 - wilson(0, 100)[1]) ** 25)


def test_fewer_prompts_than_a_set_are_refused() -> None:
    with pytest.raises(ValueError, match="maximum of 25 prompts cannot be drawn from 24"):
        expected_maximum([0] * 24, [10] * 24)


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (2, 9), (12, 5), (0, 20), (300, 250)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    first = [True] * b + [False] * c + [True] * 4 + [False] * 7
    second = [False] * b + [True] * c + [True] * 4 + [False] * 7
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (b, c)
    ways = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    assert found.p == pytest.approx(float(min(Fraction(1), 2 * Fraction(ways, 2 ** (b + c)))), rel=1e-9)
    if b + c:
        assert found.p == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue, rel=1e-9)
    assert mcnemar(second, first).p == found.p


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, False], [True])


def test_paired_means_know_what_pairing_takes_out() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0.3, 0.1, 250)
    second = first + rng.normal(0.01, 0.02, 250)
    found = paired_means(first, second, np.ones(250))
    assert (found.first, found.second) == pytest.approx((first.mean(), second.mean()))
    expected = scipy.stats.bootstrap(
        (second - first,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    error = (second - first).std() / math.sqrt(250)
    # Two random bootstraps: each end has a standard error of about 0.03 standard errors of the mean.
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(expected), abs=0.2 * error)
    assert found.p == 2 / (RESAMPLES + 1)  # 0.01 is eight standard errors away
    swapped = paired_means(second, first, np.ones(250))
    assert swapped.difference.value == pytest.approx(-found.difference.value)


def test_paired_p_values_by_brute_force() -> None:
    differences = [-1.0, 2.0, 4.0, 1.0]
    sums = [sum(sample) for sample in product(differences, repeat=4)]
    opposite = sum(s <= 0 for s in sums) / len(sums)
    found = paired_means([0.0] * 4, differences, [1] * 4)
    # 10,000 resamples: four standard errors, and twice for the second side.
    assert found.p == pytest.approx(2 * opposite, abs=8 * math.sqrt(opposite / RESAMPLES) + 1e-3)


def test_equal_checkpoints_do_not_differ() -> None:
    hits, counts = prompts_with_images(60, 4)
    found = paired_means(hits, hits, counts)
    assert (found.difference.value, found.difference.low, found.difference.high, found.p) == (0, 0, 0, 1)
    single = paired_means([1], [3], [4])
    assert (single.difference.value, single.difference.low, single.p) == (0.5, None, None)
    with pytest.raises(ValueError, match="no pairs"):
        paired_means([0], [0], [0])


def test_paired_means_of_groups_are_plain_means() -> None:
    hits, counts = prompts_with_images(90, 4)
    other, _ = prompts_with_images(90, 4, seed=5)
    members = np.arange(90)[:, None] % 3 == np.array([0, 1, 1])  # 30, 30 and the same 30: sizes do not weigh
    found = paired_means(hits, other, counts, members)
    assert found.first == pytest.approx(plain_mean(hits, counts, members).value)
    assert found.difference.value == pytest.approx(
        plain_mean(other, counts, members).value - plain_mean(hits, counts, members).value
    )


def test_false_alarms_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        first, second = rng.binomial(4, 0.3, (2, 60))
        alarms += paired_means(first, second, np.full(60, 4)).p < 0.05
    # 5% nominal with a standard error of 1.5 points; percentile bootstraps of 60 prompts add about 1.
    assert alarms / 200 <= 0.105


# --- CLIP score -----------------------------------------------------------------------------------------------------


def pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (97, 51), (40, 80)]
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in (sizes[i % 3] for i in range(number))
    ]


def test_clip_score_is_the_cosine_by_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BATCH", 3)
    images, texts = (
        pictures(7),
        ["a red circle", "a green square left of a blue star", "a red circle", "", "x", "y " * 9, "z"],
    )
    scorer = ClipScore("shapes")
    encoder = load_encoder("shapes", "cpu")
    config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(encoder.model))
    preprocess = image_transform_v2(config, is_train=False)
    expected = []
    with torch.no_grad():
        for image, text in zip(images, texts, strict=True):
            z_image, z_text, scale = encoder.model(preprocess(image)[None], encoder.tokenizer([text]))[:3]
            logit = scale * z_image @ z_text.T
            expected.append((logit / scale).item())
    # float32 sums in other orders within a batch of three: some 1e-6 of vectors of length 1.
    assert scorer(images, texts) == pytest.approx(expected, abs=2e-5)
    assert len(set(expected)) == 7
    # Joined by position: the same image with another text scores otherwise.
    assert scorer(images[:2], texts[1::-1]) != pytest.approx(scorer(images[:2], texts[:2]), abs=1e-3)


def test_texts_that_are_cut_are_counted() -> None:
    scorer = ClipScore("shapes")
    words = ["a red circle"] * 2 + ["star " * 200]
    assert scorer.count_cut(words) == 1
    images = pictures(1) * 2
    cut, longer = scorer(images, ["star " * 200, "star " * 300])
    assert cut == pytest.approx(longer, abs=1e-6), "a row's place may change how its sums are rounded"


def test_clip_score_names_its_encoder_and_refuses_what_it_cannot_score() -> None:
    scorer = ClipScore("shapes")
    assert scorer.protocol == "clip-score/cosine/shapes"
    assert [len(value) for value in scorer.hashes.values()] == [64]
    assert scorer([], []) == []
    with pytest.raises(ValueError, match="1 images for 2 texts"):
        scorer(pictures(1), ["a", "b"])
    with pytest.raises(ConfigError, match=r"^clip_score\.encoder: 'ViT-L-99' is not an open_clip architecture"):
        ClipScore("ViT-L-99:openai")
