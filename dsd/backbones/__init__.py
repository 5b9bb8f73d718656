"""Backbones: one small interface over model families, one row of the table a family."""

from __future__ import annotations

import torch

from dsd.backbones.checkpoint import device_of
from dsd.backbones.clip import Clip
from dsd.backbones.stable_diffusion import StableDiffusion, TextEmbeddings
from dsd.errors import CheckpointError, unknown
from dsd.params import BackboneParams

FAMILIES: dict[str, type[StableDiffusion] | type[Clip]] = {"stable-diffusion": StableDiffusion, "clip": Clip}

__all__ = [
    "FAMILIES",
    "Clip",
    "StableDiffusion",
    "TextEmbeddings",
    "device_of",
    "load",
    "load_clip",
    "load_diffusion",
]


def load(row: BackboneParams, device: torch.device) -> StableDiffusion | Clip:
    """Opens the checkpoint of a `backbones` row; raises CheckpointError with one line."""
    if row.family not in FAMILIES:
        raise CheckpointError(unknown("family", row.family, FAMILIES))
    if row.lora is not None and FAMILIES[row.family] is not StableDiffusion:
        raise CheckpointError(f"{row.source}: family {row.family} takes no lora, found {row.lora}; only diffusion does")
    return FAMILIES[row.family](row, device)


def load_diffusion(row: BackboneParams, device: torch.device) -> StableDiffusion:
    backbone = load(row, device)
    if not isinstance(backbone, StableDiffusion):
        raise CheckpointError(
            f"{row.source}: family {row.family} has no cross-attention; this method needs a diffusion model"
        )
    return backbone


def load_clip(row: BackboneParams, device: torch.device) -> Clip:
    backbone = load(row, device)
    if not isinstance(backbone, Clip):
        raise CheckpointError(f"{row.source}: family {row.family} is no CLIP; the contrastive scorer needs one")
    return backbone
