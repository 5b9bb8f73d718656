"""CLIP: the contrastive comparison. Shapes: B batch, P picture side in pixels, D width of the joint space."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from dsd.backbones.checkpoint import DTYPES, component, locate, require
from dsd.images import resize, to_array, to_model
from dsd.params import BackboneParams


class Clip:
    """A frozen CLIPModel in the transformers layout: `model/` with the weights, `tokenizer/` beside it."""

    def __init__(self, row: BackboneParams, device: torch.device) -> None:
        folder, self.digest = locate(row)
        require(folder, ("tokenizer",))
        self.device, self.dtype = device, DTYPES[row.dtype]
        self.model: CLIPModel = component(CLIPModel, folder, "", self.dtype).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")

    @property
    def max_tokens(self) -> int:
        return int(min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings))

    @property
    def resolution(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @torch.inference_mode()
    def encode_images(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, R, R, 3] to unit vectors [B, D]; a picture of another size is resized to the model's."""
        if pictures.shape[1] != self.resolution:
            pictures = np.stack(
                [to_array(resize(Image.fromarray(p), parity=None, resolution=self.resolution)) for p in pictures]
            )
        pixels = torch.from_numpy(to_model(pictures)).to(self.device, self.dtype)
        output = self.model.get_image_features(pixel_values=pixels)
        return torch.nn.functional.normalize(output.pooler_output.float(), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors [B, D]."""
        batch = self.tokenizer(
            texts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        output = self.model.get_text_features(**{k: v.to(self.device) for k, v in batch.items()})
        return torch.nn.functional.normalize(output.pooler_output.float(), dim=-1)
