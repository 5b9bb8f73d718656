"""The engine: (pair, draw) requests to evidence, in full batches, each once, resumable.

Shapes: B rows of a batch, R rows of a shard, P poolings, L layers, H heads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsd.attention import Recording, during
from dsd.backbones import StableDiffusion, device_of, load_diffusion
from dsd.draws import Draw, draws
from dsd.encoding import UNCONDITIONAL, Arrays, Encodings, all_texts, diffusion_encodings, read_all
from dsd.errors import DataError
from dsd.matching import MatchingExample, Pair, pairs, read_examples
from dsd.params import ContrastiveMethod, EvidenceParams, Params
from dsd.preparation import Pictures
from dsd.progress import progress
from dsd.prompts import AttentionPrompt, pooled_latent
from dsd.schedules import exhaustive
from dsd.store import Store, digest, file_digest


@dataclass(frozen=True)
class Shard:
    """Rows (pair, draw) that are computed and stored together under the key of their content."""

    key: str
    rows: tuple[tuple[Pair, Draw], ...]


@dataclass(frozen=True)
class Evidence:
    """What was seen, for pairs in the order of `pairs` and draws in the order of `draws` (E pairs, K draws)."""

    pairs: list[Pair]
    draws: list[Draw]
    attention: np.ndarray  # [E, K, P, L, H] pooled attention
    attribution: np.ndarray  # [E, K, L, H] weight of each head, eq. 7
    error: np.ndarray  # [E, K] ‖ε − ε_θ‖², mean over the latent


def wanted(examples: Sequence[MatchingExample]) -> list[Pair]:
    """The pairs of the examples, and the unconditional pass of every image that is compared with another image."""
    alone = {Pair(image, UNCONDITIONAL): None for e in examples if len(e.images) > 1 for image in e.images}
    return [*pairs(examples), *alone]


def plan(requests: Sequence[tuple[Pair, Draw]], source: str, size: int) -> list[Shard]:
    """Cuts the requests into shards; `source` is the digest of backbone, prompt and evidence params."""
    chunks = (tuple(requests[i : i + size]) for i in range(0, len(requests), size))
    return [Shard(f"evidence-{digest(source, [[*pair, *draw] for pair, draw in rows])}", rows) for rows in chunks]


class Engine:
    """Evidence of one backbone under one prompt (or none)."""

    def __init__(
        self,
        backbone: StableDiffusion,
        prompt: AttentionPrompt | None,
        evidence: EvidenceParams,
        latents: Encodings,
        texts: Encodings,
        batch_size: int,
    ) -> None:
        self.backbone, self.evidence, self.batch_size = backbone, evidence, batch_size
        self.prompt = prompt.to(backbone.device) if prompt is not None else None
        self._latents, self._texts = latents, texts

    def compute(self, rows: Sequence[tuple[Pair, Draw]]) -> Arrays:
        """The evidence of the rows: attention [R, P, L, H], attribution [R, L, H], error [R]; float32."""
        batches = [self._batch(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    @torch.inference_mode()
    def _batch(self, rows: Sequence[tuple[Pair, Draw]]) -> Arrays:
        device = self.backbone.device
        latents = torch.from_numpy(self._latents([pair.image for pair, _ in rows])["latents"]).to(device)
        text = self._texts([pair.text for pair, _ in rows])
        # An unconditional row has no content token; its attention is never read, and begin stands in for it.
        content = torch.from_numpy(text["content"]).to(device)
        content[:, 0] |= ~content.any(-1)
        noise = {draw: draw.noise(tuple(latents.shape[1:])) for _, draw in dict.fromkeys(rows)}
        attention, attribution, error = observe(
            self.backbone,
            self.prompt,
            self.evidence,
            latents,
            torch.from_numpy(text["hidden"]).to(device),
            content,
            torch.tensor([draw.timestep(self.backbone.schedule_length) for _, draw in rows], device=device),
            torch.stack([noise[draw] for _, draw in rows]).to(device),
        )
        found = {"attention": attention, "attribution": attribution, "error": error}
        return {name: tensor.float().cpu().contiguous().numpy() for name, tensor in found.items()}

    def fill(self, shards: Sequence[Shard], store: Store, title: str) -> int:
        """Computes the shards that the store lacks or holds damaged; returns how many (pair, draw) rows it computed."""
        computed = 0
        bar = progress(total=sum(len(shard.rows) for shard in shards), desc=title, unit="row", unit_scale=True)
        for shard in shards:
            if shard.key not in store or store.read(shard.key) is None:
                store.write(shard.key, self.compute(shard.rows))
                computed += len(shard.rows)
            bar.update(len(shard.rows))
        bar.close()
        return computed


def observe(
    backbone: StableDiffusion,
    prompt: AttentionPrompt | None,
    evidence: EvidenceParams,
    latents: Tensor,
    hidden: Tensor,
    content: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One U-Net pass: pooled attention [B, P, L, H], attribution [B, L, H] and denoising error [B].

    latents and noise [B, C, r, r], hidden [B, M, D], content [B, M] bool, timesteps [B]. Differentiable in the prompt.
    """
    tokens = content if evidence.tokens == "content" else torch.ones_like(content)
    recording = Recording.of(evidence, tokens)
    with during(backbone.attention, recording, prompt, pooled_latent(latents)):
        predicted = backbone.predict_noise(backbone.add_noise(latents, noise, timesteps), timesteps, hidden)
    return *recording.stacked(), (noise - predicted).square().mean((1, 2, 3))


def source_digest(params: Params, backbone: StableDiffusion, prompt: str | None) -> str:
    """Everything but the rows that evidence depends on."""
    settings = params.evidence.model_dump(exclude={"shard"})
    return digest(backbone.digest, prompt, settings, params.images.resolution, str(backbone.dtype))


def variants(params: Params) -> list[str]:
    """The prompts ("none", "few-shot") that the methods need evidence under."""
    return sorted({m.prompt for m in params.methods.values() if not isinstance(m, ContrastiveMethod)}, reverse=True)


def shards_of(
    params: Params,
    backbone: StableDiffusion,
    variant: str,
    trained: Path,
    examples: Sequence[MatchingExample],
) -> list[Shard]:
    """The shards that hold the evidence of a dataset's examples under a variant of the prompt."""
    prompt = file_digest(trained / "prompt.safetensors") if variant == "few-shot" else None
    asked, seen = wanted(examples), draws(params.noise, params.seed)
    order = exhaustive(len(asked), len(seen))
    requests = [(asked[p], seen[d]) for p, d in order]
    return plan(requests, source_digest(params, backbone, prompt), params.evidence.shard)


def read_evidence(
    params: Params,
    backbone: StableDiffusion,
    variant: str,
    trained: Path,
    scored: Path,
    examples: Sequence[MatchingExample],
) -> Evidence:
    """The stored evidence of the examples; raises DataError where the stage `score` has not run with these params."""
    store, shards = Store(scored), shards_of(params, backbone, variant, trained, examples)
    parts = []
    for shard in shards:
        arrays = store.read(shard.key)
        if arrays is None:
            raise DataError(f"{scored}: no evidence {shard.key}; run the stage `score` again")
        parts.append(arrays)
    seen = draws(params.noise, params.seed)
    stacked = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    by_pair = {name: array.reshape(-1, len(seen), *array.shape[1:]) for name, array in stacked.items()}
    return Evidence(wanted(examples), seen, **by_pair)


def score(name: str, params: Params, prepared: Path, cached: Path, trained: Path, target: Path) -> dict[str, Any]:
    """Stores the evidence of the test examples of dataset `name` for every method; resumes where it was stopped."""
    store, device, started = Store(target), device_of(params.runtime.device), time.perf_counter()
    examples = read_examples(prepared / "examples.parquet", "test")
    pictures, texts = Pictures(prepared / "images.parquet"), all_texts(read_all(prepared))
    backbone = load_diffusion(params.backbones[params.backbone], device)
    tables = diffusion_encodings(backbone, pictures, texts, params.images.resolution, Store(cached))
    keep: set[str] = set()
    counts: dict[str, Any] = {"pairs": len(pairs(examples)), "rows": 0, "computed": 0}
    for variant in variants(params):
        prompt = (
            AttentionPrompt.load(trained / "prompt.safetensors", backbone.digest) if variant == "few-shot" else None
        )
        shards = shards_of(params, backbone, variant, trained, examples)
        engine = Engine(backbone, prompt, params.evidence, *tables, params.runtime.batch_size)
        counts["computed"] += engine.fill(shards, store, f"score {name}, prompt {variant}")
        counts["rows"] += sum(len(shard.rows) for shard in shards)
        keep |= {shard.key for shard in shards}
    store.prune(keep)
    return {**counts, "corrupt": store.corrupt, "seconds": round(time.perf_counter() - started, 2)}
