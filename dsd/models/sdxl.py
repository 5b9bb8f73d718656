"""Stable Diffusion XL: two text encoders, and a U-Net conditioned on pooled text embedding and image size as well.

Shapes: B batch, T texts, M text tokens, D text width (of both encoders together), P width of the pooled embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dsd.errors import CheckpointError
from dsd.models.checkpoint import check_end
from dsd.models.settings import read_settings
from dsd.models.stable_diffusion import StableDiffusion, TextEmbeddings
from dsd.store import digest


class StableDiffusionXL(StableDiffusion):
    """The base model of XL and its fine-tunes (Podell et al. 2023).

    Micro-conditioning is the same for every image, as in the published pipeline: the model's resolution, not cropped.

    Content tokens are those of the first tokenizer. The second pads with "!" and makes each "!" of a text one token, so
    that the two are misaligned after a "!!", as in the published pipeline.
    """

    family = layout = "stable-diffusion-xl"
    addition = "text_time"
    states_scale = True
    architecture = r"stable-diffusion-xl-v1(-base)?"
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}  # noqa: RUF012

    def open(self) -> None:
        super().open()
        _ = self._zeros

    @cached_property
    def tokenizers(self) -> list[CLIPTokenizer]:
        opened = super().tokenizers
        end = self._config("text_encoder_2").eos_token_id
        check_end(opened[1], end, self._folder / "text_encoder_2/config.json")
        return opened

    @cached_property
    def _zeros(self) -> bool:
        """Whether the empty text is encoded as zeros: true unless model_index.json says otherwise, as for diffusers'
        StableDiffusionXLPipeline."""
        file, key = self._folder / "model_index.json", "force_zeros_for_empty_prompt"
        if type(zeros := read_settings(file).get(key, True) if file.exists() else True) is not bool:
            raise CheckpointError(f"{file}: {key} {zeros!r}: must be true or false")
        return zeros

    @property
    def text_digest(self) -> str:
        return digest(self.digest, "empty text as zeros") if self._zeros else self.digest

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> TextEmbeddings:
        encoded = super().encode_texts(texts)
        if self._zeros:
            encoded.hidden[[n for n, text in enumerate(texts) if not text]] = 0
        return encoded

    @property
    def _pooled(self) -> int:
        return int(self._config("text_encoder_2").projection_dim)

    def _check_shapes(self, unet: Any) -> None:
        super()._check_shapes(unet)
        folder, width = self._folder, self._pooled
        sizes = 6 * unet.addition_time_embed_dim
        if unet.projection_class_embeddings_input_dim != sizes + width or width > unet.cross_attention_dim:
            raise CheckpointError(
                f"{folder}: unet expects {unet.projection_class_embeddings_input_dim} values of a text and an image's "
                f"sizes, text_encoder_2 gives {width} and the sizes {sizes}"
            )

    def _hidden(self, ids: Sequence[Tensor]) -> Tensor:
        """Return [B, M + 1, D]: the penultimate hidden states of both encoders, concatenated, and in the last row the
        second encoder's pooled embedding, padded with zeros."""
        encoders = zip(self.text_encoders, ids, strict=True)
        outputs = [encoder(ids_BM, output_hidden_states=True) for encoder, ids_BM in encoders]
        hidden_BMD = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled_BD = torch.nn.functional.pad(outputs[1].text_embeds, (0, hidden_BMD.shape[-1] - self._pooled))
        return torch.cat([hidden_BMD, pooled_BD[:, None]], 1)

    def _output(self, noised: Tensor, timesteps: Tensor, hidden: Tensor, text_index: Tensor | None) -> Tensor:
        hidden_TMD, pooled_TP = hidden[:, :-1], hidden[:, -1, : self._pooled]
        side = float(self.resolution)
        # Original height and width, top and left of the crop, target height and width.
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=noised.device)
        conditions = {
            "text_embeds": pooled_TP if text_index is None else pooled_TP[text_index],
            "time_ids": sizes.expand(len(noised), -1),
        }
        return cast(Tensor, self.unet(noised, timesteps, hidden_TMD, added_cond_kwargs=conditions).sample)


BACKBONES = {StableDiffusionXL.family: StableDiffusionXL}
