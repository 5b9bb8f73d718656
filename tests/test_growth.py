"""Racing among many candidates: the cost falls towards one draw each, and the error rate is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsd.config import Params
from dsd.experiments.scaling import NOISES, measure_scaling, read_scaling, synthetic
from tests.raced import few


def test_costs_of_each_noise_and_number(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(seed: int) -> None:
        measure_scaling(few(params.races), params.evaluate, seed, tmp_path)

    measure(params.seed)
    rows = read_scaling(tmp_path)["rows"]
    assert [(row["noise"], row["candidates"]) for row in rows] == [(n, c) for n in NOISES for c in (10, 40)]
    for row in rows:
        assert row["share"]["n"] == row["disagreement"]["n"] == 30
        assert 1 / row["draws"] <= row["share"]["value"] <= 1 and row["disagreement"]["low"] <= 0.2
    of_few, of_many = rows[:2]
    assert of_many["share"]["value"] < of_few["share"]["value"]

    monkeypatch.setattr("dsd.experiments.scaling.synthetic", None)
    measure(params.seed)  # not computed again
    with pytest.raises(TypeError):
        measure(seed=9)


@pytest.mark.parametrize("noise", NOISES)
def test_draws_share_a_worth(noise: str) -> None:
    values = synthetic(np.random.default_rng(0), (2000, 64), NOISES[noise])
    own, other = values[:, :32].mean(1), values[:, 32:].mean(1)
    assert np.corrcoef(own, other)[0, 1] > 0.95
