"""Params of the runtime, the models, and what one forward pass takes and yields."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dsd.config.base import PROMPTS, Levels, ParamsModel, Poolings, Positive, Prompt, Seed, Side, is_unset
from dsd.errors import DsdError

if TYPE_CHECKING:
    from dsd.config.load import Params

# Whether each family is a CLIP. Other families, of further modules in dsd/models, are asked there: it imports torch.
FAMILIES = {"stable-diffusion": False, "stable-diffusion-xl": False, "clip": True, "open-clip": True}

PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # files of checkpoints that are never opened: they can run code


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
    resolution: Side
    parity: Side | None
    max_pixels: Positive


class NoiseParams(ParamsModel):
    """The draws that pairs are scored at: `draws_per_level` at each level.

    sample: number of the set of draws; no two sets have a draw in common.
    """

    levels: Levels
    draws_per_level: Positive
    sample: Seed  # larger ones overflow the seeds of draws


def _of_both(value: Any) -> Any:
    return dict.fromkeys(PROMPTS, value) if isinstance(value, str) else value


def _both(value: dict[str, str]) -> dict[str, str]:
    if missing := [prompt for prompt in PROMPTS if prompt not in value]:
        raise ValueError(f"a value is missing for {missing[0]}")
    return value


class EvidenceParams(ParamsModel):
    """What one forward pass stores for each layer and head.

    scale: λ of eq. 3. Below 1 the rounding of float32 exceeds the differences between texts.
    tokens: the tokens whose attention is pooled, under each prompt; one value is for both.
    """

    poolings: Poolings
    scale: Annotated[float, Field(ge=1, le=60)]
    normalise: bool
    tokens: Annotated[dict[Prompt, Literal["content", "all"]], BeforeValidator(_of_both), AfterValidator(_both)]
    shard: Positive

    def settings(self, prompt: str) -> dict[str, Any]:
        """Return what evidence under a prompt depends on."""
        return {**self.model_dump(exclude={"shard"}), "tokens": self.tokens["none" if prompt == "none" else "few-shot"]}


class PromptParams(ParamsModel):
    """Size of the attention prompt, eq. 5."""

    rank: Positive
    conditional: bool


class ContextParams(ParamsModel):
    """Size of the learned text context of a CLIP (CoCoOp)."""

    tokens: Positive
    hidden: Positive
