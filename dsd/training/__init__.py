"""Few-shot training; one file per learner."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from dsd.training.base import Build

LEARNERS: dict[str, Build] = {}  # by what a row of `methods` learns, from LEARNERS of each module of this package

for _module in iter_modules(__path__):
    LEARNERS.update(getattr(import_module(f"{__name__}.{_module.name}"), "LEARNERS", {}))
