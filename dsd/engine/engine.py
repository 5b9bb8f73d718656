"""The engine: (pair, draw) requests to evidence, in full batches, each once, resumable.

Shapes: B rows of a batch, R rows of a shard, P poolings, L layers, H heads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd.config import CrossAttentionMethod, DenoisingMethod, EvidenceParams, Params
from dsd.data.examples import Pair
from dsd.engine.batching import Entry, Filled, side_by_side
from dsd.engine.encodings import Arrays
from dsd.models import StableDiffusion
from dsd.models import clip_heads as contrastive
from dsd.models.attention import Recording, during
from dsd.models.checkpoint import DTYPES
from dsd.models.prompts import AttentionPrompt, pooled_latent
from dsd.progress import progress
from dsd.scorers import cross_attention
from dsd.scorers.evidence import Request, Shard
from dsd.store import Store, digest, file_digest
from dsd.versions import versioned

log = logging.getLogger(__name__)

OWN_BATCH = 32  # rows from which on two cores are faster with a batch each than with one that they share

RacedMethod = DenoisingMethod | CrossAttentionMethod  # whose score is a mean over draws
Values = NDArray[np.float32]


class Engine:
    """Evidence of one backbone under one prompt (or none)."""

    def __init__(
        self,
        backbone: StableDiffusion,
        prompt: AttentionPrompt | None,
        evidence: EvidenceParams,
        latents: Callable[[Sequence[str]], Arrays],
        texts: Callable[[Sequence[str]], Arrays],
        batch_size: int,
        cores: int | None = None,
    ) -> None:
        """latents [B, C, r, r] by image id; hidden [T, M, D] and content [T, M] by text.

        `cores`: batches are cut as on a processor of so many, so that two processes' evidence is the same to the bit;
        None: as many as this one has threads.
        """
        self.backbone, self.evidence, self.batch_size = backbone, evidence, batch_size
        self._as_on = cores
        self.prompt = prompt.to(backbone.device) if prompt is not None else None
        self._latents, self._texts = latents, texts

    def compute(self, rows: Sequence[Request]) -> Arrays:
        """The evidence of the rows: attention [R, P, L, H], attribution [R, L, H], error [R]; float32.

        On processors each core has a batch of its own, all of one size: that is faster than to share one, but for the
        last few rows. Where memory does not suffice for a batch, it is halved, from then on, until it does.
        """
        while True:
            try:
                return self._compute(rows)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                log.warning("out of memory: batches of %d from now on (runtime.batch_size)", self.batch_size)

    def _compute(self, rows: Sequence[Request]) -> Arrays:
        count = math.ceil(len(rows) / self.batch_size)
        if apart := self._cores > 1 and len(rows) >= self._cores * min(OWN_BATCH, self.batch_size):
            count = self._cores * math.ceil(count / self._cores)
        chunks = (rows[len(rows) * n // count : len(rows) * (n + 1) // count] for n in range(count))
        inputs = map(self._inputs, chunks)  # in this thread: what the cache lacks is computed while it is read
        if apart:
            with ThreadPoolExecutor(torch.get_num_threads(), "batch", torch.set_num_threads, (1,)) as pool:
                batches = list(pool.map(self._batch, inputs))
        else:
            batches = list(map(self._batch, inputs))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    @property
    def _cores(self) -> int:
        """How many batches are computed at once, where there are as many cores."""
        return self._as_on if self._as_on and self.backbone.device.type == "cpu" else cores(self.backbone.device)

    def _inputs(self, rows: Sequence[Request]) -> tuple[Tensor, ...]:
        """What `observe` asks for after its settings."""
        latents = torch.from_numpy(self._latents([pair.image for pair, _ in rows])["latents"])
        asked, texts = np.unique([pair.text for pair, _ in rows], return_inverse=True)
        text = self._texts(asked.tolist())
        # An unconditional row has no content token; its attention is never read, and begin stands in for it.
        content = torch.from_numpy(text["content"])
        content[:, 0] |= ~content.any(-1)
        timesteps = torch.tensor([draw.timestep(self.backbone.schedule_length) for _, draw in rows])
        noise = {draw: draw.noise(tuple(latents.shape[1:])) for _, draw in dict.fromkeys(rows)}
        stacked = torch.stack([noise[draw] for _, draw in rows])
        return latents, torch.from_numpy(text["hidden"]), content, torch.from_numpy(texts), timesteps, stacked

    @torch.inference_mode()
    def _batch(self, inputs: tuple[Tensor, ...]) -> Arrays:
        there = (tensor.to(self.backbone.device) for tensor in inputs)
        attention, attribution, error = observe(self.backbone, self.prompt, self.evidence, *there)
        found = {"attention": attention, "attribution": attribution, "error": error}
        return {name: tensor.float().cpu().contiguous().numpy() for name, tensor in found.items()}

    def race(
        self, entries: Iterable[Entry], method: RacedMethod, filled: Filled, stored: dict[Request, float]
    ) -> Iterator[Entry]:
        """Runs races side by side, in batches that are full until the last of them; see `side_by_side`."""
        size = self.batch_size * self._cores

        def compute(rows: list[Request]) -> Values:
            return row_values(self.compute(rows), method, self.evidence.poolings)

        return side_by_side(entries, compute, size, filled, stored)

    def fill(
        self,
        shards: Sequence[Shard],
        store: Store,
        title: str,
        keep: Callable[[Arrays], Arrays] = lambda arrays: arrays,
    ) -> int:
        """Computes the shards that the store lacks or holds damaged; returns how many (pair, draw) rows it computed.

        `keep` says what of the evidence is stored.
        """
        computed = 0
        bar = progress(total=sum(len(shard.rows) for shard in shards), desc=title, unit="row", unit_scale=True)
        for shard in shards:
            if shard.key not in store or store.read(shard.key) is None:
                store.write(shard.key, keep(self.compute(shard.rows)))
                computed += len(shard.rows)
            bar.update(len(shard.rows))
        bar.close()
        return computed


def cores(device: torch.device) -> int:
    """How many batches are computed at once."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def observe(
    backbone: StableDiffusion,
    prompt: AttentionPrompt | None,
    evidence: EvidenceParams,
    latents: Tensor,
    hidden: Tensor,
    content: Tensor,
    texts: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One U-Net pass: pooled attention [B, P, L, H], attribution [B, L, H] and denoising error [B].

    latents and noise [B, C, r, r], timesteps [B]; hidden [T, M, D] and content [T, M] bool of each text once, texts [B]
    the number of each row's text. Differentiable in the prompt.
    """
    tokens = content if evidence.tokens == "content" else torch.ones_like(content)
    recording = Recording.of(evidence, tokens[texts])
    with during(backbone.attention, recording, prompt, pooled_latent(latents), texts):
        predicted = backbone.predict_noise(backbone.add_noise(latents, noise, timesteps), timesteps, hidden)
    return *recording.stacked(), (noise - predicted).square().mean((1, 2, 3))


def row_values(arrays: Arrays, method: RacedMethod, poolings: Sequence[str]) -> Values:
    """[R] what each row of evidence says for its pair; the score of a pair is their mean over draws."""
    if isinstance(method, DenoisingMethod):
        return -arrays["error"]
    pooled = arrays["attention"][:, list(poolings).index(method.pooling)]
    found: Values = cross_attention.reduce(pooled, arrays["attribution"], layers=method.layers, heads=method.heads)
    return found


def source_digest(params: Params, backbone: str, trained: Path | None) -> str:
    """Everything but the rows that evidence depends on: of the backbone its digest, of a prompt its file."""
    prompt = None if trained is None else file_digest(trained)
    settings, dtype = params.evidence.model_dump(exclude={"shard"}), DTYPES[params.backbones[params.backbone].dtype]
    return versioned("evidence", digest(backbone, prompt, settings, params.images.resolution, str(dtype)))


@torch.inference_mode()
def cosines(head: contrastive.Head, asked: Sequence[Pair], batch_size: int) -> np.ndarray:
    """CLIP's cosine [E] of every pair."""
    batches = [asked[i : i + batch_size] for i in range(0, len(asked), batch_size)]
    bar = progress(batches, desc="cosines", unit="batch", leave=False)
    return np.concatenate([head(batch).float().cpu().numpy() for batch in bar])
