"""Stable Diffusion 2 base at its real size, with random weights, through the engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dsd.config import NoiseParams, Params
from dsd.data.draws import Draw
from dsd.data.examples import Pair
from dsd.data.image_table import ImageTable, ImageTableWriter, StoredImage
from dsd.datasets import benchmark
from dsd.datasets.preparation import prepare
from dsd.engine.cache import encode
from dsd.engine.encodings import diffusion_encodings
from dsd.engine.engine import Engine
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.evaluation.evaluate import ScoredSplit, evaluate
from dsd.models import load_diffusion
from dsd.models.attention import cross_attention_layers
from dsd.models.prompts import PROMPT
from dsd.models.stable_diffusion import StableDiffusion
from dsd.scorers.evidence import UNCONDITIONAL
from dsd.store import Store
from dsd.training.loop import Training, train
from tests.real import stable_diffusion_2
from tests.tiny import row, small

TEXT = "a red circle left of a blue star"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("real")
    stable_diffusion_2(folder)
    yield folder
    shutil.rmtree(folder)  # pytest would keep its gigabytes


def test_all_stages_run_on_a_model_of_the_published_size(folder: Path, models: Path, tmp_path: Path) -> None:
    """Images resized to 224 and then 512 pixels; latents, a step of training, evidence, answers: a pair at a time."""
    small_ = small(models)
    method = small_.methods["dsd"].model_copy(update={"levels": (0.4,)})
    training = small_.training["dsd"].model_copy(
        update={"epochs": 0.3, "examples_per_step": 1, "candidates": 2, "levels": (0.4,)}
    )
    com = small_.datasets["scenes-com"].model_copy(
        update={"size": 12, "few_shot": 0.25, "validation": 0.0, "test": 3, "draws_per_level": None}
    )
    params = small_.model_copy(
        update={
            "backbones": {"embedded": row(folder)},
            "images": small_.images.model_copy(update={"resolution": 512, "parity": 224}),
            "datasets": {"scenes-com": com},
            "noise": NoiseParams(levels=(0.4,), draws_per_level=1, sample=0),
            "methods": {"dsd": method},
            "training": {"dsd": training},
            "runtime": small_.runtime.model_copy(update={"batch_size": 1}),
        }
    )
    raw, scored = tmp_path / "raw", tmp_path / "score"
    folders = Folders(tmp_path / "prepare", tmp_path / "cache", tmp_path / "train")
    benchmark("scenes-com").download(com, seed=params.seed, folder=raw, workers=1)
    prepare("scenes-com", com, raw, folders.prepared, images=params.images, seed=params.seed, workers=1)
    session = Session("scenes-com", params, folders)
    assert encode(session)["truncated"] == 0
    (step,) = train(session, Training("dsd"))
    assert np.isfinite(step["loss"])
    counts = score(session, scored, split="test")
    assert counts["rows"] == counts["computed"] == counts["pairs"] == 4
    split = ScoredSplit.of("scenes-com", params, folders.prepared, scored)
    results, _ = evaluate("scenes-com", split, params.evaluate, params.seed, tmp_path / "evaluate")
    assert results["dsd"]["micro"].n == 3
    prompt = load_file(folders.trained / "dsd" / PROMPT)
    assert all(torch.isfinite(weight).all() for weight in prompt.values()) and any(w.any() for w in prompt.values())


@pytest.fixture(scope="module")
def backbone(folder: Path) -> StableDiffusion:
    return load_diffusion(row(folder), torch.device("cpu"))


def test_its_sizes_are_those_of_stable_diffusion_2(backbone: StableDiffusion) -> None:
    assert sum(weight.numel() for weight in backbone.unet.parameters()) == 865_910_724
    assert (backbone.resolution, backbone.scale, backbone.max_tokens, backbone.schedule_length) == (512, 8, 77, 1000)
    assert backbone.vae.config.scaling_factor == 0.18215 and backbone.prediction == "epsilon"
    heads = [layer.heads for _, layer in cross_attention_layers(backbone.unet)]
    assert heads == [5, 5, 10, 10, 20, 20, 20, 20, 20, 20, 10, 10, 10, 5, 5, 5] and len(backbone.layers) == 16
    assert backbone.layer_widths == [64 * count for count in heads]


def test_a_pair_is_scored_as_by_any_other_model(backbone: StableDiffusion, params: Params, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    with ImageTableWriter(tmp_path / "images.parquet") as writer:
        Image.fromarray(pixels).save(tmp_path / "one.png")
        writer.add(StoredImage("one", (tmp_path / "one.png").read_bytes()))
    images = ImageTable(tmp_path / "images.parquet")
    tables = diffusion_encodings(backbone, images, [UNCONDITIONAL, TEXT], backbone.resolution, Store(tmp_path), 1)
    engine = Engine(backbone, None, params.evidence, *tables, batch_size=1)
    arrays = engine.compute([(Pair("one", text), Draw(0.4, 0)) for text in (TEXT, UNCONDITIONAL)])
    assert arrays["attention"].shape == (2, len(params.evidence.poolings), 16, 20)
    assert arrays["attribution"].shape == (2, 16, 20) and arrays["error"].shape == (2,)
    assert all(np.isfinite(values).all() for values in arrays.values())
    assert (arrays["attribution"][0] > 0).sum(-1).tolist() == [
        layer.heads for _, layer in cross_attention_layers(backbone.unet)
    ]
    assert arrays["error"][0] != arrays["error"][1]
    assert tables[0](["one"])["latents"].shape == (1, 4, 64, 64) and tables[1]([TEXT])["hidden"].shape == (1, 77, 1024)
