"""The comparison of schedules (`make races`): record evidence of every candidate at every draw, replay each schedule on
it, and time the best live.

Shapes: C candidates, K draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from dsd.config import ContrastiveMethod
from dsd.data.examples import MatchingExample, pairs
from dsd.data.images import to_array
from dsd.engine.batching import Filled
from dsd.engine.forward import Values
from dsd.engine.races import RaceRunner, answer_index, independent, split_answers
from dsd.engine.session import Session
from dsd.errors import DataError
from dsd.schedules.base import Course
from dsd.schedules.race import Floats
from dsd.schedules.replay import (
    CHOSEN_ON,
    LEARNED_FROM,
    MEASURED_ON,
    RecordedRaces,
    compare_settings,
    read_comparisons,
    replay,
)
from dsd.store import Store, check_libraries, digest, libraries, write_json


def compare_schedules(session: Session, evidence: Path, target: Path) -> dict[str, Any]:
    """Compare the schedules on a dataset, for every method that `races.datasets` lists for it.

    Writes `<dataset>.json` under target: method → results of `compare_settings`, and the costs of the chosen schedules
    when run live. The evidence stays in its folder and is not computed again. A method that was compared under the same
    params, models, examples and code is skipped.
    """
    params, file = session.params, target / f"{session.name}.json"
    races, store = params.races, Store(evidence)
    splits = race_examples(session)
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
        learning, choosing, measured = (
            recorded(
                examples,
                runner.collect(examples, store, f"races of {method} on {session.name} ({split})"),
                proposed(split),
                {p: proposing_cost(runner, p, examples) for p in proposers},
            )
            for split, examples in splits.items()
        )
        chosen, results = compare_settings(learning, choosing, measured, races, params.evaluate, params.seed)
        timed: dict[str, dict[str, float]] = {}  # names with equal settings are timed once
        for name, course in chosen.items():
            setting = {key: value for key, value in results["chosen"][name]["setting"].items() if key != "delta"}
            if (key := digest(setting)) not in timed:
                timed[key] = run_live(runner, course, splits[MEASURED_ON], measured, races.timed)
            results["chosen"][name]["live"] = timed[key]
        comparisons[method] = identity | {"libraries": libraries()} | results
    write_json(file, comparisons)
    return {"races": sum(map(len, splits.values()))}


def race_examples(session: Session) -> dict[str, list[MatchingExample]]:
    """Return the examples of the races by split.

    The prompt is trained on the few-shot split, so settings are chosen and racing is calibrated on the validation
    split, on races that share no image.

    Raises:
        DataError: a split has no example.
    """
    races, seed = session.params.races, session.params.seed
    whole = {split: split_answers(session.examples(split)) for split in (LEARNED_FROM, CHOSEN_ON, MEASURED_ON)}
    few_shot = np.random.default_rng(seed).permutation(len(whole[LEARNED_FROM]))[: races.racing.learning]
    splits = {
        LEARNED_FROM: [whole[LEARNED_FROM][place] for place in few_shot],
        CHOSEN_ON: independent(whole[CHOSEN_ON], races.examples, seed),
        MEASURED_ON: whole[MEASURED_ON][: races.examples],
    }
    for split, key in ((LEARNED_FROM, "few_shot"), (CHOSEN_ON, "validation"), (MEASURED_ON, "test")):
        if not splits[split]:
            raise DataError(f"datasets.{session.name}.{key}: no examples, and schedules are compared on each split")
    return splits


def recorded(
    examples: Sequence[MatchingExample],
    values: Sequence[Values],
    proposed: dict[str, list[Floats]],
    costs: dict[str, float],
) -> RecordedRaces:
    """Return races with their evidence [C, K]; `proposed` and `costs` by proposer, see `RecordedRaces`."""
    wide = [values_CK.astype(np.float64) for values_CK in values]
    answers, clusters = [answer_index(example) for example in examples], [example.cluster for example in examples]
    return RecordedRaces(wide, proposed, costs, answers, clusters)


def proposing_cost(runner: RaceRunner, proposer: str, examples: Sequence[MatchingExample]) -> float:
    """Return the cost of a proposer's scores of one example, as a number of evaluations of the diffusion model.

    It is the ratio of floating-point operations. Each distinct image and text is encoded once.
    """
    session, method = runner.session, cast(ContrastiveMethod, runner.session.params.methods[proposer])
    clip, images, texts = session.clip(method.backbone), *encoded(method, examples)
    pixels, row = to_array(session.images[images[0]])[None], (pairs(examples[:1])[0], runner.draws[0])
    of_image = operations(lambda: clip.image_features(pixels))
    of_text = operations(lambda: clip.text_features(texts[:1]))
    of_evaluation = operations(lambda: session.engine(runner.method.prompt).compute([row]))
    return (len(images) * of_image + len(texts) * of_text) / of_evaluation / len(examples)


def encoded(method: ContrastiveMethod, examples: Sequence[MatchingExample]) -> tuple[list[str], list[str]]:
    """Return the images and the texts that a contrastive method encodes for the examples."""
    every = pairs(examples)
    texts = [pair.text for pair in every]
    return list(dict.fromkeys(pair.image for pair in every)), texts if method.encodes_pairs else [*dict.fromkeys(texts)]


def operations(work: Callable[[], object]) -> float:
    """Return the floating-point operations of work in this thread."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def encode_uncached(session: Session, proposer: str, examples: Sequence[MatchingExample]) -> None:
    """Encode the images and texts of the examples for a proposer, also those in the cache, to time it."""
    method, size = cast(ContrastiveMethod, session.params.methods[proposer]), session.params.runtime.batch_size
    clip, images, texts = session.clip(method.backbone), *encoded(method, examples)
    for first in range(0, len(images), size):
        clip.image_features(np.stack([to_array(session.images[image]) for image in images[first : first + size]]))
    for first in range(0, len(texts), size):
        clip.text_features(texts[first : first + size])


def run_live(
    runner: RaceRunner, course: Course, examples: Sequence[MatchingExample], races: RecordedRaces, evaluations: int
) -> dict[str, float]:
    """Run a schedule on as many of the first examples as `evaluations` allows.

    Returns: images, seconds and evaluations per image, both with those of the proposer, how full the batches were, and
    how many winners differ from those of the replay, whose evidence was computed in other batches.
    """
    outcome = replay(course, races)
    costs = [share * values_CK.size for share, values_CK in zip(outcome.share, races.values, strict=True)]
    count = max(1, int(np.searchsorted(np.cumsum(costs), evaluations)))
    runner.open()
    start, filled = time.perf_counter(), Filled()
    if course.proposer:
        encode_uncached(runner.session, course.proposer, examples[:count])
    proposed = races.proposals[course.proposer] if course.proposer else None
    entries = list(runner.run(course, examples[:count], proposed, filled))
    seconds = time.perf_counter() - start
    winners = {entry.id: int(entry.race.ranking()[0]) for entry in entries}
    return {
        "images": count,
        "seconds": seconds / count,
        "evaluations": filled.rows / count + (races.costs[course.proposer] if course.proposer else 0.0),
        "fill": filled.share,
        "differ": sum(winners[examples[n].id] != int(outcome.winners[n]) for n in range(count)),
    }
