"""Fixtures over the tiny checkpoints, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsd.datasets import benchmark
from dsd.encoding import encode
from dsd.params import Params
from dsd.preparation import prepare
from tests.tiny import save_checkpoints, small


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def params(models: Path) -> Params:
    return small(models)


@pytest.fixture(scope="session")
def prepared(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
    row = params.datasets["scenes-com"]
    benchmark(row.kind).download(row, seed=params.seed, folder=raw, workers=1)
    prepare("scenes-com", params, raw, folder)
    return folder


@pytest.fixture(scope="session")
def cached(params: Params, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    encode("scenes-com", params, prepared, folder)
    return folder
