"""Passes per second of the denoiser of published configurations: bare, and with the attention captured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Sizes
from benchmarks.gpu.device import rates, spread
from benchmarks.gpu.records import Case, Result
from dsd.engine.forward import observe

PEAK = "peak"  # the case of the device's own peak


def passes(sizes: Sizes) -> list[Case]:
    """Return the cases of bare passes, after one of the device's peak."""
    setting = {"seconds": sizes.seconds, "matrix": sizes.matrix}
    return [Case(PEAK, setting, sizes.seconds + 2, peak), *_by_batch(sizes, bare, 1)]


def capture(sizes: Sizes) -> list[Case]:
    """Return the cases of passes with capture."""
    return _by_batch(sizes, captured, 2)


def _by_batch(sizes: Sizes, measure: Callable[[str, int, Bench], Result], turns: int) -> list[Case]:
    return [
        Case(
            f"{model}, batch {batch}",
            {"model": model, "batch": batch, "dtype": "bfloat16", "seconds": sizes.seconds, "tiny": sizes.tiny},
            turns * sizes.seconds + 3,
            partial(measure, model, batch),
            model,
        )
        for model, batches in sizes.batches.items()
        for batch in batches
    ]


def peak(bench: Bench) -> Result:
    """Return the rate of a product of large square matrices in bfloat16, in operations per second."""
    side = bench.sizes.matrix
    a, b = torch.randn(2, side, side, device=bench.machine.device, dtype=torch.float32).bfloat16()
    out = torch.empty_like(a)
    [seconds] = bench.machine.timed(bench.sizes.seconds, lambda: torch.mm(a, b, out=out))
    return {"operations_per_second": rates(2 * side**3, seconds), "matrix": side}


@torch.inference_mode()
def bare(model: str, size: int, bench: Bench) -> Result:
    """Return the rate of passes without capture, through PyTorch's fused attention."""
    (_, backbone, opening, operations), batch = bench.checkpoint(model), bench.batch(model, size)
    noised = backbone.add_noise(batch.latents, batch.noise, batch.timesteps)

    def work() -> None:
        backbone.predict_noise(noised, batch.timesteps, batch.hidden, batch.text_index)

    [seconds] = bench.machine.timed(bench.sizes.seconds, work)
    return {
        "passes_per_second": rates(size, seconds),
        "operations_per_pass": operations,
        "opening_seconds": opening,
    }


@torch.inference_mode()
def captured(model: str, size: int, bench: Bench) -> Result:
    """Return the rate of passes as the engine makes them, and their time over that of bare passes, in turns."""
    backbone, batch, evidence = bench.backbone(model), bench.batch(model, size), bench.params.evidence
    noised = backbone.add_noise(batch.latents, batch.noise, batch.timesteps)

    def without() -> None:
        backbone.predict_noise(noised, batch.timesteps, batch.hidden, batch.text_index)

    bare_seconds, seconds = bench.machine.timed(
        2 * bench.sizes.seconds, without, lambda: observe(backbone, None, evidence, batch)
    )
    ratios = [own / plain for own, plain in zip(seconds, bare_seconds, strict=True)]
    return {"passes_per_second": rates(size, seconds), "over_bare": spread(ratios)}
