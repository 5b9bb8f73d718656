"""Replay schedules on evidence that is recorded at every draw: their evaluations and winners. No model runs here.

Shapes: n races of C candidates, K draws.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsd.config import EvaluateParams, RacesParams
from dsd.data.examples import MatchingExample
from dsd.metrics import Hits
from dsd.schedules import SCHEDULES
from dsd.schedules.base import Course, ScheduleKind, Setting, draw_levels
from dsd.schedules.exhaustive import ALL_DRAWS, exhaustive_course
from dsd.schedules.race import Floats
from dsd.schedules.racing import UnsupportedRate, calibrate, fit_forecast, racing_name
from dsd.statistics import clustered_mean, paired_difference
from dsd.store import digest

log = logging.getLogger(__name__)

# Splits: forecasts are fitted on the first, settings are chosen and racing is calibrated on the second.
LEARNED_FROM, CHOSEN_ON, MEASURED_ON = "train", "validation", "test"
SPARED = "spared evaluations"
AGREED = "the winner of all draws"
Identities = Mapping[str, Mapping[str, str]]  # `RaceRunner.identity` by method
SHORTLISTS = (1, 2, 5, 10, 20, 50)


class RecordedRaces(NamedTuple):
    """The races of a split: evidence, the proposers' scores, and which candidate is right, −1 in a tie.

    costs: what a proposer's scores of one race cost, as a number of evaluations.
    """

    values: list[Floats]  # [C, K] each
    proposals: dict[str, list[Floats]]  # by proposer, [C] each
    costs: dict[str, float]  # by proposer
    answers: list[int]
    clusters: list[str]


class Outcome(NamedTuple):
    """Results of races, [n] each: the winner, whether it is right, whether all draws have the same winner, and the
    share of evaluations made, with those that the proposer's scores cost."""

    winners: NDArray[np.int64]
    hits: NDArray[np.bool_]
    agrees: NDArray[np.bool_]
    share: Floats

    def means(self, draws: int) -> dict[str, float]:
        """Accuracy, disagreement with the winner of all draws, and evaluations per candidate."""
        return {
            "accuracy": float(self.hits.mean()),
            "disagreement": float((~self.agrees).mean()),
            "evaluations": float(self.share.mean() * draws),
        }

    def intervals(self, whole: Outcome, races: RecordedRaces, evaluate: EvaluateParams, seed: int) -> dict[str, Any]:
        """Accuracy, disagreement and share of the evaluations with their intervals, the difference in accuracy from
        all draws (`whole`), and for paired tests the hit, agreement and evaluations of each race."""
        options = dict(evaluate.model_dump(), seed=seed)
        everyone = [np.ones(len(races.values), dtype=bool)]
        most = max(1.0, float(self.share.max()))  # above 1 if a proposer is added to all draws
        columns = {"accuracy": self.hits, "disagreement": ~self.agrees, "share": self.share / most}
        results: dict[str, Any] = {
            name: clustered_mean(column.astype(float), races.clusters, everyone, **options).as_dict()
            for name, column in columns.items()
        }
        results["share"] |= {key: most * results["share"][key] for key in ("value", "low", "high")}
        if np.ptp(self.share) == 0:  # a cost that never varies is known exactly
            results["share"] |= {"low": results["share"]["value"], "high": results["share"]["value"]}
        difference = paired_difference(self.hits, whole.hits, races.clusters, **options).as_dict()
        sizes = (values_CK.size for values_CK in races.values)
        evaluations = " ".join(f"{share * size:.6g}" for share, size in zip(self.share, sizes, strict=True))
        hits, agrees = ("".join("01"[int(bit)] for bit in bits) for bits in (self.hits, self.agrees))
        each = {"hits": hits, "agrees": agrees, "evaluations": evaluations}
        return {**results, "difference": difference, "each": each}


def replay(course: Course, races: RecordedRaces) -> Outcome:
    """The outcome of the races under a course, with its budget in force."""
    outcomes = []
    proposing = races.costs[course.proposer] if course.proposer else 0.0
    for number, values_CK in enumerate(races.values):
        proposal = races.proposals[course.proposer][number] if course.proposer else None
        ordered_CK = values_CK[:, course.order]
        race = course.race(len(ordered_CK), proposal)
        while len(rows := race.next_rows()):
            race.record(ordered_CK[rows[:, 0], rows[:, 1]])
        winner = race.ranking()[0]
        agrees = winner == np.nanmean(values_CK, 1).argmax()
        share = (race.evaluations + proposing) / values_CK.size
        outcomes.append((winner, winner == races.answers[number], agrees, share))
    return Outcome(*(np.array(column) for column in zip(*outcomes, strict=True)))


class Trial(NamedTuple):
    """A setting, and its outcomes on the races that select it and on those that measure it."""

    schedule: ScheduleKind
    setting: Setting
    chosen_on: Outcome
    measured_on: Outcome

    @property
    def label(self) -> str:
        return label_of(self.schedule.kind, self.setting)

    @property
    def missed(self) -> float:
        """The share of the selecting races with another winner than all draws."""
        return float((~self.chosen_on.agrees).mean())

    def as_dict(self, draws: int) -> dict[str, Any]:
        on = {CHOSEN_ON: self.chosen_on.means(draws), MEASURED_ON: self.measured_on.means(draws)}
        return {"schedule": self.schedule.kind, "setting": self.setting, **on}


def label_of(schedule: str, setting: Setting) -> str:
    """The name of a kind of schedule, with its proposer if it has one."""
    proposer = setting.get("proposer")
    return f"{schedule}, {proposer} first" if proposer else schedule


def matched_name(label: str, within: float) -> str:
    """The name in results of the cheapest setting that disagrees with all draws in at most this share of races."""
    return f"{label}, within {100 * within:g} %"


def compare_settings(
    learning: RecordedRaces,
    choosing: RecordedRaces,
    measured: RecordedRaces,
    races: RacesParams,
    evaluate: EvaluateParams,
    seed: int,
) -> tuple[dict[str, Course], dict[str, Any]]:
    """Replay every setting of every schedule, choose the cheapest at each rate of disagreement, and calibrate racing.

    Args:
        learning: the races that racing's forecasts are fitted on.
        choosing: other races, on which settings are chosen and racing is calibrated; no two of one cluster.
        measured: the races that the results are of.

    Returns: the chosen courses by name, and the results of all, as in data/races/*.json.
    """
    if len(set(choosing.clusters)) < len(choosing.clusters):
        raise ValueError("calibration needs independent races: no two of one cluster")
    levels, rivals = draw_levels(races), races.racing.rivals
    forecasts = {
        str(p): fit_forecast(learning.values, levels, rivals, learning.proposals[p] if p else None)
        for p in races.racing.proposer
    }
    comparison = {"learned": {proposer: asdict(forecast) for proposer, forecast in forecasts.items()}}
    # The kinds with a section in `races`, in the order of the sections: the order of the results.
    kinds = [SCHEDULES[section] for section in type(races).model_fields if section in SCHEDULES]
    trials = []
    for kind in kinds:
        for setting in kind.settings(races):
            course = kind.course(setting, races, comparison)
            trials.append(Trial(kind, setting, replay(course, choosing), replay(course, measured)))
    promised = _promised(trials, races)
    settings = [
        *((name, kind, setting) for kind in kinds for name, setting in kind.named_settings(races).items()),
        *((name, trial.schedule, trial.setting) for name, trial in _matched(trials, races.within).items()),
        *((name, SCHEDULES["racing"], promise) for name, promise in promised.items() if promise["threshold"]),
    ]
    draws, everything = len(levels), exhaustive_course(races)
    chosen = {ALL_DRAWS: ({"draws": draws}, everything)} | {
        name: (setting, kind.course(setting, races, comparison)) for name, kind, setting in settings
    }

    whole = replay(everything, measured)
    counts = {LEARNED_FROM: learning, CHOSEN_ON: choosing, MEASURED_ON: measured}
    results = {
        "races": {name: len(part.values) for name, part in counts.items()},
        "candidates": float(np.mean([len(values_CK) for values_CK in measured.values])),
        "draws": draws,
        "ties": sum(answer < 0 for answer in measured.answers),
        "recall": {proposer: proposer_recall(scores, whole.winners) for proposer, scores in measured.proposals.items()},
        "costs": measured.costs,
        "within": list(races.within),
        **comparison,
        "promised": list(promised.values()),
        "chosen": {
            name: {"setting": setting, **replay(course, measured).intervals(whole, measured, evaluate, seed)}
            for name, (setting, course) in chosen.items()
        },
        "runs": [trial.as_dict(draws) for trial in trials],
    }
    return {name: course for name, (_, course) in chosen.items()}, results


def _matched(trials: Sequence[Trial], rates: Sequence[float]) -> dict[str, Trial]:
    """The cheapest trial of each schedule within each rate of disagreement, by name; none where no setting is."""
    matched = {}
    for label in dict.fromkeys(trial.label for trial in trials):
        for rate in rates:
            if within := [trial for trial in trials if trial.label == label and trial.missed <= rate]:
                matched[matched_name(label, rate)] = min(within, key=lambda trial: float(trial.chosen_on.share.mean()))
    return matched


def _promised(trials: Sequence[Trial], races: RacesParams) -> dict[str, Setting]:
    """The settings of racing, by name, that are calibrated for each proposer, error rate and budget.

    Where the races do not support the rate, `threshold` is None, and `smallest` is the least rate that they support.
    """
    promised: dict[str, Setting] = {}
    own = [trial for trial in trials if trial.schedule.kind == "racing"]
    for proposer, delta, budget in product(races.racing.proposer, races.racing.deltas, races.racing.budget):
        errors = {
            trial.setting["threshold"]: (~trial.chosen_on.agrees).tolist()
            for trial in own
            if (trial.setting["proposer"], trial.setting["budget"]) == (proposer, budget)
        }
        promise = {"proposer": proposer, "delta": delta, "budget": budget}
        name, remedy = racing_name(delta, proposer, budget), "raise validation, δ or the budget"
        try:
            threshold = calibrate(errors.__getitem__, races.racing.threshold, delta, races.racing.confidence, remedy)
            promised[name] = promise | {"threshold": threshold}
        except UnsupportedRate as refusal:
            log.warning("%s: %s", name, refusal)
            promised[name] = promise | {"threshold": None, "smallest": refusal.smallest}
    return promised


def proposer_recall(proposals: Sequence[Floats], winners: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    """The share of races whose winner of all draws is among the proposer's first candidates, by how many of them."""
    places = np.array([(scores_C > scores_C[w]).sum() + 1 for scores_C, w in zip(proposals, winners, strict=True)])
    return {str(kept): float((places <= kept).mean()) for kept in SHORTLISTS if kept < max(map(len, proposals))}


def read_hits(
    file: Path, identities: Identities, metric: str, examples: Sequence[MatchingExample]
) -> dict[str, dict[str, Hits]]:
    """Hits of each chosen schedule, `<method>, <schedule>`, by metric: `metric`, right answers; `AGREED`, same winner
    as all draws; `SPARED`, the share of evaluations spared, 0 where a proposer makes a race dearer than all draws.

    Empty where the comparison was not run, or not on these examples, or is stale, see `current_comparisons`.
    """
    everyone = [np.ones(len(examples), dtype=bool)]
    hits = {}
    for method, comparison in current_comparisons(file, identities).items():
        if comparison["examples"] == digest([example.id for example in examples]):
            for schedule, row in comparison["chosen"].items():
                each, whole = row["each"], comparison["chosen"][ALL_DRAWS]["each"]
                own_n, whole_n = (np.array(side["evaluations"].split(), dtype=float) for side in (each, whole))
                hits_n, agrees_n = (np.array(list(each[bits]), dtype=float) for bits in ("hits", "agrees"))
                columns = {metric: hits_n, AGREED: agrees_n, SPARED: np.maximum(0, 1 - own_n / whole_n)}
                hits[f"{method}, {schedule}"] = {key: (column, everyone) for key, column in columns.items()}
    return hits


def current_comparisons(file: Path, identities: Identities) -> dict[str, Any]:
    """The schedule comparisons of a dataset, by method, without those made with other params, model or code."""
    comparisons = read_comparisons(file)
    for method, results in list(comparisons.items()):
        if method not in identities or not identities[method].items() <= results.items():
            log.warning("%s: %s was compared with other params, model or code: run `make races`", file, method)
            del comparisons[method]
    return comparisons


def read_comparisons(file: Path) -> dict[str, Any]:
    """The schedule comparisons of a dataset, by method; empty where none was run."""
    return dict(json.loads(file.read_text())) if file.exists() else {}
