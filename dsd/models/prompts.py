"""The attention prompt: low-rank additions to W^k and W^v of every cross-attention layer (eq. 5).

p(x) = p + π with π = m_θ(x). A full matrix per image is too large for Stable Diffusion, so
p_layer(x) = U diag(1 + m_θ(x)) V with V [rank, D] and U [inner, rank]; m_θ is a linear map of the pooled latent.
Without an image condition p = U V.

Shapes: B batch, M text tokens, D text width, L layers, R rank, C pooled latent (mean and deviation by channel).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dsd.errors import CheckpointError
from dsd.models.weights import check_tensors
from dsd.store import strict_json, write_atomic

PROMPT = "prompt.safetensors"  # written by the stage `train` into a method's folder
Learned = TypeVar("Learned", bound=nn.Module)


def save_learned(module: nn.Module, path: Path, backbone: str, **shape: Any) -> None:
    """Write a module's weights, its shape and the digest of its backbone to a file in safetensors, atomically."""
    metadata = {"dsd": json.dumps({"backbone": backbone, **shape})}
    write_atomic(path, save({k: v.contiguous() for k, v in module.state_dict().items()}, metadata))


def load_learned(build: Callable[..., Learned], path: Path, backbone: str, kind: str) -> Learned:
    """Build a module of the shape in the file and load the file's weights, frozen; `kind` names it in errors.

    Raises:
        CheckpointError: the file is missing, of another kind, or belongs to another backbone.
    """
    try:
        with safe_open(path, "pt") as file:
            shape = dict(strict_json((file.metadata() or {})["dsd"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        owner = shape.pop("backbone")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; train {kind} with the stage `train`") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):  # of another format, or with other metadata
        raise CheckpointError(f"{path}: not {kind} in safetensors") from None
    if owner != backbone:
        raise CheckpointError(f"{path}: belongs to backbone {owner}, not to {backbone}")
    check_tensors(tensors, str(path))
    try:
        module = build(**shape)
        module.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError):  # of another shape, with other names
        raise CheckpointError(f"{path}: not {kind}; another kind of tensors") from None
    return module.eval().requires_grad_(False)


def pooled_latent(latents_BCrr: Tensor) -> Tensor:
    """Return mean and standard deviation [B, 2C] of every channel of latents [B, C, r, r]."""
    return torch.cat([latents_BCrr.mean((-2, -1)), latents_BCrr.std((-2, -1))], -1)


class AttentionPrompt(nn.Module):
    """The weights of p; U starts at zero, so that step 0 is the zero-shot score."""

    def __init__(
        self, text_width: int, inner: list[int], latent_channels: int, rank: int, conditional: bool, seed: int
    ) -> None:
        super().__init__()
        self.conditional = conditional
        generator = torch.Generator("cpu").manual_seed(seed)
        plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults of the process
        # Keys and values of a layer share one stacked matrix: index 0 is k, index 1 is v.
        self.down = nn.Parameter(
            torch.randn(len(inner), 2, rank, text_width, generator=generator, **plain) * text_width**-0.5
        )
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(2, width, rank, **plain)) for width in inner])
        if conditional:
            self.map = nn.Parameter(torch.zeros(len(inner), 2, rank, 2 * latent_channels, **plain))
            nn.init.normal_(self.map, std=0.1 * (2 * latent_channels) ** -0.5, generator=generator)

    def forward(self, layer: int, text_BMD: Tensor, pooled_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to keys and values of a layer, [B, M, inner] each."""
        added = []
        for side in range(2):
            core_BMR = text_BMD @ self.down[layer, side].T
            if self.conditional:
                core_BMR = core_BMR * (1 + pooled_BC @ self.map[layer, side].T)[:, None, :]
            added.append(core_BMR @ self.up[layer][side].T)
        return added[0], added[1]

    def bind(self, latents_BCrr: Tensor) -> BoundPrompt:
        """The prompt for the images with these latents."""
        return BoundPrompt(self, pooled_latent(latents_BCrr))

    def save(self, path: Path, backbone: str) -> None:
        shape = dict(
            text_width=self.down.shape[-1],
            inner=[u.shape[1] for u in self.up],
            latent_channels=self.map.shape[-1] // 2 if self.conditional else 0,
            rank=self.down.shape[2],
            conditional=self.conditional,
        )
        save_learned(self, path, backbone, **shape)

    @classmethod
    def load(cls, path: Path, backbone: str) -> AttentionPrompt:
        """Load a prompt; raise CheckpointError if the file is not a prompt or belongs to another backbone."""
        return load_learned(partial(cls, seed=0), path, backbone, "an attention prompt")


@dataclass(frozen=True)
class BoundPrompt:
    """An attention prompt for the images of a batch, with their pooled latents [B, C]."""

    prompt: AttentionPrompt
    pooled_BC: Tensor

    @property
    def layers(self) -> int:
        return len(self.prompt.up)

    def __call__(self, layer: int, text_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to keys and values of a layer, [B, M, inner] each, given the text of each image."""
        return self.prompt(layer, text_BMD, self.pooled_BC)
