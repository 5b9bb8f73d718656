"""The comparison of schedules (`make races`): record evidence of every candidate at every draw, replay each schedule on
it, and time the best live.

Shapes: C candidates, K draws.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dsd.data.examples import MatchingExample
from dsd.engine.batching import Filled
from dsd.engine.forward import Values
from dsd.engine.races import RaceRunner, answer_index, split_answers
from dsd.engine.session import Session
from dsd.schedules.base import Course
from dsd.schedules.race import Floats
from dsd.schedules.replay import LEARNED_FROM, MEASURED_ON, RecordedRaces, compare_settings, read_comparisons, replay
from dsd.store import Store, check_libraries, digest, libraries, write_json


def compare_schedules(session: Session, evidence: Path, target: Path) -> dict[str, Any]:
    """Compare the schedules on a dataset, for every method that `races.datasets` lists for it.

    Writes `<dataset>.json` under target: method → results of `compare_settings`, and the costs of the chosen schedules
    when run live. The evidence stays in its folder and is not computed again. A method that was compared under the same
    params, models, examples and code is skipped.
    """
    params, file = session.params, target / f"{session.name}.json"
    races, store = params.races, Store(evidence)
    splits = {split: split_answers(session.examples(split))[: races.examples] for split in (LEARNED_FROM, MEASURED_ON)}
    proposers = [name for name in races.racing.proposer if name]

    @cache
    def proposed(split: str) -> dict[str, list[Floats]]:
        return {p: session.proposals(p, splits[split]) for p in proposers}

    before, comparisons = read_comparisons(file), {}
    for method, row in params.compared(session.name).items():
        runner = RaceRunner(session, row)
        identity = runner.identity | {"examples": digest([example.id for example in splits[MEASURED_ON]])}
        if identity.items() <= before.get(method, {}).items():
            recompute = f"remove it and {evidence}, then `make races`"
            check_libraries(file, before[method].get("libraries", {}), recompute)
            comparisons[method] = before[method]
            continue
        learning, measured = (
            recorded(
                examples,
                runner.collect(examples, store, f"races of {method} on {session.name} ({split})"),
                proposed(split),
            )
            for split, examples in splits.items()
        )
        chosen, results = compare_settings(learning, measured, races, params.evaluate, params.seed)
        for schedule, course in chosen.items():
            results["chosen"][schedule]["live"] = run_live(runner, course, splits[MEASURED_ON], measured, races.timed)
        comparisons[method] = identity | {"libraries": libraries()} | results
    write_json(file, comparisons)
    return {"races": sum(map(len, splits.values()))}


def recorded(
    examples: Sequence[MatchingExample], values: Sequence[Values], proposed: dict[str, list[Floats]]
) -> RecordedRaces:
    wide = [values_CK.astype(np.float64) for values_CK in values]
    return RecordedRaces(wide, proposed, [answer_index(example) for example in examples], [e.cluster for e in examples])


def run_live(
    runner: RaceRunner, course: Course, examples: Sequence[MatchingExample], races: RecordedRaces, evaluations: int
) -> dict[str, float]:
    """Run a schedule on as many of the first examples as `evaluations` allows.

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
