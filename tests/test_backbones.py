"""Checkpoints: ε and v agree, and every defect of a folder is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsd.backbones import StableDiffusion, load, load_clip, load_diffusion
from dsd.errors import CheckpointError
from dsd.params import BackboneParams, Params
from dsd.scorers.contrastive import cosine

CPU = torch.device("cpu")


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "embedded", tmp_path / "checkpoint"))


def row(folder: Path, family: str = "stable-diffusion") -> BackboneParams:
    return BackboneParams(
        family=family, source=str(folder), revision=None, config=None, prediction=None, lora=None, dtype="float32"
    )


def test_noising_and_prediction_are_those_of_the_scheduler(params: Params) -> None:
    backbone = load_diffusion(params.backbones["embedded"], CPU)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    expected = backbone.schedule.add_noise(latents, noise, timesteps)
    assert torch.allclose(backbone.add_noise(latents, noise, timesteps), expected, atol=1e-6)


def predicting(folder: Path, what: str) -> StableDiffusion:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": what}))
    return load_diffusion(row(folder), CPU)


def test_v_prediction_gives_the_same_noise(folder: Path) -> None:
    """A U-Net that answers v for the same ε leads to the same prediction."""
    epsilon = predicting(folder, "epsilon")
    latents, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps, text = torch.tensor([200, 700]), epsilon.encode_texts(["a red circle", "a blue star"]).hidden
    noised = epsilon.add_noise(latents, noise, timesteps)
    with torch.inference_mode():
        expected = epsilon.predict_noise(noised, timesteps, text)
    velocity = predicting(folder, "v_prediction")
    # v of z_t and ε_θ: v = (ε − √(1 − ᾱ) z_t) / √ᾱ  (Salimans and Ho 2022)
    alpha = velocity.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    answer = (expected - (1 - alpha).sqrt() * noised) / alpha.sqrt()
    velocity.unet.forward = lambda *_: type("Output", (), {"sample": answer})  # type: ignore[method-assign]
    assert torch.allclose(velocity.predict_noise(noised, timesteps, text), expected, atol=1e-5)


def test_missing_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="lacks the component vae/"):
        load(row(folder), CPU)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"only diffusion_pytorch_model\.bin, a pickle"):
        load(row(folder), CPU)


def test_missing_tensor(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"unet: .*conv_in\.weight"):
        load(row(folder), CPU)


def test_wrong_shape(folder: Path) -> None:
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("token_embedding.weight"))
    tensors[name] = tensors[name][:, :8].clone()
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="text_encoder"):
        load(row(folder), CPU)


def test_components_that_do_not_fit_each_other(folder: Path, models: Path) -> None:
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"latent_channels": 3}))
    with pytest.raises(CheckpointError):
        load(row(folder), CPU)


def test_unknown_family_and_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'stable-diffusion'"):
        load(row(folder, "stable-difusion"), CPU)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load(row(folder.parent / "nowhere"), CPU)


def test_families_are_not_mixed_up(models: Path) -> None:
    with pytest.raises(CheckpointError, match="no cross-attention"):
        load_diffusion(row(models / "embedded-clip", "clip"), CPU)
    with pytest.raises(CheckpointError, match="no CLIP"):
        load_clip(row(models / "embedded"), CPU)


def test_clip_cosines_are_those_of_the_model(params: Params) -> None:
    clip = load_clip(params.backbones["embedded-clip"], CPU)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3), dtype=np.uint8)
    texts = ["a red circle", "a blue star"]
    images_BD = clip.model.visual_projection(clip.image_features(pictures))
    texts_BD = clip.model.text_projection(clip.text_features(texts))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    ids = clip.tokenizer(texts, padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        logits = clip.model(
            pixel_values=pixels, input_ids=ids.input_ids, attention_mask=ids.attention_mask
        ).logits_per_image
    found = cosine(images_BD[:, None], texts_BD[None])
    assert torch.allclose(found * clip.model.logit_scale.exp(), logits, atol=1e-5)


def test_a_card_is_no_part_of_the_identity(folder: Path) -> None:
    before = load_diffusion(row(folder), CPU).digest
    (folder / "README.md").write_text("a card")
    assert load_diffusion(row(folder), CPU).digest == before
