"""CLIP in the layout of transformers.

Shapes: B batch, P image side in pixels, F width of a tower, M text tokens, N context tokens, W width of a text token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer

from dsd.config import BackboneParams
from dsd.data.images import resize, to_array, to_model
from dsd.errors import CheckpointError
from dsd.models.checkpoint import (
    DTYPES,
    check_end,
    check_vocabulary,
    component,
    config_errors,
    locate,
    require,
    tokenizer,
)
from dsd.models.settings import component_settings, read_settings, validated
from dsd.store import digest

# Of the values of each colour, in 0…1.
Mean = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0.001, le=1)]
Means = tuple[Mean, Mean, Mean]
Deviations = tuple[Deviation, Deviation, Deviation]


class Pixels(BaseModel):
    """How pixels are normalised, as image processors of transformers state it; cropping and resizing are ignored."""

    model_config = ConfigDict(frozen=True)

    image_mean: Means
    image_std: Deviations
    do_normalize: Literal[True] | None = None
    do_rescale: Literal[True] | None = None
    rescale_factor: Annotated[float, Field(ge=0.0039215, le=0.0039216)] | None = None  # 1/255


class Opened(NamedTuple):
    """An opened CLIP of any layout.

    model: has `vision_model`, `text_model`, `visual_projection` and `text_projection` with the interface of
        transformers' CLIPModel.
    resolution: P of the images that it was trained on.
    mean, deviation: normalisation of the values of each colour, in 0…1.
    """

    model: Any
    resolution: int
    mean: Means
    deviation: Deviations


class Clip:
    """A frozen CLIPModel in the transformers layout; its tokenizer is in the same folder or in `tokenizer/`.

    Pixels are normalised according to `preprocessor_config.json` or `processor_config.json`.
    """

    family: ClassVar[str] = "clip"

    def __init__(self, row: BackboneParams, device: torch.device) -> None:
        folder, identity = locate(row)
        # Features are stored, and depend on the dtype.
        self.digest = identity if row.dtype == "float32" else digest(identity, row.dtype)
        self.device, self.dtype, self._folder = device, DTYPES[row.dtype], folder

    def open(self) -> None:
        """Open model and tokenizer unless they are open; raise CheckpointError if one does not load."""
        _ = self._opened, self.tokenizer

    @cached_property
    @torch.inference_mode(False)  # a tensor that is made in this mode cannot be used in training
    def _opened(self) -> Opened:
        opened = self._open(self._folder, self.dtype)
        return opened._replace(model=opened.model.to(self.device))

    @property
    def model(self) -> Any:
        return self._opened.model

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Opened without the model."""
        name = "tokenizer" if (self._folder / "tokenizer").is_dir() else ""
        tokens, config = tokenizer(self._folder, name), self._text_config
        check_vocabulary(tokens, config.vocab_size, self._folder / name, "text_config")
        check_end(tokens, config.eos_token_id, self._folder / "config.json")
        return tokens

    @property
    def resolution(self) -> int:
        return self._opened.resolution

    @classmethod
    def _open(cls, folder: Path, dtype: torch.dtype) -> Opened:
        require(folder, cls.family, ())
        model: CLIPModel = component(folder, CLIPModel, "", dtype)
        resolution = int(model.config.vision_config.image_size)
        return Opened(model, resolution, *normalisation(folder))

    @property
    def _text_config(self) -> CLIPTextConfig:
        component_settings(self._folder, "", CLIPModel)
        with config_errors(self._folder):
            return CLIPConfig.from_pretrained(self._folder).text_config

    @property
    def _positions(self) -> int:
        """The longest text of the text tower, in tokens."""
        return int(self._text_config.max_position_embeddings)

    @cached_property
    def max_tokens(self) -> int:
        """The token limit of a text, including begin and end."""
        return int(min(self.tokenizer.model_max_length, self._positions))

    def text_ids(self, texts: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return the token ids of each text as it is encoded; texts with the same ids are one text to the model."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens).input_ids
        return [tuple(one) for one in ids]

    @torch.inference_mode()
    def image_features(self, images: np.ndarray) -> Tensor:
        """Return the inputs [B, F] of the image projection for uint8 images [B, R, R, 3], resized to P if necessary."""
        if images.shape[1] != (side := self.resolution):
            resized = (resize(Image.fromarray(image), parity=None, resolution=side) for image in images)
            images = np.stack([to_array(image) for image in resized])
        # `to_model` gives values in −1…1; the mean and deviation are of values in 0…1.
        stated = self._opened.mean, self._opened.deviation
        mean_3, deviation_3 = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in stated)
        scale_3, shift_3 = 0.5 / deviation_3, (0.5 - mean_3) / deviation_3
        pixels = torch.from_numpy(to_model(images)) * scale_3[:, None, None] + shift_3[:, None, None]
        return self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output.float()

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> Tensor:
        """Return the inputs [B, F] of the text projection; texts over the model's maximum are cut."""
        limit = self.max_tokens
        batch = self.tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        return self.model.text_model(**{k: v.to(self.device) for k, v in batch.items()}).pooler_output.float()

    def prompted_features(self, ids_BM: Tensor, context_BNW: Tensor) -> Tensor:
        """Return `text_features` with context vectors after the begin token; differentiable in the context.

        The context replaces N additional begin tokens, so that the encoder's own positions, causal mask and pooling at
        the end token apply.
        """
        count = context_BNW.shape[1]
        longer = torch.cat([ids_BM[:, :1].expand(-1, count), ids_BM], 1)

        def insert(_: nn.Module, __: object, tokens: Tensor) -> Tensor:
            return torch.cat([tokens[:, :1], context_BNW.to(tokens.dtype), tokens[:, 1 + count :]], 1)

        hook = self.model.text_model.embeddings.token_embedding.register_forward_hook(insert)
        try:
            return self.model.text_model(input_ids=longer).pooler_output.float()
        finally:
            hook.remove()


def normalisation(folder: Path) -> tuple[Means, Deviations]:
    """Read mean and standard deviation of each colour from preprocessor_config.json, or from the image processor in
    processor_config.json, which transformers 5 writes.

    Raises:
        CheckpointError: neither file has them, they disagree, or they are not those of `Pixels`.
    """
    stated = []
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            settings = read_settings(folder / name)
            if (pixels := settings if section is None else settings.get(section)) is not None:
                checked = validated(Pixels, pixels, folder / name)
                stated.append((checked.image_mean, checked.image_std))
    if not stated:
        raise CheckpointError(
            f"{folder}: has neither preprocessor_config.json nor image_processor in processor_config.json, which say "
            "how pixels are normalised; add that of the original CLIP"
        )
    if stated[0] != stated[-1]:
        problem = "preprocessor_config.json and processor_config.json disagree on image_mean or image_std"
        raise CheckpointError(f"{folder}: {problem}; remove the wrong one")
    return stated[0]


BACKBONES = {Clip.family: Clip}
