"""The public API: score images against texts in five lines.

Shapes: I images, T texts, K draws, M words, R image side in pixels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd import EMBEDDED
from dsd.arguments import check_choice, check_count, check_path, check_texts, image_list, option_errors, text_list
from dsd.config import (
    EXHAUSTIVE,
    BackboneParams,
    CrossAttentionMethod,
    DenoisingMethod,
    EvidenceParams,
    NoiseParams,
    ScheduledMethod,
)
from dsd.config.base import LONGEST_SIDE
from dsd.data.draws import Draw, draws
from dsd.data.examples import Pair
from dsd.data.images import MAX_PIXELS, ImageSource, image_id, load_image, resize, to_array
from dsd.engine.encodings import Arrays, embeddings, remember
from dsd.engine.engine import Engine, cores
from dsd.engine.forward import row_values
from dsd.errors import ImageError, ParamsError
from dsd.models import device_of, load_diffusion
from dsd.models.attention import Capture
from dsd.models.checkpoint import family_of, folder_of, token_ids
from dsd.models.prompts import AttentionPrompt
from dsd.progress import progress
from dsd.scorers.evidence import UNCONDITIONAL

if TYPE_CHECKING:
    from dsd.models.stable_diffusion import StableDiffusion

KEPT_TEXTS = 512  # encodings in memory: 240 kB each with Stable Diffusion 1.x
AT_ONCE = 16  # batches of evidence in memory
P = ParamSpec("P")
Result = TypeVar("Result")
MethodName = Literal["cross-attention", "denoising"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
Row = tuple[Pair, Draw]
Picture = NDArray[np.uint8]  # [R, R, 3] as `Matcher.picture` returns it


@dataclass(frozen=True)
class Heatmap:
    """The cross-attention of each word of a text over an image, each map scaled to 0…1."""

    words: list[str]
    maps: np.ndarray  # [M, R, R] float32
    picture: np.ndarray  # [R, R, 3] uint8


def on_own_device(function: Callable[P, Result]) -> Callable[P, Result]:
    """Run a function without the default device and the autocast of the caller's session; tensors name theirs."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> Result:
        with torch.device("cpu"), ExitStack() as off:
            for device in ("cpu", "cuda"):
                off.enter_context(torch.autocast(device, enabled=False))
            return function(*arguments, **options)

    return run


class Matcher:
    """Scores images against texts with a frozen text-to-image diffusion model; higher is better.

    Examples:
        >>> matcher = Matcher.from_pretrained()  # the embedded checkpoint
        >>> matcher.score(["photo.png"], ["a red circle", "a blue square"])  # Tensor [1, 2]
    """

    def __init__(
        self,
        backbone: StableDiffusion,
        prompt: AttentionPrompt | None,
        method: MethodName | ScheduledMethod,
        noise: NoiseParams,
        evidence: EvidenceParams,
        *,
        parity: int | None,
        batch_size: int,
        seed: int,
        resolution: int | None = None,
    ) -> None:
        """`method` is a row of params.yaml, or a name; `resolution` is the backbone's own by default."""
        self.backbone, self.prompt = backbone, None if prompt is None else prompt.to(backbone.device)
        self._row = _row(method, prompt, noise) if isinstance(method, str) else method
        self.method = cast(MethodName, self._row.scorer)
        self.draws, self._evidence, self._batch_size = draws(noise, seed), evidence, batch_size
        self._parity, self._resolution = parity, resolution or backbone.resolution
        self._known: dict[str, Arrays] = {}
        self._reading = Lock()  # tokenizers are not thread-safe

    @classmethod
    @on_own_device
    def from_pretrained(
        cls,
        path_or_id: str | Path = EMBEDDED,
        prompt: str | Path | None = None,
        method: str | None = None,
        *,
        revision: str | None = None,
        family: str | None = None,
        config: str | Path | None = None,
        prediction: Literal["epsilon", "v_prediction"] | None = None,
        device: str | torch.device = "auto",
        attention: str = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
        draws_per_level: int = 1,
        scale: float = 20.0,
        parity: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Matcher:
        """Open a checkpoint and optionally a trained attention prompt.

        Args:
            path_or_id: a folder or hub id in the diffusers layout, or a file .safetensors with `config`, a folder or
                hub id of the same architecture; by default the embedded checkpoint, which knows drawn scenes only.
            method: "cross-attention" (DSD) or "denoising" (Diffusion Classifier); by default cross-attention with a
                prompt, which is trained for it, else denoising, the best without training.
            family: detected from the files by default.
            prediction: as in params.yaml.
            attention: as in params.yaml.
            levels: noise levels in (0, 1).
            scale: λ of eq. 3, from 1 to 60.
            parity: resize images to this side in pixels first, as in a comparison with CLIP.

        Raises:
            ParamsError: an option is wrong.
            CheckpointError: the checkpoint or the prompt does not load.
        """
        if method is None:
            method = "denoising" if prompt is None else "cross-attention"
        check_choice("method", method, METHODS)
        check_path("path_or_id", path_or_id)
        check_count("batch_size", batch_size)
        if prompt is not None:
            check_path("prompt", prompt)
        if config is not None:
            check_path("config", config)
        if parity is not None:
            check_count("parity", parity)
            if parity > LONGEST_SIDE:
                raise ParamsError(f"parity: must be at most {LONGEST_SIDE} pixels, found {parity}")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ParamsError(f"seed: must be a whole number from 0 to {2**32 - 1}, found {seed!r}")
        if not isinstance(device, str | torch.device):
            raise ParamsError(f"device: must be a name such as auto, cpu or cuda, found {device!r}")
        with option_errors():
            row = BackboneParams(
                family=family or "stable-diffusion",
                source=str(path_or_id),
                revision=revision,
                config=None if config is None else str(config),
                prediction=prediction,
                lora=None,
                dtype=dtype,
            )
            noise = NoiseParams(levels=levels, draws_per_level=draws_per_level, sample=0)
            tokens = {"none": "all", "few-shot": "content"}  # as in params.yaml, by a search
            evidence = EvidenceParams(poolings=("logsumexp",), scale=scale, normalise=False, tokens=tokens, shard=1)
        if family is None and (detected := family_of(folder_of(row))):
            row = row.model_copy(update={"family": detected})
        backbone = load_diffusion(row, device_of(str(device)), attention)
        learned = None if prompt is None else AttentionPrompt.load(Path(prompt), backbone.digest)
        chosen = cast(MethodName, method)
        return cls(backbone, learned, chosen, noise, evidence, parity=parity, batch_size=batch_size, seed=seed)

    def score(self, images: Sequence[ImageSource] | ImageSource, texts: Sequence[str] | str) -> Tensor:
        """Return scores [I, T], higher is better.

        Args:
            images: paths, PIL images, the bytes of files, arrays [H, W, 3 or 4] or [H, W], tensors [C, H, W] or
                [H, W, C], one of these, or a batch of arrays or tensors. Numbers are uint8, or floats in 0…1.
            texts: a text or several. One over the model's token limit is cut with a warning.

        Raises:
            ImageError: an image cannot be read.
            TextError: a text is empty, or has no token but special ones.
        """
        images, texts = image_list(images), text_list(texts)
        pictures = [self.picture(image) for image in images]
        if not pictures or not texts:
            return torch.zeros(len(pictures), len(texts), dtype=torch.float32, device="cpu")
        [scores_IT] = self.score_many([(pictures, texts)])
        for remark in self.remarks(texts):
            warnings.warn(remark, stacklevel=2)
        return scores_IT

    def remarks(self, texts: Sequence[str]) -> list[str]:
        """Return what a reader of the scores of these texts should know, a line each."""
        lines = []
        if words := self.unknown_words(texts):
            lines.append(f"the text encoder has not learned: {', '.join(words[:10])}")
        for same in self.indistinct(texts):
            lines.append(f"to the model these are one text, a tie: {' = '.join(map(repr, same))}")
        return [*lines, *map(self._was_cut, self.cut(texts))]

    def _was_cut(self, text: str) -> str:
        return f"text is longer than the model's {self.backbone.max_tokens} tokens and was cut: {text[:60]!r}…"

    def shares(self, scores_IT: Tensor) -> Tensor:
        """Return the softmax of scores over the texts of each image, [I, T].

        Of denoising, the posterior of the Diffusion Classifier with equal priors (Li et al. 2023, eq. 6): the error is
        there a sum over the values of the latent, here a mean. Of cross-attention, with λ of eq. 3 as the inverse
        temperature.
        """
        if not isinstance(scores_IT, Tensor) or scores_IT.ndim != 2 or not scores_IT.isfinite().all():
            raise ParamsError("scores: must be those of `score`, a finite tensor [I, T]")
        side = self._resolution // self.backbone.scale
        values = self.backbone.latent_channels * side**2 if self.method == "denoising" else self._evidence.scale
        return (scores_IT * float(values)).softmax(-1)

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """Return the words of several letters that the tokenizer splits into letters: it has not learned them."""
        words = list(dict.fromkeys(word for text in texts for word in re.findall(r"[^\W\d_]{2,}", text)))
        if not words:
            return []
        with self._reading:
            ids = token_ids(self.backbone.tokenizer, words)  # with begin and end
        return [word for word, split in zip(words, ids, strict=True) if len(split) - 2 >= len(word)]

    @on_own_device
    def score_many(self, problems: Sequence[tuple[Sequence[Picture], Sequence[str]]]) -> list[Tensor]:
        """Score several (images, texts) together in full batches; what they share is computed once.

        Texts are not checked; see `check_texts` and `cut`.
        """
        by_id = {image_id(image): image for images, _ in problems for image in images}
        tables = [[[Pair(image_id(i), t) for t in self._columns(texts)] for i in images] for images, texts in problems]
        rows = list(dict.fromkeys((pair, d) for table in tables for row in table for pair in row for d in self.draws))
        values = self.values(rows, self.latents(by_id))
        values_ITK = ([[[values[pair, d] for d in self.draws] for pair in row] for row in table] for table in tables)
        return [self._reduced(torch.tensor(table, dtype=torch.float32, device="cpu")) for table in values_ITK]

    @on_own_device
    def values(self, rows: Sequence[Row], latents: Mapping[str, Arrays]) -> dict[Row, float]:
        """Return the value of every row (pair, draw), in full batches; higher is better.

        latents: of the rows' images, see `latents`.
        """
        texts = self._encoded({pair.text: None for pair, _ in rows})
        engine = Engine(
            self.backbone, self.prompt, self._evidence, partial(_stacked, latents), partial(_stacked, texts),
            self._batch_size,
        )  # fmt: skip
        values: dict[Row, float] = {}
        size = AT_ONCE * self._batch_size
        for n in progress(range(0, len(rows), size), desc="score", leave=False):
            part = rows[n : n + size]
            values_R = row_values(engine.compute(part), self._row, self._evidence.poolings)
            values |= zip(part, values_R.tolist(), strict=True)
        self._batch_size = engine.batch_size  # halved if memory was too small
        return values

    def rows(self, images: int, texts: int) -> int:
        """Return the number of (pair, draw) rows of a problem of this size."""
        return images * len(self._columns([""] * texts)) * len(self.draws)

    @property
    def full(self) -> int:
        """The number of rows that are computed at once."""
        return self._batch_size * cores(self.backbone.device)

    def _columns(self, texts: Sequence[str]) -> list[str]:
        """Add the unconditional pass, which makes scores of different images comparable."""
        return [*texts, UNCONDITIONAL] if self.compares_unconditional else [*texts]

    @property
    def compares_unconditional(self) -> bool:
        """Whether a score is a difference from the unconditional pass on the same image."""
        return self._row.compares_unconditional

    def _reduced(self, values_ITK: Tensor) -> Tensor:
        means_IT = values_ITK.mean(-1)
        return means_IT[:, :-1] - means_IT[:, -1:] if self.compares_unconditional else means_IT

    def heatmap(self, image: ImageSource, text: str) -> Heatmap:
        """Return the cross-attention of each word over the image, averaged over layers, heads and draws.

        A text over the model's token limit is cut with a warning. For errors see `score`.
        """
        [text] = text_list([text])
        for cut in self.cut([text]):
            warnings.warn(self._was_cut(cut), stacklevel=2)
        return self.heatmap_of(self.picture(image), text)

    @on_own_device
    @torch.inference_mode()
    def heatmap_of(self, picture: Picture, text: str) -> Heatmap:
        """Return the `heatmap` of an image that `picture` returned."""
        latents, hidden, content = self._encoded_pair(picture, text)
        maps = [self._maps(latents, hidden, content, draw)[0] for draw in self.draws]
        return Heatmap(self._words(text), _stretched(torch.stack(maps).sum(0)), picture)

    @on_own_device
    @torch.inference_mode()
    def heatmaps(self, image: ImageSource, text: str) -> dict[float, Heatmap]:
        """Return for each noise level the `heatmap` of its first draw, over the noised image."""
        array = self.picture(image)
        latents, hidden, content = self._encoded_pair(array, text)
        first = {draw.level: draw for draw in reversed(self.draws)}
        heatmaps = {}
        for level, draw in sorted(first.items()):
            maps, noised = self._maps(latents, hidden, content, draw)
            heatmaps[level] = Heatmap(self._words(text), _stretched(maps), self.backbone.decode_images(noised)[0])
        return heatmaps

    def _maps(self, latents: Tensor, hidden: Tensor, content: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return the attention of each word at one draw, summed over layers [M, R, R], and the noised latents."""
        capture = Capture.of(self._evidence, content, keep_maps=True)
        timesteps = torch.tensor([draw.timestep(self.backbone.schedule_length)], device=latents.device)
        noise = draw.noise(tuple(latents.shape[1:]))[None].to(latents.device)
        noised = self.backbone.add_noise(latents, noise, timesteps)
        prompt = None if self.prompt is None else self.prompt.bind(latents)
        self.backbone.predict_noise(noised, timesteps, hidden, capture=capture, prompt=prompt)
        assert capture.maps is not None
        side = self._resolution
        total = torch.zeros(int(content.sum()), side, side, dtype=torch.float32, device="cpu")
        for attn_BHNM in capture.maps:
            size = round(attn_BHNM.shape[-2] ** 0.5)
            maps = attn_BHNM[0].mean(0).T[content[0]].reshape(1, -1, size, size)
            total += torch.nn.functional.interpolate(maps, (side, side), mode="bicubic")[0].cpu()
        return total, noised

    def _words(self, text: str) -> list[str]:
        """Return the content tokens of a text."""
        limit = self.backbone.max_tokens
        with self._reading:
            ids = self.backbone.tokenizer(text, truncation=True, max_length=limit).input_ids[1:-1]
        return [piece.removesuffix("</w>") for piece in self.backbone.tokenizer.convert_ids_to_tokens(ids)]

    def picture(self, image: ImageSource, max_pixels: int = MAX_PIXELS) -> Picture:
        """Load an image at the model's resolution; raise ImageError if it cannot be read or is not one image."""
        if len(several := image_list(image)) != 1:
            raise ImageError(f"one image is needed, found {len(several)}")
        loaded = load_image(several[0], max_pixels=max_pixels)
        return to_array(resize(loaded, parity=self._parity, resolution=self._resolution))

    def cut(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that exceed the model's token limit."""
        encoded = self._encoded(dict.fromkeys(texts))
        return [text for text in texts if encoded[text]["truncated"]]

    def indistinct(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the groups of different texts that are one to the model, after the cut or by its tokenizer."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        different = list(dict.fromkeys(texts))
        with self._reading:
            for text, ids in zip(different, self.backbone.text_ids(different), strict=True):
                groups.setdefault(ids, []).append(text)
        return [same for same in groups.values() if len(same) > 1]

    @on_own_device
    def latents(self, images: Mapping[str, Picture]) -> dict[str, Arrays]:
        """Return the latent of each image, by the image's id."""
        ids, encoded = list(images), dict[str, Arrays]()
        for n in range(0, len(ids), 16):
            latents = self.backbone.encode_images(np.stack([images[i] for i in ids[n : n + 16]])).cpu().numpy()
            encoded |= {i: {"latents": latent} for i, latent in zip(ids[n:], latents, strict=False)}
        return encoded

    def _encoded(self, texts: Iterable[str]) -> dict[str, Arrays]:
        """Return hidden [M, D], content [M] and truncated of each text, encoded unless they are in memory."""
        wanted = list(dict.fromkeys(texts))
        with self._reading:
            encoded = {text: self._known[text] for text in wanted if text in self._known}
            if new := [text for text in wanted if text not in encoded]:
                rows = embeddings(self.backbone, new)
                for n, text in enumerate(new):
                    encoded[text] = {name: array[n].copy() for name, array in rows.items()}
            remember(self._known, encoded, KEPT_TEXTS)
        return encoded

    def _encoded_pair(self, image: Picture, text: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents [1, C, r, r], hidden [1, M, D] and content [1, M] of a pair."""
        check_texts([text])
        arrays = _stacked(self._encoded([text]), [text])
        hidden, content = (torch.from_numpy(arrays[name]).to(self.backbone.device) for name in ("hidden", "content"))
        return self.backbone.encode_images(image[None]), hidden, content


def _row(name: MethodName, prompt: AttentionPrompt | None, noise: NoiseParams) -> ScheduledMethod:
    """Return the method of this name with the settings of its paper."""
    common: dict[str, Any] = dict(prompt="few-shot" if prompt else "none", levels=noise.levels, schedule=EXHAUSTIVE)
    if name == "denoising":
        return DenoisingMethod(scorer=name, **common)
    return CrossAttentionMethod(scorer=name, pooling="logsumexp", layers="all", heads="weighted", **common)


def _stacked(table: Mapping[str, Arrays], items: Sequence[str]) -> Arrays:
    return {name: np.stack([table[item][name] for item in items]) for name in table[items[0]]}


def _stretched(maps: Tensor) -> np.ndarray:
    """Scale each map [M, R, R] to 0…1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-9)).numpy()
