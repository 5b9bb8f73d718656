"""Backbones: one interface to all model families; one file per family."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch

from dsd.config import BackboneParams
from dsd.errors import CheckpointError, unknown
from dsd.models.checkpoint import device_of
from dsd.models.clip import Clip
from dsd.models.open_clip import OpenClip
from dsd.models.sdxl import StableDiffusionXL
from dsd.models.stable_diffusion import StableDiffusion, TextEmbeddings

FAMILIES: dict[str, type[StableDiffusion] | type[Clip]] = {}  # by name, from BACKBONES of each module of this package

for _module in iter_modules(__path__):
    FAMILIES.update(getattr(import_module(f"{__name__}.{_module.name}"), "BACKBONES", {}))

__all__ = [
    "FAMILIES",
    "Clip",
    "OpenClip",
    "StableDiffusion",
    "StableDiffusionXL",
    "TextEmbeddings",
    "device_of",
    "load",
    "load_clip",
    "load_diffusion",
]


def load(
    row: BackboneParams, device: torch.device, attention: str = "sdpa", *, lazy: bool = False
) -> StableDiffusion | Clip:
    """Open the checkpoint of a `backbones` row; if lazy, each component is opened at its first use.

    `attention` is the backend of `runtime.attention`, which changes no result. Every defect raises CheckpointError.
    """
    if row.family not in FAMILIES:
        raise CheckpointError(unknown("family", row.family, FAMILIES))
    kind = FAMILIES[row.family]
    if issubclass(kind, StableDiffusion):
        backbone: StableDiffusion | Clip = kind(row, device, attention)
    else:
        for key in ("config", "prediction", "lora"):
            if (value := getattr(row, key)) is not None:
                problem = f"takes no {key}, found {value}; only diffusion does"
                raise CheckpointError(f"{row.source}: family {row.family} {problem}")
        if Path(row.source).is_file():
            raise CheckpointError(f"{row.source}: a file, but family {row.family} is opened by its folder")
        backbone = kind(row, device)
    if not lazy:
        backbone.open()
    return backbone


def load_diffusion(
    row: BackboneParams, device: torch.device, attention: str = "sdpa", *, lazy: bool = False
) -> StableDiffusion:
    backbone = load(row, device, attention, lazy=lazy)
    if not isinstance(backbone, StableDiffusion):
        problem = "has no cross-attention; this method needs a diffusion model"
        raise CheckpointError(f"{row.source}: family {row.family} {problem}")
    return backbone


def load_clip(row: BackboneParams, device: torch.device, *, lazy: bool = False) -> Clip:
    backbone = load(row, device, lazy=lazy)
    if not isinstance(backbone, Clip):
        raise CheckpointError(f"{row.source}: family {row.family} is no CLIP; the contrastive scorer needs one")
    return backbone
