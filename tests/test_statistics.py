"""Intervals and tests against closed forms, plain loops and their stated properties."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dsd import statistics
from dsd.statistics import (
    Difference,
    Interval,
    clustered_mean,
    cohens_h,
    difference_above,
    holm,
    paired_difference,
    replicated_difference,
)

OPTIONS: Any = {"confidence": 0.95, "seed": 7}


def singletons(n: int) -> list[str]:
    return [f"sentence-{i}" for i in range(n)]


def everyone(n: int) -> list[np.ndarray]:
    return [np.ones(n, dtype=bool)]


def test_singleton_clusters_agree_with_the_normal_approximation() -> None:
    n = 600
    hits = np.random.default_rng(0).random(n) < 0.7
    interval = clustered_mean(hits, singletons(n), everyone(n), resamples=4000, **OPTIONS)
    p = hits.mean()
    half = 1.96 * np.sqrt(p * (1 - p) / n)
    assert interval.value == p and interval.n == n
    assert interval.low == pytest.approx(p - half, abs=0.1 * half)
    assert interval.high == pytest.approx(p + half, abs=0.1 * half)


def test_unequal_clusters_agree_with_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    names = np.repeat([f"c{i}" for i in range(60)], rng.integers(1, 9, 60))
    n = len(names)
    hits = (rng.random(n) < 0.6).astype(float)
    category = rng.integers(0, 3, n)
    groups = [category == g for g in range(3)]
    interval = clustered_mean(hits, names, groups, resamples=4000, **OPTIONS)

    members = {name: np.flatnonzero(names == name) for name in set(names)}
    ordered = sorted(members)
    values = []
    for _ in range(2000):
        drawn = np.concatenate([members[ordered[i]] for i in rng.integers(0, len(ordered), len(ordered))])
        values.append(np.mean([hits[drawn][groups[g][drawn]].mean() for g in range(3)]))
    assert interval.value == pytest.approx(np.mean([hits[mask].mean() for mask in groups]))
    width = interval.high - interval.low
    assert interval.low == pytest.approx(np.quantile(values, 0.025), abs=0.08 * width)
    assert interval.high == pytest.approx(np.quantile(values, 0.975), abs=0.08 * width)


def test_macro_weighs_groups_alike_and_micro_weighs_examples() -> None:
    hits = np.array([1.0] * 8 + [0.0] * 2)
    groups = [np.arange(10) < 8, np.arange(10) >= 8]
    assert clustered_mean(hits, singletons(10), groups, resamples=100, **OPTIONS).value == 0.5
    assert clustered_mean(hits, singletons(10), everyone(10), resamples=100, **OPTIONS).value == 0.8


def test_examples_outside_every_group_are_not_counted() -> None:
    hits, mask = np.array([1.0, 0.0, 1.0, 0.0]), np.array([True, True, True, False])
    interval = clustered_mean(hits, ["a", "b", "c", "alone"], [mask], resamples=200, **OPTIONS)
    shorter = clustered_mean(hits[:3], ["a", "b", "c"], [mask[:3]], resamples=200, **OPTIONS)
    assert interval == shorter and interval.n == 3


def test_repeating_examples_in_their_cluster_does_not_narrow_the_interval() -> None:
    hits = (np.random.default_rng(2).random(40) < 0.5).astype(float)
    once = clustered_mean(hits, singletons(40), everyone(40), resamples=2000, **OPTIONS)
    often = clustered_mean(
        np.repeat(hits, 25), np.repeat(singletons(40), 25), everyone(1000), resamples=2000, **OPTIONS
    )
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert often.n == 1000
    naive = clustered_mean(np.repeat(hits, 25), singletons(1000), everyone(1000), resamples=2000, **OPTIONS)
    assert naive.high - naive.low < 0.3 * (often.high - often.low)


@pytest.mark.parametrize("hit", [0, 1])
def test_equal_hits_give_wilson_on_the_number_of_clusters(hit: int) -> None:
    names = np.repeat(singletons(20), 5)
    interval = clustered_mean(np.full(100, hit), names, everyone(100), resamples=500, **OPTIONS)
    wilson = stats.binomtest(20 * hit, 20).proportion_ci(0.95, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    assert interval.value == hit


def test_one_cluster_or_equal_clusters_do_not_claim_certainty() -> None:
    one = clustered_mean([1, 0, 1, 0], ["a"] * 4, everyone(4), resamples=100, **OPTIONS)
    assert one.value == 0.5 and one.low < 0.15 and one.high > 0.85
    alike = clustered_mean([1, 0] * 10, np.repeat(singletons(10), 2), everyone(20), resamples=100, **OPTIONS)
    assert 0.3 < alike.low < 0.5 < alike.high < 0.7
    equal_groups = [np.arange(9) % 3 == g for g in range(3)]
    macro = clustered_mean([1, 0, 1] * 3, singletons(9), equal_groups, resamples=100, **OPTIONS)
    assert 0 <= macro.low < 2 / 3 < macro.high <= 1


def test_resamples_that_miss_a_rare_group_are_left_out() -> None:
    hits = np.array([1, 0, 1, 0, 1, 1, 0], dtype=float)
    rare = np.arange(7) == 6
    interval = clustered_mean(hits, singletons(7), [~rare, rare], resamples=2000, **OPTIONS)
    assert np.isfinite([interval.low, interval.high]).all()
    assert 0 <= interval.low <= interval.value <= interval.high <= 0.5


def test_coverage_is_near_the_stated_level() -> None:
    covered = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        accuracy_C = rng.beta(4, 2, 80)  # clusters differ: examples within one are correlated, mean 2/3
        hits = (rng.random((80, 5)) < accuracy_C[:, None]).astype(float).ravel()
        interval = clustered_mean(
            hits, np.repeat(singletons(80), 5), everyone(400), resamples=200, confidence=0.9, seed=trial
        )
        covered += interval.low <= 2 / 3 <= interval.high
    assert 0.83 <= covered / 100 <= 0.97


def test_results_depend_on_the_seed_and_not_on_the_order() -> None:
    rng = np.random.default_rng(3)
    hits, names = (rng.random(200) < 0.4).astype(float), np.array([f"c{i % 30}" for i in range(200)])
    first = clustered_mean(hits, names, everyone(200), resamples=300, **OPTIONS)
    order = rng.permutation(200)
    assert first == clustered_mean(hits, names, everyone(200), resamples=300, **OPTIONS)
    assert first == clustered_mean(hits[order], names[order], everyone(200), resamples=300, **OPTIONS)
    other = clustered_mean(hits, names, everyone(200), resamples=100, confidence=0.95, seed=8)
    assert other.value == first.value and (other.low, other.high) != (first.low, first.high)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_interval_contains_its_value_and_stays_within_range(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    hits = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=n, max_size=n))
    interval = clustered_mean(hits, names, everyone(n), resamples=100, confidence=0.9, seed=0)
    assert 0 <= interval.low <= interval.high <= 1
    assert interval.value == pytest.approx(np.mean(hits))
    difference = paired_difference(hits, hits[::-1], names, resamples=100, confidence=0.9, seed=0)
    assert -1 <= difference.low <= difference.high <= 1 and 0 < difference.p <= 1


def test_memory_does_not_grow_with_the_resamples() -> None:
    n = 2000
    hits = (np.random.default_rng(4).random(n) < 0.6).astype(float)
    groups = [np.arange(n) % 3 == g for g in range(3)]
    tracemalloc.start()
    clustered_mean(hits, singletons(n), groups, resamples=600, **OPTIONS)
    paired_difference(hits, hits[::-1], singletons(n), resamples=600, **OPTIONS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # all resamples at once would be 600 * 2000 * 8 bytes * 6 arrays = 58 MB


def test_a_thousand_examples_and_two_thousand_resamples_are_fast() -> None:
    n = 1000
    hits = (np.random.default_rng(4).random(n) < 0.6).astype(float)
    groups = [np.arange(n) % 3 == g for g in range(3)]
    start = time.process_time()
    clustered_mean(hits, singletons(n), groups, resamples=2000, **OPTIONS)
    assert time.process_time() - start < 10  # 0.05 s on an idle machine; a Python loop takes longer


@pytest.mark.parametrize(
    ("hits", "clusters", "groups", "message"),
    [
        ([1, 2], ["a", "b"], everyone(2), "0..1"),
        ([1, np.nan], ["a", "b"], everyone(2), "0..1"),
        ([1, 0], ["a"], everyone(2), "as many clusters"),
        ([1, 0], ["a", "b"], everyone(3), "group mask"),
        ([1, 0], ["a", "b"], [], "group mask"),
        ([1, 0], ["a", "b"], [*everyone(2), np.zeros(2, dtype=bool)], "group 1 of 2 has no examples"),
        ([], [], everyone(0), "no examples"),
    ],
)
def test_mistakes_are_named(hits: list[float], clusters: list[str], groups: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustered_mean(hits, clusters, groups, resamples=10, **OPTIONS)


def test_sign_flip_p_is_exact_for_few_clusters() -> None:
    # Six clusters all in favour: of 2^6 flips two are as extreme.
    difference = paired_difference([1] * 6, [0] * 6, singletons(6), resamples=2000, **OPTIONS)
    assert difference.p == pytest.approx(2 / 64)
    assert difference.value == 1 and difference.low < 1 and difference.high == 1 and difference.n == 6
    # The same examples as one cluster prove nothing.
    assert paired_difference([1] * 6, [0] * 6, ["a"] * 6, resamples=2000, **OPTIONS).p == 1


def test_sign_flip_p_agrees_with_mcnemar_and_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.random(300) < 0.62).astype(float), (rng.random(300) < 0.5).astype(float)
    difference = paired_difference(a, b, singletons(300), resamples=4999, **OPTIONS)
    won, lost = int((a > b).sum()), int((a < b).sum())
    assert difference.p == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    assert difference.value == pytest.approx((won - lost) / 300)

    names = np.array([f"c{i // 5}" for i in range(300)])
    clustered = paired_difference(a, b, names, resamples=4999, **OPTIONS)
    sums = np.array([(a - b)[names == name].sum() for name in sorted(set(names))])
    flips = rng.choice([-1, 1], (4999, len(sums)))
    extreme = np.abs(flips @ sums) >= abs(sums.sum()) - 1e-9
    assert clustered.p == pytest.approx(extreme.mean(), rel=0.3, abs=2e-3)


def enumerated(shares_C: np.ndarray) -> float:
    """Two-sided p-value over all 2^C sign flips."""
    flips = 1 - 2 * (np.arange(2 ** len(shares_C))[:, None] >> np.arange(len(shares_C)) & 1)
    return float((np.abs(flips @ shares_C) >= abs(shares_C.sum()) - 1e-9).mean())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 14), st.sampled_from(["whole", "eighths", "two groups", "any"]))
def test_sign_flip_p_is_that_of_all_flips(seed: int, clusters: int, hits: str) -> None:
    """Also where the hits are means, where clusters are of unequal size, and where shares have no common step."""
    rng = np.random.default_rng(seed)
    names = rng.integers(0, clusters, 5 * clusters)
    fine = {"whole": 1, "eighths": 8, "two groups": 1, "any": 10**6}[hits]
    a, b = rng.integers(0, fine + 1, (2, len(names))) / fine
    groups = [np.arange(len(names)) < 7, np.arange(len(names)) >= 7] if hits == "two groups" else everyone(len(names))
    p = paired_difference(a, b, names.astype(str), groups, resamples=10, **OPTIONS).p
    shares = [
        np.mean([(a - b)[mask & (names == cluster)].sum() / mask.sum() for mask in groups]) for cluster in set(names)
    ]
    exact = enumerated(np.array(shares))
    if hits == "any":  # rounded: never too small, and little too large
        assert exact - 1e-9 <= p <= 1.05 * exact + 4 / 2 ** len(shares)
    else:
        assert p == pytest.approx(exact, abs=1e-9)


def test_sign_flip_p_of_many_clusters_without_a_common_step() -> None:
    """Three groups whose sizes have no common divisor: against 100,000 sampled flips."""
    rng = np.random.default_rng(1)
    group_n, cluster_n = rng.integers(0, 3, 2400), rng.integers(0, 800, 2400)
    a = rng.random(2400) < 0.5
    b = np.where(rng.random(2400) < 0.4, rng.random(2400) < 0.465, a)
    groups = [group_n == g for g in range(3)]
    p = paired_difference(a, b, cluster_n.astype(str), groups, resamples=10, **OPTIONS).p
    shares_C = np.zeros(800)
    for mask in groups:
        np.add.at(shares_C, cluster_n[mask], (a.astype(float) - b)[mask] / mask.sum() / 3)
    sums = [(1 - 2 * rng.integers(0, 2, (4000, 800))) @ shares_C for _ in range(25)]
    extreme = np.mean(np.abs(sums) >= abs(shares_C.sum()) - 1e-12)
    assert p == pytest.approx(extreme, rel=0.1) and 0.005 < extreme < 0.05  # its standard error is at most 4 %


def test_a_p_value_has_no_floor_and_does_not_depend_on_resamples_or_seed() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.random(600) < share for share in (0.8, 0.5))
    names = [f"c{i // 3}" for i in range(600)]
    p = {
        paired_difference(a, b, names, resamples=resamples, confidence=0.95, seed=seed).p
        for resamples, seed in ((100, 0), (2000, 0), (20000, 1))
    }
    assert len(p) == 1 and p.pop() < 1e-12
    everything = paired_difference([1] * 3000, [0] * 3000, singletons(3000), resamples=10, **OPTIONS)
    assert 0 < everything.p < 1e-300


def test_hundreds_of_p_values_are_fast() -> None:
    rng = np.random.default_rng(3)
    names = [str(c) for c in rng.integers(0, 800, 2400)]
    a, b = rng.random((2, 2400)) < 0.6
    start = time.process_time()
    for _ in range(20):
        paired_difference(a, b, names, resamples=2, **OPTIONS)
    assert time.process_time() - start < 4  # 0.4 s on an idle machine


def test_macro_difference_is_the_difference_of_macro_means() -> None:
    rng = np.random.default_rng(6)
    a, b = (rng.random(90) < 0.7).astype(float), (rng.random(90) < 0.5).astype(float)
    groups = [np.arange(90) < 60, np.arange(90) >= 60]
    names = [f"c{i % 30}" for i in range(90)]
    difference = paired_difference(a, b, names, groups, resamples=500, **OPTIONS)
    means = [clustered_mean(x, names, groups, resamples=10, **OPTIONS).value for x in (a, b)]
    assert difference.value == pytest.approx(means[0] - means[1])
    swapped = paired_difference(b, a, names, groups, resamples=500, **OPTIONS)
    assert swapped.value == pytest.approx(-difference.value) and swapped.p == pytest.approx(difference.p)


def test_equal_methods_have_no_difference_and_an_interval_of_some_width() -> None:
    difference = paired_difference([1, 0] * 30, [1, 0] * 30, singletons(60), resamples=100, **OPTIONS)
    assert difference.value == 0 and difference.p == 1
    assert -0.1 < difference.low < 0 < difference.high < 0.1


def test_differences_need_the_same_examples() -> None:
    with pytest.raises(ValueError, match="of 2 and 1"):
        paired_difference([1, 0], [1], ["a", "b"], resamples=10, **OPTIONS)


def test_p_is_uniform_where_there_is_no_difference() -> None:
    p = []
    for trial in range(60):
        rng = np.random.default_rng(trial)
        a, b = (rng.random((2, 120)) < 0.6).astype(float)
        p.append(paired_difference(a, b, singletons(120), resamples=200, confidence=0.95, seed=trial).p)
    assert np.mean(np.array(p) <= 0.1) <= 0.2


def test_results_as_dictionaries() -> None:
    assert Interval(0.5, 0.4, 0.6, 10).as_dict() == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    assert Difference(0.1, 0.0, 0.2, 0.04, 9).as_dict()["p"] == 0.04


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, made monotone."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= min(1.0, len(p_values) * p) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    assert np.argsort(p_values, kind="stable").tolist() == sorted(
        range(len(p_values)), key=lambda n: (adjusted[n], p_values[n], n)
    )


def test_holm_rejects_as_its_stepwise_rule_does() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        p_values = (rng.random(6) ** 4).tolist()
        rejected: set[int] = set()
        for step, number in enumerate(np.argsort(p_values)):
            if p_values[number] > 0.05 / (6 - step):
                break
            rejected.add(int(number))
        assert {n for n, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_cohens_h_by_hand() -> None:
    assert cohens_h(0.5, 0.5) == 0
    assert cohens_h(1, 0) == pytest.approx(np.pi)
    assert cohens_h(0.75, 0.25) == pytest.approx(np.pi / 3)  # asin √¾ − asin √¼ = 60° − 30°
    assert cohens_h(0.25, 0.75) == -cohens_h(0.75, 0.25)
    assert cohens_h(0.99, 0.94) > cohens_h(0.55, 0.5)


def above(a: Any, b: Any, clusters: Any, least: float, groups: Any = None) -> Difference:
    return difference_above(a, b, clusters, groups, least=least, resamples=500, **OPTIONS)


def test_a_difference_above_a_margin_is_the_t_test_of_the_clusters() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random(80) < share for share in (0.8, 0.75))
    clusters = [str(n // 2) for n in range(80)]
    plain = paired_difference(a, b, clusters, resamples=500, **OPTIONS)
    tested = above(a, b, clusters, -0.04)
    means = (a.astype(float) - b).reshape(-1, 2).mean(1)
    assert tested.p == pytest.approx(stats.ttest_1samp(means, -0.04).pvalue)
    assert (tested.value, tested.low, tested.high) == (plain.value, plain.low, plain.high)  # the margin is apart
    assert above(a, b, clusters, 0.0) == plain


def test_a_margin_is_tested_around_the_value_that_is_reported() -> None:
    """Also where clusters differ in size, and for a macro mean: there p is 1 at the value itself."""
    rng = np.random.default_rng(1)
    a, b = (rng.random(200) < share for share in (0.8, 0.6))
    clusters = [f"c{c}" for c in rng.integers(0, 40, 200) // rng.integers(1, 4, 200)]
    groups = [np.arange(200) < 150, np.arange(200) >= 150]
    for masks in (None, groups):
        value = above(a, b, clusters, 0.05, masks).value
        assert above(a, b, clusters, value, masks).p == pytest.approx(1)
        ps = [above(a, b, clusters, least, masks).p for least in (value - 0.2, value - 0.1, value - 0.01)]
        assert ps == sorted(ps) and ps[0] < 0.01


def test_equal_clusters_prove_a_margin_by_their_number() -> None:
    """If a share above 0.02 of clusters had lost everything, 300 clusters without a loss had a chance of 0.98^300."""
    ones = np.ones(600)
    clusters = [str(n // 2) for n in range(600)]
    assert above(ones, ones, clusters, -0.02).p == pytest.approx(2 * 0.98**300)
    assert above(ones[:20], ones[:20], clusters[:20], -0.02).p == 1
    assert above(ones, 0 * ones, clusters, 0.02).p == pytest.approx(2 * 0.51**300)
    assert above(ones, ones, clusters, 0.02).p == pytest.approx(2 * 0.98**300)


@pytest.mark.parametrize("least", [-0.02, 0.01])
def test_few_gains_and_losses_do_not_prove_a_margin(least: float) -> None:
    """At the margin itself, 5 % of the tests are below 0.05, however few examples differ; of t-tests, 8 to 12 %."""
    rng = np.random.default_rng(0)
    rare = [0.005 + max(least, 0), 0.005 - min(least, 0)]  # gains and losses
    found = []
    for _ in range(300):
        kind = rng.choice(3, size=500, p=[*rare, 1 - sum(rare)])
        found.append(above(kind != 1, kind != 0, singletons(500), least).p)
    assert 0.02 <= np.mean(np.array(found) < 0.05) <= 0.08


def test_the_score_test_is_that_of_its_paper() -> None:
    """Tango 1998: of 44 pairs 43 agree; with a margin of 0.1, Z is 1.709."""
    assert statistics._score_p(1, 0, 44, 0.1) == pytest.approx(2 * stats.norm.sf(1.709), rel=2e-3)


def test_losses_of_single_examples_use_the_binomial_test() -> None:
    whole = np.ones(200)
    for losses in (0, 3, 12):
        tested = above(whole - (np.arange(200) < losses), whole, singletons(200), -0.05)
        assert tested.value == pytest.approx(-losses / 200)
        assert tested.p == pytest.approx(stats.binomtest(losses, 200, 0.05).pvalue)
        gained = above(whole, whole - (np.arange(200) < losses), singletons(200), 0.05)
        assert gained.p == pytest.approx(tested.p)


CLUSTERS = np.repeat(np.arange(40), 3).astype(str).tolist()
GRID = [(sample, noise) for sample in range(3) for noise in range(2)]


def replicated(rng: np.random.Generator, between: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hits of two methods that are equal on average, in 3 × 2 replicates on 40 clusters of 3 examples.

    The first method's accuracy has the standard deviation `between` over samples, and a third of it over noise sets.
    """
    of_clusters = rng.normal(0, 0.08, 40)[np.repeat(np.arange(40), 3)]
    by_sample, by_noise = rng.normal(0, between, 3), rng.normal(0, between / 3, 2)
    chances = [np.clip(0.5 + of_clusters + by_sample[s] + by_noise[k], 0, 1) for s, k in GRID]
    return [rng.random(120) < chance for chance in chances], [rng.random(120) < 0.5] * len(GRID)


@pytest.mark.parametrize("between", [0.0, 0.05, 0.15])
def test_intervals_over_replicates_cover_what_they_state_and_p_is_uniform(between: float) -> None:
    rng, runs = np.random.default_rng(4), 300
    pairs = [replicated(rng, between) for _ in range(runs)]
    results = [replicated_difference(a, b, GRID, CLUSTERS, least=0.0, resamples=200, **OPTIONS) for a, b in pairs]
    assert 0.92 <= np.mean([one.low <= 0 <= one.high for one in results]) <= 0.99
    p = np.array([one.p for one in results])
    for level in (0.05, 0.2, 0.5):
        assert 0.5 * level < (p < level).mean() < level + 2 * np.sqrt(level * (1 - level) / runs)
    if between == 0.15:  # one replicate does not cover the choice of the sample
        single = [paired_difference(a[0], b[0], CLUSTERS, resamples=200, **OPTIONS) for a, b in pairs[:100]]
        assert np.mean([one.low <= 0 <= one.high for one in single]) < 0.7


@pytest.mark.parametrize("least", [0.0, -0.04])
def test_one_replicate_is_the_difference_itself(least: float) -> None:
    a, b = replicated(np.random.default_rng(0), 0.1)
    options: Any = dict(least=least, resamples=100, **OPTIONS)
    expected = difference_above(a[0], b[0], CLUSTERS, **options)
    assert replicated_difference(a[:1], b[:1], [(0, 0)], CLUSTERS, **options) == expected


def test_replicates_give_the_mean_difference_and_a_p_value_without_a_floor() -> None:
    a, b = replicated(np.random.default_rng(0), 0.0)
    better = [hits | (np.arange(120) % 3 > 0) for hits in a]
    results = [replicated_difference(better, b, GRID, CLUSTERS, least=0.0, resamples=n, **OPTIONS) for n in (50, 500)]
    assert results[0].p == results[1].p < 1e-6
    assert results[0].value == pytest.approx(np.mean(better) - np.mean(b))
    clear = replicated_difference(better, b, GRID, CLUSTERS, least=0.2, resamples=50, **OPTIONS)
    assert results[0].p < clear.p < 0.05 and clear.value == results[0].value
    # Replicates that agree in every hit are one replicate.
    same = replicated_difference([a[0]] * 6, [b[0]] * 6, GRID, CLUSTERS, least=0.0, resamples=200, **OPTIONS)
    once = paired_difference(a[0], b[0], CLUSTERS, resamples=200, **OPTIONS)
    assert same.value == pytest.approx(once.value) and same.p == pytest.approx(once.p, rel=0.3)


def test_replicates_of_an_incomplete_grid() -> None:
    a, b = replicated(np.random.default_rng(0), 0.1)
    one = replicated_difference(
        a[:4], b[:4], [(0, 0), (1, 0), (2, 0), (1, 1)], CLUSTERS, least=0.0, resamples=200, **OPTIONS
    )
    assert one.low < one.value < one.high and 0 < one.p <= 1
    nothing = [np.zeros(120)] * 2
    equal = replicated_difference(nothing, nothing, [(0, 0), (1, 0)], CLUSTERS, least=0.0, resamples=20, **OPTIONS)
    assert equal.value == 0 and equal.p == 1 and equal.low < 0 < equal.high
