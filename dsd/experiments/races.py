"""Schedules compared: evidence of every candidate at every draw is collected, replayed under each schedule, and the
best are run live for what they cost in seconds.

Shapes: n races of C candidates, K draws; E pairs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dsd.config import Params
from dsd.data.examples import MatchingExample
from dsd.engine.batching import Filled
from dsd.engine.engine import RacedMethod, Values
from dsd.engine.tracks import Folders, Track, proposals, right
from dsd.errors import ParamsError, unknown
from dsd.schedules.race import Floats
from dsd.schedules.replay import LEARNED_FROM, MEASURED_ON, Course, Entrants, compare, read, replay
from dsd.store import Store, check_libraries, digest, libraries, write_atomic


def run(name: str, params: Params, folders: Folders, seen: Path, target: Path) -> dict[str, Any]:
    """Compares the schedules on dataset `name` for every method that is raced there.

    Writes `<name>.json` under target: method → what `replay.compare` tells, and what the chosen schedules take when
    they are run live. The evidence stays in the folder `seen`; what is there is not computed again, and a method that
    was compared under the same params, models and examples is left as it is.
    """
    store = Store(seen)
    raced = methods(name, params)
    splits = {split: folders.examples(split)[: params.races.examples] for split in (LEARNED_FROM, MEASURED_ON)}
    proposers = [p for p in params.races.racing.proposer if p]
    rows = [params.methods[p].model_dump() for p in proposers]
    settings = digest(params.races.model_dump(exclude={"datasets", "growth"}), params.evaluate.model_dump(), rows)

    @cache
    def said(split: str) -> dict[str, list[Floats]]:
        return {p: proposals(p, splits[split], params, folders) for p in proposers}

    before, told = read(target / f"{name}.json"), {}
    for row, method in raced.items():
        track = Track.of(name, method, params, folders)
        known = {
            "key": track.key,
            "settings": settings,
            "examples": digest([example.id for example in splits[MEASURED_ON]]),
        }
        if known.items() <= before.get(row, {}).items():
            recorded = before[row].get("libraries", {})
            check_libraries(target / f"{name}.json", recorded, "remove it and data/draws, then `make races`")
            told[row] = before[row]
            continue
        learning, measured = (
            entrants(examples, track.collect(examples, store, f"races of {row} on {name} ({split})"), said(split))
            for split, examples in splits.items()
        )
        compared = compare(learning, measured, [draw.level for draw in track.draws], params)
        for schedule, course in compared.chosen.items():
            compared.told["chosen"][schedule]["live"] = live(track, course, splits[MEASURED_ON], measured)
        told[row] = known | {"libraries": libraries()} | compared.told
    write_atomic(target / f"{name}.json", (json.dumps(told, indent=1) + "\n").encode())
    return {"races": sum(map(len, splits.values()))}


def methods(dataset: str, params: Params) -> dict[str, RacedMethod]:
    """The methods raced on a dataset.

    Raises:
        ParamsError: params.yaml has no such method, or its score is not a mean over draws.
    """
    found: dict[str, RacedMethod] = {}
    for name in params.races.datasets[dataset]:
        method = params.methods.get(name)
        if not isinstance(method, RacedMethod):
            fitting = [other for other, row in params.methods.items() if isinstance(row, RacedMethod)]
            raise ParamsError(f"races.datasets.{dataset}: {unknown('method by means over draws', name, fitting)}")
        found[name] = method
    return found


def entrants(
    examples: Sequence[MatchingExample], values: Sequence[Values], proposed: dict[str, list[Floats]]
) -> Entrants:
    wide = [values_CK.astype(np.float64) for values_CK in values]
    return Entrants(wide, proposed, [right(example) for example in examples], [e.cluster for e in examples])


def live(track: Track, course: Course, examples: Sequence[MatchingExample], races: Entrants) -> dict[str, float]:
    """Runs a schedule on the first examples, as many as `timed` evaluations suffice for.

    Returns: images, seconds an image, evaluations an image, how full the batches were, and how many answers differ
    from those on the stored evidence, which other batches have left.
    """
    outcome = replay(course, races)
    costs = [share * values_CK.size for share, values_CK in zip(outcome.share, races.values, strict=True)]
    count = max(1, int(np.searchsorted(np.cumsum(costs), track.params.races.timed)))
    said = races.proposals[course.proposer] if course.proposer else None
    start, filled = time.perf_counter(), Filled()
    ended = list(track.engine.race(track.entries(course, examples[:count], said), track.method, filled, {}))
    seconds = time.perf_counter() - start
    answers = {entry.id: int(entry.race.ranking()[0]) for entry in ended}
    differ = sum(answers[examples[n].id] != int(outcome.winners[n]) for n in range(count))
    return {
        "images": count,
        "seconds": seconds / count,
        "evaluations": filled.rows / count,
        "fill": filled.share,
        "differ": differ,
    }
