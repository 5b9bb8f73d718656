"""Racing among many: costs fall towards a draw each, and the promise is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsd.config import Params
from dsd.experiments.scaling import NOISES, grow, read, synthetic
from tests.raced import few


def test_costs_of_each_noise_and_number(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raced = params.model_copy(update={"races": few(params.races)})
    grow(raced, tmp_path)
    told = read(tmp_path)["rows"]
    assert [(row["noise"], row["candidates"]) for row in told] == [(n, c) for n in NOISES for c in (10, 40)]
    for row in told:
        assert row["share"]["n"] == row["disagreement"]["n"] == 30
        assert 1 / row["draws"] <= row["share"]["value"] <= 1 and row["disagreement"]["low"] <= 0.2
    few_of, many_of = told[:2]
    assert many_of["share"]["value"] < few_of["share"]["value"]

    monkeypatch.setattr("dsd.experiments.scaling.synthetic", None)
    grow(raced, tmp_path)  # what is there is left
    with pytest.raises(TypeError):
        grow(raced.model_copy(update={"seed": 9}), tmp_path)


@pytest.mark.parametrize("noise", NOISES)
def test_draws_share_a_worth(noise: str) -> None:
    values = synthetic(np.random.default_rng(0), (2000, 64), NOISES[noise])
    own, other = values[:, :32].mean(1), values[:, 32:].mean(1)
    assert np.corrcoef(own, other)[0, 1] > 0.95
