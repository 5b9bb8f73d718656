"""Interface of a kind of schedule, and what the kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from numpy.typing import ArrayLike
from scipy.stats import qmc

from dsd.config import RacesParams, ScheduleParams
from dsd.schedules.race import Mask, Race, RoundState, Schedule, best, mean

# A row of `schedules` without `kind`, `budget` and `shortlist`, or one to compare, which may have a `budget`.
Setting = Mapping[str, Any]
Comparison = Mapping[str, Any]  # results of the schedule comparison for one method, as in data/races/*.json
Proposer = str | None


class Course(NamedTuple):
    """A schedule, the order in which it takes the draws, the proposer that it starts from, and its budget.

    budget: maximum number of evaluations, as a multiple of the number of candidates; the leader wins when it is spent.
    """

    order: list[int]
    schedule: Schedule
    proposer: Proposer
    budget: float | None = None

    def race(self, candidates: int, proposal: ArrayLike | None) -> Race:
        """A race of an example with so many candidates; `proposal`: see `Race`."""
        most = None if self.budget is None else int(self.budget * candidates)
        return Race(candidates, self.schedule, proposal, most)


class ScheduleKind(ABC):
    """A kind of schedule. A new kind is a module of this package with an instance named SCHEDULE."""

    kind: ClassVar[str]
    needs_comparison: ClassVar[bool] = False  # whether a course needs the results of `make races`

    @abstractmethod
    def course(self, setting: Setting, races: RacesParams, comparison: Comparison) -> Course:
        """The course of a setting.

        Raises:
            DataError: the comparison lacks what the setting needs.
        """

    def evaluations(self, setting: Setting, candidates: int, races: RacesParams) -> int:
        """Maximum evaluations of a race; by default every candidate at every draw."""
        return candidates * races.draws

    def settings(self, races: RacesParams) -> Iterable[Setting]:
        """Settings that the schedule comparison tries, if the draws suffice for them."""
        return ()

    def named_settings(self, races: RacesParams) -> dict[str, Setting]:
        """Settings that the schedule comparison reports under a name of their own, whether they are best or not."""
        return {}

    def course_of(self, row: ScheduleParams, races: RacesParams, comparison: Comparison) -> Course:
        """The course of a row of `schedules`; `comparison` may be empty unless `needs_comparison`."""
        course = self.course(_setting(row), races, comparison)._replace(budget=row.budget)
        if not (shortlist := getattr(row, "shortlist", None)):
            return course
        return course._replace(schedule=shortlisted(course.schedule, shortlist.keep), proposer=shortlist.proposer)

    def evaluations_of(self, row: ScheduleParams, candidates: int, races: RacesParams) -> int:
        """The most evaluations that a race takes under a row of `schedules`."""
        shortlist = getattr(row, "shortlist", None)
        most = self.evaluations(_setting(row), min(candidates, shortlist.keep) if shortlist else candidates, races)
        return most if row.budget is None else min(most, int(row.budget * candidates))


def _setting(row: ScheduleParams) -> Setting:
    return row.model_dump(exclude={"kind", "budget", "shortlist"})


def shortlisted(schedule: Schedule, number: int) -> Schedule:
    """The schedule over the `number` candidates that the proposer scores highest."""

    def keep(state: RoundState) -> Mask:
        return schedule.keep(state) if state.draws else best(mean(state), state.kept_C, number)

    return Schedule((0, *schedule.ends), keep, schedule.estimate)


def draw_levels(races: RacesParams) -> list[float]:
    """[K] the noise level of each draw."""
    return [level for level in races.levels for _ in range(races.draws_per_level)]


def spread_order(races: RacesParams) -> list[int]:
    """An order of the draws whose every prefix is spread over the levels, as in the published code of `staged`."""
    levels, per_level = len(races.levels), races.draws_per_level
    points = qmc.Halton(1, scramble=False).fast_forward(1).random(8 * levels)
    spread = list(dict.fromkeys((points.ravel() * levels).astype(int).tolist()))
    return [level * per_level + number for number in range(per_level) for level in spread]
