"""Schedules: which (candidate, draw) is computed next. One file a kind; no torch."""

from __future__ import annotations

from dsd.config.base import constants
from dsd.schedules.base import ScheduleKind

# By kind: the SCHEDULE of each module of this package that has one. Defined before it is filled: `replay` imports it.
SCHEDULES: dict[str, ScheduleKind] = {}
SCHEDULES.update({schedule.kind: schedule for schedule in constants(__name__, __path__, "SCHEDULE")})
