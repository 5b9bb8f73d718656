"""The comparison of schedules (`make races`): record evidence of every candidate at every draw, replay each schedule on
it, and run the best live for their seconds.

Shapes: C candidates, K draws.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from dsd.config import MethodParams, ScheduledMethod
from dsd.data.examples import MatchingExample
from dsd.engine.batching import Filled
from dsd.engine.forward import Values
from dsd.engine.races import RaceRunner, choices, right
from dsd.engine.session import Session
from dsd.errors import ParamsError, unknown
from dsd.schedules.base import Course
from dsd.schedules.race import Floats
from dsd.schedules.replay import LEARNED_FROM, MEASURED_ON, RecordedRaces, compare_settings, read_comparisons, replay
from dsd.store import Store, check_libraries, digest, libraries, write_atomic


def compare_schedules(session: Session, evidence: Path, target: Path) -> dict[str, Any]:
    """Compare the schedules on a dataset, for every method that `races.datasets` lists for it.

    Writes `<dataset>.json` under target: method → results of `compare_settings`, and the costs of the chosen schedules
    when run live. The evidence stays in its folder and is not computed again. A method that was compared under the same
    params, models, examples and code is skipped.
    """
    params, file = session.params, target / f"{session.name}.json"
    races, store = params.races, Store(evidence)
    methods = compared_methods(session.name, races.datasets[session.name], params.methods)
    splits = {split: choices(session.examples(split))[: races.examples] for split in (LEARNED_FROM, MEASURED_ON)}
    proposers = compared_proposers(races.racing.proposer, params.methods)
    rows = [params.methods[p].model_dump() for p in proposers]
    settings = digest(races.model_dump(exclude={"datasets", "growth"}), params.evaluate.model_dump(), rows)

    @cache
    def proposed(split: str) -> dict[str, list[Floats]]:
        return {p: session.proposals(p, splits[split]) for p in proposers}

    before, comparisons = read_comparisons(file), {}
    for row, method in methods.items():
        runner = RaceRunner(session, method)
        identity = {
            "key": runner.key,
            "settings": settings,
            "examples": digest([example.id for example in splits[MEASURED_ON]]),
        }
        if identity.items() <= before.get(row, {}).items():
            recompute = f"remove it and {evidence}, then `make races`"
            check_libraries(file, before[row].get("libraries", {}), recompute)
            comparisons[row] = before[row]
            continue
        learning, measured = (
            recorded(
                examples,
                runner.collect(examples, store, f"races of {row} on {session.name} ({split})"),
                proposed(split),
            )
            for split, examples in splits.items()
        )
        chosen, results = compare_settings(learning, measured, races, params.evaluate, params.seed)
        for schedule, course in chosen.items():
            results["chosen"][schedule]["live"] = run_live(runner, course, splits[MEASURED_ON], measured, races.timed)
        comparisons[row] = identity | {"libraries": libraries()} | results
    write_atomic(file, (json.dumps(comparisons, indent=1) + "\n").encode())
    return {"races": sum(map(len, splits.values()))}


def compared_methods(
    dataset: str, names: Sequence[str], methods: Mapping[str, MethodParams]
) -> dict[str, ScheduledMethod]:
    """The rows of `methods` that schedules are compared for on a dataset.

    Raises:
        ParamsError: params.yaml has no such method, or its score is not a mean over draws.
    """
    fitting = {name: row for name, row in methods.items() if row.can_have_schedule}
    for name in names:
        if name not in fitting:
            raise ParamsError(f"races.datasets.{dataset}: {unknown('method by means over draws', name, fitting)}")
    return {name: cast(ScheduledMethod, fitting[name]) for name in names}


def compared_proposers(names: Sequence[str | None], methods: Mapping[str, MethodParams]) -> list[str]:
    """The proposers that racing is compared with.

    Raises:
        ParamsError: params.yaml has no such method, or it is not contrastive.
    """
    fitting = [name for name, row in methods.items() if row.contrastive]
    proposers = [name for name in names if name]
    for name in proposers:
        if name not in fitting:
            raise ParamsError(f"races.racing.proposer: {unknown('contrastive method', name, fitting)}")
    return proposers


def recorded(
    examples: Sequence[MatchingExample], values: Sequence[Values], proposed: dict[str, list[Floats]]
) -> RecordedRaces:
    wide = [values_CK.astype(np.float64) for values_CK in values]
    return RecordedRaces(wide, proposed, [right(example) for example in examples], [e.cluster for e in examples])


def run_live(
    runner: RaceRunner, course: Course, examples: Sequence[MatchingExample], races: RecordedRaces, evaluations: int
) -> dict[str, float]:
    """Run a schedule on the first examples, as many as this number of evaluations suffices for.

    Returns: images, seconds per image, evaluations per image, how full the batches were, and how many winners differ
    from those of the replay, whose evidence was computed in other batches.
    """
    outcome = replay(course, races)
    costs = [share * values_CK.size for share, values_CK in zip(outcome.share, races.values, strict=True)]
    count = max(1, int(np.searchsorted(np.cumsum(costs), evaluations)))
    proposed = races.proposals[course.proposer] if course.proposer else None
    runner.open()
    start, filled = time.perf_counter(), Filled()
    entries = list(runner.run(course, examples[:count], proposed, filled))
    seconds = time.perf_counter() - start
    winners = {entry.id: int(entry.race.ranking()[0]) for entry in entries}
    return {
        "images": count,
        "seconds": seconds / count,
        "evaluations": filled.rows / count,
        "fill": filled.share,
        "differ": sum(winners[examples[n].id] != int(outcome.winners[n]) for n in range(count)),
    }
