"""The stage score: what every method asks of a split of a dataset is computed and stored, each once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsd.config import ContrastiveMethod, FusionMethod, Params, RacingSchedule, noise_of, prompted, raced
from dsd.data.draws import draws
from dsd.data.examples import MatchingExample, pairs, read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.batching import Filled
from dsd.engine.encodings import Arrays, all_texts, clip_backbones, contrastive_encodings, diffusion_encodings, read_all
from dsd.engine.engine import Engine, cosines, row_values, source_digest
from dsd.engine.tracks import Folders, Track, proposals
from dsd.errors import DataError
from dsd.models import clip_heads as contrastive
from dsd.models import device_of, load_clip, load_diffusion
from dsd.models.checkpoint import digest_of
from dsd.models.prompts import PROMPT, AttentionPrompt
from dsd.progress import progress
from dsd.schedules import replay
from dsd.schedules.race import Race
from dsd.schedules.replay import course_of
from dsd.scorers.evidence import (
    INDEX,
    RACES,
    Request,
    Shard,
    normalises,
    plan,
    read_index,
    read_shards,
    requests,
    write_index,
)
from dsd.scorers.fusion import fitting_entry, fitting_examples
from dsd.store import Store, digest, file_digest, write_atomic

GROUP = 256  # examples whose races are stored together


def prompts(params: Params) -> list[str]:
    """The prompts ("none", "few-shot") that the methods need evidence under."""
    others = raced(params)
    diffusion = [m for n, m in params.methods.items() if not isinstance(m, ContrastiveMethod) and n not in others]
    both = {"none"} if any(isinstance(method, FusionMethod) for method in diffusion) else set()
    return sorted(both | {method.prompt for method in diffusion}, reverse=True)


def score_contrastive(
    params: Params, examples: Sequence[MatchingExample], prepared: Path, cached: Path, trained: Path, store: Store
) -> dict[str, list[str]]:
    """Stores the cosines of every contrastive method in a shard each; returns the shard of each method."""
    asked = pairs(examples)
    pictures, texts = ImageTable(prepared / "images.parquet"), all_texts(read_all(prepared))
    keys: dict[str, list[str]] = {}
    for row in clip_backbones(params):
        clip = load_clip(params.backbones[row], device_of(params.runtime.device))
        tables = contrastive_encodings(clip, pictures, texts, Store(cached), params.runtime.kept_texts)
        for name, method in params.methods.items():
            if isinstance(method, ContrastiveMethod) and method.backbone == row:
                head = contrastive.learned(method, clip, *tables, trained / name)
                weights = None if method.tuned == "none" else file_digest(trained / name / head.file)
                keys[name] = [f"cosines-{digest(clip.digest, weights, asked)}"]
                if store.read(keys[name][0]) is None:
                    store.write(keys[name][0], {"cosine": cosines(head, asked, params.runtime.batch_size)})
    return keys


class Planned(NamedTuple):
    """An entry of the index: the prompt that it is seen under, and its evidence in shards."""

    entry: str
    prompt: str
    shards: list[Shard]


def planned(name: str, params: Params, folders: Folders, split: str) -> Iterator[Planned]:
    """All the evidence that the methods ask for, one entry at a time; no model is opened.

    Raises:
        CheckpointError: a prompt is missing, or belongs to another backbone.
    """
    examples = read_examples(folders.prepared / "examples.parquet", split)
    fitting = fitting_examples(params, folders.prepared)
    identity = digest_of(params.backbones[params.backbone])
    for prompt in prompts(params):
        file = prompt_file(params, prompt, folders.trained)
        if file:
            AttentionPrompt.load(file, identity)
        source, normalised = source_digest(params, identity, file), normalises(params.methods, prompt)
        asked = {prompt: examples} | ({fitting_entry(prompt): fitting} if fitting else {})
        for entry, some in asked.items():
            rows = requests(some, noise_of(params, name), params.seed, normalised)
            yield Planned(entry, prompt, plan(rows, source, params.evidence.shard))


def prompt_file(params: Params, prompt: str, trained: Path) -> Path | None:
    """Where the stage `train` has left the prompt ("none", "few-shot") that evidence is seen under, if it is one."""
    training = prompted(params) if prompt == "few-shot" else None
    return trained / training / PROMPT if training else None


class Engines:
    """The engines of a dataset, one for each prompt, on one backbone; `cores` is theirs."""

    def __init__(self, params: Params, folders: Folders, cores: int | None = None) -> None:
        row, runtime = params.backbones[params.backbone], params.runtime
        self.backbone = load_diffusion(row, device_of(runtime.device), runtime.attention)
        self.pictures, texts = folders.inputs()
        cached, resolution = Store(folders.cached), params.images.resolution
        self.tables = diffusion_encodings(self.backbone, self.pictures, texts, resolution, cached, runtime.kept_texts)
        self._params, self._trained, self._cores = params, folders.trained, cores
        self.under = cache(self._under)

    def _under(self, prompt: str) -> Engine:
        file = prompt_file(self._params, prompt, self._trained)
        learned = AttentionPrompt.load(file, self.backbone.digest) if file else None
        evidence, batch_size = self._params.evidence, self._params.runtime.batch_size
        return Engine(self.backbone, learned, evidence, *self.tables, batch_size, self._cores)


def missing(name: str, params: Params, folders: Folders, target: Path, *, split: str) -> dict[str, int]:
    """The shards of evidence that are still to be computed: how many rows each has, by key."""
    store = Store(target)
    shards = (shard for part in planned(name, params, folders, split) for shard in part.shards)
    return {shard.key: len(shard.rows) for shard in shards if shard.key not in store}


class Worker:
    """Computes evidence of a dataset shard by shard, with the models open; for `cores` see `Engine`."""

    def __init__(self, name: str, params: Params, folders: Folders, target: Path, *, split: str, cores: int) -> None:
        parts = planned(name, params, folders, split)
        self.asked = {shard.key: (part.prompt, shard) for part in parts for shard in part.shards}
        self._engines, self._store = Engines(params, folders, cores), Store(target)

    def __call__(self, key: str) -> None:
        """Computes the shard of a key, unless it is there."""
        prompt, shard = self.asked[key]
        self._engines.under(prompt).fill([shard], self._store, key)


def score(
    name: str, params: Params, prepared: Path, cached: Path, trained: Path, target: Path, *, split: str
) -> dict[str, Any]:
    """Stores the evidence of a split of dataset `name` for every method; resumes where it was stopped.

    Where evidence is fused, also that of the few-shot examples that its weights are fitted on.
    `trained` is where the stage `train` has left a folder for each method that learns.
    """
    folders = Folders(prepared, cached, trained)
    store, engines = Store(target), Engines(params, folders)
    examples = read_examples(prepared / "examples.parquet", split)
    keys: dict[str, list[str]] = {}
    total, computed = 0, 0
    for entry, prompt, shards in planned(name, params, folders, split):
        computed += engines.under(prompt).fill(shards, store, f"score {name}, prompt {entry}")
        keys[entry] = [shard.key for shard in shards]
        total += sum(len(shard.rows) for shard in shards)
    keys |= score_contrastive(params, examples, prepared, cached, trained, store)
    store.prune({key for some in keys.values() for key in some})
    latent = engines.tables[0](engines.pictures.ids[:1])["latents"][0]
    write_index(target, keys, engines.backbone.layers, latent.size)
    return {"pairs": len(pairs(examples)), "rows": total, "computed": computed, "corrupt": store.corrupt}


def score_raced(
    name: str, params: Params, folders: Folders, races: Path, target: Path, *, split: str
) -> dict[str, float]:
    """Runs the races of every method with a schedule on a split of dataset `name`; resumes where it was stopped.

    Args:
        races: where `make races` has left its results.
    Returns: evaluations an example, by method.

    A shard has, for some examples one after the other, the place of each candidate, from 1, and for each example the
    evaluations and the draws that were lost. Races of several shards run side by side; a shard is written once its last
    race has ended.

    Raises:
        DataError: the races that a schedule learns from were not run, or under other params.
    """
    store, examples = Store(target / RACES), read_examples(folders.prepared / "examples.parquet", split)
    keys: dict[str, list[str]] = {}
    costs: dict[str, float] = {}
    for row, method in raced(params).items():
        schedule = params.schedules[method.schedule]
        track = Track.of(name, method, params, folders)
        told = learned_from(races / f"{name}.json", row, track.key) if isinstance(schedule, RacingSchedule) else {}
        course = course_of(schedule, params.races, told)
        settings = [schedule.model_dump(), told.get("learned"), told.get("promised")]
        groups = [examples[first : first + GROUP] for first in range(0, len(examples), GROUP)]
        keys[row] = [f"races-{digest(track.source, settings, [astuple(e) for e in group])}" for group in groups]
        missing = {key: group for key, group in zip(keys[row], groups, strict=True) if store.read(key) is None}
        some = [example for group in missing.values() for example in group]
        said = proposals(course.proposer, some, params, folders) if course.proposer and some else None
        entries = track.entries(course, some, said, schedule.budget)
        known = stored(name, params, track, examples, target) if some else {}
        ended: dict[str, Race] = {}
        bar = progress(total=len(some), desc=f"races of {row} on {name}", unit="example")
        for entry in track.engine.race(entries, method, Filled(), known):
            ended[entry.id] = entry.race
            bar.update()
            for key, group in list(missing.items()):
                if all(example.id in ended for example in group):
                    store.write(key, places([ended.pop(example.id) for example in group]))
                    del missing[key]
        bar.close()
        parts = [part for part in map(store.read, keys[row]) if part is not None]
        costs[row] = float(np.concatenate([part["evaluations"] for part in parts]).mean())
    store.prune({key for some in keys.values() for key in some})
    write_atomic(store.root / INDEX, json.dumps(keys, indent=1).encode())
    return costs


def stored(
    name: str, params: Params, track: Track, examples: Sequence[MatchingExample], scored: Path
) -> dict[Request, float]:
    """What is known of a track's pairs because a method without a schedule sees them at the same draws."""
    noise, prompt = noise_of(params, name), track.method.prompt
    if not (scored / INDEX).exists() or set(draws(noise, params.seed)).isdisjoint(track.draws):
        return {}
    if prompt not in read_index(scored)["shards"]:
        return {}
    normalised = normalises(params.methods, prompt)
    arrays = read_shards(scored, prompt)
    rows = requests(examples, noise, params.seed, normalised)
    return dict(zip(rows, row_values(arrays, track.method, params.evidence.poolings).tolist(), strict=True))


def places(races: Sequence[Race]) -> Arrays:
    """The places of all candidates, one race after the other, and of each race evaluations and lost draws."""
    return {
        "place": np.concatenate([race.ranking().argsort() + 1 for race in races]).astype(np.int32),
        "evaluations": np.array([race.evaluations for race in races], dtype=np.int32),
        "lost": np.array([race.dropped for race in races], dtype=np.int32),
    }


def learned_from(file: Path, row: str, key: str) -> dict[str, Any]:
    """What races of the score of method `row` have told.

    Raises:
        DataError: there were none under these params and models.
    """
    for told in replay.read(file).values():
        if told["key"] == key:
            return dict(told)
    raise DataError(f"{file}: no races that {row} could learn from; see races.datasets, then `make races`")
