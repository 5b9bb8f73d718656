"""Scorers reduce evidence to scores, higher is better; one file per scorer, no torch."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from dsd.scorers.base import Scorer

SCORERS: dict[str, Scorer] = {}  # by name, from SCORER of the modules of this package

for _module in iter_modules(__path__):
    if (_scorer := getattr(import_module(f"{__name__}.{_module.name}"), "SCORER", None)) is not None:
        SCORERS[_scorer.name] = _scorer
