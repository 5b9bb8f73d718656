"""The configurations of published checkpoints, and checkpoints of them with random weights.

Speed and memory depend on the configuration alone, so nothing has to be downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from dsd.config import BackboneParams

Config = Mapping[str, Any]
TOKENIZER = Path(__file__).parents[2] / "models" / "embedded" / "tokenizer"  # ids below every vocabulary size here
TOKENS, VOCABULARY = 77, 49408
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@dataclass(frozen=True)
class Published:
    """The config files of a checkpoint, without keys that have the libraries' default value."""

    family: str
    unet: Config
    vae: Config
    text_encoders: tuple[Config, ...]
    scheduler: Config


UNET_2: Config = dict(
    sample_size=64, block_out_channels=[320, 640, 1280, 1280], attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024, use_linear_projection=True,
)  # fmt: skip
VAE_2: Config = dict(
    block_out_channels=[128, 256, 512, 512], latent_channels=4, layers_per_block=2, norm_num_groups=32, sample_size=768,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
)  # fmt: skip
TEXT_ENCODER_2: Config = dict(  # 23 of OpenCLIP's 24 layers: the penultimate is the last
    vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    max_position_embeddings=TOKENS, hidden_act="gelu", projection_dim=512,
    bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
NOISE: Config = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None,
}  # fmt: skip

PUBLISHED = {
    "sd2-base": Published(
        "stable-diffusion", UNET_2, VAE_2, (TEXT_ENCODER_2,), {"_class_name": "PNDMScheduler", **NOISE}
    ),
    "sd2.1-v": Published(
        "stable-diffusion",
        {**UNET_2, "sample_size": 96, "upcast_attention": True},
        VAE_2,
        (TEXT_ENCODER_2,),
        {"_class_name": "DDIMScheduler", **NOISE, "prediction_type": "v_prediction"},
    ),
    "sdxl": Published(
        "stable-diffusion-xl",
        dict(
            sample_size=128, block_out_channels=[320, 640, 1280], attention_head_dim=[5, 10, 20],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ),
        {**VAE_2, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        (
            dict(vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, max_position_embeddings=TOKENS, hidden_act="quick_gelu", projection_dim=768,
                 bos_token_id=0, eos_token_id=2, pad_token_id=1),
            dict(vocab_size=VOCABULARY, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                 num_attention_heads=20, max_position_embeddings=TOKENS, hidden_act="gelu", projection_dim=1280,
                 bos_token_id=0, eos_token_id=2, pad_token_id=1),
        ),
        {"_class_name": "EulerDiscreteScheduler", **NOISE, "interpolation_type": "linear"},
    ),
}  # fmt: skip


def tiny(model: Published) -> Published:
    """Return the same architecture at the smallest size, for runs that only check the code."""
    blocks = len(model.unet["block_out_channels"])
    width, pooled = 16, 16
    unet = {
        **model.unet,
        "sample_size": 8,
        "block_out_channels": [16, 16, 32, 32][:blocks],
        "attention_head_dim": [2, 2, 4, 4][:blocks],
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "cross_attention_dim": width * len(model.text_encoders),
    }
    if "addition_embed_type" in unet:
        unet |= {"transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8}
        unet["projection_class_embeddings_input_dim"] = 6 * 8 + pooled
    vae = {**model.vae, "block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    small = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoders = tuple({**e, **small, "vocab_size": 1024, "projection_dim": pooled} for e in model.text_encoders)
    return replace(model, unet=unet, vae=vae, text_encoders=encoders)


def row(model: Published, folder: Path) -> BackboneParams:
    """Return the row of `backbones` that opens the checkpoint in a folder in bfloat16."""
    return BackboneParams(family=model.family, source=str(folder), revision=None, lora=None, dtype="bfloat16")


def write(model: Published, folder: Path, device: torch.device) -> None:
    """Write a checkpoint with random weights in bfloat16, drawn on the device, in the layout of diffusers."""
    disable_progress_bar()
    torch.manual_seed(0)
    with device:
        unet, vae = UNet2DConditionModel(**model.unet), AutoencoderKL(**model.vae)
        encoders = {
            name: ENCODERS[name](CLIPTextConfig(**config))
            for name, config in zip(ENCODERS, model.text_encoders, strict=False)
        }
    for name, part in {"unet": unet, "vae": vae, **encoders}.items():
        part.bfloat16().cpu().save_pretrained(folder / name)
    for name in encoders:
        tokens = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=TOKENS)
        tokens.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(model.scheduler)))
