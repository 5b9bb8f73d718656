"""Stable Diffusion 1.x and 2.x: ε or v prediction, any size.

Shapes: B batch, C latent channels, R image side in pixels, r latent side, T texts, M text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dsd.config import BackboneParams
from dsd.data.images import to_model
from dsd.errors import CheckpointError, brief
from dsd.models import lora
from dsd.models.attention import AttentionState, Capture, cross_attention_layers, during, install
from dsd.models.checkpoint import (
    DTYPES,
    check_vocabulary,
    component,
    config_errors,
    locate,
    one_file,
    over_limit,
    require,
    token_ids,
    tokenizer,
)
from dsd.models.noise_process import declared, noise_schedule, prediction_of
from dsd.models.prompts import BoundPrompt
from dsd.models.settings import check_settings, component_settings, is_number, read_settings
from dsd.models.single_file import SingleFile, check_marks

# Settings of U-Nets that take more than a latent, a time and a text, with the value of those that do not.
INPUTS = {
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")),
    "attention_type": "default",
}
# Blocks in which the text is taken by `cross_attention_layers` alone, as the processor that `install` sets computes it.
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
AT_ONCE = 2**21  # pixels per batch of the VAE: 512 images of 64², 8 of 512²


class TextEmbeddings(NamedTuple):
    """The embeddings of T texts, each padded to the token limit M."""

    hidden: Tensor  # [T, M, D], with additional rows for other inputs of `predict_noise`
    content: Tensor  # [T, M] bool: the tokens between begin and end
    truncated: Tensor  # [T] bool: the text exceeded the token limit and was cut


class StableDiffusion:
    """A frozen latent diffusion model, in the diffusers layout or as one file.

    Components are opened at their first use, or all by `open`. Images and texts are encoded in float32, whatever the
    dtype of the U-Net, because each is encoded only once.
    """

    family: ClassVar[str] = "stable-diffusion"
    addition: ClassVar[str | None] = None  # the U-Net's additional embedding
    layout: ClassVar[str] = "stable-diffusion"  # what `family_of` returns for folders with these components
    states_scale: ClassVar[bool] = False  # whether the VAE's config must have scaling_factor, else diffusers' default
    architecture: ClassVar[str] = r"stable-diffusion-v[12](-.*)?"  # what ModelSpec calls files of this family
    encoders: ClassVar[Mapping[str, Any]] = {"text_encoder": CLIPTextModel}

    def __init__(self, row: BackboneParams, device: torch.device, attention: str) -> None:
        """Locate the checkpoint and read its settings, but no weights.

        Raises:
            CheckpointError: it is missing, lacks a component, or its scheduler does not load.
        """
        self._row, self._backend, self._lock, self.source = row, attention, RLock(), row.source
        self._file: SingleFile | None = None
        self._folder, self.digest = locate(row)
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in self.encoders]
        components = ("vae", "unet", *self.encoders, *tokenizers, "scheduler")
        require(self._folder, self.layout, components, weights=one_file(row) is None)
        self.device, self.dtype, self.prediction = device, DTYPES[row.dtype], prediction_of(self._folder, row)
        self.attention = AttentionState()
        if file := one_file(row):
            zero_snr = bool(declared(self._folder).get("rescale_betas_zero_snr"))
            check_marks(file, self._folder, self.architecture, prediction=self.prediction, zero_snr=zero_snr)

    def open(self) -> None:
        """Open every component; raise CheckpointError if one does not load or does not match the others."""
        if file := one_file(self._row):
            self._file = SingleFile(file, self._folder)  # read once for all components, then dropped
        # `unet` checks the U-Net against the others, which are opened first: a damaged component is the one to name.
        _ = self.vae, vars(self).get("unet") or self._bare_unet, self.text_encoders, self.tokenizers, self.schedule
        _ = self.unet
        self._file = None

    @cached_property
    def vae(self) -> AutoencoderKL:
        config = component_settings(self._folder, "vae", AutoencoderKL)
        if self.states_scale and config.get("scaling_factor") is None:
            file = self._folder / "vae/config.json"
            raise CheckpointError(f"{file}: no scaling_factor; that of family {self.family} cannot be assumed")
        return self._component(AutoencoderKL, "vae", torch.float32)

    @cached_property
    def text_encoders(self) -> list[Any]:
        return [self._component(kind, name, torch.float32) for name, kind in self.encoders.items()]

    @cached_property
    def tokenizers(self) -> list[CLIPTokenizer]:
        opened = {name: tokenizer(self._folder, name.replace("text_encoder", "tokenizer")) for name in self.encoders}
        for name, tokens in opened.items():
            place = self._folder / name.replace("text_encoder", "tokenizer")
            check_vocabulary(tokens, self._config(name).vocab_size, place, name)
        return list(opened.values())

    @cached_property
    def _bare_unet(self) -> UNet2DConditionModel:
        """The U-Net as stored; `unet` checks and changes it."""
        unet: UNet2DConditionModel = self._component(UNet2DConditionModel, "unet", self.dtype)
        return unet

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        with self._lock:
            if (opened := self.__dict__.get("unet")) is not None:  # another thread was first
                return cast(UNet2DConditionModel, opened)
            unet = self._bare_unet
            del self._bare_unet  # opened again after an error below, which may leave it half changed
            self._check_shapes(unet.config)
            if self._row.lora is not None:
                lora.merge(unet, Path(self._row.lora))
            install(unet, self.attention, self._backend)
            self.__dict__["unet"] = unet
            return unet

    @cached_property
    def schedule(self) -> DDPMScheduler:
        return noise_schedule(self._folder)

    @cached_property
    @torch.inference_mode(False)
    def _alphas(self) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ) of every timestep."""
        alphas = self.schedule.alphas_cumprod.to(self.device)
        return alphas.sqrt(), (1 - alphas).sqrt()

    @torch.inference_mode(False)  # a tensor that is made in this mode cannot be used in training
    def _component(self, kind: Any, name: str, dtype: torch.dtype) -> Any:
        if file := one_file(self._row):
            return (self._file or SingleFile(file, self._folder)).component(kind, name, dtype).to(self.device)
        return component(self._folder, kind, name, dtype).to(self.device)

    def _config(self, name: str) -> Any:
        """Return the configuration of a component including defaults, without its weights."""
        kind = self.encoders.get(name, AutoencoderKL)
        settings = component_settings(self._folder, name, kind)
        with config_errors(self._folder / name):
            if kind is AutoencoderKL:
                return AutoencoderKL.from_config(settings).config
            return kind.config_class.from_pretrained(self._folder / name)

    @cached_property
    def _skeleton(self) -> UNet2DConditionModel:
        """The U-Net if it is open, else one without weights, for attributes that depend on the configuration alone."""
        if "unet" in self.__dict__:
            return self.unet
        return unet_skeleton(read_settings(self._folder / "unet/config.json"), str(self._folder))

    def _check_shapes(self, unet: Any) -> None:
        """Check that the other components match this configuration of the U-Net."""
        folder, width = self._folder, sum(self._config(name).hidden_size for name in self.encoders)
        if unet.cross_attention_dim != width:
            expected, encoders = unet.cross_attention_dim, " and ".join(self.encoders)
            raise CheckpointError(f"{folder}: unet expects texts of width {expected}, {encoders} give {width}")
        if unet.in_channels != (channels := self._config("vae").latent_channels):
            raise CheckpointError(f"{folder}: unet expects {unet.in_channels} latent channels, vae gives {channels}")
        if unet.out_channels != unet.in_channels:
            problem = f"unet has {unet.out_channels} output channels for {unet.in_channels} of the latent"
            raise CheckpointError(f"{folder}: {problem}; a learned variance is not supported")
        for key, plain in {**INPUTS, "addition_embed_type": self.addition}.items():
            if (value := getattr(unet, key)) != plain:
                problem = f"{key} {value!r}: must be {plain!r} for family {self.family}"
                raise CheckpointError(f"{folder}/unet/config.json: {problem}; no other input can be given")
        check_attention(unet, f"{folder}/unet/config.json")

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer that content tokens refer to."""
        return self.tokenizers[0]

    @cached_property
    def max_tokens(self) -> int:
        """The token limit of a text, including begin and end."""
        limits = [self._config(name).max_position_embeddings for name in self.encoders]
        return int(min(*limits, *(tokens.model_max_length for tokens in self.tokenizers)))

    @property
    def resolution(self) -> int:
        """The side in pixels that the U-Net was trained at."""
        size = self._skeleton.config.sample_size
        height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        if type(height) is not int or height != width or height < 1:
            raise CheckpointError(f"{self._folder}/unet/config.json: sample_size {size!r}: must be n or [n, n]")
        return height * self.scale

    @cached_property
    def scale(self) -> int:
        """Pixels per latent position, along a side."""
        return int(2 ** (len(self._config("vae").block_out_channels) - 1))

    @property
    def schedule_length(self) -> int:
        """The number of timesteps of the noise process."""
        return int(self.schedule.config.num_train_timesteps)

    @property
    def layers(self) -> list[str]:
        """Names of the cross-attention layers, in the order of the forward pass."""
        return [name for name, _ in cross_attention_layers(self._skeleton)]

    @cached_property
    def _layer_count(self) -> int:
        return len(self.layers)

    @property
    def layer_widths(self) -> list[int]:
        """The width of the keys of each of the `layers`, over all heads."""
        return [int(module.to_k.out_features) for _, module in cross_attention_layers(self._skeleton)]

    @property
    def text_width(self) -> int:
        return int(self._skeleton.config.cross_attention_dim)

    @property
    def latent_channels(self) -> int:
        return int(self._skeleton.config.in_channels)

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """Return the scaled latent means [B, C, r, r] of uint8 images [B, R, R, 3]; nothing is sampled."""
        size = max(1, AT_ONCE // images.shape[1] ** 2)
        means = []
        for first in range(0, len(images), size):
            pixels = torch.from_numpy(to_model(images[first : first + size])).to(self.device)
            means.append(self.vae.encode(pixels).latent_dist.mean)
        shift, scale = self._latent_statistics
        return (torch.cat(means) - shift) * scale

    @torch.inference_mode()
    def decode_images(self, latents: Tensor) -> np.ndarray:
        """Decode scaled latents [B, C, r, r], which may be noisy, to uint8 images [B, R, R, 3]."""
        shift, scale = self._latent_statistics
        pixels = self.vae.decode(latents / scale + shift).sample
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @property
    def text_digest(self) -> str:
        """The digest of everything that text embeddings, and all that is computed with them, depend on."""
        return self.digest

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> TextEmbeddings:
        """Encode texts, padded to the model's maximum as in its training; those over the limit are cut."""
        limit = self.max_tokens
        padded = [
            tokens(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
            for tokens in self.tokenizers
        ]
        counts = [[len(ids) for ids in token_ids(tokens, texts)] for tokens in self.tokenizers]
        lengths = torch.tensor(counts, device="cpu")
        position = torch.arange(limit, device="cpu")  # a truncated text has its end token in the last position
        content = (position > 0) & (position < lengths[0].clamp(max=limit)[:, None] - 1)
        hidden = self._hidden([ids.to(self.device) for ids in padded])
        return TextEmbeddings(hidden, content, (lengths > limit).any(0))

    def text_ids(self, texts: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return the token ids of each text as it is encoded; texts with the same ids are one text to the model."""
        limit = self.max_tokens
        by_encoder = [tokens(list(texts), truncation=True, max_length=limit).input_ids for tokens in self.tokenizers]
        return [tuple(map(tuple, ids)) for ids in zip(*by_encoder, strict=True)]

    def truncated(self, texts: Collection[str]) -> int:
        """Return the number of texts over the token limit, without encoding them."""
        return len({text for tokens in self.tokenizers for text, _ in over_limit(tokens, texts, self.max_tokens)})

    def _hidden(self, ids: Sequence[Tensor]) -> Tensor:
        """Return `TextEmbeddings.hidden`, given the ids [B, M] of each text encoder."""
        return cast(Tensor, self.text_encoders[0](ids[0]).last_hidden_state)

    @cached_property
    def _latent_statistics(self) -> tuple[Any, Any]:
        """Shift and scale of latents, numbers or [1, C, 1, 1], as diffusers' pipelines apply them.

        Either one scaling_factor with an optional shift_factor, or for each channel latents_mean and latents_std, to
        which the scaling_factor applies as well.
        """
        config, place = self.vae.config, f"{self._folder}/vae/config.json"
        scaling, shift = config.scaling_factor, config.shift_factor or 0.0
        mean, deviation = config.latents_mean, config.latents_std
        if not is_number(scaling) or not scaling > 0:
            raise CheckpointError(f"{place}: scaling_factor {scaling!r}: must be a number above 0")
        if not is_number(shift):
            raise CheckpointError(f"{place}: shift_factor {shift!r}: must be a number")
        if (mean is None) != (deviation is None) or (mean is not None and shift):
            raise CheckpointError(f"{place}: latents_mean and latents_std belong together, without shift_factor")
        if mean is None:
            return shift, scaling
        for values in (mean, deviation):
            if not isinstance(values, list) or len(values) != config.latent_channels or not all(map(is_number, values)):
                problem = f"must be {config.latent_channels} numbers"
                raise CheckpointError(f"{place}: latents_mean and latents_std: {problem}")
        if min(deviation) <= 0:
            raise CheckpointError(f"{place}: latents_std {deviation}: must be above 0")
        mean_C, deviation_C = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (mean, deviation))
        return mean_C.view(1, -1, 1, 1), (scaling / deviation_C).view(1, -1, 1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return z_t = √ᾱ_t z + √(1 − ᾱ_t) ε."""
        (signal, sigma), shape = self._alphas, (-1, 1, 1, 1)
        return signal[timesteps].view(shape) * latents + sigma[timesteps].view(shape) * noise

    def predict_noise(
        self,
        noised: Tensor,
        timesteps: Tensor,
        hidden: Tensor,
        text_index: Tensor | None = None,
        *,
        capture: Capture | None = None,
        prompt: BoundPrompt | None = None,
    ) -> Tensor:
        """Return ε_θ(z_t, t, y) [B, C, r, r]; a prediction of v is converted to ε = √ᾱ v + √(1 − ᾱ) z_t.

        Args:
            noised: [B, C, r, r]; timesteps: [B].
            hidden: [B, M, D] the text of each row; or with text_index [B], the unique texts [T, M, D], whose keys and
                values are then computed once.
            capture: records the cross-attention of this pass.
            prompt: bound to the latents of this batch.
        """
        if prompt is not None and prompt.layers != self._layer_count:
            problem = f"the attention prompt is of {prompt.layers} layers, the U-Net of {self._layer_count}"
            raise CheckpointError(f"{self.source}: {problem}; another backbone's, or damaged")
        with during(self.attention, capture, prompt, text_index):
            output = self._output(noised.to(self.dtype), timesteps, hidden.to(self.dtype), text_index).float()
        if self.prediction == "epsilon":
            return output
        (signal, sigma), shape = self._alphas, (-1, 1, 1, 1)
        return signal[timesteps].view(shape) * output + sigma[timesteps].view(shape) * noised

    def _output(self, noised: Tensor, timesteps: Tensor, hidden: Tensor, text_index: Tensor | None) -> Tensor:
        return cast(Tensor, self.unet(noised, timesteps, hidden).sample)


def check_attention(unet: Any, file: str) -> None:
    """Check that every layer of this configuration of a U-Net that takes the text is one that is captured."""
    for key in ("only_cross_attention", "dual_cross_attention"):
        value = getattr(unet, key)
        if any(value) if isinstance(value, list | tuple) else value:
            raise CheckpointError(f"{file}: {key} {value!r}: must be false; other cross-attention is not supported")
    for key, supported in BLOCKS.items():
        value = getattr(unet, key)
        for block in value if isinstance(value, list | tuple) else [value]:
            if block not in supported:
                names = ", ".join(map(str, supported))
                raise CheckpointError(f"{file}: {key} has {block!r}: must be of {names}; others are not supported")
    blocks = (*unet.down_block_types, unet.mid_block_type, *unet.up_block_types)
    if not any("CrossAttn" in str(block) for block in blocks):
        raise CheckpointError(f"{file}: no block has cross-attention, so the text would not matter")


def unet_skeleton(config: Mapping[str, Any], source: str) -> UNet2DConditionModel:
    """Build a U-Net without weights; raise CheckpointError if the configuration is not one of a U-Net."""
    check_settings(config, UNet2DConditionModel, f"{source}/unet/config.json")
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: unet/config.json is no valid U-Net ({brief(error)})") from None


BACKBONES = {StableDiffusion.family: StableDiffusion}
