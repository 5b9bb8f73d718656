"""Peak memory: of the U-Net's weights, of a pass, of a pass with capture, and of a step of training."""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Sizes, trainer
from benchmarks.gpu.device import spread
from benchmarks.gpu.records import Case, Result
from dsd.engine.forward import observe

TRAINED, STEPS = "sd2-base", 4


def cases(sizes: Sizes) -> list[Case]:
    """Return a case per checkpoint and batch size, and one of training on one example of two images and two texts."""
    shared = {"dtype": "bfloat16", "tiny": sizes.tiny}
    training = {**shared, "model": TRAINED, "rows": 4, "steps": STEPS}
    return [
        *(
            Case(
                f"{model}, batch {batch}",
                {**shared, "model": model, "batch": batch},
                3,
                partial(passes, model, batch),
                model,
            )
            for model, batches in sizes.batches.items()
            for batch in batches
        ),
        Case(f"{TRAINED}, training", training, 10, partial(train, TRAINED), TRAINED),
    ]


@torch.inference_mode()
def passes(model: str, size: int, bench: Bench) -> Result:
    """Return the bytes of the U-Net's weights, and those that a pass needs in addition."""
    backbone, batch, evidence = bench.backbone(model), bench.batch(model, size), bench.params.evidence
    noised = backbone.add_noise(batch.latents, batch.noise, batch.timesteps)
    bench.machine.release()
    return {
        "weights": sum(weight.numel() * weight.element_size() for weight in backbone.unet.parameters()),
        "bare": bench.machine.peak(
            lambda: backbone.predict_noise(noised, batch.timesteps, batch.hidden, batch.text_index)
        ),
        "captured": bench.machine.peak(lambda: observe(backbone, None, evidence, batch)),
    }


def train(model: str, bench: Bench) -> Result:
    """Return the bytes that a step needs besides the weights, and the seconds of all steps but the first."""
    session = bench.comvg(model, "dsd")
    training = trainer(session, examples_per_step=1)
    seconds = []

    def step() -> None:
        start = time.perf_counter()
        training.advance()
        bench.machine.synchronize()
        seconds.append(time.perf_counter() - start)

    bench.machine.release()
    peaks = [bench.machine.peak(step) for _ in range(STEPS)]
    return {"bytes": max(peaks), "seconds_per_step": spread(seconds[1:]), "images": 2, "texts": 2}
