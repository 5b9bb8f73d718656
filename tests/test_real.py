"""Stable Diffusion 2 base at its real size, with random weights, through the engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsd.attention import cross_attention_layers
from dsd.backbones import StableDiffusion, load_diffusion
from dsd.draws import Draw
from dsd.encoding import diffusion_encodings
from dsd.engine import Engine
from dsd.evidence import UNCONDITIONAL
from dsd.matching import Pair
from dsd.params import Params
from dsd.pictures import Picture, Pictures, PictureWriter
from dsd.store import Store
from tests.real import stable_diffusion_2
from tests.tiny import row

TEXT = "a red circle left of a blue star"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StableDiffusion]:
    folder = tmp_path_factory.mktemp("real")
    stable_diffusion_2(folder)
    yield load_diffusion(row(folder), torch.device("cpu"))
    shutil.rmtree(folder)  # pytest would keep its gigabytes


def test_its_sizes_are_those_of_stable_diffusion_2(backbone: StableDiffusion) -> None:
    assert sum(weight.numel() for weight in backbone.unet.parameters()) == 865_910_724
    assert (backbone.resolution, backbone.scale, backbone.max_tokens, backbone.schedule_length) == (512, 8, 77, 1000)
    assert backbone.vae.config.scaling_factor == 0.18215 and backbone.prediction == "epsilon"
    heads = [layer.heads for _, layer in cross_attention_layers(backbone.unet)]
    assert heads == [5, 5, 10, 10, 20, 20, 20, 20, 20, 20, 10, 10, 10, 5, 5, 5] and len(backbone.layers) == 16
    assert backbone.layer_widths == [64 * count for count in heads]


def test_a_pair_is_scored_as_by_any_other_model(backbone: StableDiffusion, params: Params, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    with PictureWriter(tmp_path / "images.parquet") as writer:
        Image.fromarray(pixels).save(tmp_path / "one.png")
        writer.add(Picture("one", (tmp_path / "one.png").read_bytes()))
    pictures = Pictures(tmp_path / "images.parquet")
    tables = diffusion_encodings(backbone, pictures, [UNCONDITIONAL, TEXT], backbone.resolution, Store(tmp_path))
    engine = Engine(backbone, None, params.evidence, *tables, batch_size=1)
    found = engine.compute([(Pair("one", text), Draw(0.4, 0)) for text in (TEXT, UNCONDITIONAL)])
    assert found["attention"].shape == (2, len(params.evidence.poolings), 16, 20)
    assert found["attribution"].shape == (2, 16, 20) and found["error"].shape == (2,)
    assert all(np.isfinite(values).all() for values in found.values())
    assert (found["attribution"][0] > 0).sum(-1).tolist() == [
        layer.heads for _, layer in cross_attention_layers(backbone.unet)
    ]
    assert found["error"][0] != found["error"][1]
    assert tables[0](["one"])["latents"].shape == (1, 4, 64, 64) and tables[1]([TEXT])["hidden"].shape == (1, 77, 1024)
