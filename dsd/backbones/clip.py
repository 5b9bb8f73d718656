"""CLIP: the contrastive comparison.

Shapes: B batch, P picture side in pixels, F width of a tower, M text tokens, N context tokens, W width of a text token.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
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
    def image_features(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, R, R, 3] to what the image tower's projection sees [B, F]; another size is resized."""
        if pictures.shape[1] != self.resolution:
            pictures = np.stack(
                [to_array(resize(Image.fromarray(p), parity=None, resolution=self.resolution)) for p in pictures]
            )
        pixels = torch.from_numpy(to_model(pictures)).to(self.device, self.dtype)
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
