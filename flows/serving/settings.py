"""The settings that a version is served with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dsd.config import (
    BackboneParams,
    Bounds,
    CrossAttentionMethod,
    DenoisingMethod,
    EvidenceParams,
    ImageParams,
    NoiseParams,
    Params,
    RuntimeParams,
)
from flows import absolute

if TYPE_CHECKING:
    from dsd.matcher import Matcher


class Settings(Bounds):
    """The settings that a version was measured with, without its prompt, and the bounds of a request."""

    seed: int
    runtime: RuntimeParams
    backbone: BackboneParams
    images: ImageParams
    noise: NoiseParams
    evidence: EvidenceParams
    method: Annotated[CrossAttentionMethod | DenoisingMethod, Field(discriminator="scorer")]

    @classmethod
    def of(cls, params: Params, digest: str) -> Settings:
        """The settings of `serving.method` for the checkpoint with this digest; any other is refused when opened."""
        serving, row = params.serving, params.backbones[params.backbone]
        method = params.methods[serving.method]
        assert method.scorer == "cross-attention" or method.scorer == "denoising"  # `Params` checks it
        noise = params.noise if serving.prompt is None else params.noise_of(serving.prompt)
        pooling = method.reads_pooling or "logsumexp"
        return cls(
            seed=params.seed,
            runtime=params.runtime,
            backbone=absolute(row).model_copy(update={"digest": digest}),
            images=params.images,
            noise=noise.model_copy(update={"levels": method.levels}),
            evidence=params.evidence.model_copy(update={"poolings": (pooling,)}),
            method=method,
            **serving.model_dump(include=set(Bounds.model_fields)),
        )

    def matcher(self, prompt: Path | None) -> Matcher:
        """Open the checkpoint and the prompt; raise CheckpointError if they differ from the registered ones."""
        from dsd.matcher import Matcher
        from dsd.models import device_of, load_diffusion  # they import torch
        from dsd.models.prompts import AttentionPrompt

        backbone = load_diffusion(self.backbone, device_of(self.runtime.device), self.runtime.attention)
        return Matcher(
            backbone,
            AttentionPrompt.load(prompt, backbone.digest) if prompt is not None else None,
            self.method,
            self.noise,
            self.evidence,
            parity=self.images.parity,
            resolution=self.images.resolution,
            batch_size=self.runtime.batch_size,
            seed=self.seed,
        )
