"""One forward pass: a batch from (pair, draw) requests, and its evidence.

Shapes: B rows of a batch, R rows of evidence, T texts, M text tokens, D text width, C latent channels, r latent side;
P poolings, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd.config import EvidenceParams, ScheduledMethod
from dsd.engine.encodings import Arrays
from dsd.models.attention import Capture
from dsd.models.prompts import AttentionPrompt
from dsd.scorers import SCORERS
from dsd.scorers.evidence import Request

if TYPE_CHECKING:
    from dsd.models.stable_diffusion import StableDiffusion

Values = NDArray[np.float32]
Lookup = Callable[[Sequence[str]], Arrays]  # rows of named arrays by image id or text


class Batch(NamedTuple):
    """The inputs of a forward pass; each text occurs once."""

    latents: Tensor  # [B, C, r, r]
    hidden: Tensor  # [T, M, D]
    content: Tensor  # [T, M] bool: the tokens between begin and end
    text_index: Tensor  # [B] the text of each row
    timesteps: Tensor  # [B]
    noise: Tensor  # [B, C, r, r]

    @classmethod
    def of(cls, rows: Sequence[Request], schedule_length: int, latents_of: Lookup, texts_of: Lookup) -> Batch:
        """Build the batch on the CPU; latents_of: `latents` by image id, texts_of: `hidden` and `content` by text."""
        latents = torch.from_numpy(latents_of([pair.image for pair, _ in rows])["latents"])
        unique, index = np.unique([pair.text for pair, _ in rows], return_inverse=True)
        texts = texts_of(unique.tolist())
        # An unconditional row has no content token; its attention is never used, so the begin token is marked.
        content = torch.from_numpy(texts["content"])
        content[:, 0] |= ~content.any(-1)
        noise = {draw: draw.noise(tuple(latents.shape[1:])) for draw in dict.fromkeys(draw for _, draw in rows)}
        return cls(
            latents,
            torch.from_numpy(texts["hidden"]),
            content,
            torch.from_numpy(index),
            torch.tensor([draw.timestep(schedule_length) for _, draw in rows], device="cpu"),
            torch.stack([noise[draw] for _, draw in rows]),
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def observe(
    backbone: StableDiffusion, prompt: AttentionPrompt | None, evidence: EvidenceParams, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled attention [B, P, L, H], attribution [B, L, H] and error [B], differentiable in the prompt."""
    pooled = evidence.tokens["none" if prompt is None else "few-shot"]
    tokens = batch.content if pooled == "content" else torch.ones_like(batch.content)
    capture = Capture.of(evidence, tokens[batch.text_index])
    noised = backbone.add_noise(batch.latents, batch.noise, batch.timesteps)
    bound = None if prompt is None else prompt.bind(batch.latents)
    predicted = backbone.predict_noise(
        noised, batch.timesteps, batch.hidden, batch.text_index, capture=capture, prompt=bound
    )
    return *capture.stacked(), (batch.noise - predicted).square().mean((1, 2, 3))


def row_values(arrays: Arrays, method: ScheduledMethod, poolings: Sequence[str]) -> Values:
    """Return the value [R] of each row of evidence under a method; a pair's score is the mean over draws."""
    values: Values = SCORERS[method.scorer].row_values(arrays, method, poolings)
    return values
