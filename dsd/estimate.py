"""What a reproduction will need, told before anything is fetched or computed: access, memory, passes, disk.

Passes are at most what is told: pairs that examples share are seen once. Shapes: L layers, H heads, P poolings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from dsd.config import (
    Params,
    backbone_of,
    noise_of,
    prompted,
    raced,
)
from dsd.datasets import benchmark
from dsd.errors import DsdError
from dsd.models import device_of
from dsd.models.attention import cross_attention_layers
from dsd.models.checkpoint import DTYPES, component_config, remote
from dsd.models.stable_diffusion import unet_skeleton
from dsd.schedules import SCHEDULES
from dsd.scorers.evidence import evidence_prompts, reads_unconditional

BACKWARD = 3  # passes that a pass and its gradient cost
TOKENS = 77  # of a text, as every published model takes it
RATE = 1e14  # operations a second that a device is taken to do; its own rate is to be set against it


class Need(NamedTuple):
    """Something that is asked for: how much of it, and what stands against it, if anything."""

    what: str
    where: str
    amount: float
    unit: str
    problem: str | None


@dataclass(frozen=True)
class UNet:
    """Of one pass for one picture and text: its floating-point operations, and what of its evidence is kept."""

    operations: float
    layers: int
    heads: int
    weights: int  # bytes
    text: int  # bytes of a text's embedding
    latents: int  # bytes of a picture's

    @classmethod
    def of(cls, params: Params) -> UNet:
        """From the configuration alone: no weights are read.

        Raises:
            CheckpointError: the configuration cannot be had or makes no U-Net.
        """
        row = params.backbones[params.backbone]
        unet = unet_skeleton(component_config(row, "unet"), row.source)
        with torch.device("meta"):
            operations = _operations(unet)
        attention = [module for _, module in cross_attention_layers(unet)]
        size = sum(weight.numel() for weight in unet.parameters()) * DTYPES[row.dtype].itemsize
        text, latents = TOKENS * unet.config.cross_attention_dim, unet.config.in_channels * unet.config.sample_size**2
        heads = max(module.heads for module in attention)
        return cls(operations, len(attention), heads, size, 4 * text, 4 * latents)

    def kept(self, params: Params) -> int:
        """Bytes of the evidence of a pass: pooled attention and attribution of every head, and the error."""
        return 4 * ((len(params.evidence.poolings) + 1) * self.layers * self.heads + 1)


def _operations(unet: UNet2DConditionModel) -> float:
    config = unet.config
    side, more = config.sample_size, {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    latents, text = torch.empty(1, config.in_channels, side, side), torch.empty(1, TOKENS, config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter:
        unet(latents, torch.zeros(1), text, **more)
    return float(counter.get_total_flops())


def needs(params: Params, free: int) -> Iterator[Need]:
    """Everything, in the order in which it will be asked for; `free` are the bytes of disk that are left."""
    fetched = 0
    for need in (*_checkpoints(params), *_datasets(params)):
        fetched += int(need.amount)
        yield need
    try:
        unet = UNet.of(params)
    except DsdError as error:
        yield Need("U-Net", params.backbone, 0, "bytes", str(error))
        return
    yield _memory(params, unet)
    kept, operations = 0, 0.0
    for name in params.datasets:
        scored, trained = passes(name, params)
        kept += disk(name, params, unet)
        count = texts(name, params)
        if count > params.runtime.kept_texts:
            why = f"{name}, {count * unet.text / 1e9:,.0f} GB, and more than runtime.kept_texts"
            yield Need("texts encoded when asked for, and not stored", why, count, "texts", None)
        yield Need("passes of the U-Net", f"score {name}", scored, "passes", None)
        if trained:
            yield Need("passes of the U-Net", f"train {name}", trained, "passes", None)
        operations += (scored + trained) * unet.operations
    yield Need(
        "time", f"at {RATE / 1e12:g} TFLOP/s, {unet.operations / 1e12:.2g} a pass", operations / RATE / 3600, "h", None
    )
    short = f"{(fetched + kept - free) / 1e9:.1f} GB more than is free" if fetched + kept > free else None
    yield Need("disk", "what is fetched, latents, texts and evidence", fetched + kept, "bytes", short)


def _checkpoints(params: Params) -> Iterator[Need]:
    for name in dict.fromkeys([params.backbone, *(backbone_of(params, method) for method in params.methods)]):
        row = params.backbones[name]
        where = row.source + (f"@{row.revision}" if row.revision else "")
        yield _tried(f"checkpoint {name}", where, partial(remote, row))


def _datasets(params: Params) -> Iterator[Need]:
    for name, row in params.datasets.items():
        yield _tried(f"dataset {name}", row.kind, partial(benchmark(row.kind).remote, name, row))


def _tried(what: str, where: str, size: Callable[[], int]) -> Need:
    try:
        return Need(what, where, size(), "bytes", None)
    except DsdError as error:
        return Need(what, where, 0, "bytes", str(error))


def _memory(params: Params, unet: UNet) -> Need:
    """Of the weights of the U-Net alone; a batch is halved until what is left suffices for it."""
    device = device_of(params.runtime.device)
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    short = None if there is None or unet.weights < there else f"{there / 1e9:.1f} GB are free"
    return Need(
        "memory of the device", f"U-Net in {params.backbones[params.backbone].dtype}", unet.weights, "bytes", short
    )


def examples(name: str, params: Params) -> int:
    """How many a dataset has, all splits together."""
    row = params.datasets[name]
    expected = benchmark(row.kind).expected(row)
    return expected.test + round((row.few_shot + row.validation) * expected.learning)


def texts(name: str, params: Params) -> int:
    """How many a dataset has, at most: a text that examples share is there once."""
    row = params.datasets[name]
    expected = benchmark(row.kind).expected(row)
    return expected.texts * (1 if expected.shared else examples(name, params))


def disk(name: str, params: Params, unet: UNet) -> int:
    """Bytes that a dataset's latents, text embeddings and evidence take, at most.

    What is trained takes little, and what CLIP sees of a text about a hundredth of its embedding. A method with a
    schedule leaves no evidence.
    """
    row, count = params.datasets[name], texts(name, params)
    images = examples(name, params) * benchmark(row.kind).expected(row).images
    embeddings = count * unet.text if count <= params.runtime.kept_texts else 0
    return _scored(name, params) * unet.kept(params) + embeddings + images * unet.latents


def passes(name: str, params: Params) -> tuple[int, int]:
    """Passes of the U-Net that scoring and training take on a dataset, at most."""
    return _scored(name, params) + _raced(name, params), _trained(name, params)


def _scored(name: str, params: Params) -> int:
    """Passes of the methods without a schedule."""
    row = params.datasets[name]
    expected = benchmark(row.kind).expected(row)
    noise = noise_of(params, name)
    draws = len(noise.levels) * noise.draws_per_level
    pairs = expected.images * expected.texts
    shown = max(expected.images, expected.texts)  # a few-shot choice of images has a text for each
    fitting = 0
    if any(method.fits_weights for method in params.methods.values()):
        fitting = min(params.fusion.examples, round(row.few_shot * expected.learning))
    scored = 0
    for prompt in evidence_prompts(params.methods):
        alone = expected.images if expected.images > 1 and reads_unconditional(params.methods, prompt) else 0
        scored += expected.test * (pairs + alone) * draws
        scored += fitting * (expected.images * min(shown, params.fusion.candidates) + alone) * draws
    return scored


def _raced(name: str, params: Params) -> int:
    """Passes of the methods with a schedule."""
    row = params.datasets[name]
    expected = benchmark(row.kind).expected(row)
    found = 0
    for method in raced(params).values():
        schedule = params.schedules[method.schedule]
        found += SCHEDULES[schedule.kind].evaluations_of(schedule, expected.images * expected.texts, params.races)
        if method.compares_unconditional and expected.images > 1:
            found += expected.images * len(params.races.levels) * params.races.draws_per_level
    return expected.test * found


def _trained(name: str, params: Params) -> int:
    row = params.datasets[name]
    expected = benchmark(row.kind).expected(row)
    training = params.training.get(prompted(params) or "")
    if training is None:
        return 0
    shown = min(training.candidates, expected.images) * min(training.candidates, max(expected.images, expected.texts))
    steps = max(training.least_steps, training.epochs * row.few_shot * expected.learning / training.examples_per_step)
    return BACKWARD * round(steps * training.examples_per_step * shown)
