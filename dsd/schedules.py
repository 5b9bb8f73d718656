"""Schedules: which (pair, draw) is worth asking for next. Pure NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def exhaustive(pairs: int, draws: int) -> NDArray[np.int64]:
    """Every pair at every draw: rows (pair index, draw index) [pairs × draws, 2], a pair's draws together."""
    return np.stack(np.meshgrid(np.arange(pairs), np.arange(draws), indexing="ij"), -1).reshape(-1, 2)
