"""Backbones: one interface to all model families; one file per family."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

import torch

from dsd.config import BackboneParams
from dsd.config.base import constants
from dsd.errors import CheckpointError, unknown
from dsd.models.checkpoint import device_of

if TYPE_CHECKING:
    from dsd.models.clip import Clip
    from dsd.models.stable_diffusion import StableDiffusion

__all__ = ["device_of", "families", "family", "is_clip", "load", "load_clip", "load_diffusion"]


@cache
def families() -> dict[str, type[StableDiffusion] | type[Clip]]:
    """The families by name, from BACKBONES of each module of this package.

    They are imported at the first call: diffusers and transformers are slow to import.
    """
    return {name: kind for table in constants(__name__, __path__, "BACKBONES") for name, kind in table.items()}


def family(name: str) -> type[StableDiffusion] | type[Clip]:
    """Return the class of a family; raise CheckpointError if there is none of this name."""
    if name not in families():
        raise CheckpointError(unknown("family", name, families()))
    return families()[name]


def is_clip(name: str) -> bool:
    """Return whether a family is a CLIP, not a diffusion model; raise CheckpointError if there is no such family."""
    from dsd.models.clip import Clip

    return issubclass(family(name), Clip)


def load(
    row: BackboneParams, device: torch.device, attention: str = "sdpa", *, lazy: bool = False
) -> StableDiffusion | Clip:
    """Open the checkpoint of a `backbones` row; if lazy, each component is opened at its first use.

    `attention` is the backend of `runtime.attention`, which changes no result. Every defect raises CheckpointError.
    """
    from dsd.models.stable_diffusion import StableDiffusion

    kind = family(row.family)
    if issubclass(kind, StableDiffusion):
        backbone: StableDiffusion | Clip = kind(row, device, attention)
    else:
        for key in ("config", "prediction", "lora"):
            if (value := getattr(row, key)) is not None:
                problem = f"takes no {key}, found {value}; only diffusion does"
                raise CheckpointError(f"{row.source}: family {row.family} {problem}")
        if os.path.isfile(row.source):
            raise CheckpointError(f"{row.source}: a file, but family {row.family} is opened by its folder")
        backbone = kind(row, device)
    if not lazy:
        backbone.open()
    return backbone


def load_diffusion(
    row: BackboneParams, device: torch.device, attention: str = "sdpa", *, lazy: bool = False
) -> StableDiffusion:
    """`load` a diffusion model; raise CheckpointError if the row is of another family."""
    from dsd.models.stable_diffusion import StableDiffusion

    backbone = load(row, device, attention, lazy=lazy)
    if not isinstance(backbone, StableDiffusion):
        problem = "has no cross-attention; this method needs a diffusion model"
        raise CheckpointError(f"{row.source}: family {row.family} {problem}")
    return backbone


def load_clip(row: BackboneParams, device: torch.device, *, lazy: bool = False) -> Clip:
    """`load` a CLIP; raise CheckpointError if the row is of another family."""
    from dsd.models.clip import Clip

    backbone = load(row, device, lazy=lazy)
    if not isinstance(backbone, Clip):
        raise CheckpointError(f"{row.source}: family {row.family} is no CLIP; the contrastive scorer needs one")
    return backbone
