"""Discriminative Stable Diffusion: pooled cross-attention, averaged over heads and layers.

Shapes: L layers, H heads; any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dsd.config import CrossAttentionMethod
from dsd.scorers.base import Scorer, Scores, StoredEvidence


def reduce(pooled: Any, attribution: Any, *, layers: int | Literal["all"], heads: Literal["weighted", "mean"]) -> Any:
    """Reduce pooled attention [..., L, H] and attribution [..., L, H] (eq. 7) to scores [...].

    `weighted`: heads are weighted by their attribution ΣAttr_h(A) within the layer. The paper gives Attr per element
    and not how heads are combined; weighting by the sums is our interpretation. `mean`: equal weights. Heads of
    attribution 0 are padding or excluded, and do not count.
    `layers`: all, or the last n in the order of the forward pass.
    """
    if layers != "all":
        pooled, attribution = pooled[..., -layers:, :], attribution[..., -layers:, :]
    weights = attribution if heads == "weighted" else attribution > 0
    return ((pooled * weights).sum(-1) / weights.sum(-1)).mean(-1)


class CrossAttention(Scorer):
    name = "cross-attention"

    def scores(
        self, name: str, method: CrossAttentionMethod, stored: StoredEvidence, heads_LH: NDArray[np.bool_] | None = None
    ) -> Scores:
        """heads_LH: the heads that count, by default all."""
        evidence = stored.evidence(method.prompt)
        draws, pooling = evidence.at(method.levels), list(stored.poolings).index(method.pooling)
        attribution = evidence.attribution[:, draws]
        if heads_LH is not None:
            attribution = attribution * heads_LH
        scores = reduce(evidence.attention[:, draws, pooling], attribution, layers=method.layers, heads=method.heads)
        return dict(zip(evidence.pairs, scores.mean(-1).tolist(), strict=True))

    def row_values(
        self, arrays: Mapping[str, np.ndarray], method: CrossAttentionMethod, poolings: Sequence[str]
    ) -> np.ndarray:
        pooled = arrays["attention"][:, list(poolings).index(method.pooling)]
        values: np.ndarray = reduce(pooled, arrays["attribution"], layers=method.layers, heads=method.heads)
        return values


SCORER = CrossAttention()
