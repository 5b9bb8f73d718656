"""Confidence intervals and paired tests for clustered examples.

Examples that share a sentence or an image are not independent, so clusters (all examples of one sentence or image) are
resampled and flipped as a whole: repeating an example inside its cluster does not narrow the interval.

Shapes: n examples, C clusters, G groups, R resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Groups = Sequence[NDArray[np.bool_]]
Clusters = Sequence[str] | NDArray[np.str_]

# Resampled values in memory at once (R × C per array), whatever the number of examples.
BATCH_VALUES = 200_000
# Most steps of the distribution of a sign-flip test, and most steps × clusters: 0.1 s.
STEPS, STEPS_CLUSTERS = 2**20, 2**27


class Resampling(TypedDict):
    """The keyword arguments of every test and interval of this module; no p-value depends on resamples or seed."""

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
    a: ArrayLike, b: ArrayLike, clusters: Clusters, groups: Groups | None = None, **resampling: Unpack[Resampling]
) -> Difference:
    """The mean of a - b over the same examples, with a clustered bootstrap interval and a sign-flip p-value.

    Args:
        a, b: [n] in 0..1, hits of two methods on the same examples in the same order.
        clusters: [n] as in `clustered_mean`.
        groups: as in `clustered_mean`; None is one group of all examples.
        resampling: of the interval, as in `clustered_mean`.

    The p-value is that of a two-sided permutation test: under the null hypothesis the two methods can be swapped within
    any cluster, which flips the sign of that cluster's share of the difference. All 2^C flips are counted (`_flip_p`).

    Raises:
        ValueError: as `clustered_mean`.
    """
    return difference_above(a, b, clusters, groups, least=0.0, **resampling)


def difference_above(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters,
    groups: Groups | None = None,
    *,
    least: float,
    **resampling: Unpack[Resampling],
) -> Difference:
    """`paired_difference`, with the p-value of the null hypothesis that the difference is `least`.

    Args:
        least: in -1..1 exclusive; below 0, the loss that is tolerated (a non-inferiority test); above 0, the gain that
            is required.

    Value and interval are those of a - b; `least` is not subtracted. Unless `least` is 0, the two methods cannot be
    swapped under the null hypothesis, and p is that of `_margin_p`.

    Raises:
        ValueError: as `clustered_mean`.
    """
    if not -1 < least < 1:
        raise ValueError(f"least must be in -1..1 exclusive, not {least}")
    a_n, b_n = _unit(a, "a"), _unit(b, "b")
    if a_n.shape != b_n.shape:
        raise ValueError(f"a and b must be of the same examples, not of {len(a_n)} and {len(b_n)}")
    d_n = a_n - b_n
    masks = [np.ones(len(d_n), dtype=bool)] if groups is None else groups
    sums_CG, counts_CG, n = _by_cluster(d_n, clusters, masks)
    value = _macro(sums_CG.sum(axis=0), counts_CG.sum(axis=0))
    low, high = _bootstrap(sums_CG, counts_CG, **resampling) or _wilson(
        value, len(sums_CG), resampling["confidence"], lowest=-1.0, highest=1.0
    )
    # A cluster's share of the value. A flip changes no count, so the shares are additive.
    shares_C = (sums_CG / counts_CG.sum(axis=0)).mean(axis=1)
    p = _flip_p(shares_C) if least == 0 else _margin_p(sums_CG, counts_CG, least)
    return Difference(value, low, high, p, n)


def replicated_difference(
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    replicates: Sequence[tuple[int, int]],
    clusters: Clusters,
    groups: Groups | None = None,
    *,
    least: float,
    **resampling: Unpack[Resampling],
) -> Difference:
    """The mean of `difference_above` over replicates, with an interval and a p-value that cover their choice too.

    Args:
        a, b: [K][n] hits in each replicate.
        replicates: [K] (few-shot sample, noise set) of each, all different. With one this is `difference_above`.

    Samples, noise sets and clusters are crossed: the same noise sets and examples are used with every sample. The
    squared error is the sum of those of the clusters, of the samples' means and of the noise sets' means. p is that of
    the t-test with it; degrees of freedom by Satterthwaite (1946, "An approximate distribution of estimates of variance
    components"). It is conservative: the interaction of two factors counts in the error of both.

    The interval is a hierarchical bootstrap: samples, noise sets and clusters are resampled independently (Owen 2007,
    "The pigeonhole bootstrap"). Two or three levels spread too little when they are resampled, so the deviations from
    the value are scaled, by the half-width of the t-test over that of a normal distribution with their spread.
    """
    a_Kn, b_Kn = (np.stack([_unit(hits, name) for hits in side]) for side, name in ((a, "a"), (b, "b")))
    masks = [np.ones(a_Kn.shape[1], dtype=bool)] if groups is None else groups
    sums_KCG = np.stack([_by_cluster(d_n, clusters, masks)[0] for d_n in a_Kn - b_Kn])
    sums_CG, (_, counts_CG, n) = sums_KCG.mean(axis=0), _by_cluster(a_Kn[0], clusters, masks)
    values_K = (sums_KCG.sum(axis=1) / counts_CG.sum(axis=0)).mean(axis=1)
    value = float(values_K.mean())
    levels = [np.unique(factor, return_inverse=True)[1] for factor in zip(*replicates, strict=True)]
    parts = [(_squared_error(sums_CG, counts_CG), len(sums_CG) - 1)]  # squared errors and their degrees of freedom
    for index_K in levels:
        means_L = np.bincount(index_K, values_K) / np.bincount(index_K)
        if len(means_L) > 1:
            parts.append((float(means_L.var(ddof=1)) / len(means_L), len(means_L) - 1))
    error = float(np.sqrt(sum(squared for squared, _ in parts)))
    if len(replicates) == 1 or len(sums_CG) == 1 or error < 1e-12:  # one replicate or cluster, or all agree
        return difference_above(a_Kn.mean(axis=0), b_Kn.mean(axis=0), clusters, groups, least=least, **resampling)
    freedom = error**4 / sum(squared**2 / df for squared, df in parts)
    p = float(2 * stats.t.sf(abs(value - least) / error, freedom))
    values_R = _pigeonholes(sums_KCG, counts_CG, levels, resampling["resamples"], resampling["seed"])
    upper = (1 + resampling["confidence"]) / 2
    scale = stats.t.ppf(upper, freedom) * error / (stats.norm.ppf(upper) * values_R.std())
    low, high = value + scale * (np.quantile(values_R, [1 - upper, upper]) - value)
    return Difference(value, max(-1.0, float(low)), min(1.0, float(high)), p, n)


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


def _pigeonholes(
    sums_KCG: Floats, counts_CG: Floats, levels: Sequence[NDArray[np.intp]], resamples: int, seed: int
) -> Floats:
    """At most R values, under resampled clusters and resampled levels of each factor ([K] each); some lack a group."""
    K, C, G = sums_KCG.shape
    rng, sums_CM = np.random.default_rng(seed), sums_KCG.transpose(1, 0, 2).reshape(C, K * G)
    rows, values = max(1, BATCH_VALUES // C), []
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        weights_RK = np.ones((count, K))
        for index_K in levels:
            size = int(index_K.max()) + 1
            weights_RK *= rng.multinomial(size, [1 / size] * size, size=count)[:, index_K]
        chosen_RC = rng.multinomial(C, [1 / C] * C, size=count).astype(np.float64)
        sums_RKG = (chosen_RC @ sums_CM).reshape(count, K, G)
        with np.errstate(invalid="ignore"):  # 0/0: no cluster of a group, or, in an incomplete grid, no replicate
            means_RG = np.einsum("rk,rkg->rg", weights_RK, sums_RKG) / weights_RK.sum(axis=1, keepdims=True)
            values.append((means_RG / (chosen_RC @ counts_CG)).mean(axis=1))
    values_R = np.concatenate(values)
    return values_R[np.isfinite(values_R)]


def _squared_error(sums_CG: Floats, counts_CG: Floats) -> float:
    """Squared error of the macro mean over clusters, linearised where they differ in size.

    Cochran 1977, "Sampling Techniques", eq. 6.13.
    """
    totals_G, C = counts_CG.sum(axis=0), len(sums_CG)
    residuals_C = ((sums_CG - counts_CG * (sums_CG.sum(axis=0) / totals_G)) / totals_G).mean(axis=1)
    return float(C / max(1, C - 1) * np.sum(residuals_C**2))


def _wilson(value: float, clusters: int, confidence: float, *, lowest: float, highest: float) -> tuple[float, float]:
    """Interval if every cluster has the same value, so that resampling shows no spread.

    Wilson's upper limit for 0 of C bounds the share of clusters that differ from all observed ones; their values could
    be anywhere in lowest..highest. For hits that are all 1 or all 0 this equals Wilson's interval for C of C or 0 of C.
    """
    share = stats.binomtest(0, clusters).proportion_ci(confidence, method="wilson").high
    return float((1 - share) * value + share * lowest), float((1 - share) * value + share * highest)


def _flip_p(shares_C: Floats) -> float:
    """Two-sided p-value of the sum of the shares under independent sign flips, one per cluster.

    The distribution of the sum is computed by convolution over the multiples of a common step of the shares (Pagano and
    Tritchler 1983, "On obtaining permutation distributions in polynomial time"). With hits of 0 and 1 the step is one
    hit, and p is exact. Shares without a common step, as of groups of unequal size, are rounded to steps so small that
    p is at most a few percent too large.
    """
    shares_C = shares_C[np.abs(shares_C) > 1e-12]  # flipping a zero changes nothing
    if shares_C.size < 2:  # one cluster: both flips are as extreme as the observed sum
        return 1.0
    sizes_C = np.abs(shares_C) / np.abs(shares_C).max()
    most = min(STEPS, STEPS_CLUSTERS // len(sizes_C))
    step = _common_step(sizes_C)
    rounded = sizes_C.sum() > most * step
    if rounded:
        step = sizes_C.sum() / most
    steps_C = np.rint(sizes_C / step).astype(np.int64)
    positive, total = int(steps_C[shares_C > 0].sum()), int(steps_C.sum())
    # As extreme as observed, on one side. Rounding moves a sum by less than √C steps, 3.5 standard deviations.
    extreme = max(positive, total - positive) - (int(np.sqrt(len(steps_C))) if rounded else 0)
    chance = np.zeros(total + 1)  # of each sum of the positive shares
    chance[0], reached = 1.0, 0
    for steps in np.sort(steps_C).tolist():
        chance[: reached + 1] *= 0.5
        chance[steps : reached + steps + 1] += chance[: reached + 1].copy()
        reached += steps
    p = 2 * float(chance[max(0, extreme) :].sum())
    return min(1.0, max(p, float(np.finfo(np.float64).tiny)))  # thousands of equal signs: less than any float


def _common_step(sizes: Floats) -> float:
    """The largest number that all sizes (in 0..1 exclusive of 0) are multiples of, by Euclid's algorithm.

    Numbers below 1e-9 count as rounding errors.
    """
    step = 0.0
    for size in np.unique(sizes).tolist():
        rest = step
        step = size
        while rest > 1e-9:
            step, rest = rest, abs(step - rest * round(step / rest))
    return step


def _margin_p(sums_CG: Floats, counts_CG: Floats, least: float) -> float:
    """Two-sided p-value of the null hypothesis that the macro mean of differences is `least`, not 0.

    - If every cluster is one example, and the differences are 0 and 1 (`least` above 0) or 0 and −1 (below 0): the
      binomial test of their number.
    - If every cluster is one example with a difference of −1, 0 or 1: the score test of Tango 1998 ("Equivalence test
      and confidence interval for the difference in proportions for the paired-sample design"). With few differences
      the t-test is too liberal.
    - If all clusters have the same difference: twice the chance that no cluster shows another one, for the distribution
      within −1..1 with mean `least` that makes it largest.
    - Otherwise the t-test of the clusters (`_squared_error`).
    """
    sign, C = np.sign(least), len(sums_CG)
    if sums_CG.shape[1] == 1 and (counts_CG == 1).all() and np.isin(sign * sums_CG, (0, 1)).all():
        return float(stats.binomtest(round(abs(sums_CG.sum())), C, abs(least)).pvalue)
    if sums_CG.shape[1] == 1 and (counts_CG == 1).all() and np.isin(sums_CG, (-1, 0, 1)).all():
        return _score_p(int((sign * sums_CG == 1).sum()), int((sign * sums_CG == -1).sum()), C, abs(least))
    value = _macro(sums_CG.sum(axis=0), counts_CG.sum(axis=0))
    error = np.sqrt(_squared_error(sums_CG, counts_CG))
    if error > 1e-12:
        return float(2 * stats.t.sf(abs(value - least) / error, C - 1))
    if value == least:
        return 1.0
    side = 1.0 if value > least else -1.0
    return min(1.0, 2 * float((1 + side * least) / (1 + side * value)) ** C)


def _score_p(gains: int, losses: int, n: int, least: float) -> float:
    """Two-sided p-value of Tango's score test of the null hypothesis that gains minus losses is the share `least` of n.

    least: above 0. The chance of a loss is estimated under the null hypothesis.
    """
    linear = (2 * n - gains + losses) * least - gains - losses
    loss = (np.sqrt(linear**2 + 8 * n * losses * least * (1 - least)) - linear) / (4 * n)
    deviation = np.sqrt(n * (2 * loss + least * (1 - least)))
    return float(2 * stats.norm.sf(abs(gains - losses - n * least) / deviation))
