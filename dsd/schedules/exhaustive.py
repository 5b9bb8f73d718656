"""Exhaustive: every candidate at every draw."""

from __future__ import annotations

from collections.abc import Iterable

from dsd.config import RacesParams
from dsd.schedules.base import Comparison, Course, ScheduleKind, Setting, spread_order
from dsd.schedules.race import Schedule

ALL_DRAWS = "exhaustive, all draws"  # name in results of the reference for every schedule


def all_draws(draws: int) -> Schedule:
    return Schedule((draws,), lambda state: state.kept_C)


def exhaustive_course(races: RacesParams) -> Course:
    """All draws, level by level."""
    return Course(list(range(races.draws)), all_draws(races.draws), None)


class Exhaustive(ScheduleKind):
    kind = "exhaustive"

    def course(self, setting: Setting, races: RacesParams, comparison: Comparison) -> Course:
        return Course(spread_order(races)[: setting["draws"]], all_draws(setting["draws"]), None)

    def settings(self, races: RacesParams) -> Iterable[Setting]:
        return [{"draws": draws} for draws in races.exhaustive.draws]


SCHEDULE = Exhaustive()
