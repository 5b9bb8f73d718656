"""The scorer contrastive: the cosine of a CLIP, which the stage score stores for every pair."""

from __future__ import annotations

from dsd.config import ContrastiveMethod
from dsd.scorers.base import Scorer, Scores, StoredEvidence


class Contrastive(Scorer):
    name = "contrastive"

    def scores(self, name: str, method: ContrastiveMethod, stored: StoredEvidence) -> Scores:
        return stored.cosines(name)


SCORER = Contrastive()
