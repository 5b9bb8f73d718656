"""CLIP in the layout of open_clip, with a ResNet or a vision transformer as image tower.

The text tower and the vision transformer are those of transformers, under other names. F is the width of a tower.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from dsd.errors import CheckpointError, brief
from dsd.models.checkpoint import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    check_vocabulary,
    family_of,
    pickle_note,
    tokenizer,
)
from dsd.models.clip import Clip, Deviations, Means, Opened
from dsd.models.resnet import ResNet
from dsd.models.settings import read_settings, validated
from dsd.models.weights import check_tensors, read_tensors


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Vision(_Settings):
    """The image tower; `layers` are the bottlenecks of a ResNet's four stages, or the depth of a transformer."""

    image_size: PositiveInt
    layers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] | PositiveInt
    width: PositiveInt
    patch_size: PositiveInt | None = None
    head_width: PositiveInt = 64
    mlp_ratio: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _fits(self) -> Vision:
        if isinstance(self.layers, int) == (self.patch_size is None):
            raise ValueError("layers must be four numbers and patch_size null, or one number with a patch_size")
        if self.features % self.head_width:
            raise ValueError(f"head_width {self.head_width} must divide the {self.features} features of the tower")
        return self

    @property
    def features(self) -> int:
        """The width F of the tower's output."""
        return self.width if isinstance(self.layers, int) else 32 * self.width


class Text(_Settings):
    context_length: PositiveInt
    vocab_size: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    layers: PositiveInt


class Model(_Settings):
    """The supported kinds of CLIP; any other key is an error."""

    embed_dim: PositiveInt
    quick_gelu: bool = False
    vision_cfg: Vision
    text_cfg: Text


class Preprocess(BaseModel):
    """How pixels are normalised; settings for cropping and resizing are ignored."""

    mean: Means
    std: Deviations


class Config(BaseModel):
    model_cfg: Model
    preprocess_cfg: Preprocess

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Read the configuration in a folder; raise CheckpointError if it is missing or not supported."""
        file = folder / OPEN_CLIP_CONFIG
        if not file.is_file():
            family = family_of(folder)
            reason = f"of family {family}; correct family" if family else "not in open_clip's layout"
            raise CheckpointError(f"{folder}: no {OPEN_CLIP_CONFIG}: {reason}")
        return validated(cls, read_settings(file), file)


class Towers(nn.Module):
    """Both towers and their linear heads, named as in transformers' CLIPModel; untrained."""

    def __init__(self, config: Model, end: int) -> None:
        """end: the token at which a text is pooled."""
        super().__init__()
        vision, text = config.vision_cfg, config.text_cfg
        shared = {"projection_dim": config.embed_dim, "hidden_act": "quick_gelu" if config.quick_gelu else "gelu"}
        texts = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=text.vocab_size, max_position_embeddings=text.context_length, hidden_size=text.width,
                intermediate_size=4 * text.width, num_hidden_layers=text.layers, num_attention_heads=text.heads,
                eos_token_id=end, **shared,
            )
        )  # fmt: skip
        self.text_model, self.text_projection = texts.text_model, texts.text_projection
        if isinstance(vision.layers, tuple):
            self.vision_model = ResNet(vision.layers, vision.width, vision.image_size, vision.head_width)
            self.visual_projection = nn.Linear(vision.features, config.embed_dim)
        else:
            images = CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    image_size=vision.image_size, patch_size=vision.patch_size, hidden_size=vision.width,
                    intermediate_size=int(vision.width * vision.mlp_ratio), num_hidden_layers=vision.layers,
                    num_attention_heads=vision.width // vision.head_width, **shared,
                )
            )  # fmt: skip
            self.vision_model, self.visual_projection = images.vision_model, images.visual_projection
        self.logit_scale = nn.Parameter(torch.zeros((), dtype=torch.float32))


# Parts of names: transformers' → open_clip's, in the order in which they are replaced.
NAMES = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.": "visual.",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.": "visual.",
    ".self_attn.": ".attn.",
    ".layer_norm": ".ln_",
    ".mlp.fc1": ".mlp.c_fc",
    ".mlp.fc2": ".mlp.c_proj",
}
RESNET_NAMES = {"visual_projection.": "visual.attnpool.c_proj."}


class Origin(NamedTuple):
    """The tensor of the file that one of ours comes from: `name`, transposed if `flipped`, or a third of it."""

    name: str
    flipped: bool = False
    third: int | None = None

    @classmethod
    def of(cls, key: str, resnet: bool) -> Origin:
        name = key
        for ours, theirs in ((RESNET_NAMES if resnet else {}) | NAMES).items():
            name = name.replace(ours, theirs)
        if match := re.fullmatch(r"(.*resblocks\.\d+\.attn)\.([qkv])_proj\.(weight|bias)", name):
            return cls(f"{match[1]}.in_proj_{match[3]}", third="qkv".index(match[2]))
        return cls(name, flipped=name in ("text_projection", "visual.proj"))

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        """Return the required shape of the file's tensor, given ours."""
        if self.third is not None:
            return 3 * ours[0], *ours[1:]
        return tuple(reversed(ours)) if self.flipped else tuple(ours)

    def take(self, tensor: Tensor) -> Tensor:
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        return tensor.T if self.flipped else tensor


def fill(towers: Towers, file: Path) -> None:
    """Load the weights of the file into the towers.

    Raises:
        CheckpointError: not a file in safetensors, or a tensor is missing, unexpected or misshapen.
    """
    tensors = read_tensors(file)
    resnet = isinstance(towers.vision_model, ResNet)
    ours = {key: own for key, own in towers.state_dict().items() if not _is_counter(key)}
    origins = {key: Origin.of(key, resnet) for key in ours}
    wrong = {}
    for key, (name, *_) in origins.items():
        shape = origins[key].shape(ours[key].shape)
        if name not in tensors:
            wrong[name] = "missing"
        elif tensors[name].shape != shape:
            wrong[name] = f"{list(tensors[name].shape)} and not {list(shape)}"
    used = {origin.name for origin in origins.values()}
    wrong |= {name: "unexpected" for name in tensors if name not in used and not _is_counter(name)}
    if wrong:
        name, reason = next(iter(wrong.items()))
        raise CheckpointError(
            f"{file}: {len(wrong)} tensors do not fit the model of {OPEN_CLIP_CONFIG}; {name} is {reason}"
        )
    check_tensors({name: tensors[name] for name in used}, str(file))
    towers.load_state_dict({key: origin.take(tensors[origin.name]) for key, origin in origins.items()}, strict=False)


def _is_counter(name: str) -> bool:
    """Return whether a tensor is the batch counter of a batch norm, which is not used."""
    return name.endswith("num_batches_tracked")


class OpenClip(Clip):
    """A frozen CLIP of `open_clip_config.json` and `open_clip_model.safetensors`, with its tokenizer next to them."""

    family: ClassVar[str] = "open-clip"

    @classmethod
    def _open(cls, folder: Path, dtype: torch.dtype) -> Opened:
        config, weights = Config.read(folder), folder / OPEN_CLIP_WEIGHTS
        if not weights.is_file():
            raise CheckpointError(", ".join(filter(None, [f"{folder}: no {OPEN_CLIP_WEIGHTS}", pickle_note(folder)])))
        tokens = tokenizer(folder, "")
        if len(tokens) != (size := config.model_cfg.text_cfg.vocab_size):
            raise CheckpointError(f"{folder}: tokenizer of {len(tokens)} tokens, but vocab_size is {size}")
        try:
            towers = Towers(config.model_cfg, int(tokens.eos_token_id))
        except (StrictDataclassError, RuntimeError) as error:  # sizes that do not fit each other, or no memory
            raise CheckpointError(f"{folder / OPEN_CLIP_CONFIG}: no valid CLIP ({brief(error, 200)})") from None
        fill(towers, weights)
        towers, side = towers.to(dtype).eval().requires_grad_(False), config.model_cfg.vision_cfg.image_size
        return Opened(towers, side, config.preprocess_cfg.mean, config.preprocess_cfg.std)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        tokens = tokenizer(self._folder, "")
        size = Config.read(self._folder).model_cfg.text_cfg.vocab_size
        check_vocabulary(tokens, size, self._folder, OPEN_CLIP_CONFIG)
        return tokens

    @property
    def _positions(self) -> int:
        return Config.read(self._folder).model_cfg.text_cfg.context_length


BACKBONES = {OpenClip.family: OpenClip}
