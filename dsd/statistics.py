"""Confidence intervals and paired tests for clustered examples.

Examples that share a sentence or an image are not independent, so clusters (all examples of one sentence or image) are
resampled and flipped as a whole: repeating an example inside its cluster does not narrow the interval.

Shapes: n examples, C clusters, G groups, R resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Groups = Sequence[NDArray[np.bool_]]
Clusters = Sequence[str] | NDArray[np.str_]

# Resampled values in memory at once (R × C per array), whatever the number of examples.
BATCH_VALUES = 200_000


class Resampling(TypedDict):
    """The keyword arguments of every test and interval of this module."""

    resamples: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; n is the number of examples."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its confidence interval and two-sided p-value; n is the number of examples."""

    value: float
    low: float
    high: float
    p: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def clustered_mean(
    hits: ArrayLike, clusters: Clusters, groups: Groups, *, resamples: int, confidence: float, seed: int
) -> Interval:
    """The mean over groups of the mean of `hits` within each group, with a clustered bootstrap interval.

    One group of all examples gives the micro mean, one group per category the macro mean.

    Args:
        hits: [n] in 0..1, one per example.
        clusters: [n] the sentence or image of each example.
        groups: G non-empty masks [n]; examples in no group are not counted.
        resamples: number of bootstrap resamples R.
        confidence: level of the interval, in 0..1 exclusive.
        seed: of the resampling; the same seed gives the same interval.

    The interval is the percentile bootstrap over whole clusters (Field and Welsh 2007, "Bootstrapping clustered data").
    It has zero width if all clusters have the same mean, as when every hit is 1 or every hit is 0; the interval is then
    Wilson's with n = number of clusters (`_wilson`).

    Raises:
        ValueError: shapes differ, hits are outside 0..1, or a group is empty.
    """
    hits_n = _unit(hits, "hits")
    sums_CG, counts_CG, n = _by_cluster(hits_n, clusters, groups)
    value = _macro(sums_CG.sum(axis=0), counts_CG.sum(axis=0))
    low, high = _bootstrap(sums_CG, counts_CG, resamples, confidence, seed) or _wilson(
        value, len(sums_CG), confidence, lowest=0.0, highest=1.0
    )
    return Interval(value, low, high, n)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters,
    groups: Groups | None = None,
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Difference:
    """The mean of a - b over the same examples, with a clustered bootstrap interval and a sign-flip p-value.

    Args:
        a, b: [n] in 0..1, hits of two methods on the same examples in the same order.
        clusters: [n] as in `clustered_mean`.
        groups: as in `clustered_mean`; None is one group of all examples.
        resamples, confidence, seed: as in `clustered_mean`; `resamples` also counts the sign flips.

    The p-value is that of a two-sided permutation test: under the null hypothesis the two methods can be swapped within
    any cluster, which flips the sign of that cluster's share of the difference. If there are at most `resamples` flips
    (2^C), all are enumerated; otherwise they are sampled, and p is at least 2 / (resamples + 1).

    Raises:
        ValueError: as `clustered_mean`.
    """
    a_n, b_n = _unit(a, "a"), _unit(b, "b")
    if a_n.shape != b_n.shape:
        raise ValueError(f"a and b must be of the same examples, not of {len(a_n)} and {len(b_n)}")
    d_n = a_n - b_n
    masks = [np.ones(len(d_n), dtype=bool)] if groups is None else groups
    sums_CG, counts_CG, n = _by_cluster(d_n, clusters, masks)
    value = _macro(sums_CG.sum(axis=0), counts_CG.sum(axis=0))
    low, high = _bootstrap(sums_CG, counts_CG, resamples, confidence, seed) or _wilson(
        value, len(sums_CG), confidence, lowest=-1.0, highest=1.0
    )
    # A cluster's share of the value. A flip changes no count, so the shares are additive.
    shares_C = (sums_CG / counts_CG.sum(axis=0)).mean(axis=1)
    return Difference(value, low, high, _sign_flip_p(shares_C, resamples, seed), n)


def difference_above(
    a: ArrayLike, b: ArrayLike, clusters: Clusters, least: float, *, resamples: int, confidence: float, seed: int
) -> Difference:
    """The mean of a - b over the same examples, minus `least`, with a clustered bootstrap interval.

    Args:
        a, b, clusters, resamples, confidence, seed: as in `paired_difference`.
        least: below 0, the loss that is tolerated (a non-inferiority test); above 0, the gain that is required.

    The p-value is that of the two-sided t-test of the clusters' mean differences against `least`: under this null
    hypothesis the two methods cannot be swapped as in `paired_difference`. If all differences are 0 or −1 and every
    cluster is a single example, p is that of the binomial test for the number of losses; otherwise, if all clusters
    have the same difference, p is 1.

    Raises:
        ValueError: as `clustered_mean`.
    """
    paired = paired_difference(a, b, clusters, resamples=resamples, confidence=confidence, seed=seed)
    difference_n = _unit(a, "a") - _unit(b, "b")
    sums_CG, counts_CG, _ = _by_cluster(difference_n, clusters, [np.ones(paired.n, dtype=bool)])
    means_C = (sums_CG / counts_CG)[:, 0]
    if least < 0 and len(means_C) == paired.n and np.isin(difference_n, (-1, 0)).all():
        p = float(stats.binomtest(int(-difference_n.sum()), paired.n, -least).pvalue)
    else:
        p = float(stats.ttest_1samp(means_C, least).pvalue) if np.ptp(means_C) > 0 else 1.0
    return Difference(paired.value - least, paired.low - least, paired.high - least, p, paired.n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for multiple testing (Holm 1979, "A simple sequentially rejective multiple test procedure").

    Rejecting where the adjusted value is below α keeps the family-wise error rate below α, whatever the dependence
    between the tests.
    """
    p_n = np.asarray(p_values, dtype=np.float64)
    order_n = np.argsort(p_n, kind="stable")
    adjusted_n = np.maximum.accumulate(p_n[order_n] * np.arange(len(p_n), 0, -1)).clip(max=1.0)
    result_n = np.empty_like(p_n)
    result_n[order_n] = adjusted_n
    return [float(p) for p in result_n]


def cohens_h(a: float, b: float) -> float:
    """Effect size of two shares in 0..1: 2 asin √a − 2 asin √b (Cohen 1988, chapter 6); 0.2 is small, 0.8 large.

    The same difference in percentage points is a larger effect near 0 and 1.
    """
    return float(2 * np.arcsin(np.sqrt(a)) - 2 * np.arcsin(np.sqrt(b)))


def _unit(values: ArrayLike, name: str) -> Floats:
    """[n] as float64, checked to be within 0..1 and not NaN."""
    array_n = np.asarray(values, dtype=np.float64)
    if array_n.ndim != 1 or not np.all((array_n >= 0) & (array_n <= 1)):
        raise ValueError(f"{name} must be one number in 0..1 per example")
    return array_n


def _by_cluster(values_n: Floats, clusters: Clusters, groups: Groups) -> tuple[Floats, Floats, int]:
    """Sums [C, G] and counts [C, G] of the values per cluster and group; the number of examples counted."""
    masks_nG = np.array(groups, dtype=bool).T
    if not len(groups) or masks_nG.shape != (len(values_n), len(groups)) or len(clusters) != len(values_n):
        raise ValueError(f"{len(values_n)} values need as many clusters and at least one group mask as long")
    empty = np.flatnonzero(~masks_nG.any(axis=0))
    if empty.size:
        raise ValueError(f"group {empty[0]} of {len(groups)} has no examples")
    counted_n = masks_nG.any(axis=1)
    names, index_n = np.unique(np.asarray(clusters, dtype=str)[counted_n], return_inverse=True)
    shape = (len(names), len(groups))
    sums_CG, counts_CG = np.zeros(shape), np.zeros(shape)
    np.add.at(sums_CG, index_n, values_n[counted_n, None] * masks_nG[counted_n])
    np.add.at(counts_CG, index_n, masks_nG[counted_n])
    return sums_CG, counts_CG, int(counted_n.sum())


def _macro(sums_G: Floats, counts_G: Floats) -> float:
    return float(np.mean(sums_G / counts_G))


def _bootstrap(
    sums_CG: Floats, counts_CG: Floats, resamples: int, confidence: float, seed: int
) -> tuple[float, float] | None:
    """Percentile interval over resampled clusters, or None if it has zero width."""
    C, G = sums_CG.shape
    if C == 1:
        return None

    def macro(*samples: Floats, axis: int = -1) -> Any:
        totals = [sample.sum(axis=axis) for sample in samples]
        with np.errstate(invalid="ignore"):
            return np.mean([totals[g] / totals[G + g] for g in range(G)], axis=0)

    with warnings.catch_warnings():
        # A resample without any cluster of some group has no macro mean: 0/0, excluded from the quantiles.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (*sums_CG.T, *counts_CG.T),
            macro,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, BATCH_VALUES // C),
            method="percentile",
            confidence_level=confidence,
            rng=np.random.default_rng(seed),
        )
    values_R = result.bootstrap_distribution
    values_R = values_R[~np.isnan(values_R)]
    if not values_R.size or np.ptp(values_R) < 1e-12:  # equal resamples differ by rounding
        return None
    low, high = np.quantile(values_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _wilson(value: float, clusters: int, confidence: float, *, lowest: float, highest: float) -> tuple[float, float]:
    """Interval if every cluster has the same value, so that resampling shows no spread.

    Wilson's upper limit for 0 of C bounds the share of clusters that differ from all observed ones; their values could
    be anywhere in lowest..highest. For hits that are all 1 or all 0 this equals Wilson's interval for C of C or 0 of C.
    """
    share = stats.binomtest(0, clusters).proportion_ci(confidence, method="wilson").high
    return float((1 - share) * value + share * lowest), float((1 - share) * value + share * highest)


def _sign_flip_p(shares_C: Floats, resamples: int, seed: int) -> float:
    """Two-sided p-value of the sum of the shares under independent sign flips, one per cluster."""
    flippable = shares_C[shares_C != 0]  # flipping a zero changes nothing
    if flippable.size < 2:  # one cluster: both flips are as extreme as the observed sum
        return 1.0
    result = stats.permutation_test(
        (flippable,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BATCH_VALUES // len(flippable)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
