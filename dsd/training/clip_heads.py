"""The learners of CLIP's projections and of CoCoOp's context vectors, trained on the cosine."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor

from dsd.config import ContrastiveMethod
from dsd.data.draws import Draw
from dsd.engine.session import Session
from dsd.models.clip_heads import new_head
from dsd.training.base import Table


class HeadLearner:
    def __init__(self, session: Session, method: str) -> None:
        params, row = session.params, cast(ContrastiveMethod, session.params.methods[method])
        clip, features = session.clip(row.backbone), session.features(row.backbone)
        self.module = new_head(row, clip, *features, params.context, params.seed)
        self.file = self.module.file

    def scores(self, tables: list[Table], draws: list[Draw]) -> Tensor:
        cosines: Tensor = self.module([pair for rows in tables for row in rows for pair in row])
        return cosines.view(len(tables), len(tables[0]), -1)

    def save(self, path: Path) -> None:
        self.module.save(path)


LEARNERS = {"projections": HeadLearner, "context": HeadLearner}
