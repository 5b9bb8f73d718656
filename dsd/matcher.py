"""The public API: score images against texts in five lines.

Shapes: I images, T texts, M words, R picture side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsd.attention import Recording, during
from dsd.backbones import StableDiffusion, device_of, load_diffusion
from dsd.backbones.checkpoint import family_of, folder_of
from dsd.draws import Draw, draws
from dsd.engine import observe
from dsd.errors import CheckpointError, TextError, unknown
from dsd.evidence import UNCONDITIONAL
from dsd.images import ImageSource, load_image, resize, to_array
from dsd.params import BackboneParams, EvidenceParams, NoiseParams
from dsd.progress import progress
from dsd.prompts import AttentionPrompt, pooled_latent
from dsd.scorers import cross_attention

METHODS = ("cross-attention", "denoising")
MethodName = Literal["cross-attention", "denoising"]


@dataclass(frozen=True)
class Heatmap:
    """Where a text looks in a picture: one map a word, each [R, R] in 0…1 of its own range."""

    words: list[str]
    maps: np.ndarray  # [M, R, R] float32
    picture: np.ndarray  # [R, R, 3] uint8


class Matcher:
    """Scores images against texts with a frozen text-to-image diffusion model; higher is better.

    >>> matcher = Matcher.from_pretrained("models/embedded")
    >>> matcher.score(["photo.png"], ["a red circle", "a blue square"])  # Tensor [1, 2]
    """

    def __init__(
        self,
        backbone: StableDiffusion,
        prompt: AttentionPrompt | None,
        method: MethodName,
        noise: NoiseParams,
        evidence: EvidenceParams,
        *,
        parity: int | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.backbone, self.prompt, self.method = backbone, prompt, method
        self._draws, self._evidence, self._parity, self._batch_size = (
            draws(noise, seed),
            evidence,
            parity,
            batch_size,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        prompt: str | Path | None = None,
        method: str = "cross-attention",
        *,
        revision: str | None = None,
        family: str | None = None,
        config: str | Path | None = None,
        prediction: Literal["epsilon", "v_prediction"] | None = None,
        device: str = "auto",
        attention: str = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
        draws_per_level: int = 1,
        scale: float = 20.0,
        parity: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Matcher:
        """Opens a checkpoint and, if given, a trained attention prompt.

        The checkpoint is in the diffusers layout (a folder or a hub id), or one file .safetensors with `config`, a
        folder or hub id of the same architecture; `family` is what it looks like where none is given, prediction and
        attention are as in params.yaml.
        `method` is "cross-attention" (DSD) or "denoising" (Diffusion Classifier); `levels` are noise levels in (0, 1);
        `scale` is λ of eq. 3; `parity` resizes pictures to so many pixels first, as a comparison with CLIP does.
        Raises CheckpointError, in one line, where the checkpoint or the prompt does not load.
        """
        if method not in METHODS:
            raise CheckpointError(unknown("method", method, METHODS))
        row = BackboneParams(
            family=family or "stable-diffusion",
            source=str(path_or_id),
            revision=revision,
            config=None if config is None else str(config),
            prediction=prediction,
            lora=None,
            dtype=dtype,
        )
        if family is None and (found := family_of(folder_of(row))):
            row = row.model_copy(update={"family": found})
        backbone = load_diffusion(row, device_of(device), attention)
        learned = (
            AttentionPrompt.load(Path(prompt), backbone.digest).to(backbone.device) if prompt is not None else None
        )
        noise = NoiseParams(levels=tuple(levels), draws_per_level=draws_per_level)
        evidence = EvidenceParams(poolings=("logsumexp",), scale=scale, normalise=False, tokens="content", shard=1)
        chosen: MethodName = "denoising" if method == "denoising" else "cross-attention"
        return cls(backbone, learned, chosen, noise, evidence, parity=parity, batch_size=batch_size, seed=seed)

    def score(self, images: Sequence[ImageSource] | ImageSource, texts: Sequence[str] | str) -> Tensor:
        """Scores [I, T], higher is better. Images are paths, PIL images, arrays or bytes.

        Raises ImageError for a picture that cannot be read and TextError for an empty text; a text over the model's
        token limit is cut with a warning.
        """
        if isinstance(images, str | Path | bytes | np.ndarray | Image.Image):
            images = [images]
        latents = self._latents(images)
        texts = [texts] if isinstance(texts, str) else list(texts)
        hidden, content = self._encode(texts)
        if self.method == "denoising":
            # The unconditional pass makes images comparable with each other, not only texts.
            nothing = self.backbone.encode_texts([UNCONDITIONAL])
            hidden = torch.cat([hidden, nothing.hidden])
            content = torch.cat(
                [
                    content,
                    content.new_zeros(1, content.shape[1]).index_fill(
                        1, torch.tensor([0], device=content.device), True
                    ),
                ]
            )
        found = torch.stack([self._column(latents, hidden, content, draw) for draw in self._draws]).mean(0)
        return found[:, -1:] - found[:, :-1] if self.method == "denoising" else found

    @torch.inference_mode()
    def _column(self, latents: Tensor, hidden: Tensor, content: Tensor, draw: Draw) -> Tensor:
        """One draw's value of every (image, text): [I, T]; the attention score, or the denoising error."""
        count, width = len(latents), len(hidden)
        noise = draw.noise(tuple(latents.shape[1:])).to(latents.device)
        timestep = draw.timestep(self.backbone.schedule_length)
        values = []
        for rows in progress(torch.arange(count * width).split(self._batch_size), desc="score", leave=False):
            i, t = rows // width, rows % width
            asked, texts = t.unique(return_inverse=True)
            pooled, attribution, error = observe(
                self.backbone, self.prompt, self._evidence, latents[i], hidden[asked], content[asked], texts,
                torch.full((len(rows),), timestep, device=latents.device), noise.expand(len(rows), *noise.shape),
            )  # fmt: skip
            attention = cross_attention.reduce(pooled[:, 0], attribution, layers="all", heads="weighted")
            values.append(error if self.method == "denoising" else attention)
        return torch.cat(values).view(count, width).cpu()

    @torch.inference_mode()
    def heatmap(self, image: ImageSource, text: str) -> Heatmap:
        """Cross-attention of each word over the picture, averaged over layers, heads and draws."""
        picture = self._picture(image)
        latents, (hidden, content) = self.backbone.encode_images(picture[None]), self._encode([text])
        maps = [self._maps(latents, hidden, content, draw, picture.shape[0])[0] for draw in self._draws]
        return Heatmap(self._words(text), _stretched(torch.stack(maps).sum(0)), picture)

    @torch.inference_mode()
    def heatmaps(self, image: ImageSource, text: str) -> dict[float, Heatmap]:
        """By noise level, at the first draw of each: what the model sees, decoded, and where each word looks in it."""
        picture = self._picture(image)
        latents, (hidden, content) = self.backbone.encode_images(picture[None]), self._encode([text])
        first = {draw.level: draw for draw in reversed(self._draws)}
        found = {}
        for level, draw in sorted(first.items()):
            maps, noised = self._maps(latents, hidden, content, draw, picture.shape[0])
            found[level] = Heatmap(self._words(text), _stretched(maps), self.backbone.decode_images(noised)[0])
        return found

    def _maps(self, latents: Tensor, hidden: Tensor, content: Tensor, draw: Draw, side: int) -> tuple[Tensor, Tensor]:
        """Of one draw, the attention of each word summed over layers [M, R, R], and the noised latents [1, C, r, r]."""
        recording = Recording.of(self._evidence, content, keep_maps=True)
        timesteps = torch.tensor([draw.timestep(self.backbone.schedule_length)], device=latents.device)
        noise = draw.noise(tuple(latents.shape[1:]))[None].to(latents.device)
        noised = self.backbone.add_noise(latents, noise, timesteps)
        with during(self.backbone.attention, recording, self.prompt, pooled_latent(latents)):
            self.backbone.predict_noise(noised, timesteps, hidden)
        assert recording.maps is not None
        total = torch.zeros(int(content.sum()), side, side)
        for attn_BHNM in recording.maps:
            own = round(attn_BHNM.shape[-2] ** 0.5)
            maps = attn_BHNM[0].mean(0).T[content[0]].reshape(1, -1, own, own)
            total += torch.nn.functional.interpolate(maps, (side, side), mode="bicubic")[0].cpu()
        return total, noised

    def _words(self, text: str) -> list[str]:
        """The content tokens of a text."""
        ids = self.backbone.tokenizer(text, truncation=True, max_length=self.backbone.max_tokens).input_ids[1:-1]
        return [piece.removesuffix("</w>") for piece in self.backbone.tokenizer.convert_ids_to_tokens(ids)]

    def _picture(self, image: ImageSource) -> np.ndarray:
        loaded = load_image(image, max_pixels=40_000_000)
        return to_array(resize(loaded, parity=self._parity, resolution=self.backbone.resolution))

    def _latents(self, images: Sequence[ImageSource]) -> Tensor:
        pictures = (np.stack([self._picture(image) for image in images[i : i + 16]]) for i in range(0, len(images), 16))
        return torch.cat([self.backbone.encode_images(batch) for batch in pictures])

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        for number, text in enumerate(texts):
            if not text.strip():
                raise TextError(f"text {number + 1} of {len(texts)} is empty; give it at least one word")
        out = self.backbone.encode_texts(list(texts))
        for text, cut in zip(texts, out.truncated, strict=True):
            if cut:
                warnings.warn(
                    f"text is longer than the model's {self.backbone.max_tokens} tokens and was cut: {text[:60]!r}…",
                    stacklevel=3,
                )
        return out.hidden, out.content


def _stretched(maps: Tensor) -> np.ndarray:
    """Each map [M, R, R] to 0…1 of its own range."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-9)).numpy()
