"""The real component classes at the smallest size, with random weights: what the tests of the core run on."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from dsd.params import FitParams, Params, PretrainParams, load
from dsd.pretraining import (
    build_autoencoder,
    build_clip,
    build_text_encoder,
    build_unet,
    noise_schedule,
    tokenizer,
)
from dsd.scenes.captions import vocabulary
from tests.raced import few

FIT = FitParams(steps=2, batch=2, learning_rate=1e-3, warmup=1, weight_decay=0.0, ema=0.5)
SIZES = PretrainParams(
    seed=0, size=8, captions=2, resolution=32, parity=24, max_tokens=24, latent_channels=4,
    autoencoder_channels=(8, 8, 8, 8), text_width=32, text_layers=1, unet_channels=(16, 32), unet_transformers=(1, 1),
    unet_heads=2, timesteps=(0.4, 1.0), simplicity=1.0, bfloat16=False,
    clip_width=32, clip_layers=1, clip_patch=8, autoencoder=FIT, diffusion=FIT, clip=FIT,
)  # fmt: skip


def save_checkpoints(folder: Path) -> None:
    """`embedded` and `embedded-clip` under the folder, in the layout of the real ones."""
    torch.manual_seed(0)
    tokens = tokenizer(vocabulary(), SIZES.max_tokens)
    text = build_text_encoder(SIZES, len(tokens), tokens.eos_token_id)
    parts = (build_autoencoder(SIZES), text, tokens, build_unet(SIZES), noise_schedule(), None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder / "embedded")
    build_clip(SIZES, len(tokens), tokens.eos_token_id).save_pretrained(folder / "embedded-clip")
    tokens.save_pretrained(folder / "embedded-clip" / "tokenizer")


def small(models: Path, **changes: object) -> Params:
    """The project's params on the tiny checkpoints, one small scenes-com and few steps."""
    params = load(Path(__file__).parent.parent / "params.yaml")
    rows = {name: row.model_copy(update={"source": str(models / name)}) for name, row in params.backbones.items()}
    com = params.datasets["scenes-com"].model_copy(
        update={"size": 60, "few_shot": 0.1, "validation": 0.05, "test": 9, "draws_per_level": 2}
    )
    # 4 steps: 6 examples are the few-shot split
    steps = {"epochs": 2.0, "least_steps": 0, "examples_per_step": 3, "checkpoint_every": 1}
    training = {name: row.model_copy(update=steps) for name, row in params.training.items()}
    return params.model_copy(
        update={
            "backbones": rows,
            "datasets": {"scenes-com": com},
            "images": params.images.model_copy(update={"resolution": 32, "parity": 24}),
            "noise": params.noise.model_copy(update={"levels": (0.2, 0.6)}),
            "ablations": params.ablations.model_copy(update={"levels": ((0.2, 0.6), (0.2,), (0.6,))}),
            "methods": {
                name: method.model_copy(update={"levels": (0.2, 0.6)}) if hasattr(method, "levels") else method
                for name, method in params.methods.items()
            },
            "training": training,
            "studies": {},
            "races": few(params.races).model_copy(update={"datasets": {"scenes-com": ("denoising",)}}),
            "evidence": params.evidence.model_copy(update={"shard": 16}),
            "evaluate": params.evaluate.model_copy(update={"resamples": 50}),
            "runtime": params.runtime.model_copy(update={"batch_size": 8, "workers": 1, "device": "cpu"}),
            **changes,
        }
    )
