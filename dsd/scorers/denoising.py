"""The scorer denoising (Diffusion Classifier): the text with the lowest denoising error is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dsd.config import DenoisingMethod
from dsd.scorers.base import Scorer, Scores, StoredEvidence
from dsd.scorers.evidence import unconditional

Array = NDArray[np.float32]


def reduce(error: Array, without_text: Array) -> Array:
    """Reduce errors ‖ε − ε_θ(x_t, y)‖² with and without the text, [..., draws] each, to scores [...]."""
    return (without_text - error).mean(-1)


class Denoising(Scorer):
    name = "denoising"

    def scores(self, name: str, method: DenoisingMethod, stored: StoredEvidence) -> Scores:
        evidence = stored.evidence(method.prompt)
        error = evidence.error[:, evidence.at(method.levels)]
        scores = reduce(error, unconditional(evidence.pairs, error))
        return dict(zip(evidence.pairs, scores.tolist(), strict=True))

    def row_values(
        self, arrays: Mapping[str, np.ndarray], method: DenoisingMethod, poolings: Sequence[str]
    ) -> np.ndarray:
        return -arrays["error"]


SCORER = Denoising()
