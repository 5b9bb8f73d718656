"""The stage `score`: compute and store what the methods need of a split of a dataset, each result once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsd.data.draws import draws
from dsd.data.examples import MatchingExample, Pair, pairs
from dsd.engine.batching import Filled
from dsd.engine.encodings import Arrays
from dsd.engine.forward import row_values
from dsd.engine.races import RaceRunner, read_shard
from dsd.engine.session import Session
from dsd.errors import DataError
from dsd.progress import progress
from dsd.schedules import SCHEDULES
from dsd.schedules.race import Race
from dsd.schedules.replay import read_comparisons
from dsd.scorers.evidence import (
    INDEX,
    RACES,
    Request,
    Shard,
    evidence_prompts,
    fitting_entry,
    plan,
    prompt_without,
    read_index,
    read_shards,
    reads_unconditional,
    requests,
    write_index,
)
from dsd.scorers.fusion import fitting_examples
from dsd.store import Store, digest, write_atomic
from dsd.versions import versioned

GROUP = 256  # examples whose races are stored together


class Planned(NamedTuple):
    """An entry of the index, the prompt of its evidence, and its shards."""

    entry: str
    prompt: str
    shards: list[Shard]


def planned(session: Session, split: str) -> Iterator[Planned]:
    """Yield all evidence that the methods need, by entry; no model is opened.

    Raises:
        CheckpointError: a prompt is missing, or belongs to another backbone.
    """
    params, examples = session.params, session.examples(split)
    fitting = fitting_examples(session.examples("train"), params.methods, params.fusion, params.seed)
    for prompt in evidence_prompts(params.methods):
        compares = reads_unconditional(params.methods, prompt)
        entries = [(prompt, prompt, examples)]
        for fold, some in enumerate(fitting):
            entries.append((fitting_entry(prompt, fold), prompt if prompt == "none" else prompt_without(fold), some))
        for entry, learned, some in entries:
            rows = requests(some, session.scoring_noise, params.seed, compares)
            yield Planned(entry, learned, plan(rows, session.evidence_key(learned), params.evidence.shard))


def missing(session: Session, target: Path, *, split: str) -> dict[str, int]:
    """Return the number of rows of each missing shard of evidence, by key."""
    store = Store(target)
    shards = (shard for part in planned(session, split) for shard in part.shards)
    return {shard.key: len(shard.rows) for shard in shards if shard.key not in store}


class Worker:
    """Computes the evidence of a dataset shard by shard, with a session of its own."""

    def __init__(self, session: Session, target: Path, *, split: str) -> None:
        parts = planned(session, split)
        self.shards = {shard.key: (part.prompt, shard) for part in parts for shard in part.shards}
        self._session, self._store = session, Store(target)

    def __call__(self, key: str) -> None:
        """Compute the shard of a key unless it exists."""
        prompt, shard = self.shards[key]
        self._session.fill_evidence(prompt, [shard], self._store, key)


def score(session: Session, target: Path, *, split: str) -> dict[str, Any]:
    """Store the evidence of a split, and of few-shot examples for methods that fit weights; resumable."""
    store, examples = Store(target), session.examples(split)
    keys: dict[str, list[str]] = {}
    total, computed = 0, 0
    for entry, prompt, shards in planned(session, split):
        computed += session.fill_evidence(prompt, shards, store, f"score {session.name}, prompt {entry}")
        keys[entry] = [shard.key for shard in shards]
        total += sum(len(shard.rows) for shard in shards)
    keys |= score_contrastive(session, pairs(examples), store)
    store.prune(set(chain.from_iterable(keys.values())))
    latents, _ = session.diffusion_encodings
    size, indistinct = latents(session.images.ids[:1])["latents"][0].size, session.indistinct(split)
    write_index(target, keys, session.backbone.layers, size, indistinct)
    return {"pairs": len(pairs(examples)), "rows": total, "computed": computed, "corrupt": store.corrupt}


def score_contrastive(session: Session, every: Sequence[Pair], store: Store) -> dict[str, list[str]]:
    """Store the cosines of each contrastive method in a shard; return the shard of each method."""
    keys: dict[str, list[str]] = {}
    for name, method in session.params.methods.items():
        if method.contrastive:
            key = f"cosines-{session.cosines_key(name, every)}"
            if store.read(key) is None:
                store.write(key, {"cosine": session.cosines(name, every)})
            keys[name] = [key]
    return keys


def score_raced(session: Session, comparisons: Path, target: Path, *, split: str) -> dict[str, float]:
    """Run the races of every method with a schedule on a split; resumable.

    A shard holds, for a group of examples, the rank of each candidate from 1, and evaluations and lost draws of each
    example. It is written when its last race is over; races of several shards run concurrently. The index next to them
    also has the identity of each schedule comparison, by which later stages detect a stale one.

    Args:
        comparisons: the folder with the results of `make races`.

    Returns: evaluations per example, by method.

    Raises:
        DataError: results of `make races` that a schedule needs are missing, or of other params.
    """
    name, params = session.name, session.params
    store, examples = Store(target / RACES), session.examples(split)
    keys: dict[str, list[str]] = {}
    costs: dict[str, float] = {}
    for method, row in params.raced.items():
        schedule = params.schedules[row.schedule]
        kind, runner = SCHEDULES[schedule.kind], RaceRunner(session, row)
        learned = comparison_of(comparisons / f"{name}.json", method, runner.identity) if kind.needs_comparison else {}
        course = kind.course_of(schedule, params.races, learned)
        settings = [schedule.model_dump(), learned.get("learned"), learned.get("promised")]
        groups = [examples[first : first + GROUP] for first in range(0, len(examples), GROUP)]
        contents = [digest(runner.source, settings, [astuple(e) for e in group]) for group in groups]
        keys[method] = [f"races-{versioned('races', content)}" for content in contents]
        missing = {key: group for key, group in zip(keys[method], groups, strict=True) if store.read(key) is None}
        if remaining := list(chain.from_iterable(missing.values())):
            proposals = session.proposals(course.proposer, remaining) if course.proposer else None
            ended: dict[str, Race] = {}
            bar = progress(total=len(remaining), desc=f"races of {method} on {name}", unit="example")
            stored = stored_values(runner, examples, target)
            for entry in runner.run(course, remaining, proposals, Filled(), stored=stored):
                ended[entry.id] = entry.race
                bar.update()
                for key, group in list(missing.items()):
                    if all(example.id in ended for example in group):
                        store.write(key, race_arrays([ended.pop(example.id) for example in group]))
                        del missing[key]
            bar.close()
        parts = [read_shard(store, key)["evaluations"] for key in keys[method]]
        costs[method] = float(np.concatenate(parts).mean())
    store.prune(set(chain.from_iterable(keys.values())))
    compared = {method: RaceRunner(session, row).identity for method, row in params.compared(name).items()}
    write_atomic(store.root / INDEX, json.dumps({"shards": keys, "compared": compared}, indent=1).encode())
    return costs


def stored_values(runner: RaceRunner, examples: Sequence[MatchingExample], scored: Path) -> Mapping[Request, float]:
    """Return the values of a method's pairs that evidence of a method without a schedule already contains."""
    session, method = runner.session, runner.method
    params, prompt = session.params, method.prompt
    if not (scored / INDEX).exists() or set(draws(session.scoring_noise, params.seed)).isdisjoint(runner.draws):
        return {}
    if prompt not in read_index(scored)["shards"]:
        return {}
    arrays = read_shards(scored, prompt)
    rows = requests(examples, session.scoring_noise, params.seed, reads_unconditional(params.methods, prompt))
    return dict(zip(rows, row_values(arrays, method, params.evidence.poolings).tolist(), strict=True))


def race_arrays(races: Sequence[Race]) -> Arrays:
    """Return the ranks of all candidates, concatenated, and the evaluations and lost draws of each race."""
    return {
        "place": np.concatenate([race.ranking().argsort() + 1 for race in races]).astype(np.int32),
        "evaluations": np.array([race.evaluations for race in races], dtype=np.int32),
        "lost": np.array([race.lost_draws for race in races], dtype=np.int32),
    }


def comparison_of(file: Path, method: str, identity: Mapping[str, str]) -> dict[str, Any]:
    """Return the results of the schedule comparison for a method; raise DataError if none has this identity."""
    for comparison in read_comparisons(file).values():
        if identity.items() <= comparison.items():
            return dict(comparison)
    raise DataError(f"{file}: no races that {method} could learn from; see races.datasets, then `make races`")
