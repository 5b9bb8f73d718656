"""Stable Diffusion XL: its U-Net gets the same inputs as in the published pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dsd import Matcher
from dsd.config import Params
from dsd.data.draws import draws
from dsd.data.examples import read_examples
from dsd.engine.cache import encode
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.errors import CheckpointError
from dsd.models import load, load_diffusion
from dsd.models.attention import Capture
from dsd.models.prompts import AttentionPrompt
from dsd.models.sdxl import StableDiffusionXL
from dsd.scorers.evidence import read_evidence
from dsd.training.loop import Training, train
from tests.test_backbones import description
from tests.tiny import row

CPU = torch.device("cpu")
FAMILY = "stable-diffusion-xl"
TEXTS = ["a red circle left of a blue star", "a green ring", ""]


@pytest.fixture(scope="module")
def backbone(xl: Path) -> StableDiffusionXL:
    backbone = load_diffusion(row(xl, FAMILY), CPU)
    assert isinstance(backbone, StableDiffusionXL)
    return backbone


@pytest.fixture(scope="module")
def pipeline(backbone: StableDiffusionXL) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        backbone.vae, *backbone.text_encoders, *backbone.tokenizers, backbone.unet, backbone.schedule
    )


@torch.inference_mode()
def test_noise_is_predicted_as_the_published_pipeline_does(
    backbone: StableDiffusionXL, pipeline: StableDiffusionXLPipeline
) -> None:
    *given, empty_pooled = pipeline.encode_prompt(TEXTS[:2], device=CPU, do_classifier_free_guidance=True)
    hidden, pooled = torch.cat([given[0], given[1][:1]]), torch.cat([given[2], empty_pooled[:1]])
    side = (backbone.resolution,) * 2
    sizes = pipeline._get_add_time_ids(side, (0, 0), side, torch.float32, pooled.shape[-1]).repeat(3, 1)
    noised, timesteps = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 400, 900])
    conditions = {"text_embeds": pooled, "time_ids": sizes}
    expected = pipeline.unet(noised, timesteps, hidden, added_cond_kwargs=conditions).sample
    ours = backbone.encode_texts(TEXTS)
    found = backbone.predict_noise(noised, timesteps, ours.hidden)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(ours.hidden[:, :-1], hidden)
    other = backbone.predict_noise(noised, timesteps, torch.cat([ours.hidden[:, :-1], ours.hidden[:, -1:].flip(0)], 1))
    assert not torch.allclose(other, expected, atol=1e-3)  # the pooled embedding matters


@torch.inference_mode()
def test_the_empty_text_is_zeros_unless_the_pipeline_encodes_it(
    backbone: StableDiffusionXL, pipeline: StableDiffusionXLPipeline, xl: Path, tmp_path: Path
) -> None:
    assert not backbone.encode_texts([""]).hidden.any()
    folder = Path(shutil.copytree(xl, tmp_path / "xl"))
    for value in (True, False):
        (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": value}))
        opened = load_diffusion(row(folder, FAMILY), CPU)
        assert (opened.text_digest != opened.digest) == value  # what was stored before has another key
        encoded = opened.encode_texts(["", TEXTS[0]])
        assert bool(encoded.hidden[0].any()) != value
        assert torch.allclose(encoded.hidden[1], backbone.encode_texts(TEXTS[:1]).hidden[0], atol=1e-5)
    hidden, _, pooled, _ = pipeline.encode_prompt("", device=CPU, do_classifier_free_guidance=False)
    assert torch.allclose(encoded.hidden[0, :-1], hidden[0], atol=1e-6)
    assert torch.allclose(encoded.hidden[0, -1, : pooled.shape[1]], pooled[0], atol=1e-6)
    (folder / "model_index.json").write_text('{"force_zeros_for_empty_prompt": "false"}')
    with pytest.raises(CheckpointError, match="force_zeros_for_empty_prompt 'false': must be true or false"):
        load(row(folder, FAMILY), CPU)


def test_texts_are_pooled_at_the_end_token(xl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(xl, tmp_path / "xl"))
    edit(folder / "text_encoder_2/config.json", eos_token_id=5)
    with pytest.raises(CheckpointError, match=r"text_encoder_2/config\.json: eos_token_id 5: texts must be pooled at"):
        load(row(folder, FAMILY), CPU)


@torch.inference_mode()
def test_each_text_once_or_for_every_row_is_the_same(backbone: StableDiffusionXL, params: Params) -> None:
    text, index = backbone.encode_texts(TEXTS[:2]), torch.tensor([1, 0, 0, 1])
    noised, timesteps = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((4,), 300)
    once, each = (Capture.of(params.evidence, text.content[index]) for _ in range(2))
    predicted = backbone.predict_noise(noised, timesteps, text.hidden, index, capture=once)
    expected = backbone.predict_noise(noised, timesteps, text.hidden[index], capture=each)
    assert torch.allclose(predicted, expected, atol=1e-6)
    for one, other in zip(once.stacked(), each.stacked(), strict=True):
        assert one.shape[-2:] == (len(backbone.layers), 4) and torch.allclose(one, other, atol=1e-6)


def test_content_tokens_are_in_the_same_places_for_both_tokenizers(backbone: StableDiffusionXL) -> None:
    first, second = (
        torch.tensor(tokens(TEXTS, padding="max_length", max_length=24).input_ids) for tokens in backbone.tokenizers
    )
    content = backbone.encode_texts(TEXTS).content
    assert torch.equal(first[content], second[content]) and content.sum(-1).tolist() == [8, 3, 0]
    end = content.sum(-1) + 1
    rows = torch.arange(len(TEXTS))
    assert (first[rows, end] == second[rows, end]).all() and (second[rows, end + 1] == 0).all()
    assert backbone.tokenizers[1].pad_token == "!"
    assert backbone.encode_texts(["a red circle " * 20, "a"]).truncated.tolist() == [True, False]


def test_its_resolution_scale_and_limits_are_those_of_its_configs(backbone: StableDiffusionXL, xl: Path) -> None:
    assert backbone.resolution == 32 and backbone.scale == 8 and backbone.max_tokens == 24
    assert backbone.vae.config.scaling_factor == 0.13025 and backbone.layer_widths == [32] * 8
    half = load_diffusion(row(xl, FAMILY, dtype="bfloat16"), CPU)
    assert half.unet.dtype == torch.bfloat16 and half.vae.dtype == torch.float32  # which overflows in float16
    assert half.digest == backbone.digest


def test_a_lazy_backbone_is_described_without_weights(backbone: StableDiffusionXL, xl: Path, opened: list[str]) -> None:
    lazy = load_diffusion(row(xl, FAMILY), CPU, lazy=True)
    assert isinstance(lazy, StableDiffusionXL)
    assert description(lazy) == description(backbone) and lazy.digest == backbone.digest and opened == []
    assert (lazy.text_width, lazy.latent_channels, len(lazy.layers)) == (32 + 16, 4, 8)
    text = lazy.encode_texts(TEXTS)
    assert opened == ["text_encoder", "text_encoder_2"] and torch.equal(
        text.hidden, backbone.encode_texts(TEXTS).hidden
    )
    lazy.open()
    assert sorted(opened) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert description(lazy) == description(backbone)


@pytest.mark.parametrize("method", ["cross-attention", "denoising"])
def test_it_matches_and_draws_heat_maps_as_any_other(xl: Path, method: str) -> None:
    images = list(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8))
    one, many = (Matcher.from_pretrained(xl, method=method, levels=(0.3,), batch_size=size) for size in (1, 64))
    scores = many.score(images, TEXTS[:2])
    assert scores.shape == (2, 2) and scores.std() > 0
    assert torch.allclose(one.score(images, TEXTS[:2]), scores, atol=1e-5)
    found = many.heatmap(images[0], "a green ring")
    assert found.words == ["a", "green", "ring"] and found.maps.shape == (3, 32, 32)


def test_the_stages_run_on_it(params: Params, xl: Path, prepared: Path, tmp_path: Path) -> None:
    """Cache, train and score are the same code for every family."""
    methods = {name: params.methods[name] for name in ("dsd-zero-shot", "dsd", "denoising")}
    chosen = params.model_copy(
        update={
            "backbones": {"xl": row(xl, FAMILY)},
            "backbone": "xl",
            "methods": methods,
            "training": {"dsd": params.training["dsd"]},
        }
    )
    folders, scored = Folders(prepared, tmp_path / "cached", tmp_path / "trained"), tmp_path / "scored"
    session = Session("scenes-com", chosen, folders)
    assert encode(session)["truncated"] == 0
    curve = list(train(session, Training("dsd")))
    assert curve and all(np.isfinite(step["loss"]) for step in curve)
    counts = score(session, scored, split="test")
    assert counts["computed"] == counts["rows"] > 0
    examples, noise = read_examples(prepared / "examples.parquet", "test"), chosen.noise_of("scenes-com")
    evidence = read_evidence(scored, "none", examples, noise, chosen.seed, compares=True)
    assert evidence.attention.shape[1] == len(draws(noise, chosen.seed))
    assert np.isfinite(evidence.attention).all() and np.isfinite(evidence.error).all()


def test_a_zero_prompt_changes_nothing(backbone: StableDiffusionXL, params: Params) -> None:
    text, latents = backbone.encode_texts(TEXTS[:2]), torch.randn(2, 4, 4, 4)
    prompt = AttentionPrompt(48, backbone.layer_widths, 4, rank=2, conditional=True, seed=0)
    results, timesteps, hidden = [], torch.full((2,), 300), text.hidden.clone()
    for bound in (None, prompt.bind(latents)):
        capture = Capture.of(params.evidence, text.content)
        with torch.no_grad():
            backbone.predict_noise(latents, timesteps, hidden, capture=capture, prompt=bound)
        results.append(capture.stacked()[0])
    assert torch.equal(*results)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "of family stable-diffusion, and not"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "lacks the component text_encoder/"),
        (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "lacks the component tokenizer_2/"),
        (lambda folder: (folder / "tokenizer_2" / "vocab.json").unlink(), "tokenizer_2: no tokenizer"),
        (
            lambda folder: shutil.copytree(folder / "text_encoder", folder / "text_encoder_2", dirs_exist_ok=True),
            "text_encoder_2: does not load as CLIPTextModelWithProjection|text_encoder_2: .* tensors missing",
        ),
        (
            lambda folder: edit(folder / "unet" / "config.json", addition_embed_type=None),
            "addition_embed_type None|add_embedding",
        ),
        (
            lambda folder: edit(folder / "unet" / "config.json", addition_time_embed_dim=4),
            "expects 72 values of a text",
        ),
    ],
)
def test_a_defect_is_one_line(damage: Callable[[Path], object], message: str, xl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(xl, tmp_path / "xl"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load(row(folder, FAMILY), CPU)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_each_family_names_the_other(xl: Path, models: Path) -> None:
    with pytest.raises(
        CheckpointError, match="of family stable-diffusion-xl, and not stable-diffusion; correct family"
    ):
        load(row(xl), CPU)
    with pytest.raises(CheckpointError, match="of family stable-diffusion, and not stable-diffusion-xl"):
        load(row(models / "embedded", FAMILY), CPU)
    with pytest.raises(CheckpointError, match="of family clip, and not stable-diffusion-xl"):
        load(row(models / "embedded-clip", FAMILY), CPU)
