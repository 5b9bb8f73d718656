"""The real component classes at the smallest size, with random weights: what the tests of the core run on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dsd.config import BackboneParams, FitParams, Params, PretrainParams, load
from dsd.pretraining.recipe import (
    PIXELS,
    build_autoencoder,
    build_clip,
    build_text_encoder,
    build_unet,
    noise_schedule,
    tokenizer,
)
from dsd.scenes.captions import vocabulary
from dsd.store import write_json
from tests.raced import few

FIT = FitParams(steps=2, batch=2, learning_rate=1e-3, warmup=1, weight_decay=0.0, ema=0.5, bfloat16=False)
SIZES = PretrainParams(
    seed=0, size=8, captions=2, resolution=32, parity=24, max_tokens=24, latent_channels=4,
    autoencoder_channels=(8, 8, 8, 8), text_width=32, text_layers=1, unet_channels=(16, 32), unet_transformers=(1, 1),
    unet_heads=2, timesteps=(0.4, 1.0), simplicity=1.0,
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
    write_json(folder / "embedded-clip" / "preprocessor_config.json", PIXELS)


def save_tokenizer(folder: Path, pad: str, max_tokens: int, size: int | None = None) -> CLIPTokenizer:
    """The files of a published CLIP tokenizer (no tokenizer.json), of `size` tokens if need be; returns it, opened."""
    made = tokenizer(vocabulary(), max_tokens)
    tokens = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    fill = [f"[{n}]" for n in range((size or len(tokens)) - len(tokens))]
    ordered = [*tokens[:-2], *fill, *tokens[-2:]]  # begin and end are the last two
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    merges = json.loads(made.backend_tokenizer.to_str())["model"]["merges"]
    settings = {**special, "pad_token": "<|endoftext|>", "model_max_length": max_tokens, "do_lower_case": True}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(ordered)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder)


def save_xl(folder: Path) -> None:
    """Stable Diffusion XL in its published layout: every width differs, so that none can stand for another."""
    torch.manual_seed(0)
    tokens = [
        save_tokenizer(folder / name, pad, 24) for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))
    ]
    shared = dict(
        vocab_size=len(tokens[0]), num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=24,
        bos_token_id=tokens[0].bos_token_id, eos_token_id=tokens[0].eos_token_id,
    )  # fmt: skip
    first = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=32, **shared))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=16, intermediate_size=32, projection_dim=24, hidden_act="gelu", **shared)
    )
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    vae = build_autoencoder(SIZES)
    vae.register_to_config(scaling_factor=0.13025)
    schedule = noise_schedule()
    schedule.register_to_config(prediction_type="epsilon")
    parts = {"vae": vae, "text_encoder": first, "text_encoder_2": second, "unet": unet, "scheduler": schedule}
    for name, part in parts.items():
        part.save_pretrained(folder / name)


def row(source: Path, family: str = "stable-diffusion", **changes: object) -> BackboneParams:
    settings = dict(family=family, source=str(source), revision=None, config=None, prediction=None, lora=None)
    return BackboneParams.model_validate({**settings, "dtype": "float32", **changes})


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
            "ablations": params.ablations.model_copy(
                update={"levels": ((0.2, 0.6), (0.2,), (0.6,)), "layers": ("all", 2, 1)}
            ),
            "methods": {
                name: method.model_copy(update={"levels": (0.2, 0.6)}) if hasattr(method, "levels") else method
                for name, method in params.methods.items()
            },
            "training": training,
            "studies": {},
            "gate": params.gate.model_copy(update={"datasets": {"scenes-com": params.gate.datasets["scenes-com"]}}),
            "races": few(params.races).model_copy(update={"datasets": {"scenes-com": ("denoising",)}}),
            "schedules": {"racing": params.schedules["racing"].model_copy(update={"delta": 0.1, "budget": 5.0})},
            "evidence": params.evidence.model_copy(update={"shard": 16}),
            "evaluate": params.evaluate.model_copy(update={"resamples": 50}),
            "runtime": params.runtime.model_copy(update={"batch_size": 8, "workers": 1, "device": "cpu"}),
            **changes,
        }
    )
