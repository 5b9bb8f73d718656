"""The learner of the attention prompt (eq. 5), trained on the score of a cross-attention method.

Shapes: E examples of a step, I images and T texts of each; rows are their pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsd.config import CrossAttentionMethod
from dsd.data.draws import Draw
from dsd.engine.forward import Batch, observe
from dsd.engine.session import Session
from dsd.models.prompts import PROMPT, AttentionPrompt
from dsd.scorers import cross_attention
from dsd.scorers.evidence import Request
from dsd.training.base import Table


class AttentionPromptLearner:
    file = PROMPT

    def __init__(self, session: Session, method: str) -> None:
        params, backbone = session.params, session.backbone
        self._method = cast(CrossAttentionMethod, params.methods[method])
        self._backbone, self._encodings = backbone, session.diffusion_encodings
        self._batch_size = params.runtime.batch_size
        self._evidence = params.evidence.model_copy(update={"poolings": (self._method.pooling,)})
        self.module = AttentionPrompt(
            text_width=backbone.text_width,
            inner=backbone.layer_widths,
            latent_channels=backbone.latent_channels,
            rank=params.prompt.rank,
            conditional=params.prompt.conditional,
            seed=params.seed,
        ).to(backbone.device)

    def scores(self, tables: list[Table], draws: list[Draw]) -> Tensor:
        """Score tables; the pairs of an example share its draw, which removes most of the variance.

        More rows than a batch are checkpointed: each batch is computed again for its gradient, so that only one is in
        memory (Chen et al. 2016, arXiv:1604.06174).
        """
        rows = [(pair, draw) for table, draw in zip(tables, draws, strict=True) for line in table for pair in line]
        size = self._batch_size
        if len(rows) <= size:
            scores = self._scores(rows)
        else:
            batches = (rows[first : first + size] for first in range(0, len(rows), size))
            scores = torch.cat([checkpoint(self._scores, batch, use_reentrant=False) for batch in batches])
        return scores.view(len(tables), len(tables[0]), -1)

    def _scores(self, rows: list[Request]) -> Tensor:
        batch = Batch.of(rows, self._backbone.schedule_length, *self._encodings).to(self._backbone.device)
        pooled, attribution, _ = observe(self._backbone, self.module, self._evidence, batch)
        # Eq. 7 weights the heads by a gradient, which is constant in the update of the prompt.
        scores: Tensor = cross_attention.reduce(
            pooled[:, 0], attribution.detach(), layers=self._method.layers, heads=self._method.heads
        )
        return scores

    def save(self, path: Path) -> None:
        self.module.save(path, self._backbone.digest)


LEARNERS = {"attention prompt": AttentionPromptLearner}
