"""Races of one method on one dataset: its examples under a schedule, many side by side in full batches.

Shapes: C candidates, K draws; E pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dsd.config import NoiseParams
from dsd.data.draws import Draw, draws
from dsd.data.examples import MatchingExample, Pair, pairs
from dsd.engine.batching import Entry, Filled
from dsd.engine.forward import ScheduledMethod, Values, row_values
from dsd.engine.session import Session
from dsd.schedules.base import Course
from dsd.schedules.race import Floats, Race
from dsd.scorers.evidence import Request, plan, requests, unconditional, with_unconditional
from dsd.store import Store, digest
from dsd.versions import versioned


def choices(examples: Iterable[MatchingExample]) -> list[MatchingExample]:
    """The examples; one with several right pairs becomes one choice among its images for each right pair's text."""
    return [choice for example in examples for choice in _choices(example)]


def _choices(example: MatchingExample) -> list[MatchingExample]:
    if len(example.answer) <= 1:
        return [example]
    return [
        replace(example, id=f"{example.id}/{t}", texts=(example.texts[t],), answer=((i, 0),)) for i, t in example.answer
    ]


def right(example: MatchingExample) -> int:
    """The index of the example's right pair; −1 if there is none, or a wrong candidate equals it: a tie is wrong."""
    if not example.answer:
        return -1
    ((image, text),) = example.answer
    candidates = [Pair(i, t) for i in example.images for t in example.texts]
    answer = Pair(example.images[image], example.texts[text])
    return pairs([example]).index(answer) if candidates.count(answer) == 1 else -1


class RaceRunner:
    """Runs the races of one method of a session; the engine is opened when it is needed.

    source: digest of all that evidence depends on, except the rows.
    key: digest of the models and params, the same on every machine: the last bits of a training are not in it.
    """

    def __init__(self, session: Session, method: ScheduledMethod) -> None:
        params, row = session.params, method.model_dump(exclude={"levels", "schedule"})
        self.session, self.method = session, method
        self.noise = NoiseParams(levels=params.races.levels, draws_per_level=params.races.draws_per_level)
        self.draws: list[Draw] = draws(self.noise, params.seed)
        self.source = digest(session.evidence_key(method.prompt), row)
        training = session.training_of(method.prompt)
        learning = params.training[training].model_dump() if training else None
        sections = [params.datasets[session.name], params.images, params.evidence, params.prompt, self.noise]
        content = [session.backbone.digest, row, learning, [section.model_dump() for section in sections], params.seed]
        key = versioned("races", digest(*content))
        self.key = versioned("prompts", key) if training else key

    def open(self) -> None:
        """Open the models, so that they do not count in timings."""
        _ = self.session.engine(self.method.prompt).backbone.unet

    def collect(self, examples: Sequence[MatchingExample], store: Store, title: str) -> list[Values]:
        """The values [C, K] of every example at all draws, level by level; resumable."""
        params, compares = self.session.params, self.method.compares_unconditional
        rows = requests(examples, self.noise, params.seed, compares)
        shards = plan(rows, self.source, params.evidence.shard)
        poolings = params.evidence.poolings
        self.session.fill_evidence(
            self.method.prompt, shards, store, title,
            lambda arrays: {"values": row_values(arrays, self.method, poolings)},
        )  # fmt: skip
        parts = [part["values"] for part in (store.read(shard.key) for shard in shards) if part is not None]
        every = with_unconditional(examples, compares)
        values_EK = np.concatenate(parts).reshape(len(every), -1)
        values_EK, index = values_EK - unconditional(every, values_EK), {pair: n for n, pair in enumerate(every)}
        return [values_EK[[index[pair] for pair in pairs([example])]] for example in examples]

    def run(
        self,
        course: Course,
        examples: Sequence[MatchingExample],
        proposals: Sequence[Floats] | None,
        filled: Filled,
        *,
        budget: float | None = None,
        stored: Mapping[Request, float] | None = None,
    ) -> Iterator[Entry]:
        """Run the examples as races; yields each when it has ended.

        Args:
            proposals: the scores of the course's proposer, None without one.
            budget: maximum of evaluations, as a multiple of the candidates.
            stored: values that are known already.
        """
        entries = self._entries(course, examples, proposals, budget)
        return self.session.engine(self.method.prompt).race(entries, self.method, filled, dict(stored or {}))

    def _entries(
        self,
        course: Course,
        examples: Sequence[MatchingExample],
        proposals: Sequence[Floats] | None,
        budget: float | None,
    ) -> Iterator[Entry]:
        ordered = [self.draws[k] for k in course.order]
        for number, example in enumerate(examples):
            candidates = pairs([example])
            most = None if budget is None else int(budget * len(candidates))
            race = Race(len(candidates), course.schedule, proposals[number] if proposals else None, most)
            compares = self.method.compares_unconditional and len(example.images) > 1
            yield Entry(example.id, race, candidates, ordered, compares)
