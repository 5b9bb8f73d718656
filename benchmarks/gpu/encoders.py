"""Rates of the VAE, in images, and of the text encoders, in texts; both in float32, as the stage `cache` runs them."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from benchmarks.gpu.bench import Bench, Sizes, captions
from benchmarks.gpu.device import rates
from benchmarks.gpu.records import Case, Result


def cases(sizes: Sizes) -> list[Case]:
    """Return a case per checkpoint."""
    shared = {"images": sizes.images, "texts": sizes.texts, "seconds": sizes.seconds, "tiny": sizes.tiny}
    return [
        Case(model, {"model": model, **shared}, 3 * sizes.seconds + 8, partial(measure, model), model)
        for model in sizes.batches
    ]


@torch.inference_mode()
def measure(model: str, bench: Bench) -> Result:
    """Return images encoded and decoded per second, and texts encoded per second."""
    backbone, sizes, machine = bench.backbone(model), bench.sizes, bench.machine
    side = backbone.resolution
    pixels = np.random.default_rng(0).integers(0, 256, (sizes.images, side, side, 3), dtype=np.uint8)
    texts = captions(sizes.texts)
    latents = backbone.encode_images(pixels[:1])
    works = {
        "images_encoded_per_second": (sizes.images, lambda: backbone.encode_images(pixels)),
        "images_decoded_per_second": (1, lambda: backbone.decode_images(latents)),
        "texts_encoded_per_second": (sizes.texts, lambda: backbone.encode_texts(texts)),
    }
    return {
        name: rates(count, machine.timed(sizes.seconds, work)[0]) for name, (count, work) in works.items()
    } | {"resolution": side}  # fmt: skip
