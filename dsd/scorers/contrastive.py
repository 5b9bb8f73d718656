"""The scorer contrastive: the cosine of a CLIP, stored for every pair by the stage `score`."""

from __future__ import annotations

from dsd.config import ContrastiveMethod
from dsd.scorers.base import Scorer, Scores, StoredEvidence


class Contrastive(Scorer):
    name = "contrastive"

    def scores(self, name: str, method: ContrastiveMethod, stored: StoredEvidence) -> Scores:
        return stored.cosines(name)


SCORER = Contrastive()
