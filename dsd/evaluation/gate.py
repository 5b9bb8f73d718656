"""The gate decides whether a challenger replaces the champion, from the ranks of both on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dsd.config import EvaluateParams, GateParams, Params
from dsd.data.examples import MatchingExample
from dsd.datasets import benchmark
from dsd.errors import DataError, ParamsError
from dsd.metrics import METRICS
from dsd.statistics import Difference, difference_above, holm
from dsd.store import digest


class Ranks(NamedTuple):
    """The ranks of one checkpoint on the test examples of a dataset, and what a comparison needs."""

    kind: str
    examples: str  # digest of the examples; ranks on other examples are not comparable
    categories: list[str]
    clusters: list[str]
    ranks: list[int]  # of the right pair, 1 is right

    @classmethod
    def of(cls, kind: str, examples: Sequence[MatchingExample], ranks: Sequence[int]) -> Ranks:
        categories, clusters = [e.category for e in examples], [e.cluster for e in examples]
        return cls(kind, digest(*examples), categories, clusters, list(ranks))


@dataclass(frozen=True)
class Compared:
    """Challenger minus champion on the headline metric of a dataset, and the limits of params.yaml.

    `p` is of the null hypothesis that the difference is `minimum_effect`, corrected by Holm for the number of datasets;
    low and high are of `evaluate.confidence`.
    """

    metric: str
    difference: Difference
    p: float
    minimum_effect: float
    maximum_regression: float
    better: bool
    kept: bool  # significantly no worse than maximum_regression allows

    def __str__(self) -> str:
        d = self.difference
        span = f"{_points(d.value)} points [{_points(d.low)}, {_points(d.high)}]"
        return f"{span}, p {self.p:.3f} that it exceeds {_points(self.minimum_effect)}, n = {d.n}"


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger is promoted, the reason, and the comparisons by dataset (none without a champion)."""

    promoted: bool
    reason: str
    compared: Mapping[str, Compared]


def check_gate(params: Params, datasets: Sequence[str]) -> None:
    """Check that `gate` has a row for at least one of these datasets; raise ParamsError."""
    if not set(params.gate.datasets) & set(datasets):
        raise ParamsError(f"gate.datasets: has a row for none of {', '.join(datasets)}; give at least one")


def judge(
    gate: GateParams,
    evaluate: EvaluateParams,
    seed: int,
    challenger: Mapping[str, Ranks],
    champion: Mapping[str, Ranks] | None,
) -> Verdict:
    """Return the verdict on a challenger.

    It is promoted if on some dataset its gain is significantly above `minimum_effect` (by `difference_above`, corrected
    by Holm for the number of datasets), and on every dataset it is not worse by more than `maximum_regression` (by the
    interval of the difference). A tie keeps the champion.

    Raises:
        DataError: the champion was measured on other examples.
    """
    if champion is None:
        return Verdict(True, "there was no champion", {})
    for name in other_examples(gate, challenger, champion):
        raise DataError(f"{name}: the champion was measured on other examples; evaluate it again with these params")
    names = [name for name in gate.datasets if name in challenger]
    compared = _compare(gate, evaluate, seed, {name: (challenger[name], champion[name]) for name in names})
    better = [name for name, c in compared.items() if c.better]
    lost = [name for name, c in compared.items() if not c.kept]
    if better and not lost:
        return Verdict(True, "better on " + _listed(better, compared), compared)
    if lost:
        allowed = ", ".join(f"{100 * compared[name].maximum_regression:.1f} on {name}" for name in lost)
        reason = f"may have lost more than is allowed ({allowed}, in points): {_listed(lost, compared)}"
    else:
        reason = f"not shown to be better, and a tie keeps the champion: {_listed(list(compared), compared)}"
    return Verdict(False, reason, compared)


def other_examples(gate: GateParams, challenger: Mapping[str, Ranks], champion: Mapping[str, Ranks]) -> list[str]:
    """Return the challenger's datasets in `gate` on which the champion has other examples or was not measured."""
    names = [name for name in gate.datasets if name in challenger]
    return [n for n in names if n not in champion or champion[n].examples != challenger[n].examples]


def _compare(
    gate: GateParams, evaluate: EvaluateParams, seed: int, sides: Mapping[str, tuple[Ranks, Ranks]]
) -> dict[str, Compared]:
    settings: dict[str, Any] = dict(evaluate.model_dump(), seed=seed)
    differences: dict[str, tuple[str, Difference]] = {}
    for name, (one, other) in sides.items():
        kind = benchmark(one.kind)
        metric, hits_by_metric = kind.headline, METRICS[kind.metrics]
        (hits, groups), (others, _) = (hits_by_metric(np.array(s.ranks), s.categories)[metric] for s in (one, other))
        least = gate.datasets[name].minimum_effect
        difference = difference_above(hits, others, one.clusters, groups, least=least, **settings)
        differences[name] = metric, difference
    corrected = holm([difference.p for _, difference in differences.values()])
    compared = {}
    for (name, (metric, d)), p in zip(differences.items(), corrected, strict=True):
        row = gate.datasets[name]
        better = d.value > row.minimum_effect and p < 1 - evaluate.confidence
        kept = d.low > -row.maximum_regression
        compared[name] = Compared(metric, d, p, row.minimum_effect, row.maximum_regression, better, kept)
    return compared


def _listed(names: Sequence[str], compared: Mapping[str, Compared]) -> str:
    return "; ".join(f"{name} {compared[name]}" for name in names)


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")
