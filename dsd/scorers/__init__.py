"""Scorers reduce evidence to scores, higher is better; one file per scorer, no torch."""

from __future__ import annotations

from dsd.config.base import constants
from dsd.scorers.base import Scorer

# By name: the SCORER of each module of this package that has one.
SCORERS: dict[str, Scorer] = {}
SCORERS.update({scorer.name: scorer for scorer in constants(__name__, __path__, "SCORER")})
