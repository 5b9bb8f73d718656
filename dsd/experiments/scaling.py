"""What racing costs as candidates grow, on synthetic evidence: no model is asked about ten thousand of them.

Shapes: C candidates, K draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsd.config import Params
from dsd.schedules.race import Floats, Learned, all_draws, learn
from dsd.schedules.replay import Course, Entrants, Proposer, judged, promised, raced, replay
from dsd.store import digest, write_atomic
from dsd.versions import versioned

FILE = "growth.json"
MOST = 1000  # candidates of a race that is learned from
FREEDOM = 4  # of Student's t, the heavy-tailed one: its third moment is the last that exists
Sample = Callable[[np.random.Generator, tuple[int, int]], Floats]
NOISES: dict[str, Sample] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(FREEDOM, size=shape),
}


def grow(params: Params, target: Path) -> None:
    """Writes `growth.json`: for each noise and number of candidates, what racing costs under its error rate.

    What was told under the same params is left as it is.
    """
    races = params.races.model_dump(include={"levels", "draws_per_level", "growth"})
    racing = params.races.racing.model_dump(include={"threshold", "rivals", "confidence"})
    key = versioned("scaling", digest(races, racing, params.evaluate.model_dump(), params.seed))
    if read(target).get("params") == key:
        return
    rows = [row(noise, candidates, params) for noise in NOISES for candidates in params.races.growth.candidates]
    write_atomic(target / FILE, (json.dumps({"params": key, "rows": rows}, indent=1) + "\n").encode())


def read(folder: Path) -> dict[str, Any]:
    """What `grow` has told; nothing where it was not run."""
    path = folder / FILE
    return dict(json.loads(path.read_text())) if path.exists() else {}


def row(noise: str, candidates: int, params: Params) -> dict[str, Any]:
    """Racing among so many candidates: learned, calibrated and measured on other races each."""
    growth, draws = params.races.growth, len(params.races.levels) * params.races.draws_per_level

    def races(role: int, most: int) -> Entrants:
        rngs = (np.random.default_rng([params.seed, role, candidates, n]) for n in range(growth.races))
        values = [synthetic(rng, (min(candidates, most), draws), NOISES[noise]) for rng in rngs]
        return Entrants(values, {}, [int(v.mean(1).argmax()) for v in values], [str(n) for n in range(growth.races)])

    known = learn(races(0, MOST).values, [0.0] * draws, params.races.racing.rivals, None)
    learned: dict[Proposer, Learned] = {None: known}
    fresh = races(1, candidates)

    def wrong(threshold: float) -> list[bool]:
        return (~replay(raced(learned, None, threshold), fresh).agrees).tolist()

    remedy = "raise races.growth.races or races.growth.delta"
    threshold = promised(growth.delta, wrong, params.races.racing, remedy)
    measured = races(2, candidates)
    whole = replay(Course(list(range(draws)), all_draws(draws), None), measured)
    told = judged(replay(raced(learned, None, threshold), measured), whole, measured, params)
    kept = {key: told[key] for key in ("share", "disagreement")}
    return {"noise": noise, "candidates": candidates, "draws": draws, "threshold": threshold, **kept}


def synthetic(rng: np.random.Generator, shape: tuple[int, int], noise: Sample) -> Floats:
    """[C, K]: candidates of heavy-tailed worth, so that some stand out as answers do, through noise half as wide."""
    return rng.standard_t(FREEDOM, size=(shape[0], 1)) + 0.5 * noise(rng, shape)
