"""The champion as a service: its versions as models of MLflow, and answers over HTTP."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image

from dsd.params import Params
from flows import serving, tracking
from flows.registry import BACKBONE, CHAMPION, Registry
from flows.serving import Service
from tests.tiny import small

TEXTS = ["a red circle", "a blue star", "a green ring left of a pink bolt"]
MODEL = f"models:/{BACKBONE}@{CHAMPION}"


def picture(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def coded(seed: int) -> str:
    return base64.b64encode(picture(seed)).decode()


@pytest.fixture(scope="module")
def registered(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with a champion, on its own copy of the tiny checkpoint."""
    root = tmp_path_factory.mktemp("registered")
    shutil.copytree(models / "embedded", root / "models" / "embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        enter(small(root / "models"), root)
        mlflow.set_tracking_uri(tracking.uri())
        yield root


def enter(params: Params, root: Path) -> None:
    """Registers what was measured there (nothing), and names it champion."""
    (root / "data" / "evaluate").mkdir(parents=True, exist_ok=True)
    (root / "data" / "evaluate" / "metrics.json").write_text("{}")
    (root / "dvc.lock").touch()
    version = Registry().register(params, root)
    MlflowClient(tracking.uri()).set_registered_model_alias(BACKBONE, CHAMPION, str(version.number))


def test_x(registered: Path) -> None:
    m = mlflow.pyfunc.load_model(MODEL)
    df = pd.DataFrame({"image": [coded(0), coded(1)], "texts": [TEXTS, TEXTS[:2]], "heatmap": [True, False]})
    print(m.predict(df))
    print(m.metadata.signature)
    import subprocess

    print(
        subprocess.run(
            "find mlartifacts -type f | head -50; cat $(find mlartifacts -name MLmodel)",
            shell=True,
            capture_output=True,
            text=True,
        ).stdout
    )
