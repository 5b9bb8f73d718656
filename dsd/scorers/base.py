"""The interface of scorers, and the stored evidence that they reduce to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from dsd.config import FusionParams, MethodParams, NoiseParams
from dsd.data.examples import MatchingExample, Pair, pairs
from dsd.scorers.evidence import Evidence, fitting_entry, joined, read_evidence, read_shards, reads_unconditional

Scores = dict[Pair, float]


class StoredEvidence:
    """What the stage `score` stored for some examples of a dataset, read at first use.

    few_shot: the examples that weights are fitted on, by fold of the few-shot split; the evidence of a fold is under a
        prompt that is trained without it.
    """

    def __init__(
        self,
        scored: Path,
        examples: Sequence[MatchingExample],
        few_shot: Sequence[Sequence[MatchingExample]],
        *,
        methods: Mapping[str, MethodParams],
        poolings: Sequence[str],
        noise: NoiseParams,
        fusion: FusionParams,
        seed: int,
    ) -> None:
        self.examples, self.few_shot, self.poolings, self.fusion = examples, few_shot, poolings, fusion
        self._scored, self._methods, self._noise, self._seed = scored, methods, noise, seed
        # By prompt ("none", "few-shot"). For errors see `read_shards`.
        self.evidence = lru_cache(maxsize=2)(partial(self._read, examples))
        self.few_shot_evidence = lru_cache(maxsize=2)(self._read_few_shot)

    @cached_property
    def pairs(self) -> list[Pair]:
        return pairs(self.examples)

    def _read(self, examples: Sequence[MatchingExample], prompt: str, entry: str | None = None) -> Evidence:
        compares = reads_unconditional(self._methods, prompt)
        return read_evidence(self._scored, entry or prompt, examples, self._noise, self._seed, compares)

    def _read_few_shot(self, prompt: str) -> Evidence:
        folds = enumerate(self.few_shot)
        return joined([self._read(examples, prompt, fitting_entry(prompt, fold)) for fold, examples in folds])

    def on_few_shot(self) -> StoredEvidence:
        """Return the same evidence of the examples that weights are fitted on."""
        other = copy(self)
        other.examples, other.evidence = list(chain.from_iterable(self.few_shot)), self.few_shot_evidence
        return other

    def cosines(self, name: str) -> Scores:
        """Read the cosines of all pairs under a contrastive method."""
        return dict(zip(self.pairs, read_shards(self._scored, name)["cosine"].tolist(), strict=True))


class Scorer(Protocol):
    """Reduces stored evidence to scores, higher is better; a module of this package exports one as SCORER.

    The params row of a method defines the evidence that it needs; see `dsd.config.MethodParams`.
    """

    name: ClassVar[str]

    def scores(self, name: str, method: Any, stored: StoredEvidence) -> Scores:
        """Return the score of every pair under the method `name`, a row of `methods`."""
        ...

    def row_values(self, arrays: Mapping[str, np.ndarray], method: Any, poolings: Sequence[str]) -> np.ndarray:
        """Return the value [R] of each row of evidence, for scorers whose methods can have a schedule.

        A score is the mean of its values over draws, minus that of the unconditional pass.
        """
        raise TypeError(f"{self.name}: no mean over draws")
