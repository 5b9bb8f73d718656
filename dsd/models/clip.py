"""CLIP: the contrastive comparison.

Shapes: B batch, P picture side in pixels, F width of a tower, M text tokens, N context tokens, W width of a text token.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from dsd.config import BackboneParams
from dsd.data.images import resize, to_array, to_model
from dsd.errors import CheckpointError
from dsd.models.checkpoint import DTYPES, component, locate, require, tokenizer
from dsd.store import digest


class Opened(NamedTuple):
    """What a folder makes, whatever its layout.

    model: `vision_model`, `text_model` and their linear heads `visual_projection` and `text_projection`, which are
        named, called and answer as those of transformers' CLIPModel.
    resolution: P, of the pictures that it was trained on.
    mean_3, deviation_3: of each colour's values in 0…1, by which pixels are normalised.
    """

    model: Any
    tokenizer: CLIPTokenizer
    resolution: int
    mean_3: Tensor
    deviation_3: Tensor


class Clip:
    """A frozen CLIPModel in the transformers layout; its tokenizer beside the weights, or in `tokenizer/`.

    Pixels are normalised as `preprocessor_config.json` says, and to −1…1 where there is none.
    """

    family: ClassVar[str] = "clip"

    def __init__(self, row: BackboneParams, device: torch.device) -> None:
        folder, identity = locate(row)
        # Its features are stored, and are other numbers in other arithmetic.
        self.digest = identity if row.dtype == "float32" else digest(identity, row.dtype)
        self.device, self.dtype, self._folder = device, DTYPES[row.dtype], folder

    def open(self) -> None:
        """Open the model, unless it is open.

        Raises:
            CheckpointError: it does not load; one line.
        """
        _ = self._opened

    @cached_property
    def _opened(self) -> Opened:
        opened = self._open(self._folder, self.dtype)
        return opened._replace(model=opened.model.to(self.device))

    @property
    def model(self) -> Any:
        return self._opened.model

    @property
    def tokenizer(self) -> CLIPTokenizer:
        return self._opened.tokenizer

    @property
    def resolution(self) -> int:
        """The side in pixels of the images that it was trained on."""
        return self._opened.resolution

    @classmethod
    def _open(cls, folder: Path, dtype: torch.dtype) -> Opened:
        require(folder, cls.family, ())
        model: CLIPModel = component(folder, CLIPModel, "", dtype)
        tokens = tokenizer(folder, "tokenizer" if (folder / "tokenizer").is_dir() else "")
        resolution = int(model.config.vision_config.image_size)
        return Opened(model, tokens, resolution, *normalisation(folder / "preprocessor_config.json"))

    @property
    def max_tokens(self) -> int:
        return int(min(self.tokenizer.model_max_length, self.model.text_model.config.max_position_embeddings))

    @torch.inference_mode()
    def image_features(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, R, R, 3] to what the image tower's projection sees [B, F]; another size is resized."""
        if pictures.shape[1] != self.resolution:
            pictures = np.stack(
                [to_array(resize(Image.fromarray(p), parity=None, resolution=self.resolution)) for p in pictures]
            )
        # From −1…1, which is what `to_model` gives: the mean and deviation are those of values in 0…1.
        mean_3, deviation_3 = self._opened.mean_3, self._opened.deviation_3
        scale_3, shift_3 = 0.5 / deviation_3, (0.5 - mean_3) / deviation_3
        pixels = torch.from_numpy(to_model(pictures)) * scale_3[:, None, None] + shift_3[:, None, None]
        pixels = pixels.to(self.device, self.dtype)
        return self.model.vision_model(pixel_values=pixels).pooler_output.float()

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> Tensor:
        """What the text tower's projection sees [B, F]; a text over the model's maximum is cut."""
        batch = self.tokenizer(
            texts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return self.model.text_model(**{k: v.to(self.device) for k, v in batch.items()}).pooler_output.float()

    def prompted_features(self, ids_BM: Tensor, context_BNW: Tensor) -> Tensor:
        """`text_features` with context vectors between the begin token and the text; differentiable in the context.

        The context takes the places of N further begin tokens, so positions, causal mask and the pooling at the end
        token are those of the text encoder itself.
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


def normalisation(file: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] of each colour's values in 0…1, by a preprocessor_config.json if it is there."""
    if not file.exists():
        return torch.full((3,), 0.5), torch.full((3,), 0.5)
    try:
        settings = json.loads(file.read_text())
        mean_3, deviation_3 = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
        if mean_3.shape != (3,) or not (deviation_3 > 0).all():
            raise ValueError(f"image_mean {settings['image_mean']}, image_std {settings['image_std']}")
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{file}: needs image_mean and image_std of three colours ({reason})") from None
    return mean_3, deviation_3


BACKBONES = {Clip.family: Clip}
