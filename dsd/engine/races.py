"""Races of one method on the examples of a dataset, concurrently in full batches.

Shapes: C candidates, K draws; E pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dsd.config import NoiseParams, ScheduledMethod
from dsd.data.draws import Draw, draws
from dsd.data.examples import MatchingExample, Pair, pairs
from dsd.engine.batching import Entry, Filled, run_concurrently
from dsd.engine.encodings import Arrays
from dsd.engine.forward import Values, row_values
from dsd.engine.session import Session
from dsd.errors import DataError
from dsd.schedules.base import Course
from dsd.schedules.race import Floats
from dsd.scorers.evidence import Request, plan, requests, unconditional, with_unconditional
from dsd.store import Store, digest
from dsd.versions import versioned


def split_answers(examples: Iterable[MatchingExample]) -> list[MatchingExample]:
    """Split examples with several right pairs into one choice among the images for each right pair's text."""
    split: list[MatchingExample] = []
    for e in examples:
        _check_one_answer(e)
        each = [replace(e, id=f"{e.id}/{t}", texts=(e.texts[t],), answer=((i, 0),)) for i, t in e.answer]
        split += [e] if len(each) <= 1 else each
    return split


def _check_one_answer(example: MatchingExample) -> None:
    if len(example.answer) > 1 and 1 in (len(example.images), len(example.texts)):
        raise DataError(f"example {example.id}: has {len(example.answer)} right pairs; a schedule needs exactly one")


def independent(examples: Sequence[MatchingExample], most: int, seed: int) -> list[MatchingExample]:
    """Return at most so many random examples, no two of which share an image or, if each has one text, the text."""
    chosen, used = list[MatchingExample](), set[str]()
    for place in np.random.default_rng(seed).permutation(len(examples)):
        example = examples[place]
        keys = {*example.images, example.cluster}
        if used.isdisjoint(keys) and len(chosen) < most:
            chosen.append(example)
            used |= keys
    return chosen


def answer_index(example: MatchingExample) -> int:
    """Return the index of the example's right pair; −1 if there is none, or an equal wrong one (a tie is wrong)."""
    if not example.answer:
        return -1
    _check_one_answer(example)
    ((image, text),) = example.answer
    candidates = [Pair(i, t) for i in example.images for t in example.texts]
    answer = Pair(example.images[image], example.texts[text])
    return pairs([example]).index(answer) if candidates.count(answer) == 1 else -1


def read_shard(store: Store, key: str) -> Arrays:
    """Read a shard that was just written; raise DataError if another process has removed or damaged it since."""
    if (arrays := store.read(key)) is None:
        raise DataError(f"{store.root / key}: removed or damaged while it was used; run the command again")
    return arrays


class RaceRunner:
    """Runs the races of one method of a session; the engine is opened at first use.

    source: digest of everything that evidence depends on, except the rows.
    key: digest of models and params, but not of trained weights, whose last bits differ between machines.
    identity: what a schedule comparison depends on, except its examples: `key`, and the digest of the settings.
    """

    def __init__(self, session: Session, method: ScheduledMethod) -> None:
        params, row = session.params, method.model_dump(exclude={"levels", "schedule"})
        self.session, self.method = session, method
        per_level, sample = params.races.draws_per_level, params.noise.sample
        self.noise = NoiseParams(levels=params.races.levels, draws_per_level=per_level, sample=sample)
        self.draws: list[Draw] = draws(self.noise, params.seed)
        self.source = digest(session.evidence_key(method.prompt), row)
        training = session.training_of(method.prompt)
        learning = params.training[training].model_dump() if training else None
        noise = self.noise.model_dump(exclude=None if sample else {"sample"})  # sample 0 adds nothing to a key
        sections = [params.datasets[session.name], params.images, params.evidence, params.prompt]
        dumped = [*(section.model_dump() for section in sections), noise]
        content = [session.backbone.digest, row, learning, dumped, params.seed]
        key = versioned("races", digest(*content))
        self.key = versioned("prompts", key) if training else key
        proposers = [params.methods[p].model_dump() for p in params.races.racing.proposer if p in params.methods]
        settings = params.races.model_dump(exclude={"datasets", "growth"})
        self.identity = {"key": self.key, "settings": digest(settings, params.evaluate.model_dump(), proposers)}

    def open(self) -> None:
        """Open the models, so that opening does not count in timings."""
        _ = self.session.engine(self.method.prompt).backbone.unet

    def collect(self, examples: Sequence[MatchingExample], store: Store, title: str) -> list[Values]:
        """Return the values [C, K] of every example at all draws, ordered by level; resumable."""
        params, compares = self.session.params, self.method.compares_unconditional
        rows = requests(examples, self.noise, params.seed, compares)
        shards = plan(rows, self.source, params.evidence.shard)
        poolings = params.evidence.poolings
        self.session.fill_evidence(
            self.method.prompt, shards, store, title,
            lambda arrays: {"values": row_values(arrays, self.method, poolings)},
        )  # fmt: skip
        parts = [read_shard(store, shard.key)["values"] for shard in shards]
        requested = with_unconditional(examples, compares)
        values_EK = np.concatenate(parts).reshape(len(requested), -1)
        values_EK -= unconditional(requested, values_EK)
        index = {pair: n for n, pair in enumerate(requested)}
        return [values_EK[[index[pair] for pair in pairs([example])]] for example in examples]

    def run(
        self,
        course: Course,
        examples: Sequence[MatchingExample],
        proposals: Sequence[Floats] | None,
        filled: Filled,
        *,
        stored: Mapping[Request, float] | None = None,
    ) -> Iterator[Entry]:
        """Run the examples as races; yield each when its race is over.

        Args:
            proposals: the scores of the course's proposer, if it has one.
            stored: values that are already known.
        """
        entries = self.entries(course, examples, proposals)
        engine = self.session.engine(self.method.prompt)

        def compute(rows: list[Request]) -> Values:
            return row_values(engine.compute(rows), self.method, engine.evidence.poolings)

        return run_concurrently(entries, compute, engine.rows_at_once, filled, dict(stored or {}))

    def entries(
        self, course: Course, examples: Sequence[MatchingExample], proposals: Sequence[Floats] | None
    ) -> Iterator[Entry]:
        """The examples as races, see `run`."""
        ordered = [self.draws[k] for k in course.order]
        for number, example in enumerate(examples):
            candidates = pairs([example])
            race = course.race(len(candidates), proposals[number] if proposals else None)
            compares = self.method.compares_unconditional and len(example.images) > 1
            yield Entry(example.id, race, candidates, ordered, compares)
