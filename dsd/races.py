"""Schedules compared: evidence of every candidate at every draw, and what each schedule would have asked for of it.

Shapes: n races of C candidates, K draws; R rows, E pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import qmc

from dsd.backbones import device_of, load_clip, load_diffusion
from dsd.draws import draws
from dsd.encoding import Arrays, all_texts, contrastive_encodings, diffusion_encodings, read_all
from dsd.engine import Engine, cosines, source_digest
from dsd.errors import ParamsError
from dsd.evidence import UNCONDITIONAL, plan, requests, wanted
from dsd.matching import MatchingExample, Pair, pairs, read_examples
from dsd.params import ContrastiveMethod, CrossAttentionMethod, DenoisingMethod, NoiseParams, Params, prompted
from dsd.pictures import Pictures
from dsd.prompts import PROMPT, AttentionPrompt
from dsd.schedules import (
    Floats,
    Learned,
    Race,
    Schedule,
    all_draws,
    calibrate,
    hierarchical,
    learn,
    racing,
    staged,
)
from dsd.scorers import contrastive, cross_attention
from dsd.statistics import clustered_mean, paired_difference
from dsd.store import Store, digest, write_atomic

RacedMethod = DenoisingMethod | CrossAttentionMethod
Values = NDArray[np.float32]
Setting = dict[str, Any]
LEARNED_FROM, MEASURED_ON = "train", "test"


def row_values(arrays: Arrays, method: RacedMethod, poolings: Sequence[str]) -> Values:
    """[R] what each row of evidence says for its pair; the score of a pair is their mean over draws."""
    if isinstance(method, DenoisingMethod):
        return -arrays["error"]
    pooled = arrays["attention"][:, list(poolings).index(method.pooling)]
    found: Values = cross_attention.reduce(pooled, arrays["attribution"], layers=method.layers, heads=method.heads)
    return found


def noise_of_races(params: Params) -> NoiseParams:
    return NoiseParams(levels=params.races.levels, draws_per_level=params.races.draws_per_level)


def examples_of(split: str, params: Params, prepared: Path) -> list[MatchingExample]:
    return read_examples(prepared / "examples.parquet", split)[: params.races.examples]


def collect(
    name: str, split: str, params: Params, prepared: Path, cached: Path, trained: Path, store: Store
) -> dict[str, list[Values]]:
    """For each method raced on dataset `name`, the values [C, K] of every example of a split; goes on where it stopped.

    Candidates are the pairs of an example; draws are those of `dsd.draws`, level by level.
    """
    examples = examples_of(split, params, prepared)
    backbone = load_diffusion(params.backbones[params.backbone], device_of(params.runtime.device))
    pictures, texts = Pictures(prepared / "images.parquet"), all_texts(read_all(prepared))
    tables = diffusion_encodings(backbone, pictures, texts, params.images.resolution, Store(cached))
    noise = noise_of_races(params)
    found: dict[str, list[Values]] = {}
    for prompt, methods in by_prompt(name, params).items():
        normalised = any(isinstance(method, DenoisingMethod) for method in methods.values())
        rows = requests(examples, noise, params.seed, normalised)
        file = trained / prompted(params) / PROMPT if prompt == "few-shot" else None
        learned = AttentionPrompt.load(file, backbone.digest) if file else None
        engine = Engine(backbone, learned, params.evidence, *tables, params.runtime.batch_size)

        def keep(arrays: Arrays, methods: Mapping[str, RacedMethod] = methods) -> Arrays:
            return {row: row_values(arrays, method, params.evidence.poolings) for row, method in methods.items()}

        settings = {row: method.model_dump(exclude={"levels"}) for row, method in methods.items()}
        shards = plan(rows, digest(source_digest(params, backbone, file), settings), params.evidence.shard)
        engine.fill(shards, store, f"races on {name} ({split}), prompt {prompt}", keep)
        parts = [store.read(shard.key) for shard in shards]
        for row, method in methods.items():
            values = np.concatenate([part[row] for part in parts if part is not None])
            asked = wanted(examples, normalised)
            found[row] = by_example(examples, asked, values.reshape(len(asked), -1), method)
    return found


def by_prompt(dataset: str, params: Params) -> dict[str, dict[str, RacedMethod]]:
    """The methods raced on a dataset, under each prompt."""
    found: dict[str, dict[str, RacedMethod]] = {}
    for name in params.races.datasets[dataset]:
        method = params.methods[name]
        if not isinstance(method, RacedMethod):
            raise ParamsError(f"races.datasets.{dataset}: {name} is not a mean over draws, which a race goes by")
        found.setdefault(method.prompt, {})[name] = method
    return found


def by_example(
    examples: Sequence[MatchingExample], asked: Sequence[Pair], values_EK: Values, method: RacedMethod
) -> list[Values]:
    """The values [C, K] of each example's pairs; where images are compared, denoising is set off against no text."""
    row = {pair: n for n, pair in enumerate(asked)}
    found = []
    for example in examples:
        candidates = pairs([example])
        values = values_EK[[row[pair] for pair in candidates]]
        if isinstance(method, DenoisingMethod) and len(example.images) > 1:
            values = values - values_EK[[row[Pair(pair.image, UNCONDITIONAL)] for pair in candidates]]
        found.append(values)
    return found


def proposals(
    proposer: str, examples: Sequence[MatchingExample], params: Params, prepared: Path, cached: Path, trained: Path
) -> list[Floats]:
    """What a contrastive method says of the candidates [C] of each example."""
    method = params.methods[proposer]
    if not isinstance(method, ContrastiveMethod):
        raise ParamsError(f"races.racing.proposer: {proposer} needs the U-Net itself; name a contrastive method")
    clip = load_clip(params.backbones[method.backbone], device_of(params.runtime.device))
    pictures, texts = Pictures(prepared / "images.parquet"), all_texts(read_all(prepared))
    head = contrastive.learned(
        method, clip, *contrastive_encodings(clip, pictures, texts, Store(cached)), trained / proposer
    )
    asked = pairs(examples)
    of = dict(zip(asked, cosines(head, asked, params.runtime.batch_size).astype(float).tolist(), strict=True))
    return [np.array([of[pair] for pair in pairs([example])]) for example in examples]


class Entrants(NamedTuple):
    """The races of a split: their evidence, what each proposer says, and which candidate is right."""

    values: list[Floats]  # [C, K] each
    proposals: dict[str, list[Floats]]
    answers: list[int]
    clusters: list[str]

    def some(self, chosen: Sequence[int]) -> Entrants:
        return Entrants(
            [self.values[i] for i in chosen],
            {name: [said[i] for i in chosen] for name, said in self.proposals.items()},
            [self.answers[i] for i in chosen],
            [self.clusters[i] for i in chosen],
        )


class Course(NamedTuple):
    """A schedule with the order of its draws, and whose proposal it starts from."""

    order: list[int]
    schedule: Schedule
    proposer: str | None


class Outcome(NamedTuple):
    """How races ended, [n] each: rightly, as all draws would have, and at what share of the evaluations of all draws."""

    hits: NDArray[np.bool_]
    agrees: NDArray[np.bool_]
    share: Floats


def replay(course: Course, races: Entrants) -> Outcome:
    """What the races would have ended with."""
    found = []
    for number, values_CK in enumerate(races.values):
        proposal = races.proposals[course.proposer][number] if course.proposer else None
        ordered_CK = values_CK[:, course.order]
        race = Race(len(ordered_CK), course.schedule, proposal)
        while len(asked := race.asks()):
            race.tell(ordered_CK[asked[:, 0], asked[:, 1]])
        winner = race.ranking()[0]
        exhaustive = values_CK.mean(1).argmax()
        found.append((winner == races.answers[number], winner == exhaustive, race.evaluations / values_CK.size))
    hits, agrees, share = (np.array(column) for column in zip(*found, strict=True))
    return Outcome(hits, agrees, share)


def evenly(levels: int, per_level: int) -> list[int]:
    """Draws in an order whose every beginning is spread over the levels, as in the published code of `staged`."""
    points = qmc.VanDerCorput(1, scramble=False).fast_forward(1).random(8 * levels)
    spread = list(dict.fromkeys((points.ravel() * levels).astype(int).tolist()))
    return [level * per_level + number for number in range(per_level) for level in spread]


def directed(direction: str, levels: Sequence[float], samples: int, per_level: int) -> list[int]:
    """The first `samples` draws of each level, level by level: from clean, from noisy or from the middle outwards."""
    middle = (min(levels) + max(levels)) / 2
    keys: dict[str, Callable[[int], float]] = {
        "clean": lambda n: levels[n],
        "noisy": lambda n: -levels[n],
        "middle": lambda n: abs(levels[n] - middle),
    }
    return [
        n * per_level + number for n in sorted(range(len(levels)), key=keys[direction]) for number in range(samples)
    ]


def courses(params: Params, learned: Mapping[str | None, Learned]) -> Iterator[tuple[str, Setting, Course]]:
    """(kind, setting, course) of every setting of every schedule."""
    races = params.races
    levels, per_level = races.levels, races.draws_per_level
    spread = evenly(len(levels), per_level)
    for count in races.exhaustive.draws:
        yield "exhaustive", {"draws": count}, Course(spread[:count], all_draws(count), None)
    for kept, first, growth in product(races.staged.to_keep, races.staged.first, races.staged.growth):
        samples = [first * growth**stage for stage in range(len(kept))]
        if samples[-1] <= len(spread):
            yield "staged", {"to_keep": kept, "n_samples": samples}, Course(spread, staged(kept, samples), None)
    for setting in grid(races.hierarchical.model_dump()):
        samples_each = setting["samples"]
        if samples_each <= per_level:
            order = directed(setting["direction"], levels, samples_each, per_level)
            rest = {key: setting[key] for key in ("beam_factor", "patience", "shrinking")}
            yield "hierarchical", setting, Course(order, hierarchical(len(levels), samples_each, **rest), None)
    for proposer, threshold in product(races.racing.proposer, races.racing.threshold):
        setting = {"proposer": proposer, "threshold": threshold}
        yield "racing", setting, raced(learned[proposer], threshold, proposer)


def raced(learned: Learned, threshold: float, proposer: str | None) -> Course:
    return Course(list(learned.order), racing(learned, threshold), proposer)


def grid(values: Mapping[str, Iterable[Any]]) -> Iterator[Setting]:
    """Every choice of one value for each key."""
    for chosen in product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def compare(learning: Entrants, measured: Entrants, params: Params) -> dict[str, Any]:
    """What every setting costs and keeps on both splits, the best of each schedule, and the racing that promises.

    Racing learns from a random half of the learning races and is calibrated, and judged, on the other.
    """
    racing_params, noise = params.races.racing, noise_of_races(params)
    levels = [draw.level for draw in draws(noise, params.seed)]
    half = np.random.default_rng(params.seed).permutation(len(learning.values))
    known, fresh = (learning.some(sorted(part.tolist())) for part in np.array_split(half, 2))
    learned = {
        proposer: learn(known.values, levels, racing_params.rivals, known.proposals.get(proposer) if proposer else None)
        for proposer in racing_params.proposer
    }
    whole = replay(Course(list(range(len(levels))), all_draws(len(levels)), None), measured)
    settings = dict(params.evaluate.model_dump(), seed=params.seed)

    def told(outcome: Outcome) -> dict[str, float]:
        return {
            "accuracy": float(outcome.hits.mean()),
            "disagreement": float(1 - outcome.agrees.mean()),
            "evaluations": float(outcome.share.mean() * len(levels)),
        }

    def judged(outcome: Outcome) -> dict[str, Any]:
        values: dict[str, ArrayLike] = {
            "accuracy": outcome.hits,
            "disagreement": ~outcome.agrees,
            "share": outcome.share,
        }
        intervals = {
            key: clustered_mean(np.asarray(value, dtype=float), measured.clusters, **settings).as_dict()
            for key, value in values.items()
        }
        difference = paired_difference(outcome.hits, whole.hits, measured.clusters, **settings)
        return {
            **intervals,
            "difference": difference.as_dict(),
            "hits": "".join("01"[int(hit)] for hit in outcome.hits),
        }

    runs: list[dict[str, Any]] = []
    best: dict[str, tuple[float, Setting, Course]] = {}
    floor = replay(Course(list(range(len(levels))), all_draws(len(levels)), None), learning).hits.mean()
    for kind, setting, course in courses(params, learned):
        outcome = replay(course, fresh if kind == "racing" else learning)
        runs.append(
            {
                "schedule": kind,
                "setting": setting,
                LEARNED_FROM: told(outcome),
                MEASURED_ON: told(replay(course, measured)),
            }
        )
        cost = float(outcome.share.mean())
        if outcome.hits.mean() >= floor - params.races.within and cost < best.get(kind, (np.inf,))[0]:
            best[kind] = (cost, setting, course)
    promised = []
    for proposer, delta in product(racing_params.proposer, racing_params.deltas):
        threshold = calibrate(
            lambda threshold, proposer=proposer: ~replay(raced(learned[proposer], threshold, proposer), fresh).agrees,
            racing_params.threshold, delta, racing_params.confidence,
        )  # fmt: skip
        setting = {"proposer": proposer, "delta": delta, "threshold": threshold}
        promised.append({"setting": setting, **judged(replay(raced(learned[proposer], threshold, proposer), measured))})
    return {
        "races": {
            LEARNED_FROM: len(learning.values),
            "calibration": len(fresh.values),
            MEASURED_ON: len(measured.values),
        },
        "candidates": float(np.mean([len(values) for values in measured.values])),
        "draws": len(levels),
        "learned": {str(proposer): asdict(found) for proposer, found in learned.items()},
        "exhaustive": judged(whole),
        "best": {
            kind: {"setting": setting, **judged(replay(course, measured))}
            for kind, (_, setting, course) in best.items()
        },
        "promised": promised,
        "runs": runs,
    }


def run(name: str, params: Params, prepared: Path, cached: Path, trained: Path, folder: Path) -> dict[str, Any]:
    """Compares the schedules on dataset `name` for every method that is raced there; writes `<folder>.json`."""
    store, told = Store(folder), {}
    found = {s: collect(name, s, params, prepared, cached, trained, store) for s in (LEARNED_FROM, MEASURED_ON)}
    examples = {split: examples_of(split, params, prepared) for split in found}
    asked = [proposer for proposer in params.races.racing.proposer if proposer]
    said = {
        split: {proposer: proposals(proposer, of, params, prepared, cached, trained) for proposer in asked}
        for split, of in examples.items()
    }
    for method in params.races.datasets[name]:
        splits = {
            split: Entrants(
                [values.astype(float) for values in found[split][method]],
                said[split],
                [pairs([e]).index(Pair(e.images[e.answer[0][0]], e.texts[e.answer[0][1]])) for e in of],
                [e.cluster for e in of],
            )
            for split, of in examples.items()
        }
        told[method] = compare(splits[LEARNED_FROM], splits[MEASURED_ON], params)
    write_atomic(folder.with_suffix(".json"), (json.dumps(told, indent=1) + "\n").encode())
    return {"races": sum(len(of) for of in examples.values())}
