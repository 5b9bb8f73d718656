"""Schedules compared on evidence that is there for every candidate at every draw: what each would have asked for of it,
and how it would have ended. No model is run here.

Shapes: n races of C candidates, K draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from dsd.config import Params, RacesParams, RacingSchedule, RacingSettings, ScheduleParams, StagedSchedule
from dsd.data.examples import MatchingExample
from dsd.errors import DataError
from dsd.metrics import Hits
from dsd.schedules.race import (
    Floats,
    Learned,
    Race,
    Schedule,
    all_draws,
    calibrate,
    hierarchical,
    learn,
    racing,
    shortlisted,
    staged,
)
from dsd.statistics import clustered_mean, paired_difference
from dsd.store import digest

Setting = dict[str, Any]
Proposer = str | None
LEARNED_FROM, MEASURED_ON = "train", "test"
EXHAUSTIVE = "exhaustive, all draws"
DIRECTIONS = ("clean", "noisy", "middle")
SPARED = "spared evaluations"
AGREED = "the winner of all draws"
SHORTLISTS = (1, 2, 5, 10, 20, 50)


class Entrants(NamedTuple):
    """The races of a split: their evidence, what each proposer says, and which candidate is right, −1 in a tie."""

    values: list[Floats]  # [C, K] each
    proposals: dict[str, list[Floats]]  # by proposer, [C] each
    answers: list[int]
    clusters: list[str]

    def some(self, chosen: Iterable[int]) -> Entrants:
        rows = sorted(chosen)
        return Entrants(
            [self.values[i] for i in rows],
            {proposer: [said[i] for i in rows] for proposer, said in self.proposals.items()},
            [self.answers[i] for i in rows],
            [self.clusters[i] for i in rows],
        )


class Course(NamedTuple):
    """A schedule, the order of its draws, and whose proposal it starts from."""

    order: list[int]
    schedule: Schedule
    proposer: Proposer


class Outcome(NamedTuple):
    """How races ended, [n] each: with whom, rightly, as all draws would have it, and at what share of their cost."""

    winners: NDArray[np.int64]
    hits: NDArray[np.bool_]
    agrees: NDArray[np.bool_]
    share: Floats


def replay(course: Course, races: Entrants) -> Outcome:
    """How the races would have ended."""
    found = []
    for number, values_CK in enumerate(races.values):
        proposal = races.proposals[course.proposer][number] if course.proposer else None
        ordered_CK = values_CK[:, course.order]
        race = Race(len(ordered_CK), course.schedule, proposal)
        while len(asked := race.asks()):
            race.tell(ordered_CK[asked[:, 0], asked[:, 1]])
        winner = race.ranking()[0]
        agrees = winner == np.nanmean(values_CK, 1).argmax()
        found.append((winner, winner == races.answers[number], agrees, race.evaluations / values_CK.size))
    return Outcome(*(np.array(column) for column in zip(*found, strict=True)))


def evenly(levels: int, per_level: int) -> list[int]:
    """Draws in an order whose every beginning is spread over the levels, as in the published code of `staged`."""
    points = qmc.Halton(1, scramble=False).fast_forward(1).random(8 * levels)
    spread = list(dict.fromkeys((points.ravel() * levels).astype(int).tolist()))
    return [level * per_level + number for number in range(per_level) for level in spread]


def published(direction: str) -> str:
    """The name of the second paper's own setting, from one of the three sides."""
    return f"hierarchical as published, from {direction}"


def promising(delta: float, proposer: Proposer) -> str:
    """The name of racing that is calibrated for an error rate."""
    return f"racing, δ = {delta:g}" + (f", {proposer} first" if proposer else "")


def directed(direction: str, levels: Sequence[float], samples: int, per_level: int) -> list[int]:
    """The first `samples` draws of each level, level by level: from clean, from noisy or from the middle outwards."""
    middle = (min(levels) + max(levels)) / 2
    keys: dict[str, Callable[[int], float]] = {
        "clean": lambda n: levels[n],
        "noisy": lambda n: -levels[n],
        "middle": lambda n: abs(levels[n] - middle),
    }
    walked = sorted(range(len(levels)), key=keys[direction])
    return [n * per_level + number for n in walked for number in range(samples)]


def courses(races: RacesParams, learned: Mapping[Proposer, Learned]) -> Iterator[tuple[str, Setting, Course]]:
    """(schedule, setting, course) of every setting of every schedule that the draws suffice for."""
    levels, per_level = races.levels, races.draws_per_level
    spread = evenly(len(levels), per_level)
    for draws in races.exhaustive.draws:
        yield "exhaustive", {"draws": draws}, Course(spread[:draws], all_draws(draws), None)
    for kept, first, growth in product(races.staged.to_keep, races.staged.first, races.staged.growth):
        samples = [first * growth**stage for stage in range(len(kept))]
        if samples[-1] <= len(spread):
            yield "staged", {"to_keep": kept, "n_samples": samples}, Course(spread, staged(kept, samples), None)
    for setting in grid(races.hierarchical.model_dump()):
        if setting["samples"] <= per_level:
            yield "hierarchical", setting, pruned(races, setting)
    for proposer, threshold in product(races.racing.proposer, races.racing.threshold):
        setting = {"proposer": proposer, "threshold": threshold}
        yield "racing", setting, raced(learned, proposer, threshold)


def pruned(races: RacesParams, setting: Setting) -> Course:
    levels, rest = races.levels, {key: value for key, value in setting.items() if key != "direction"}
    order = directed(setting["direction"], levels, setting["samples"], races.draws_per_level)
    return Course(order, hierarchical(len(levels), **rest), None)


def raced(learned: Mapping[Proposer, Learned], proposer: Proposer, threshold: float) -> Course:
    return Course(list(learned[proposer].order), racing(learned[proposer], threshold), proposer)


def course_of(row: ScheduleParams, races: RacesParams, told: Mapping[str, Any]) -> Course:
    """The course of a row of `schedules`; `told` is what races of the same score have told, which only racing needs.

    Raises:
        DataError: racing was not calibrated for this δ with this proposer.
    """
    if not isinstance(row, RacingSchedule):
        if isinstance(row, StagedSchedule):
            order = evenly(len(races.levels), races.draws_per_level)
            course = Course(order, staged(row.to_keep, row.n_samples), None)
        else:
            course = pruned(races, row.model_dump(exclude={"kind", "budget", "shortlist"}))
        if row.shortlist:
            first = shortlisted(course.schedule, row.shortlist.keep)
            course = course._replace(schedule=first, proposer=row.shortlist.proposer)
        return course
    for promise in told.get("promised", []):
        if (promise["proposer"], promise["delta"]) == (row.proposer, row.delta):
            learned = Learned(**told["learned"][str(row.proposer)])
            return raced({row.proposer: learned}, row.proposer, promise["threshold"])
    after = f" after {row.proposer}" if row.proposer else ""
    raise DataError(
        f"racing{after} was not calibrated for δ = {row.delta:g}; add it to races.racing and run `make races`"
    )


def grid(values: Mapping[str, Iterable[Any]]) -> Iterator[Setting]:
    """Every choice of one value for each key."""
    for chosen in product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


class Compared(NamedTuple):
    """The courses that were chosen on the learning races, by name, and all that is to be told of all of them."""

    chosen: dict[str, Course]
    told: dict[str, Any]


def compare(learning: Entrants, measured: Entrants, level_K: Sequence[float], params: Params) -> Compared:
    """What every setting of every schedule costs and keeps, the best of each schedule, and racing with its promises.

    Best is the cheapest setting that names another winner than all draws in at most the share `within` of the learning
    races; where there is none, the one that does so least.
    Racing learns from a random part of the learning races; it is calibrated, and judged there, on the others.
    """
    races, K = params.races, len(level_K)
    shuffled = np.random.default_rng(params.seed).permutation(len(learning.values))
    parts = np.split(shuffled, [math.ceil(races.racing.learning * len(shuffled))])
    known, fresh = (learning.some(part.tolist()) for part in parts)
    learned = {
        proposer: learn(known.values, level_K, races.racing.rivals, known.proposals[proposer] if proposer else None)
        for proposer in races.racing.proposer
    }
    everything = Course(list(range(K)), all_draws(K), None)
    chosen: dict[str, tuple[Setting, Course]] = {EXHAUSTIVE: ({"draws": K}, everything)}
    for direction in DIRECTIONS:
        setting = {"direction": direction, **races.published.model_dump()}
        chosen[published(direction)] = setting, pruned(races, setting)

    runs = []
    merits: dict[str, tuple[float, float]] = {}  # of the best so far: how many other winners too many, and the cost
    wrong: dict[Proposer, dict[float, list[bool]]] = {}  # of racing, by proposer and threshold
    for schedule, setting, course in courses(races, learned):
        seen = replay(course, fresh if schedule == "racing" else learning)
        both = {LEARNED_FROM: summary(seen, K), MEASURED_ON: summary(replay(course, measured), K)}
        runs.append({"schedule": schedule, "setting": setting, **both})
        if schedule == "racing":
            wrong.setdefault(course.proposer, {})[setting["threshold"]] = (~seen.agrees).tolist()
        merit = (max(0.0, float((~seen.agrees).mean()) - races.within), float(seen.share.mean()))
        if schedule not in merits or merit < merits[schedule]:
            merits[schedule], chosen[schedule] = merit, (setting, course)

    promises: list[Setting] = []
    for proposer, delta in product(races.racing.proposer, races.racing.deltas):
        remedy = "raise few_shot, or leave that δ out of races.racing.deltas"
        threshold = promised(delta, wrong[proposer].__getitem__, races.racing, remedy)
        promises.append({"proposer": proposer, "delta": delta, "threshold": threshold})
        chosen[promising(delta, proposer)] = promises[-1], raced(learned, proposer, threshold)

    whole = replay(everything, measured)
    counts = {LEARNED_FROM: len(learning.values), "calibration": len(fresh.values), MEASURED_ON: len(measured.values)}
    told = {
        "races": counts,
        "candidates": float(np.mean([len(values_CK) for values_CK in measured.values])),
        "draws": K,
        "ties": sum(answer < 0 for answer in measured.answers),
        "recall": {proposer: recall(said, whole.winners) for proposer, said in measured.proposals.items()},
        "learned": {str(proposer): asdict(found) for proposer, found in learned.items()},
        "promised": promises,
        "chosen": {
            name: {"setting": setting, **judged(replay(course, measured), whole, measured, params)}
            for name, (setting, course) in chosen.items()
        },
        "runs": runs,
    }
    return Compared({name: course for name, (_, course) in chosen.items()}, told)


def recall(said: Sequence[Floats], winners: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    """What is lost where a proposer alone says which candidates are seen at all: by how many of them, the share of
    races in which the winner of all draws is among those that it puts first."""
    places = np.array([(said_C > said_C[w]).sum() + 1 for said_C, w in zip(said, winners, strict=True)])
    return {str(kept): float((places <= kept).mean()) for kept in SHORTLISTS if kept < max(map(len, said))}


def summary(outcome: Outcome, draws: int) -> dict[str, float]:
    """Accuracy, share of other winners than all draws have, and evaluations of each candidate."""
    return {
        "accuracy": float(outcome.hits.mean()),
        "disagreement": float((~outcome.agrees).mean()),
        "evaluations": float(outcome.share.mean() * draws),
    }


def judged(outcome: Outcome, whole: Outcome, races: Entrants, params: Params) -> dict[str, Any]:
    """Accuracy, disagreement and share of the evaluations with their intervals, the difference from all draws, and for
    paired tests of each race: its hit, whether it agrees with all draws, its evaluations."""
    options = dict(params.evaluate.model_dump(), seed=params.seed)
    everyone = [np.ones(len(races.values), dtype=bool)]
    columns = {"accuracy": outcome.hits, "disagreement": ~outcome.agrees, "share": outcome.share}
    told = {
        name: clustered_mean(column.astype(float), races.clusters, everyone, **options).as_dict()
        for name, column in columns.items()
    }
    if np.ptp(outcome.share) == 0:  # what a schedule always costs is known for certain
        told["share"] |= {"low": told["share"]["value"], "high": told["share"]["value"]}
    difference = paired_difference(outcome.hits, whole.hits, races.clusters, **options).as_dict()
    sizes = (values_CK.size for values_CK in races.values)
    evaluations = " ".join(str(round(share * size)) for share, size in zip(outcome.share, sizes, strict=True))
    hits, agrees = ("".join("01"[int(bit)] for bit in bits) for bits in (outcome.hits, outcome.agrees))
    each = {"hits": hits, "agrees": agrees, "evaluations": evaluations}
    return {**told, "difference": difference, "each": each}


def promised(delta: float, wrong: Callable[[float], Sequence[bool]], settings: RacingSettings, remedy: str) -> float:
    """The threshold that keeps an error rate; see `dsd.schedules.race.calibrate`.

    Raises:
        DataError: the races are too few for it; `remedy` says what to change.
    """
    try:
        return calibrate(wrong, settings.threshold, delta, settings.confidence)
    except ValueError as error:
        raise DataError(f"races: {error}; {remedy}") from None


def read_hits(file: Path, metric: str, examples: Sequence[MatchingExample]) -> dict[str, dict[str, Hits]]:
    """Of every chosen schedule, as `<method>, <schedule>`: whether each example was answered rightly, by the headline
    metric, whether as all draws would, `AGREED`, and which share of their evaluations it was spared, `SPARED`.

    Nothing where the races were not run, or not on these examples.
    """
    everyone = [np.ones(len(examples), dtype=bool)]
    found = {}
    for method, told in read(file).items():
        if told["examples"] == digest([example.id for example in examples]):
            for schedule, row in told["chosen"].items():
                each, whole = row["each"], told["chosen"][EXHAUSTIVE]["each"]
                asked_n, whole_n = (np.array(side["evaluations"].split(), dtype=float) for side in (each, whole))
                hits_n, agrees_n = (np.array(list(each[bits]), dtype=float) for bits in ("hits", "agrees"))
                columns = {metric: hits_n, AGREED: agrees_n, SPARED: 1 - asked_n / whole_n}
                found[f"{method}, {schedule}"] = {key: (column, everyone) for key, column in columns.items()}
    return found


def read(file: Path) -> dict[str, Any]:
    """What the races of a dataset have told, by method; nothing where they were not run."""
    return dict(json.loads(file.read_text())) if file.exists() else {}
