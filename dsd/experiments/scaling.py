"""Cost of racing by number of candidates, on synthetic evidence: a model is too slow for ten thousand.

Shapes: C candidates, K draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsd.config import EvaluateParams, RacesParams
from dsd.schedules.base import Course
from dsd.schedules.exhaustive import exhaustive_course
from dsd.schedules.race import Floats
from dsd.schedules.racing import calibrate, fit_forecast, racing
from dsd.schedules.replay import RecordedRaces, replay
from dsd.store import digest, write_json
from dsd.versions import versioned

FILE = "growth.json"
MOST = 1000  # candidates of a race that the forecast is fitted on
FREEDOM = 4  # of Student's t, the heavy-tailed one; its highest finite moment is the third
Sample = Callable[[np.random.Generator, tuple[int, int]], Floats]
NOISES: dict[str, Sample] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(FREEDOM, size=shape),
}


def measure_scaling(races: RacesParams, evaluate: EvaluateParams, seed: int, target: Path) -> None:
    """Write `growth.json`: the cost of racing by noise and number of candidates; skipped if the params are the same."""
    racing_params = races.racing.model_dump(include={"threshold", "rivals", "confidence"})
    sections = races.model_dump(include={"levels", "draws_per_level", "growth"}), racing_params, evaluate.model_dump()
    key = versioned("scaling", digest(*sections, seed))
    if read_scaling(target).get("params") == key:
        return
    rows = [measure(noise, count, races, evaluate, seed) for noise in NOISES for count in races.growth.candidates]
    write_json(target / FILE, {"params": key, "rows": rows})


def read_scaling(folder: Path) -> dict[str, Any]:
    """The results of `measure_scaling`; empty where it was not run."""
    path = folder / FILE
    return dict(json.loads(path.read_text())) if path.exists() else {}


def measure(noise: str, candidates: int, races: RacesParams, evaluate: EvaluateParams, seed: int) -> dict[str, Any]:
    """Return the cost of racing; fitted, calibrated and measured on different races."""
    growth, draws = races.growth, races.draws

    def recorded(role: int, most: int) -> RecordedRaces:
        rngs = (np.random.default_rng([seed, role, candidates, n]) for n in range(growth.races))
        values = [synthetic(rng, (min(candidates, most), draws), NOISES[noise]) for rng in rngs]
        winners, clusters = [int(v.mean(1).argmax()) for v in values], [str(n) for n in range(growth.races)]
        return RecordedRaces(values, {}, {}, winners, clusters)

    forecast = fit_forecast(recorded(0, MOST).values, [0.0] * draws, races.racing.rivals, None)
    calibration = recorded(1, candidates)

    def course(threshold: float) -> Course:
        return Course(list(forecast.order), racing(forecast, threshold), None)

    def errors_at(threshold: float) -> list[bool]:
        return (~replay(course(threshold), calibration).agrees).tolist()

    remedy = "raise races.growth.races or races.growth.delta"
    threshold = calibrate(errors_at, races.racing.threshold, growth.delta, races.racing.confidence, remedy)
    measured = recorded(2, candidates)
    whole = replay(exhaustive_course(races), measured)
    results = replay(course(threshold), measured).intervals(whole, measured, evaluate, seed)
    kept = {key: results[key] for key in ("share", "disagreement")}
    return {"noise": noise, "candidates": candidates, "draws": draws, "threshold": threshold, **kept}


def synthetic(rng: np.random.Generator, shape: tuple[int, int], noise: Sample) -> Floats:
    """Return evidence [C, K]: heavy-tailed means, so that a few stand out, plus noise of half the scale."""
    return rng.standard_t(FREEDOM, size=(shape[0], 1)) + 0.5 * noise(rng, shape)
