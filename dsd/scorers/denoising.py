"""The Diffusion Classifier: the text under which the noise is predicted best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def reduce(error: Array, unconditional: Array) -> Array:
    """Errors ‖ε − ε_θ(x_t, y)‖² with and without the text, [..., draws] each, to scores [...].

    Minus the error, normalised by the unconditional one at the same draw: images differ in how easy they are to
    denoise. Where an example has one image the second term is common to all candidates, and zeros will do.
    """
    return (unconditional - error).mean(-1)
