"""Estimates of what a reproduction needs before anything is downloaded: access, memory, passes, time, disk space.

Numbers of passes are upper bounds: pairs that examples share are computed once. Shapes: L layers, H heads, P poolings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from dsd.config import BackboneParams, DatasetParams, Params
from dsd.datasets import benchmark
from dsd.datasets.protocol import Expected
from dsd.errors import DataError, DsdError, ParamsError
from dsd.models import device_of
from dsd.models.attention import cross_attention_layers
from dsd.models.checkpoint import DTYPES, component_config, remote
from dsd.models.stable_diffusion import unet_skeleton
from dsd.schedules import SCHEDULES
from dsd.scorers.evidence import evidence_prompts, reads_unconditional

BACKWARD = 3  # the cost of a pass and its gradient, in passes
TOKENS = 77  # per text, in every published model
RATE = 1e14  # floating-point operations per second that times assume; scale them to the device


class Need(NamedTuple):
    """A requirement, its amount, and the problem with it, if any."""

    what: str
    where: str
    amount: float
    unit: str
    problem: str | None


@dataclass(frozen=True)
class PassCost:
    """The cost of one pass for one image and text."""

    operations: float  # floating-point
    layers: int
    heads: int
    weights: int  # bytes
    text: int  # bytes of a text's embedding
    latents: int  # bytes of an image's latents

    @classmethod
    def of(cls, row: BackboneParams) -> PassCost:
        """Compute it from the configuration, without weights; raise CheckpointError if there is no valid one."""
        unet = unet_skeleton(component_config(row, "unet"), row.source)
        with torch.device("meta"):
            operations = _operations(unet)
        attention = [module for _, module in cross_attention_layers(unet)]
        size = sum(weight.numel() for weight in unet.parameters()) * DTYPES[row.dtype].itemsize
        text, latents = TOKENS * unet.config.cross_attention_dim, unet.config.in_channels * unet.config.sample_size**2
        heads = max(module.heads for module in attention)
        return cls(operations, len(attention), heads, size, 4 * text, 4 * latents)

    def evidence(self, poolings: int) -> int:
        """Return the bytes of a pass's evidence: pooled attention and attribution of every head, and the error."""
        return 4 * ((poolings + 1) * self.layers * self.heads + 1)


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
    """Yield all requirements in the order of a reproduction; `free`: bytes of disk space."""
    downloads = []
    for name in params.used_backbones:
        row = params.backbones[name]
        where = row.source + (f"@{row.revision}" if row.revision else "")
        downloads.append(_access(f"checkpoint {name}", where, partial(remote, row)))
    for name, dataset in params.datasets.items():
        size = partial(benchmark(dataset.kind).remote, name, dataset)
        downloads.append(_access(f"dataset {name}", dataset.kind, size))
    yield from downloads
    yield from (Need("settings", "", 0, "", line) for line in contradictions(params))
    tested = params.backbones[params.backbone]
    try:
        unet = PassCost.of(tested)
    except DsdError:  # one of the contradictions
        return
    yield _memory(unet, tested.dtype, params.runtime.device)
    stored, operations = 0, 0.0
    for name in params.datasets:
        work = Workload(name, params)
        stored += work.disk(unet)
        if work.texts > params.runtime.kept_texts:
            where = f"{name}, {work.texts * unet.text / 1e9:,.0f} GB, and more than runtime.kept_texts"
            yield Need("texts encoded at each use, not stored", where, work.texts, "texts", None)
        yield Need("passes of the U-Net", f"score {name}", work.scoring, "passes", None)
        if work.training:
            yield Need("passes of the U-Net", f"train {name}", work.training, "passes", None)
        operations += (work.scoring + work.training) * unet.operations
    rate = f"at {RATE / 1e12:g} TFLOP/s, {unet.operations / 1e12:.2g} a pass"
    yield Need("time", rate, operations / RATE / 3600, "h", None)
    total = sum(int(need.amount) for need in downloads) + stored
    problem = f"{(total - free) / 1e9:.1f} GB more than is free" if total > free else None
    yield Need("disk", "downloads, latents, texts and evidence", total, "bytes", problem)


def contradictions(params: Params) -> Iterator[str]:
    """Yield a line for each setting that local files, or the configuration of the backbone, contradict.

    No weight is read; of a hub repository only configurations are fetched.
    """
    for name in params.used_backbones:
        lora = params.backbones[name].lora
        if lora is not None and not Path(lora).is_file():
            yield f"backbones.{name}.lora: {lora}: no such file"
    for name, dataset in params.datasets.items():
        try:
            few_shot = expected_size(name, dataset).few_shot(dataset.few_shot)
            dataset.check_learning(name, params, few_shot)
        except (DsdError, ValueError) as error:
            yield str(error)
    tested = params.backbones[params.backbone]
    try:
        layers = len(cross_attention_layers(unet_skeleton(component_config(tested, "unet"), tested.source)))
        blocks = component_config(tested, "vae").get("block_out_channels", ())
    except DsdError as error:
        yield str(error)
        return
    rows = {f"methods.{name}": getattr(row, "layers", None) for name, row in params.methods.items()}
    for key, last in (*rows.items(), *(("ablations", last) for last in params.ablations.layers)):
        if isinstance(last, int) and last > layers:
            yield f"{key}.layers: {last}, but backbone {params.backbone} has {layers} layers of cross-attention"
    if params.images.resolution % (factor := 2 ** max(len(blocks) - 1, 0)):
        yield f"images.resolution: {params.images.resolution}, must be a multiple of {factor}, the VAE's reduction"


def check(params: Params) -> None:
    """Raise ParamsError with the first of the `contradictions`."""
    for line in contradictions(params):
        raise ParamsError(line)


def expected_size(name: str, row: DatasetParams) -> Expected:
    """Return the estimated size of dataset `name`; raise DataError, which names it, if its files do not tell."""
    try:
        return benchmark(row.kind).expected(row)
    except DsdError as error:
        raise DataError(f"datasets.{name}: {error}") from None


def _access(what: str, where: str, size: Callable[[], int]) -> Need:
    try:
        return Need(what, where, size(), "bytes", None)
    except DsdError as error:
        return Need(what, where, 0, "bytes", str(error))


def _memory(unet: PassCost, dtype: str, device_name: str) -> Need:
    """Require the memory of the U-Net's weights; batches are halved until they fit into the rest."""
    device = device_of(device_name)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    problem = None if available is None or unet.weights < available else f"{available / 1e9:.1f} GB are free"
    return Need("memory of the device", f"U-Net in {dtype}", unet.weights, "bytes", problem)


class Workload:
    """Upper bounds of the passes and the disk space of dataset `name`."""

    def __init__(self, name: str, params: Params) -> None:
        self._params, self._row, self._noise = params, params.datasets[name], params.noise_of(name)
        self._expected = expected_size(name, self._row)

    @property
    def examples(self) -> int:
        """The number of examples of all splits."""
        expected = self._expected
        validation = round(self._row.validation * expected.learning)
        return expected.test + expected.few_shot(self._row.few_shot) + validation

    @property
    def texts(self) -> int:
        return self._expected.texts * (1 if self._expected.shared else self.examples)

    def disk(self, unet: PassCost) -> int:
        """Return the bytes of latents, text embeddings and evidence.

        Trained weights and CLIP features are negligible, and methods with a schedule store no evidence.
        """
        embeddings = self.texts * unet.text if self.texts <= self._params.runtime.kept_texts else 0
        evidence = self._exhaustive * unet.evidence(len(self._params.evidence.poolings))
        return evidence + embeddings + self.examples * self._expected.images * unet.latents

    @property
    def scoring(self) -> int:
        """Passes of scoring."""
        return self._exhaustive + self._scheduled

    @property
    def _exhaustive(self) -> int:
        """Passes of the methods without a schedule."""
        params, expected = self._params, self._expected
        draws = len(self._noise.levels) * self._noise.draws_per_level
        pairs = expected.images * expected.texts
        texts = max(expected.images, expected.texts)  # a few-shot choice of images has a text for each
        fitting = 0
        if any(method.fits_weights for method in params.methods.values()):
            fitting = min(params.fusion.examples, expected.few_shot(self._row.few_shot))
        passes = 0
        for prompt in evidence_prompts(params.methods):
            alone = expected.images if expected.images > 1 and reads_unconditional(params.methods, prompt) else 0
            passes += expected.test * (pairs + alone) * draws
            passes += fitting * (expected.images * min(texts, params.fusion.candidates) + alone) * draws
        return passes

    @property
    def _scheduled(self) -> int:
        """Passes of the methods with a schedule."""
        params, expected, passes = self._params, self._expected, 0
        for method in params.raced.values():
            schedule = params.schedules[method.schedule]
            kind = SCHEDULES[schedule.kind]
            passes += kind.evaluations_of(schedule, expected.images * expected.texts, params.races)
            if method.compares_unconditional and expected.images > 1:
                passes += expected.images * params.races.draws
        return expected.test * passes

    @property
    def training(self) -> int:
        """Passes of training the attention prompt; a pass and its gradient count as `BACKWARD`."""
        training = self._params.training.get(self._params.prompted or "")
        if training is None:
            return 0
        images, texts = self._expected.images, self._expected.texts
        pairs = min(training.candidates, images) * min(training.candidates, max(images, texts))
        steps = training.epochs * self._expected.few_shot(self._row.few_shot) / training.examples_per_step
        again = training.examples_per_step * pairs > self._params.runtime.batch_size  # each pass is then made twice
        passes = (BACKWARD + again) * round(max(training.least_steps, steps) * training.examples_per_step * pairs)
        # Of n folds, each is left out once: n prompts, trained on the share 1 − 1/n of the examples.
        fits = any(method.fits_weights for method in self._params.methods.values())
        return passes * (self._params.fusion.prompt_folds if fits else 1)
