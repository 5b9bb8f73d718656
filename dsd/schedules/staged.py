"""Staged: a fixed number of candidates is kept after each stage.

Li et al. 2023, “Your Diffusion Model is Secretly a Zero-Shot Classifier”, its published commands.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise, product

from dsd.config import RacesParams
from dsd.schedules.base import Comparison, Course, ScheduleKind, Setting, spread_order
from dsd.schedules.race import Mask, RoundState, Schedule, best, mean


def staged(to_keep: Sequence[int], n_samples: Sequence[int]) -> Schedule:
    """Keep the best to_keep[i] candidates after n_samples[i] draws."""

    def keep(state: RoundState) -> Mask:
        return best(mean(state), state.kept_C, to_keep[bisect_left(n_samples, state.draws)])

    return Schedule(tuple(n_samples), keep)


class Staged(ScheduleKind):
    kind = "staged"

    def course(self, setting: Setting, races: RacesParams, comparison: Comparison) -> Course:
        return Course(spread_order(races), staged(**setting), None)

    def evaluations(self, setting: Setting, candidates: int, races: RacesParams) -> int:
        stages = zip((candidates, *setting["to_keep"]), pairwise((0, *setting["n_samples"])), strict=False)
        return sum(min(candidates, kept) * (after - before) for kept, (before, after) in stages)

    def settings(self, races: RacesParams) -> Iterable[Setting]:
        for to_keep, first, growth in product(races.staged.to_keep, races.staged.first, races.staged.growth):
            n_samples = [first * growth**stage for stage in range(len(to_keep))]
            if n_samples[-1] <= races.draws:
                yield {"to_keep": to_keep, "n_samples": n_samples}


SCHEDULE = Staged()
