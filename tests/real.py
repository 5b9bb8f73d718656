"""The configurations of published models, with random weights: gigabytes, for tests that take minutes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import save_tokenizer

VOCABULARY = 49408
UNET = dict(
    sample_size=64, block_out_channels=[320, 640, 1280, 1280], attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024, use_linear_projection=True,
)  # fmt: skip
VAE = dict(
    block_out_channels=[128, 256, 512, 512], latent_channels=4, layers_per_block=2, norm_num_groups=32, sample_size=768,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
)  # fmt: skip
TEXT_ENCODER = dict(  # 23 of OpenCLIP's 24 layers: the penultimate is the last
    vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    max_position_embeddings=77, hidden_act="gelu", projection_dim=512, bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip


def stable_diffusion_2(folder: Path) -> None:
    """Stable Diffusion 2 base: 865 million parameters of U-Net, in float16 as it is published; 2.6 gigabytes."""
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).half().save_pretrained(folder / "unet")
    AutoencoderKL(**VAE).half().save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).half().save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer", "!", 77, VOCABULARY)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    index = {part: ["diffusers", part] for part in parts}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
