"""Replay schedules on evidence that is recorded at every draw: their evaluations and winners. No model runs here.

Shapes: n races of C candidates, K draws.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, product
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
from dsd.schedules.race import Floats, Race
from dsd.schedules.racing import calibrate, fit_forecast, racing_name
from dsd.statistics import clustered_mean, paired_difference
from dsd.store import digest

log = logging.getLogger(__name__)

LEARNED_FROM, MEASURED_ON = "train", "test"  # splits
SPARED = "spared evaluations"
AGREED = "the winner of all draws"
Identities = Mapping[str, Mapping[str, str]]  # `RaceRunner.identity` by method
SHORTLISTS = (1, 2, 5, 10, 20, 50)


class RecordedRaces(NamedTuple):
    """The races of a split: evidence, the proposers' scores, and which candidate is right, −1 in a tie."""

    values: list[Floats]  # [C, K] each
    proposals: dict[str, list[Floats]]  # by proposer, [C] each
    answers: list[int]
    clusters: list[str]

    def subset(self, indices: Iterable[int]) -> RecordedRaces:
        rows = sorted(indices)
        return RecordedRaces(
            [self.values[i] for i in rows],
            {proposer: [scores[i] for i in rows] for proposer, scores in self.proposals.items()},
            [self.answers[i] for i in rows],
            [self.clusters[i] for i in rows],
        )


class Outcome(NamedTuple):
    """Results of races, [n] each: the winner, whether it is right, whether all draws have the same winner, and the
    share of evaluations made."""

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
        columns = {"accuracy": self.hits, "disagreement": ~self.agrees, "share": self.share}
        results = {
            name: clustered_mean(column.astype(float), races.clusters, everyone, **options).as_dict()
            for name, column in columns.items()
        }
        if np.ptp(self.share) == 0:  # a cost that never varies is known exactly
            results["share"] |= {"low": results["share"]["value"], "high": results["share"]["value"]}
        difference = paired_difference(self.hits, whole.hits, races.clusters, **options).as_dict()
        sizes = (values_CK.size for values_CK in races.values)
        evaluations = " ".join(str(round(share * size)) for share, size in zip(self.share, sizes, strict=True))
        hits, agrees = ("".join("01"[int(bit)] for bit in bits) for bits in (self.hits, self.agrees))
        each = {"hits": hits, "agrees": agrees, "evaluations": evaluations}
        return {**results, "difference": difference, "each": each}


def replay(course: Course, races: RecordedRaces) -> Outcome:
    """The outcome of the races under a course."""
    outcomes = []
    for number, values_CK in enumerate(races.values):
        proposal = races.proposals[course.proposer][number] if course.proposer else None
        ordered_CK = values_CK[:, course.order]
        race = Race(len(ordered_CK), course.schedule, proposal)
        while len(rows := race.next_rows()):
            race.record(ordered_CK[rows[:, 0], rows[:, 1]])
        winner = race.ranking()[0]
        agrees = winner == np.nanmean(values_CK, 1).argmax()
        outcomes.append((winner, winner == races.answers[number], agrees, race.evaluations / values_CK.size))
    return Outcome(*(np.array(column) for column in zip(*outcomes, strict=True)))


class Trial(NamedTuple):
    """A setting, and its outcomes on the races that select it and on those that measure it."""

    schedule: ScheduleKind
    setting: Setting
    learned_from: Outcome
    measured_on: Outcome

    def as_dict(self, draws: int) -> dict[str, Any]:
        on = {LEARNED_FROM: self.learned_from.means(draws), MEASURED_ON: self.measured_on.means(draws)}
        return {"schedule": self.schedule.kind, "setting": self.setting, **on}


def compare_settings(
    learning: RecordedRaces, measured: RecordedRaces, races: RacesParams, evaluate: EvaluateParams, seed: int
) -> tuple[dict[str, Course], dict[str, Any]]:
    """Replay every setting of every schedule, choose the best of each schedule, and calibrate racing.

    Racing is fitted on a random part of the learning races, and chosen and calibrated on the others.

    Returns: the chosen courses by name, and the results of all, as in data/races/*.json.
    """
    shuffled = np.random.default_rng(seed).permutation(len(learning.values))
    parts = np.split(shuffled, [math.ceil(races.racing.learning * len(shuffled))])
    fitting, calibration = (learning.subset(part.tolist()) for part in parts)
    levels, rivals = draw_levels(races), races.racing.rivals
    forecasts = {
        str(p): fit_forecast(fitting.values, levels, rivals, fitting.proposals[p] if p else None)
        for p in races.racing.proposer
    }
    comparison = {"learned": {proposer: asdict(forecast) for proposer, forecast in forecasts.items()}}
    # The kinds with a section in `races`, in the order of the sections: the order of the results.
    kinds = [SCHEDULES[section] for section in type(races).model_fields if section in SCHEDULES]
    trials = []
    for kind in kinds:
        own_races = calibration if kind.needs_comparison else learning
        for setting in kind.settings(races):
            course = kind.course(setting, races, comparison)
            trials.append(Trial(kind, setting, replay(course, own_races), replay(course, measured)))
    calibrated = _calibrated(trials, races)
    settings = [
        *((name, kind, setting) for kind in kinds for name, setting in kind.named_settings(races).items()),
        *((trial.schedule.kind, trial.schedule, trial.setting) for trial in _best(trials, races.within)),
        *((name, SCHEDULES["racing"], setting) for name, setting in calibrated.items()),
    ]
    draws, everything = len(levels), exhaustive_course(races)
    chosen = {ALL_DRAWS: ({"draws": draws}, everything)} | {
        name: (setting, kind.course(setting, races, comparison)) for name, kind, setting in settings
    }

    whole = replay(everything, measured)
    counts = {LEARNED_FROM: learning, "calibration": calibration, MEASURED_ON: measured}
    results = {
        "races": {name: len(part.values) for name, part in counts.items()},
        "candidates": float(np.mean([len(values_CK) for values_CK in measured.values])),
        "draws": draws,
        "ties": sum(answer < 0 for answer in measured.answers),
        "recall": {proposer: proposer_recall(scores, whole.winners) for proposer, scores in measured.proposals.items()},
        **comparison,
        "promised": list(calibrated.values()),
        "chosen": {
            name: {"setting": setting, **replay(course, measured).intervals(whole, measured, evaluate, seed)}
            for name, (setting, course) in chosen.items()
        },
        "runs": [trial.as_dict(draws) for trial in trials],
    }
    return {name: course for name, (_, course) in chosen.items()}, results


def _best(trials: Sequence[Trial], within: float) -> list[Trial]:
    """The cheapest setting of each schedule that misses the winner of all draws in at most the share `within` of races,
    else the one that misses it least."""

    def merit(trial: Trial) -> tuple[float, float]:
        missed = float((~trial.learned_from.agrees).mean())
        return max(0.0, missed - within), float(trial.learned_from.share.mean())

    return [min(some, key=merit) for _, some in groupby(trials, key=lambda trial: trial.schedule.kind)]


def _calibrated(trials: Sequence[Trial], races: RacesParams) -> dict[str, Setting]:
    """The settings of racing, by name, that are calibrated for each error rate, after each proposer and without."""
    settings: dict[str, Setting] = {}
    for proposer, delta in product(races.racing.proposer, races.racing.deltas):
        own = [trial for trial in trials if trial.schedule.kind == "racing" and trial.setting["proposer"] == proposer]
        errors = {trial.setting["threshold"]: (~trial.learned_from.agrees).tolist() for trial in own}
        remedy = "raise few_shot, or leave that δ out of races.racing.deltas"
        threshold = calibrate(errors.__getitem__, races.racing.threshold, delta, races.racing.confidence, remedy)
        settings[racing_name(delta, proposer)] = {"proposer": proposer, "delta": delta, "threshold": threshold}
    return settings


def proposer_recall(proposals: Sequence[Floats], winners: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    """The share of races whose winner of all draws is among the proposer's first candidates, by how many of them."""
    places = np.array([(scores_C > scores_C[w]).sum() + 1 for scores_C, w in zip(proposals, winners, strict=True)])
    return {str(kept): float((places <= kept).mean()) for kept in SHORTLISTS if kept < max(map(len, proposals))}


def read_hits(
    file: Path, identities: Identities, metric: str, examples: Sequence[MatchingExample]
) -> dict[str, dict[str, Hits]]:
    """Hits of each chosen schedule, `<method>, <schedule>`, by metric: `metric`, right answers; `AGREED`, same winner
    as all draws; `SPARED`, the share of evaluations spared.

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
                columns = {metric: hits_n, AGREED: agrees_n, SPARED: 1 - own_n / whole_n}
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
