"""The configurations of published models, with random weights: gigabytes, for tests that take minutes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.gpu.published import PUBLISHED, VOCABULARY
from tests.tiny import save_tokenizer

PUBLISHED_2 = PUBLISHED["sd2-base"]
UNET, VAE, (TEXT_ENCODER,) = PUBLISHED_2.unet, PUBLISHED_2.vae, PUBLISHED_2.text_encoders


def stable_diffusion_2(folder: Path) -> None:
    """Stable Diffusion 2 base: 865 million parameters of U-Net, in float16 as it is published; 2.6 gigabytes."""
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).half().save_pretrained(folder / "unet")
    AutoencoderKL(**VAE).half().save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).half().save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer", "!", 77, VOCABULARY)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(PUBLISHED_2.scheduler)))
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    index = {part: ["diffusers", part] for part in parts}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
