"""Hierarchical: a beam of candidates over noise levels.

He et al., “Accelerating Diffusion Models for Discriminative Vision and Language Learners”, section 3 and Algorithm 1,
which contradict each other: the text drops candidates after each timestep, the listing after each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import get_args

import numpy as np

from dsd.config import RacesParams
from dsd.config.base import Direction, Reading
from dsd.schedules.base import Comparison, Course, ScheduleKind, Setting
from dsd.schedules.race import Mask, RoundState, Schedule, best, mean

CLEAN = "clean"  # the paper's own direction
DIRECTIONS, READINGS = get_args(Direction), get_args(Reading)


def hierarchical(
    timesteps: int, samples: int, beam_factor: float, patience: int, *, reading: Reading, shrinking: bool
) -> Schedule:
    """Take `samples` draws at each timestep, keep the best C / beam_factor of all C candidates, and stop when one of
    them has led for `patience` further draws.

    reading: "text" drops candidates after each timestep, "listing" after each draw.
    shrinking: as in the paper's Figure 2, keep the best 1 / beam_factor of the candidates that are left.
    """

    def keep(state: RoundState) -> Mask:
        beam = (state.kept_C.sum() if shrinking else len(state.kept_C)) / beam_factor
        kept_C = best(mean(state), state.kept_C, math.ceil(beam))
        leaders_k = np.where(kept_C[:, None], state.draws_Ck, -np.inf).cumsum(1).argmax(0)
        changes = np.flatnonzero(np.diff(leaders_k))
        led = len(leaders_k) - 1 - (int(changes[-1]) + 1 if len(changes) else 0)
        return np.arange(len(kept_C)) == leaders_k[-1] if led >= patience else kept_C

    step = samples if reading == "text" else 1
    return Schedule(tuple(range(step, timesteps * samples + 1, step)), keep)


def directed_order(direction: str, levels: Sequence[float], samples: int, per_level: int) -> list[int]:
    """The first `samples` draws of each level, level by level: from clean, from noisy or from the middle outwards."""
    middle = (min(levels) + max(levels)) / 2
    keys: dict[str, Callable[[int], float]] = {
        "clean": lambda n: levels[n],
        "noisy": lambda n: -levels[n],
        "middle": lambda n: abs(levels[n] - middle),
    }
    ordered = sorted(range(len(levels)), key=keys[direction])
    return [n * per_level + number for n in ordered for number in range(samples)]


def published_name(direction: str, reading: str) -> str:
    """The name in results of the paper's own setting."""
    return f"hierarchical as published ({reading}), from {direction}"


class Hierarchical(ScheduleKind):
    kind = "hierarchical"

    def course(self, setting: Setting, races: RacesParams, comparison: Comparison) -> Course:
        levels, options = races.levels, {key: value for key, value in setting.items() if key != "direction"}
        order = directed_order(setting["direction"], levels, setting["samples"], races.draws_per_level)
        return Course(order, hierarchical(len(levels), **options), None)

    def evaluations(self, setting: Setting, candidates: int, races: RacesParams) -> int:
        return candidates * len(races.levels) * int(setting["samples"])

    def settings(self, races: RacesParams) -> Iterable[Setting]:
        values = races.hierarchical.model_dump()
        settings = (dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))
        return [setting for setting in settings if setting["samples"] <= races.draws_per_level]

    def named_settings(self, races: RacesParams) -> dict[str, Setting]:
        return {
            published_name(side, reading): {"direction": side, "reading": reading, **races.published.model_dump()}
            for side, reading in product(DIRECTIONS, READINGS)
        }


SCHEDULE = Hierarchical()
