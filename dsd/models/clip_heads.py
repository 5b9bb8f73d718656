"""CLIP's cosine of image and text: zero-shot, with fine-tuned projections, or with a learned context.

Shapes: B pairs, F width of a tower, D width of the joint space, M text tokens, N context tokens, W width of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dsd.config import ContextParams, ContrastiveMethod
from dsd.data.examples import Pair
from dsd.errors import TextError
from dsd.models.checkpoint import over_limit
from dsd.models.prompts import PROMPT, load_learned, save_learned

if TYPE_CHECKING:
    from dsd.models.clip import Clip

WEIGHTS = "weights.safetensors"
FILES = {"projections": WEIGHTS, "context": PROMPT}  # the file that training writes, by what it tunes


class Features(Protocol):
    """The `features` [B, F] of the images or texts of a dataset, before the projection into the joint space."""

    @property
    def items(self) -> Sequence[str]: ...

    def __call__(self, items: Sequence[str]) -> Mapping[str, NDArray]: ...


def cosine(images_BD: Tensor, texts_BD: Tensor) -> Tensor:
    """Return the cosine [B] of each pair."""
    return (F.normalize(images_BD, dim=-1) * F.normalize(texts_BD, dim=-1)).sum(-1)


class Projections(nn.Module):
    """The last linear layer of each tower, initially CLIP's own (the first paper's "CLIP fine-tuning").

    Everything below is frozen, so features are computed once.
    """

    file = WEIGHTS

    def __init__(self, clip: Clip, images: Features, texts: Features) -> None:
        super().__init__()
        self._clip, self._images, self._texts = clip, images, texts
        self.image = deepcopy(clip.model.visual_projection).float().requires_grad_(True)
        self.text = deepcopy(clip.model.text_projection).float().requires_grad_(True)

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """The cosine [B] of each pair."""
        images_BF = torch.from_numpy(self._images([pair.image for pair in pairs])["features"])
        texts_BF = torch.from_numpy(self._texts([pair.text for pair in pairs])["features"])
        device = self._clip.device
        return cosine(self.image(images_BF.to(device)), self.text(texts_BF.to(device)))

    def save(self, path: Path) -> None:
        save_learned(self, path, self._clip.digest)


class ContextPrompt(nn.Module):
    """CoCoOp: context vectors before a text's tokens, shifted by a function of the image; both towers are frozen.

    Zhou et al. 2022, "Conditional Prompt Learning for Vision-Language Models": t(x) = [v_1 + π, …, v_N + π, text] with
    π = h_θ(x), h_θ two linear maps with a ReLU between them. Its last layer starts at zero: no shift at step 0.
    Every pair needs a pass of the text encoder, since the context depends on the image.
    """

    file = PROMPT

    def __init__(self, clip: Clip, images: Features, texts: Features, *, tokens: int, hidden: int, seed: int) -> None:
        """Raise TextError if a text leaves no room for the context."""
        super().__init__()
        self._clip, self._images = clip, images
        for text, count in over_limit(clip.tokenizer, texts.items, clip.max_tokens - tokens):
            raise TextError(
                f"{text!r}: {count} tokens and {tokens} of context.tokens are more than the "
                f"{clip.max_tokens} of this CLIP"
            )
        joint, width = clip.model.text_projection.out_features, clip.model.text_projection.in_features
        self.context = nn.Parameter(torch.zeros(tokens, width, dtype=torch.float32))
        self.net = nn.Sequential(nn.Linear(joint, hidden), nn.ReLU(), nn.Linear(hidden, width))
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.context, std=0.02, generator=generator)  # as in the authors' code
        nn.init.normal_(self.net[0].weight, std=joint**-0.5, generator=generator)
        for start in (self.net[0].bias, self.net[2].weight, self.net[2].bias):
            nn.init.zeros_(start)
        self.to(clip.device)

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """The cosine [B] of each pair."""
        clip = self._clip
        features_BF = torch.from_numpy(self._images([pair.image for pair in pairs])["features"]).to(clip.device)
        images_BD = F.normalize(clip.model.visual_projection(features_BF.to(clip.dtype)).float(), dim=-1)
        context_BNW = self.context + self.net(images_BD)[:, None]
        ids = [torch.tensor(ids, device="cpu") for ids in clip.tokenizer([pair.text for pair in pairs]).input_ids]
        # Padding follows the end token and has no effect.
        ids_BM = pad_sequence(ids, batch_first=True, padding_value=clip.tokenizer.pad_token_id).to(clip.device)
        texts_BF = clip.prompted_features(ids_BM, context_BNW)
        return cosine(images_BD, clip.model.text_projection(texts_BF.to(clip.dtype)).float())

    def save(self, path: Path) -> None:
        save_learned(self, path, self._clip.digest, tokens=len(self.context), hidden=self.net[0].out_features)


Head = Projections | ContextPrompt


def new_head(
    method: ContrastiveMethod, clip: Clip, images: Features, texts: Features, context: ContextParams, seed: int
) -> Head:
    """Return the head of a method before its first training step."""
    if method.tuned == "context":
        return ContextPrompt(clip, images, texts, tokens=context.tokens, hidden=context.hidden, seed=seed)
    return Projections(clip, images, texts)


def load_head(method: ContrastiveMethod, clip: Clip, images: Features, texts: Features, folder: Path) -> Head:
    """Return the head of a method as its training saved it in `folder`; raise CheckpointError if it does not load."""
    if method.tuned == "none":
        return Projections(clip, images, texts).requires_grad_(False)
    if method.tuned == "projections":
        build = partial(Projections, clip, images, texts)
        return load_learned(build, folder / WEIGHTS, clip.digest, "fine-tuned projections")
    prompt = partial(ContextPrompt, clip, images, texts, seed=0)
    return load_learned(prompt, folder / PROMPT, clip.digest, "a context prompt")
