"""How far other arithmetic moves scores, in units that answers hang on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.drift import Drift, between, drift
from dsd.config import Params
from dsd.data.examples import read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.encodings import all_texts, diffusion_encodings, read_all
from dsd.engine.engine import Engine
from dsd.models import load_diffusion
from dsd.store import Store


def test_by_hand() -> None:
    full = [np.array([[1.0, 3.0]]), np.array([[5.0], [6.0], [9.0]])]  # 2 and 4 apart: 3 on average
    low = [np.array([[1.5, 0.5]]), np.array([[5.0], [6.0], [9.0]])]
    assert between(full, low) == pytest.approx(Drift(largest=2.5 / 3, mean=(0.5 + 2.5) / 5 / 3, changed=0.5))


def test_half_precision_is_near_and_no_drift_is_none(params: Params, prepared: Path, cached: Path) -> None:
    def engine(dtype: str) -> Engine:
        row = params.backbones["embedded"].model_copy(update={"dtype": dtype})
        backbone, texts = load_diffusion(row, torch.device("cpu")), all_texts(read_all(prepared))
        tables = diffusion_encodings(backbone, ImageTable(prepared / "images.parquet"), texts, 32, Store(cached), 1)
        return Engine(backbone, None, params.evidence, *tables, 32)

    examples = read_examples(prepared / "examples.parquet", "test")
    same = drift(engine("float32"), engine("float32"), params, examples)
    assert same == {method: Drift(0.0, 0.0, 0.0) for method in ("dsd-zero-shot", "denoising")}
    for found in drift(engine("float32"), engine("bfloat16"), params, examples).values():
        assert 0 < found.mean <= found.largest and 0 <= found.changed <= 1
