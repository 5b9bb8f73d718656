"""Few-shot training; one file per learner."""

from __future__ import annotations

from dsd.config.base import constants
from dsd.training.base import Build

LEARNERS: dict[str, Build] = {}  # by what a row of `methods` learns, from LEARNERS of each module of this package
for _table in constants(__name__, __path__, "LEARNERS"):
    LEARNERS.update(_table)
