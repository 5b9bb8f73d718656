"""Pretraining of the embedded checkpoints: AutoencoderKL, U-Net with text encoder (a latent diffusion model), and CLIP.

The component classes, file layouts and training objectives are those of the real models at a small size. Every batch is
a function of (seed, step), so an interrupted run resumes to the same weights.

Shapes: N images, K captions each, B batch, C latent channels, R image side, r latent side, M text tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dsd.config import FitParams, Params, PretrainParams
from dsd.errors import ParamsError
from dsd.models import device_of
from dsd.pretraining.cards import quality, write_cards
from dsd.progress import progress
from dsd.scenes.captions import vocabulary
from dsd.scenes.corpus import Corpus, build
from dsd.store import write_atomic, write_csv, write_json

Loss = Callable[[torch.Generator], dict[str, Tensor]]
Row = dict[str, float | str]
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # the normalisation of `_pixels`, as transformers writes it
WINDOW = 50  # steps that a row of the curve averages
EVERY = 2 * WINDOW  # steps between checkpoints


def tokenizer(words: list[str], max_tokens: int) -> CLIPTokenizer:
    """A CLIPTokenizer with one token per given word; other words are split."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [character + "</w>" for character in alphabet]
    # As special tokens, the final letters have fixed ids. The trainer would number them in the order of a hash map,
    # which differs between processes, and would break ties between merges by these ids.
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, special_tokens=ends, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([*words * 50], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *ends, *("".join(merge) for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def tokenize(tokens: CLIPTokenizer, captions: list[list[str]]) -> Tensor:
    """Token ids [N, K, M] of captions [N][K], padded to the model's maximum as Stable Diffusion does."""
    flat = [text for texts in captions for text in texts]
    batch = tokens(flat, padding="max_length", max_length=tokens.model_max_length, truncation=True, return_tensors="pt")
    return batch.input_ids.view(len(captions), -1, tokens.model_max_length)


def fit(name: str, module: nn.Module, loss: Loss, settings: FitParams, root: Path, seed: int) -> Iterator[Row]:
    """Train with AdamW, warm-up and cosine decay; `module` ends with the exponential moving average of its weights.

    Yields a row of the curve every `WINDOW` steps and at the end. Resumes from `<root>/<name>.pt`; the curve is written
    to `<root>/<name>.csv`.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema)
    )
    start, rows = 0, []
    path = root / f"{name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=parameters[0].device)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, rows = state["step"], state["rows"]
    module.train()
    recent: dict[str, list[Tensor]] = {}
    for step in progress(range(start, settings.steps), desc=name, initial=start, total=settings.steps):
        warm = min(1.0, (step + 1) / settings.warmup)
        rate = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator(parameters[0].device).manual_seed(seed * 1_000_003 + step)
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=settings.bfloat16):
            terms = loss(generator)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update_parameters(module)
        for key, value in terms.items():
            recent.setdefault(key, []).append(value.detach())
        if (step + 1) % WINDOW == 0 or step + 1 == settings.steps:
            means = {key: float(torch.stack(values).mean()) for key, values in recent.items()}
            rows.append({"step": step + 1, **means})
            recent = {}
            yield {"part": name, **rows[-1]}
        if (step + 1) % EVERY == 0 or step + 1 == settings.steps:
            state = dict(module=module.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict())
            torch.save({**state, "step": step + 1, "rows": rows}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            write_csv(root / f"{name}.csv", list(rows[0]), rows)
    module.load_state_dict(average.module.state_dict())
    module.eval()


def _draw(generator: torch.Generator, size: int, batch: int) -> Tensor:
    return torch.randint(size, (batch,), generator=generator, device=generator.device)


def _pixels(images_BRR3: Tensor) -> Tensor:
    """uint8 [B, R, R, 3] to float [B, 3, R, R] in −1…1, as dsd.data.images.to_model for arrays."""
    return images_BRR3.permute(0, 3, 1, 2).float() / 127.5 - 1


def build_autoencoder(params: PretrainParams) -> AutoencoderKL:
    channels = params.autoencoder_channels
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=params.latent_channels,
        norm_num_groups=8,
        sample_size=params.resolution,
    )


def autoencoder_loss(vae: AutoencoderKL, images_2NRR3: Tensor, batch: int) -> Loss:
    """Reconstruction (L1 + squared error) and a small Kullback-Leibler term, as in latent diffusion.

    Half of the images are parity-resized, so that the model is trained on both kinds.
    """

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        kind, index = _draw(generator, 2, batch), _draw(generator, images_2NRR3.shape[1], batch)
        images = _pixels(images_2NRR3[kind, index])
        posterior = vae.encode(images).latent_dist
        rebuilt = vae.decode(posterior.sample(generator)).sample.float()
        l1, squared = F.l1_loss(rebuilt, images), F.mse_loss(rebuilt, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": l1 + squared + 1e-4 * kl, "l1": l1.detach(), "kl": kl.detach()}

    return loss


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor, bfloat16: bool) -> Tensor:
    """Unscaled latent means [N, C, r, r] of uint8 images [N, R, R, 3]."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        chunks = progress(images.split(64), desc="encode")
        return torch.cat([vae.encode(_pixels(chunk)).latent_dist.mean.float() for chunk in chunks])


def build_text_encoder(params: PretrainParams, vocabulary: int, eos: int) -> CLIPTextModel:
    width = params.text_width
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=params.text_layers,
            num_attention_heads=4, max_position_embeddings=params.max_tokens, projection_dim=width,
            bos_token_id=eos - 1, eos_token_id=eos, pad_token_id=eos,
        )
    )  # fmt: skip


def build_unet(params: PretrainParams) -> UNet2DConditionModel:
    """A U-Net with multi-head cross-attention at every resolution, as in Stable Diffusion."""
    channels = params.unet_channels
    return UNet2DConditionModel(
        sample_size=params.resolution // 8,
        in_channels=params.latent_channels,
        out_channels=params.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=params.unet_transformers,
        cross_attention_dim=params.text_width,
        attention_head_dim=params.unet_heads,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def noise_schedule() -> DDPMScheduler:
    """The scaled linear schedule of Stable Diffusion with 1,000 steps; the model predicts v, as Stable Diffusion 2.1.

    ‖v − v_θ‖² is ‖ε − ε_θ‖² divided by ᾱ_t: this weights the high noise levels, where the prediction depends most on
    the text, so a short training learns text conditioning sooner.
    """
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False, steps_offset=1,
    )  # fmt: skip


def diffusion_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    weights: Tensor,
    batch: int,
    timesteps: tuple[float, float],
) -> Loss:
    """‖v − v_θ(z_t, t, y)‖² over latents [2, N, C, r, r] (direct, parity), ids [N, K, M]; a tenth has no text.

    Images are sampled with weights [N]; logit(t/T) is normal with mean and standard deviation `timesteps` (Esser et al.
    2024, Scaling Rectified Flow Transformers, section 3.1).
    """
    schedule = noise_schedule()
    mean, deviation = timesteps

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        kind = _draw(generator, 2, batch)
        index = torch.multinomial(weights, batch, replacement=True, generator=generator)
        text = ids[index, _draw(generator, ids.shape[1], batch)]
        text = torch.where(_draw(generator, 10, batch)[:, None] == 0, empty, text)
        clean = latents[kind, index]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        logit = mean + deviation * torch.randn(batch, generator=generator, device=clean.device)
        steps = (1000 * logit.sigmoid()).long().clamp(max=999)  # a large logit rounds to 1
        noised = schedule.add_noise(clean, noise, steps)
        hidden = text_encoder(text).last_hidden_state
        target = schedule.get_velocity(clean, noise, steps)
        return {"loss": F.mse_loss(unet(noised, steps, hidden).sample.float(), target)}

    return loss


def build_clip(params: PretrainParams, vocabulary: int, eos: int) -> CLIPModel:
    width = params.clip_width
    shared = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=4,
                  num_hidden_layers=params.clip_layers)  # fmt: skip
    text = dict(shared, vocab_size=vocabulary, max_position_embeddings=params.max_tokens, bos_token_id=eos - 1,
                eos_token_id=eos, pad_token_id=eos)  # fmt: skip
    vision = dict(shared, image_size=params.parity, patch_size=params.clip_patch)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def clip_loss(clip: CLIPModel, images_NRR3: Tensor, ids: Tensor, batch: int) -> Loss:
    """The symmetric contrastive loss of CLIP over a batch of images and one caption of each."""

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        index = _draw(generator, len(images_NRR3), batch)
        text = ids[index, _draw(generator, ids.shape[1], batch)]
        output = clip(input_ids=text, pixel_values=_pixels(images_NRR3[index]), return_loss=True)
        return {"loss": output.loss}

    return loss


def _on(device: torch.device, *arrays: np.ndarray) -> Tensor:
    return torch.stack([torch.from_numpy(np.asarray(array)) for array in arrays]).to(device)


def train_diffusion(
    params: PretrainParams, corpus: Corpus, work: Path, target: Path, device: torch.device
) -> Iterator[Row]:
    """Train AutoencoderKL, then the U-Net with its text encoder on the latents; write them in the diffusers layout."""
    torch.manual_seed(params.seed)
    images = _on(device, corpus.direct, corpus.parity)
    vae = build_autoencoder(params).to(device)
    loss = autoencoder_loss(vae, images, params.autoencoder.batch)
    yield from fit("autoencoder", vae, loss, params.autoencoder, work, params.seed)
    cached = work / "latents.safetensors"
    if not (cached.exists() and cached.stat().st_mtime > (work / "autoencoder.pt").stat().st_mtime):
        encoded = torch.stack([encode(vae, kind, params.autoencoder.bfloat16) for kind in images])
        write_atomic(cached, safetensors.torch.save({"latents": encoded.cpu().contiguous()}))
    latents = safetensors.torch.load_file(cached, device=str(device))["latents"]
    del images
    scaling = float(1 / latents.std())
    vae.register_to_config(scaling_factor=scaling)
    tokens = tokenizer(vocabulary(), params.max_tokens)
    torch.manual_seed(params.seed)
    unet = build_unet(params).to(device)
    text_encoder = build_text_encoder(params, len(tokens), tokens.eos_token_id).to(device)
    if device.type == "cpu" and params.diffusion.bfloat16:  # there the fused kernels have a slow bfloat16 backward pass
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    ids = tokenize(tokens, corpus.captions).to(device)
    empty = tokenize(tokens, [[""]])[0].to(device)
    weights = torch.tensor(corpus.things, device=device) ** -params.simplicity
    loss = diffusion_loss(
        unet, text_encoder, latents * scaling, ids, empty, weights, params.diffusion.batch, params.timesteps
    )
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    yield from fit("diffusion", both, loss, params.diffusion, work, params.seed)
    parts = (vae.half().cpu(), text_encoder.half().cpu(), tokens, unet.half().cpu(), noise_schedule(), None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(target)


def train_clip(params: PretrainParams, corpus: Corpus, work: Path, target: Path, device: torch.device) -> Iterator[Row]:
    """Train CLIP on the same images and captions; write it in the transformers layout, with tokenizer/."""
    tokens = tokenizer(vocabulary(), params.max_tokens)
    torch.manual_seed(params.seed)
    clip = build_clip(params, len(tokens), tokens.eos_token_id).to(device)
    if device.type == "cpu" and params.clip.bfloat16:
        clip.set_attn_implementation("eager")
    ids = tokenize(tokens, corpus.captions).to(device)
    loss = clip_loss(clip, _on(device, corpus.small)[0], ids, params.clip.batch)
    yield from fit("clip", clip, loss, params.clip, work, params.seed)
    clip.half().cpu().save_pretrained(target)
    tokens.save_pretrained(target / "tokenizer")
    write_json(target / "preprocessor_config.json", PIXELS)


def claim(work: Path, settings: PretrainParams) -> None:
    """Write the recipe into `work`, and check that its training state is of the same recipe.

    The settings of the three fits (steps, rates) may differ.

    Raises:
        ParamsError: `work` has the state of another recipe.
    """
    path, recipe = work / "recipe.json", settings.model_dump(mode="json", exclude={"autoencoder", "diffusion", "clip"})
    if path.exists():
        stored = json.loads(path.read_text())
        for key, value in recipe.items():
            if stored.get(key) != value:
                raise ParamsError(
                    f"pretrain.{key}: {value}, but {work} has a training with {stored.get(key)}; "
                    "restore that value, or empty the folder to train from scratch"
                )
    write_atomic(path, json.dumps(recipe, indent=1).encode())


def pretrain(params: Params, work: Path, target: Path) -> Iterator[Row]:
    """Write `embedded` and `embedded-clip` under target; yield rows of the curves. Resumes from `work`."""
    settings, device = params.pretrain, device_of(params.runtime.device)
    claim(work, settings)
    corpus = build(
        work / "corpus", seed=settings.seed, size=settings.size, captions=settings.captions, parity=settings.parity,
        resolution=settings.resolution, workers=params.runtime.workers,
    )  # fmt: skip
    yield from train_diffusion(settings, corpus, work, target / "embedded", device)
    yield from train_clip(settings, corpus, work, target / "embedded-clip", device)
    write_cards(settings, quality(params, target), work, target)
