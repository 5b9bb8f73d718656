"""Stable Diffusion 1.x and 2.x behind the backbone protocol: ε or v, any size.

Shapes: B batch, C latent channels, R picture side in pixels, r latent side, M text tokens, D text width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dsd.attention import AttentionState, cross_attention_layers, install
from dsd.backbones import lora
from dsd.backbones.checkpoint import DTYPES, component, locate, require
from dsd.errors import CheckpointError
from dsd.images import to_model
from dsd.params import BackboneParams

COMPONENTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


class TextEmbeddings(NamedTuple):
    hidden: Tensor  # [B, M, D]
    content: Tensor  # [B, M] bool: the tokens between begin and end
    truncated: Tensor  # [B] bool: the text is longer than the model's limit and was cut


class StableDiffusion:
    """A frozen latent diffusion model in the diffusers layout."""

    def __init__(self, row: BackboneParams, device: torch.device) -> None:
        folder, self.digest = locate(row)
        require(folder, COMPONENTS)
        self.device, self.dtype = device, DTYPES[row.dtype]
        self.vae: AutoencoderKL = component(AutoencoderKL, folder, "vae", self.dtype).to(device)
        self.unet: UNet2DConditionModel = component(UNet2DConditionModel, folder, "unet", self.dtype).to(device)
        self.text_encoder: CLIPTextModel = component(CLIPTextModel, folder, "text_encoder", self.dtype).to(device)
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
            self.schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{folder}: tokenizer or scheduler does not load: {' '.join(str(error).split())[:160]}"
            ) from None
        self._check_shapes(str(folder))
        if row.lora is not None:
            lora.merge(self.unet, Path(row.lora))
        self.attention: AttentionState = install(self.unet)
        alphas = self.schedule.alphas_cumprod.to(device)
        self._signal, self._noise = alphas.sqrt(), (1 - alphas).sqrt()

    def _check_shapes(self, folder: str) -> None:
        unet, width = self.unet.config, self.text_encoder.config.hidden_size
        if unet.cross_attention_dim != width:
            raise CheckpointError(
                f"{folder}: unet expects texts of width {unet.cross_attention_dim}, text_encoder gives {width}"
            )
        if unet.in_channels != self.vae.config.latent_channels:
            raise CheckpointError(
                f"{folder}: unet expects {unet.in_channels} latent channels, "
                f"vae gives {self.vae.config.latent_channels}"
            )

    @property
    def max_tokens(self) -> int:
        return int(min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings))

    @property
    def resolution(self) -> int:
        """The side in pixels that the U-Net was trained at."""
        return int(self.unet.config.sample_size * self.scale)

    @property
    def scale(self) -> int:
        """Pixels a latent position stands for, along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def schedule_length(self) -> int:
        return int(self.schedule.config.num_train_timesteps)

    @property
    def layers(self) -> list[str]:
        return [name for name, _ in cross_attention_layers(self.unet)]

    @property
    def layer_widths(self) -> list[int]:
        return [int(module.to_k.out_features) for _, module in cross_attention_layers(self.unet)]

    @torch.inference_mode()
    def encode_images(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, R, R, 3] to scaled latent means [B, C, r, r]: the mean, so that an image has one latent."""
        pixels = torch.from_numpy(to_model(pictures)).to(self.device, self.dtype)
        latents = self.vae.encode(pixels).latent_dist.mean
        return (latents * self.vae.config.scaling_factor).float()

    @torch.inference_mode()
    def decode_images(self, latents: Tensor) -> np.ndarray:
        """Scaled latents [B, C, r, r] to uint8 [B, R, R, 3]; noisy ones give a noisy picture."""
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.dtype)).sample.float()
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> TextEmbeddings:
        """Padded to the model's maximum, as in its training. A text over the limit is cut, and `truncated` says so."""
        limit = self.max_tokens
        batch = self.tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        lengths = torch.tensor([len(ids) for ids in self.tokenizer(texts).input_ids])
        hidden = self.text_encoder(batch.input_ids.to(self.device)).last_hidden_state.float()
        # Content: between begin and end. A truncated text has its end put in the last place.
        position = torch.arange(limit)
        content = (position > 0) & (position < lengths.clamp(max=limit)[:, None] - 1)
        return TextEmbeddings(hidden, content, lengths > limit)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = √ᾱ_t z + √(1 − ᾱ_t) ε."""
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].view(shape) * latents + self._noise[timesteps].view(shape) * noise

    def predict_noise(self, noised: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        """ε_θ(z_t, t, y) [B, C, r, r], whatever the checkpoint predicts: v is turned into ε = √ᾱ v + √(1 − ᾱ) z_t."""
        output = self.unet(noised.to(self.dtype), timesteps, hidden.to(self.dtype)).sample.float()
        if self.schedule.config.prediction_type == "epsilon":
            return cast(Tensor, output)
        if self.schedule.config.prediction_type == "v_prediction":
            shape = (-1, 1, 1, 1)
            return self._signal[timesteps].view(shape) * output + self._noise[timesteps].view(shape) * noised
        raise CheckpointError(
            f"scheduler: prediction_type {self.schedule.config.prediction_type!r} is neither epsilon nor v_prediction"
        )
