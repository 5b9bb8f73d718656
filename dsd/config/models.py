"""Params of the runtime, the models, and what one forward pass takes and yields."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dsd.config.base import Levels, ParamsModel, Poolings, Positive, is_unset
from dsd.errors import DsdError

if TYPE_CHECKING:
    from dsd.config.load import Params

# Whether each family is a CLIP. Other families, of further modules in dsd/models, are asked there: it imports torch.
FAMILIES = {"stable-diffusion": False, "stable-diffusion-xl": False, "clip": True, "open-clip": True}


class RuntimeParams(ParamsModel):
    """How fast a run is; changes no result."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?|mps)$")]
    attention: str
    batch_size: Positive
    workers: Positive
    kept_texts: Annotated[int, Field(ge=0)]
    executor: Literal["local", "ray"]
    actors: Positive


class BackboneParams(ParamsModel):
    """A row of `backbones`: a checkpoint.

    source: a folder, a hub id at `revision` (a commit), or one .safetensors file in the original layout.
    config: for such a file, the folder or hub id (at `revision`) of its configs, tokenizer and scheduler.
    prediction: what the U-Net predicts; unset, the checkpoint's scheduler config decides.
    digest: if set, a checkpoint with another digest is refused.
    dtype: precision of the U-Net; images and texts are always encoded in float32. For a CLIP, precision of everything.
    """

    family: str
    source: str
    revision: str | None
    config: str | None = Field(default=None, exclude_if=is_unset)
    prediction: Literal["epsilon", "v_prediction"] | None = Field(default=None, exclude_if=is_unset)
    lora: str | None
    digest: str | None = Field(default=None, exclude_if=is_unset)
    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def is_clip(self) -> bool:
        """Whether it is a CLIP, not a diffusion model; raise CheckpointError if there is no such family."""
        known = FAMILIES.get(self.family)
        return bool(import_module("dsd.models").is_clip(self.family)) if known is None else known

    def check(self, name: str, params: Params) -> None:
        """Check this row, called `name`; raise ValueError that starts with the key."""
        try:
            contrastive = self.is_clip
        except DsdError as error:
            raise ValueError(f"backbones.{name}.family: {error}") from None
        for key in ("config", "prediction", "lora") if contrastive else ():
            if getattr(self, key) is not None:
                raise ValueError(f"backbones.{name}.{key}: must be null for family {self.family}")
        if params.backbone == name and contrastive:
            raise ValueError(
                f"backbone: {name} is of family {self.family}; the model under test must be a diffusion model"
            )


class ImageParams(ParamsModel):
    resolution: Positive
    parity: Positive | None
    max_pixels: Positive


class NoiseParams(ParamsModel):
    """The draws that pairs are scored at: `draws_per_level` at each level."""

    levels: Levels
    draws_per_level: Positive


class EvidenceParams(ParamsModel):
    """What one forward pass stores for each layer and head; `scale` is λ of eq. 3."""

    poolings: Poolings
    scale: Annotated[float, Field(gt=0, le=60)]
    normalise: bool
    tokens: Literal["content", "all"]
    shard: Positive

    def settings(self, prompt: str) -> dict[str, Any]:
        """Return what evidence under a prompt depends on."""
        return self.model_dump(exclude={"shard"})


class PromptParams(ParamsModel):
    """Size of the attention prompt, eq. 5."""

    rank: Positive
    conditional: bool


class ContextParams(ParamsModel):
    """Size of the learned text context of a CLIP (CoCoOp)."""

    tokens: Positive
    hidden: Positive
