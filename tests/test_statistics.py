"""Intervals and rankings, against plain loops, hand-worked numbers and what must hold for any data."""
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import bootstrap
from torch.testing import assert_close

from sage_nb.core.activations import Node
from sage_nb.discovery.attribution import NodeScores
from sage_nb.core.intervals import estimates, interval, intervals, resample_counts, resampled_means
from sage_nb.discovery.accuracy import agreement

data = arrays(float, st.integers(2, 30), elements=st.floats(-100, 100, width=32))


class Two(NamedTuple):
    "Two numbers of each prompt, or of all prompts together."
    a: torch.Tensor | float
    b: torch.Tensor | float


def plain_mean(values): return math.fsum(values) / len(values)


def plain_interval(evidence, score, counts):
    "Write each resample out prompt by prompt, score it, take percentiles, mirror them; stay within what was reached."
    scores = []
    for row in counts.tolist():
        drawn = [i for i, times in enumerate(row) for _ in range(int(times))]
        scores.append(score(Two(*(plain_mean([column[i] for i in drawn]) for column in evidence))))
    scores.sort()

    def percentile(q):
        place = q * (len(scores) - 1)
        below = math.floor(place)
        return scores[below] + (place - below) * (scores[min(below + 1, len(scores) - 1)] - scores[below])
    value = score(Two(*map(plain_mean, evidence)))
    far = max(value - percentile(0.025), percentile(0.975) - value)
    return max(value - far, min(scores[0], value)), min(value + far, max(scores[-1], value))


@pytest.mark.parametrize("score", [lambda m: m.a, lambda m: m.b / m.a, lambda m: 1 - abs(m.a - m.b) / abs(m.b)])
def test_interval_equals_a_plain_bootstrap(score):
    numbers = 3 + torch.randn(23, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    evidence, plain = Two(*numbers.T), Two(*numbers.T.tolist())
    estimate = interval(evidence, score, n_resamples=300, seed=4)
    assert estimate.value == pytest.approx(score(Two(*map(plain_mean, plain))), rel=1e-12)
    ends = plain_interval(plain, score, resample_counts(23, 300, seed=4))
    assert (estimate.lo, estimate.hi) == pytest.approx(ends, rel=1e-12)
    assert estimate.n == 23


def folded(mean): return 1 - abs(mean)


@pytest.mark.parametrize("score", [lambda m: m, folded, lambda m: (m > 0.05) + 0.0])
def test_interval_is_scipys_percentile_and_basic_interval_in_one(score):
    class Done:
        "What scipy takes its resamples from."

    x = torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    Done.bootstrap_distribution = score(resampled_means(x, 800)).numpy()
    ends = []
    for method in ("percentile", "basic"):
        found = bootstrap((x.numpy(),), lambda x, axis: score(x.mean(axis)), n_resamples=0, bootstrap_result=Done,
                          method=method)
        ends += found.confidence_interval
    ours = interval(x, score, n_resamples=800, within=(-math.inf, math.inf))
    assert ours[1:3] == pytest.approx((min(ends), max(ends)), abs=1e-12)


def test_intervals_of_folded_scores_cover_where_percentiles_do_not():
    data = 0.01 + torch.randn(300, 100, generator=torch.Generator().manual_seed(5))
    ours, percentile = [], []
    for x in data:
        found = interval(x, folded, n_resamples=500)
        ours.append(found.lo <= 0.99 <= found.hi)
        lo, hi = folded(resampled_means(x, 500)).quantile(torch.tensor([0.025, 0.975]).double())
        percentile.append(lo <= 0.99 <= hi)
    assert np.mean(ours) >= 0.93 and np.mean(percentile) < 0.92


def test_resamples_draw_as_many_prompts_as_there_are_each_equally_often():
    counts = resample_counts(40, 4000, seed=1)
    assert counts.shape == (4000, 40) and (counts == counts.round()).all() and (counts >= 0).all()
    assert (counts.sum(1) == 40).all()
    # a count has mean 1 and variance 1 − 1/n, so that its mean over 4,000 resamples has standard error 0.0156
    assert (counts.mean(0) - 1).abs().max() < 5 * 0.0156
    assert counts.var(0).mean().item() == pytest.approx(1 - 1 / 40, rel=0.02)


def test_a_seed_fixes_the_interval_and_another_moves_it_a_little():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert interval(x, seed=3) == interval(x, seed=3)
    a, b = interval(x, seed=3), interval(x, seed=4)
    assert a.lo != b.lo and abs(a.lo - b.lo) < 0.15 * (a.hi - a.lo)


def test_interval_of_a_mean_covers_the_truth_95_percent_of_the_time():
    draws = torch.randn(500, 100, generator=torch.Generator().manual_seed(0))
    covered = [(e := interval(x, n_resamples=500, seed=i)).lo <= 0 <= e.hi for i, x in enumerate(draws)]
    # the percentile bootstrap of 100 normal draws covers about 0.945; 500 trials have a standard error of 0.010
    assert 0.915 <= np.mean(covered) <= 0.975


def test_paired_difference_is_the_interval_of_the_differences():
    g = torch.Generator().manual_seed(0)
    prompt, noise = 10 * torch.randn(60, generator=g), 0.1 * torch.randn(60, generator=g)
    better, worse = prompt + 0.2 + noise, prompt
    paired = interval(Two(better.double(), worse.double()), lambda m: m.a - m.b)
    assert paired[:3] == pytest.approx(interval(better.double() - worse.double())[:3], rel=1e-9)
    assert paired.excludes_zero
    assert interval(better).lo < interval(worse).hi, "unpaired intervals overlap, although every prompt is better"


@given(data)
def test_interval_is_ordered_and_within_the_data(x):
    e = interval(torch.from_numpy(x), n_resamples=50)
    slack = 1e-9 * (1 + abs(x).max())
    assert x.min() - slack <= e.lo <= e.hi <= x.max() + slack
    assert x.min() - slack <= e.value <= x.max() + slack


@given(data, st.floats(-1, 1))
def test_a_value_lies_in_its_own_interval_whatever_the_score(x, line):
    x = torch.from_numpy(x)
    scores = {"mean": lambda m: m, "folded": lambda m: 1 - (m - line).abs(), "clipped": lambda m: m.clamp(0, 1),
              "passes": lambda m: (m >= line).double(), "square": lambda m: m * m}
    for name, (e,) in intervals(x, scores, n_resamples=40).items(): assert e.lo <= e.value <= e.hi, name
    resamples = torch.linspace(81, 99, 500)[:, None]
    outside = estimates(torch.tensor([102.0]), resamples, 30)[0]
    assert outside.lo < 82 and outside.hi == 102  # no resample reaches further
    free = estimates(torch.tensor([102.0]), resamples, 30, within=(0, 120))[0]
    assert free.hi == 120 and free.lo < 82  # the mirror image of 81 is 123, and 120 is all that there can be


@given(st.floats(-100, 100), st.integers(2, 20))
def test_what_does_not_vary_has_an_interval_without_width(value, n):
    e = interval(torch.full((n,), value, dtype=torch.double), n_resamples=50)
    assert e.hi - e.lo <= 1e-12 * (1 + abs(value)) and e.lo <= e.value <= e.hi


def test_a_score_that_is_nowhere_finite_has_no_interval():
    e = interval(Two(torch.zeros(5), torch.ones(5)), lambda m: m.b / m.a, n_resamples=20)
    assert e.value == math.inf and math.isnan(e.lo) and math.isnan(e.hi)
    e = interval(Two(torch.zeros(5), torch.zeros(5)), lambda m: m.b / m.a, n_resamples=20)
    assert all(math.isnan(x) for x in e[:3])


@given(data, st.floats(-50, 50).filter(lambda c: abs(c) > 1e-3), st.floats(-50, 50))
def test_interval_scales_and_shifts_with_the_data(x, scale, shift):
    e, moved = (interval(torch.from_numpy(y), n_resamples=50) for y in (x, scale * x + shift))
    expected = sorted([scale * e.lo + shift, scale * e.hi + shift])
    assert [moved.lo, moved.hi] == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert moved.value == pytest.approx(scale * e.value + shift, rel=1e-9, abs=1e-6)


@given(data, st.randoms(use_true_random=False))
def test_the_value_does_not_depend_on_the_order_of_prompts(x, random):
    order = list(range(len(x)))
    random.shuffle(order)
    one, two = (interval(torch.from_numpy(y), n_resamples=2).value for y in (x, x[order]))
    assert one == pytest.approx(two, abs=1e-9)


@pytest.mark.parametrize("x,message", [
    (torch.ones(1), "at least 2 prompts, got 1"), (torch.tensor([1.0, math.nan]), "finite"),
    (torch.tensor([1.0, math.inf, 2.0]), "finite"),
])
def test_interval_refuses(x, message):
    with pytest.raises(ValueError, match=message): interval(x)


# Ranking

def scores(method, shares):
    "Node scores with these shares of a clean metric of 2, on two prompts."
    effects = 2 * torch.tensor([shares, shares])
    nodes = [Node("z", 0, h, "END") for h in range(len(shares))]
    return NodeScores("A", method, nodes, effects, torch.tensor([1.0, 3.0]))


def test_agreement_equals_numbers_worked_out_by_hand():
    figures = agreement(scores("AtP", [0.9, -0.8, 0.1, 0.5, 0.3]), scores("exact", [1.0, 0.0, -0.5, 0.04, 0.2]))
    # by size: 0.9 matters, 0.8 not, 0.5 not, 0.3 matters, 0.1 matters: precision 1/1, 2/4 and 3/5 at those that matter
    assert figures["average precision"] == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    assert figures["matter"] == 3 and figures["nodes"] == 5 and figures["largest effect"] == pytest.approx(1.0)
    # ranks 5 1 2 4 3 and 5 2 1 3 4: the squared differences sum to 4, and 1 − 6 · 4 / (5 · 24) = 0.8
    assert figures["spearman"] == pytest.approx(0.8)
    # means 0.2 and 0.148: Σ dx dy = 0.782, Σ dx² = 1.6, Σ dy² = 1.18208
    assert figures["pearson"] == pytest.approx(0.782 / math.sqrt(1.6 * 1.18208), rel=1e-5)


def test_agreement_is_undefined_where_nothing_matters_and_refuses_other_nodes():
    nothing = scores("exact", [0.01, 0.02, -0.03])
    assert math.isnan(agreement(scores("AtP", [0.3, 0.2, 0.1]), nothing)["average precision"])
    with pytest.raises(ValueError, match="different nodes"): agreement(scores("AtP", [0.3, 0.2]), nothing)


def test_shares_are_of_the_mean_clean_metric():
    effects, clean = torch.tensor([[-1.0], [-3.0]]), torch.tensor([1.0, 7.0])
    shares = NodeScores("A", "exact", [Node("z", 0, 0, "END")], effects, clean)
    assert_close(shares.share, torch.tensor([-0.5]))  # not the mean of −1/1 and −3/7
