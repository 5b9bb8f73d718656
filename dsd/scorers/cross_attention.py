"""Discriminative Stable Diffusion: pooled cross-attention, averaged over heads and layers.

Shapes: L layers, H heads; any leading dimensions.
"""

from __future__ import annotations

from typing import Any, Literal


def reduce(pooled: Any, attribution: Any, *, layers: int | Literal["all"], heads: Literal["weighted", "mean"]) -> Any:
    """Pooled attention [..., L, H] and attribution [..., L, H] (eq. 7) to scores [...].

    `weighted`: a head counts in proportion to its attribution ΣAttr_h(A) within its layer. The paper gives Attr per
    element and not how heads are then combined; in proportion to their sums is our reading. `mean`: all heads alike.
    A head of attribution 0 is none: it fills up a layer that has fewer heads than another, or was left out. `layers`:
    all, or the last n in the order of the forward pass.
    """
    if layers != "all":
        pooled, attribution = pooled[..., -layers:, :], attribution[..., -layers:, :]
    weights = attribution if heads == "weighted" else attribution > 0
    return ((pooled * weights).sum(-1) / weights.sum(-1)).mean(-1)
