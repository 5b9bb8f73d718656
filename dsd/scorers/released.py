"""The scoring rule of the published implementation of Discriminative Stable Diffusion, which differs from the paper's.

The published code averages the attention term over the batch, so that scores depend on each other: a defect. Here the
term is per sample.

Shapes: K draws, L layers, H heads; any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsd.config import ReleasedMethod
from dsd.scorers.base import Scorer, Scores, StoredEvidence
from dsd.scorers.evidence import unconditional

Array = NDArray[np.float32]
STAGES = ("down_blocks", "mid_block", "up_blocks")


def last_blocks(layers: Sequence[str]) -> list[int]:
    """Return the indices of the layers that count: of the last down block, the middle block and the last up block.

    `layers` are the names of the cross-attention layers in the order of the forward pass; of the 16 in Stable Diffusion
    2.1, 2 + 1 + 3 count.
    """
    chosen: list[int] = []
    for stage in STAGES:
        names = [name for name in layers if name.startswith(f"{stage}.")]
        block = names[-1].partition(".attentions.")[0] if names else ""
        chosen += [n for n, name in enumerate(layers) if block and name.startswith(f"{block}.attentions.")]
    return chosen


def reduce(logits: Array, attribution: Array, error: Array, *, size: int, denoising: bool) -> Array:
    """Reduce the evidence of the unconditional (0) and the conditional (1) half to scores [...].

    Args:
        logits: [2, ..., K, L, H] the pooling `logits` of the layers that count. Their mean over both halves, heads,
            layers and draws is the first term.
        attribution: [..., K, L, H] of the same layers; 0 for a missing head, whose logits are 0 too.
        error: [2, ..., K] ‖ε − ε_θ‖², the mean over the values of the latent.
        size: the number of values of a latent.
        denoising: whether ‖ε − ε_θ(x_t, ∅)‖₂ − ‖ε − ε_θ(x_t, y)‖₂ is added, not squared.

    With one image per example, the unconditional half is the same for all candidates and may be zeros.
    """
    scores: Array = (logits.mean(0).sum(-1) / (attribution > 0).sum(-1)).mean(-1)
    if denoising:
        norm = np.sqrt(size * error)
        scores = scores + norm[0] - norm[1]
    return scores.mean(-1)


class Released(Scorer):
    name = "released"

    def scores(self, name: str, method: ReleasedMethod, stored: StoredEvidence) -> Scores:
        evidence = stored.evidence(method.prompt)
        draws, layers = evidence.at(method.levels), last_blocks(evidence.layers)
        logits = evidence.attention[:, draws, list(stored.poolings).index("logits")][..., layers, :]
        attribution, error = evidence.attribution[:, draws][..., layers, :], evidence.error[:, draws]
        logits, error = (np.stack([unconditional(evidence.pairs, values), values]) for values in (logits, error))
        scores = reduce(logits, attribution, error, size=evidence.latent, denoising=method.denoising)
        return dict(zip(evidence.pairs, scores.tolist(), strict=True))


SCORER = Released()
