"""Scorers: evidence to scores, higher is better. One file a scorer; no torch."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from dsd.scorers.base import Scorer

SCORERS: dict[str, Scorer] = {}  # by name: the SCORER of each module of this package that has one

for _module in iter_modules(__path__):
    _scorer = getattr(import_module(f"{__name__}.{_module.name}"), "SCORER", None)
    if _scorer is not None:
        SCORERS[_scorer.name] = _scorer
