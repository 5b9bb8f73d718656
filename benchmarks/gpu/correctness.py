"""Whether a GPU computes what the CPU does: the embedded checkpoint's scores, encodings, heat maps, a training step.

Shapes: I images, T texts.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.drift import changed, moved, scores_of
from benchmarks.gpu.bench import EMBEDDED, Bench, Sizes, trainer
from benchmarks.gpu.device import spread, tf32
from benchmarks.gpu.records import Case, Result, Skipped
from dsd.engine.encodings import diffusion_encodings
from dsd.engine.session import Session
from dsd.errors import CheckpointError
from dsd.matcher import Matcher
from dsd.statistics import clustered_mean
from dsd.store import Store


class Arithmetic(NamedTuple):
    """What computes scores. tf32: whether convolutions in float32 may use it, as PyTorch allows it on a GPU."""

    on: str  # "cpu", or "gpu" for the machine's device
    dtype: str = "float32"
    attention: str = "sdpa"
    tf32: bool = True


CPU, GPU = Arithmetic("cpu"), Arithmetic("gpu")
SCORES = {
    "gpu against cpu, float32": (GPU, CPU),
    "bfloat16 against float32": (GPU._replace(dtype="bfloat16"), GPU),
    "float16 against float32": (GPU._replace(dtype="float16"), GPU),
    "gpu without TF32 against cpu, float32": (GPU._replace(tf32=False), CPU),
    "xformers against sdpa, float32": (GPU._replace(attention="xformers"), GPU),
}


def cases(sizes: Sizes) -> list[Case]:
    """Return the cases, the most important first."""
    examples = {"examples": sizes.examples}
    scores = [
        Case(f"scores, {name}", {**examples, "compared": [list(new), list(old)]}, 8, partial(scored, new, old))
        for name, (new, old) in SCORES.items()
    ]
    several = []
    for dtype in ("float32", "bfloat16"):
        maps = {**examples, "heatmaps": sizes.heatmaps, "dtype": dtype}
        step = {**examples, "examples_per_step": sizes.examples_per_step, "dtype": dtype}
        several.append(Case(f"heat maps, {dtype}", maps, 6, partial(heat_maps, dtype)))
        several.append(Case(f"training step, {dtype}", step, 6, partial(training_step, dtype)))
    *most, optional = scores
    return [*most, *several, Case("encodings, float32", examples, 6, encodings), optional]


def _session(bench: Bench, arithmetic: Arithmetic) -> Session:
    device = bench.machine.device.type if arithmetic.on == "gpu" else "cpu"
    return bench.embedded(device, arithmetic.dtype, arithmetic.attention)


def _scores(bench: Bench, arithmetic: Arithmetic) -> dict[str, list[np.ndarray]]:
    """Return the scores [I, T] of every example by method, computed once in a run."""
    if arithmetic not in bench.scores:
        session = _session(bench, arithmetic)
        engine = session.engine("none")
        try:
            engine.backbone.open()
        except CheckpointError as error:
            if arithmetic.attention == "xformers":
                raise Skipped(str(error)) from None
            raise
        with tf32(arithmetic.tf32):
            bench.scores[arithmetic] = scores_of(engine, session.params, session.examples("test"))
    return bench.scores[arithmetic]


def scored(new: Arithmetic, old: Arithmetic, bench: Bench) -> Result:
    """Return by method how far scores move, relative to the mean spread of an example, and the share of examples with
    another best candidate. Latents and text embeddings are the same on both sides."""
    new_scores, old_scores, results = _scores(bench, new), _scores(bench, old), Result()
    clusters = [example.cluster for example in _session(bench, CPU).examples("test")]
    options = dict(bench.params.evaluate.model_dump(), seed=bench.params.seed)
    for method, full in old_scores.items():
        drifts, hits = moved(full, new_scores[method]), changed(full, new_scores[method])
        share = clustered_mean(hits, clusters, [np.ones(len(hits), dtype=bool)], **options)
        results[method] = {"drift": spread(drifts), "largest": float(drifts.max()), "changed": share.as_dict()}
    return results


def encodings(bench: Bench) -> Result:
    """Return how far latents and text embeddings move from the CPU to the device, relative to their deviation, with
    TF32 in convolutions as PyTorch allows it, and without."""
    session = _session(bench, CPU)
    images, texts, params = session.images, session.texts, session.params
    items = {"latents": images.ids[: params.runtime.batch_size], "hidden": texts}
    on_cpu = {key: table(items[key])[key] for key, table in zip(items, session.diffusion_encodings, strict=True)}
    backbone, results = _session(bench, GPU).backbone, Result()
    for name, allowed in {"with TF32": True, "without TF32": False}.items():
        store = Store(bench.folder / f"encodings, {name}")
        sizes = params.images.resolution, store, params.runtime.kept_texts
        with tf32(allowed):
            tables = diffusion_encodings(backbone, images, texts, *sizes)
            on_gpu = {key: table(items[key])[key] for key, table in zip(items, tables, strict=True)}
        for key, reference in on_cpu.items():
            drifts = np.abs(on_gpu[key] - reference).ravel() / reference.std()
            results[f"{key} {name}"] = {"drift": spread(drifts), "largest": float(drifts.max())}
    return results


def heat_maps(dtype: str, bench: Bench) -> Result:
    """Return the mean difference of each word's heat map, in 0…1, from that of the CPU in float32."""
    session = _session(bench, CPU)
    source, images = session.params.backbones[EMBEDDED].source, session.images
    examples = session.examples("test")[: bench.sizes.heatmaps]

    def maps(device: str, dtype: Any) -> list[np.ndarray]:
        matcher = Matcher.from_pretrained(source, method="cross-attention", device=device, dtype=dtype)
        return [matcher.heatmap(images[example.images[0]], example.texts[0]).maps for example in examples]

    compared = zip(maps(bench.machine.device.type, dtype), maps("cpu", "float32"), strict=True)
    differences = np.concatenate([np.abs(new - old).mean((1, 2)) for new, old in compared])
    return {"difference": spread(differences), "largest": float(differences.max()), "images": len(examples)}


def training_step(dtype: str, bench: Bench) -> Result:
    """Return how far loss and gradient of the first training step move from those of the CPU in float32."""

    def first(arithmetic: Arithmetic) -> tuple[float, torch.Tensor]:
        training = trainer(_session(bench, arithmetic), examples_per_step=bench.sizes.examples_per_step)
        loss = training.advance()["loss"]
        return loss, torch.cat([weight.grad.float().cpu().ravel() for weight in training.weights])

    (loss, gradient), (reference_loss, reference) = first(GPU._replace(dtype=dtype)), first(CPU)
    return {
        "loss": loss,
        "reference_loss": reference_loss,
        "gradient_difference": float((gradient - reference).norm() / reference.norm()),
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(gradient, reference, dim=0)),
        "parameters": len(reference),
    }
