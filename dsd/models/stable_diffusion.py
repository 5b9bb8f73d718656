"""Stable Diffusion 1.x and 2.x behind the backbone protocol: ε or v, any size.

Shapes: B batch, C latent channels, R picture side in pixels, r latent side, T texts, M text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dsd.config import BackboneParams
from dsd.data.images import to_model
from dsd.errors import CheckpointError
from dsd.models import lora
from dsd.models.attention import AttentionState, cross_attention_layers, install
from dsd.models.checkpoint import DTYPES, component, locate, longer, one_file, prediction_of, require, tokenizer
from dsd.models.single_file import SingleFile

AT_ONCE = 2**21  # pixels of the pictures that pass the VAE together: 512 of 64², 8 of 512²


class TextEmbeddings(NamedTuple):
    hidden: Tensor  # [B, M, D], and whatever else of a text `predict_noise` takes, in further rows
    content: Tensor  # [B, M] bool: the tokens between begin and end
    truncated: Tensor  # [B] bool: the text is longer than the model's limit and was cut


class StableDiffusion:
    """A frozen latent diffusion model, in the diffusers layout or as one file.

    Images and texts are encoded in float32, whatever the arithmetic of the U-Net: each is encoded once.
    """

    family: ClassVar[str] = "stable-diffusion"
    encoders: ClassVar[Mapping[str, Any]] = {"text_encoder": CLIPTextModel}

    def __init__(self, row: BackboneParams, device: torch.device, attention: str) -> None:
        folder, self.digest = locate(row)
        file, tokenizers = one_file(row), [name.replace("text_encoder", "tokenizer") for name in self.encoders]
        components = ("vae", "unet", *self.encoders, *tokenizers, "scheduler")
        require(folder, self.family, components, weights=file is None)
        self.device, self.dtype, self.prediction = device, DTYPES[row.dtype], prediction_of(folder, row)
        part = partial(component, folder) if file is None else SingleFile(file, folder).component
        self.vae: AutoencoderKL = part(AutoencoderKL, "vae", torch.float32).to(device)
        self.unet: UNet2DConditionModel = part(UNet2DConditionModel, "unet", self.dtype).to(device)
        self.text_encoders = [part(kind, name, torch.float32).to(device) for name, kind in self.encoders.items()]
        self.tokenizers = [tokenizer(folder, name) for name in tokenizers]
        try:
            self.schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{folder}/scheduler: does not load: {reason}") from None
        self._check_shapes(str(folder))
        if row.lora is not None:
            lora.merge(self.unet, Path(row.lora))
        self.attention: AttentionState = install(self.unet, attention)
        alphas = self.schedule.alphas_cumprod.to(device)
        self._signal, self._noise = alphas.sqrt(), (1 - alphas).sqrt()

    def _check_shapes(self, folder: str) -> None:
        unet, width = self.unet.config, sum(encoder.config.hidden_size for encoder in self.text_encoders)
        if unet.cross_attention_dim != width:
            raise CheckpointError(
                f"{folder}: unet expects texts of width {unet.cross_attention_dim}, {' and '.join(self.encoders)} "
                f"give {width}"
            )
        if unet.in_channels != self.vae.config.latent_channels:
            raise CheckpointError(
                f"{folder}: unet expects {unet.in_channels} latent channels, "
                f"vae gives {self.vae.config.latent_channels}"
            )

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The one by whose tokens words are told."""
        return self.tokenizers[0]

    @property
    def max_tokens(self) -> int:
        limits = [encoder.config.max_position_embeddings for encoder in self.text_encoders]
        return int(min(*limits, *(tokens.model_max_length for tokens in self.tokenizers)))

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
        size = max(1, AT_ONCE // pictures.shape[1] ** 2)
        means = []
        for first in range(0, len(pictures), size):
            pixels = torch.from_numpy(to_model(pictures[first : first + size])).to(self.device)
            means.append(self.vae.encode(pixels).latent_dist.mean)
        return torch.cat(means) * self.vae.config.scaling_factor

    @torch.inference_mode()
    def decode_images(self, latents: Tensor) -> np.ndarray:
        """Scaled latents [B, C, r, r] to uint8 [B, R, R, 3]; noisy ones give a noisy picture."""
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> TextEmbeddings:
        """Padded to the model's maximum, as in its training. A text over the limit is cut, and `truncated` says so."""
        limit = self.max_tokens
        padded = [
            tokens(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
            for tokens in self.tokenizers
        ]
        lengths = torch.tensor([[len(ids) for ids in tokens(texts).input_ids] for tokens in self.tokenizers])
        # Content: between begin and end. A truncated text has its end put in the last place.
        position = torch.arange(limit)
        content = (position > 0) & (position < lengths[0].clamp(max=limit)[:, None] - 1)
        hidden = self._hidden([ids.to(self.device) for ids in padded])
        return TextEmbeddings(hidden, content, (lengths > limit).any(0))

    def truncated(self, texts: Collection[str]) -> int:
        """How many of the texts are longer than the limit; none is encoded."""
        return len({text for tokens in self.tokenizers for text, _ in longer(tokens, texts, self.max_tokens)})

    def _hidden(self, ids: Sequence[Tensor]) -> Tensor:
        """Of the ids [B, M] of each text encoder, what `predict_noise` takes of a text."""
        return cast(Tensor, self.text_encoders[0](ids[0]).last_hidden_state)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = √ᾱ_t z + √(1 − ᾱ_t) ε."""
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].view(shape) * latents + self._noise[timesteps].view(shape) * noise

    def predict_noise(self, noised: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        """ε_θ(z_t, t, y) [B, C, r, r], whatever the checkpoint predicts: v is turned into ε = √ᾱ v + √(1 − ᾱ) z_t."""
        output = self._output(noised.to(self.dtype), timesteps, hidden.to(self.dtype)).float()
        if self.prediction == "epsilon":
            return output
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].view(shape) * output + self._noise[timesteps].view(shape) * noised

    def _output(self, noised: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.unet(noised, timesteps, hidden).sample)
