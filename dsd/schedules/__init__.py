"""Schedules: which (candidate, draw) is computed next. One file a kind; no torch."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from dsd.schedules.base import ScheduleKind

# By kind: the SCHEDULE of each module of this package that has one. Defined before the loop, as `replay` imports it.
SCHEDULES: dict[str, ScheduleKind] = {}

for _module in iter_modules(__path__):
    _schedule = getattr(import_module(f"{__name__}.{_module.name}"), "SCHEDULE", None)
    if _schedule is not None:
        SCHEDULES[_schedule.kind] = _schedule
