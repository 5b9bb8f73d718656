"""Pretrains the embedded checkpoints: AutoencoderKL, U-Net with text encoder (a latent diffusion model), and CLIP.

The component classes, their files and the training objectives are those of the real models; only the sizes and the
world are small. Every batch is a function of (seed, step), so an interrupted run resumes to the same weights.

Shapes: B batch, C latent channels, R picture side in pixels, r latent side, M text tokens, D text width.
"""

from __future__ import annotations

import csv
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
from dsd.pretraining.cards import write_cards
from dsd.progress import progress
from dsd.scenes.captions import vocabulary
from dsd.scenes.corpus import Corpus, build
from dsd.store import write_atomic

Loss = Callable[[torch.Generator], dict[str, Tensor]]
Row = dict[str, float | str]
WINDOW = 50  # steps that a row of the curve is the mean of
EVERY = 2 * WINDOW  # steps between checkpoints


def tokenizer(words: list[str], max_tokens: int) -> CLIPTokenizer:
    """A CLIPTokenizer to which each word of the world is one token; other words fall to pieces."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [character + "</w>" for character in alphabet]
    # Named beforehand, the last letters have fixed numbers. The trainer would number them as a hash map yields the
    # words, differently in every process, and break ties between merges by these numbers.
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=1,
        special_tokens=ends,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
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


def fit(
    name: str, module: nn.Module, loss: Loss, settings: FitParams, root: Path, seed: int, bfloat16: bool
) -> Iterator[dict[str, float]]:
    """AdamW with warm-up and cosine decay; leaves the exponential moving average of the weights in `module`.

    Yields a row of the curve every 50 steps and at the end. State goes to `<root>/<name>.pt`, the curve to
    `<root>/<name>.csv`.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
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
    seen: dict[str, list[Tensor]] = {}
    for step in progress(range(start, settings.steps), desc=name, initial=start, total=settings.steps):
        warm = min(1.0, (step + 1) / settings.warmup)
        rate = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator(parameters[0].device).manual_seed(seed * 1_000_003 + step)
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=bfloat16):
            terms = loss(generator)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update_parameters(module)
        for key, value in terms.items():
            seen.setdefault(key, []).append(value.detach())
        if (step + 1) % WINDOW == 0 or step + 1 == settings.steps:
            rows.append({"step": step + 1, **{key: float(torch.stack(window).mean()) for key, window in seen.items()}})
            seen = {}
            yield rows[-1]
        if (step + 1) % EVERY == 0 or step + 1 == settings.steps:
            state = dict(module=module.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict())
            torch.save({**state, "step": step + 1, "rows": rows}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            with (root / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    module.load_state_dict(average.module.state_dict())
    module.eval()


def _draw(generator: torch.Generator, size: int, batch: int) -> Tensor:
    return torch.randint(size, (batch,), generator=generator, device=generator.device)


def _pixels(pictures_BRR3: Tensor) -> Tensor:
    """uint8 [B, R, R, 3] to float [B, 3, R, R] in −1…1, as dsd.data.images.to_model does for arrays."""
    return pictures_BRR3.permute(0, 3, 1, 2).float() / 127.5 - 1


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


def autoencoder_loss(vae: AutoencoderKL, pictures_2NRR3: Tensor, batch: int) -> Loss:
    """Reconstruction (L1 + squared error) and a small Kullback-Leibler term, as in latent diffusion.

    Half of the pictures come through the parity resizing, so that the model knows both kinds.
    """

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        kind, index = _draw(generator, 2, batch), _draw(generator, pictures_2NRR3.shape[1], batch)
        pictures = _pixels(pictures_2NRR3[kind, index])
        posterior = vae.encode(pictures).latent_dist
        rebuilt = vae.decode(posterior.sample(generator)).sample.float()
        l1, squared = F.l1_loss(rebuilt, pictures), F.mse_loss(rebuilt, pictures)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": l1 + squared + 1e-4 * kl, "l1": l1.detach(), "kl": kl.detach()}

    return loss


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: Tensor, bfloat16: bool) -> Tensor:
    """Latent means [N, C, r, r] of uint8 pictures [N, R, R, 3], not yet scaled."""
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=bfloat16):
        chunks = progress(pictures.split(64), desc="encode")
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
    """Cross-attention at every level, several heads each, as in Stable Diffusion."""
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
    """Stable Diffusion's 1,000 steps, scaled linear; the model predicts v, as Stable Diffusion 2.1 does.

    ‖v − v_θ‖² is ‖ε − ε_θ‖² divided by ᾱ_t: the high noise levels, where the text tells what is in the picture, weigh
    more, and a short training learns to read sooner.
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

    weights [N] say how often a picture comes; logit(t/T) is drawn from a normal distribution of this mean and deviation
    (Esser et al. 2024, Scaling Rectified Flow Transformers, section 3.1).
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
    shared = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=4,
        num_hidden_layers=params.clip_layers,
    )
    text = dict(shared, vocab_size=vocabulary, max_position_embeddings=params.max_tokens, bos_token_id=eos - 1,
                eos_token_id=eos, pad_token_id=eos)  # fmt: skip
    vision = dict(shared, image_size=params.parity, patch_size=params.clip_patch)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def clip_loss(clip: CLIPModel, pictures_NPP3: Tensor, ids: Tensor, batch: int) -> Loss:
    """The symmetric contrastive loss of CLIP over a batch of pictures [B, 3, P, P] and one caption of each."""

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        index = _draw(generator, len(pictures_NPP3), batch)
        text = ids[index, _draw(generator, ids.shape[1], batch)]
        output = clip(input_ids=text, pixel_values=_pixels(pictures_NPP3[index]), return_loss=True)
        return {"loss": output.loss}

    return loss


def _on(device: torch.device, *arrays: np.ndarray) -> Tensor:
    return torch.stack([torch.from_numpy(np.asarray(array)) for array in arrays]).to(device)


def train_diffusion(
    params: PretrainParams, corpus: Corpus, work: Path, target: Path, device: torch.device
) -> Iterator[Row]:
    """AutoencoderKL, then the U-Net with its text encoder on the latents; writes the folder that diffusers reads."""
    torch.manual_seed(params.seed)
    pictures = _on(device, corpus.direct, corpus.parity)
    vae = build_autoencoder(params).to(device)
    loss = autoencoder_loss(vae, pictures, params.autoencoder.batch)
    for row in fit("autoencoder", vae, loss, params.autoencoder, work, params.seed, params.bfloat16):
        yield {"part": "autoencoder", **row}
    cached = work / "latents.safetensors"
    if not (cached.exists() and cached.stat().st_mtime > (work / "autoencoder.pt").stat().st_mtime):
        encoded = torch.stack([encode(vae, kind, params.bfloat16) for kind in pictures])
        write_atomic(cached, safetensors.torch.save({"latents": encoded.cpu().contiguous()}))
    latents = safetensors.torch.load_file(cached, device=str(device))["latents"]
    del pictures
    scaling = float(1 / latents.std())
    vae.register_to_config(scaling_factor=scaling)
    tokens = tokenizer(vocabulary(), params.max_tokens)
    torch.manual_seed(params.seed)
    unet = build_unet(params).to(device)
    text_encoder = build_text_encoder(params, len(tokens), tokens.eos_token_id).to(device)
    if device.type == "cpu":  # in bfloat16 the fused kernels are slow backwards there: half of a step's time
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    ids = tokenize(tokens, corpus.captions).to(device)
    empty = tokenize(tokens, [[""]])[0].to(device)
    weights = torch.tensor(corpus.things, device=device) ** -params.simplicity
    loss = diffusion_loss(
        unet, text_encoder, latents * scaling, ids, empty, weights, params.diffusion.batch, params.timesteps
    )
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    for row in fit("diffusion", both, loss, params.diffusion, work, params.seed, params.bfloat16):
        yield {"part": "diffusion", **row}
    pipeline = StableDiffusionPipeline(
        vae.half().cpu(),
        text_encoder.half().cpu(),
        tokens,
        unet.half().cpu(),
        noise_schedule(),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(target)


def train_clip(params: PretrainParams, corpus: Corpus, work: Path, target: Path, device: torch.device) -> Iterator[Row]:
    """CLIP on the same pictures and captions; writes the folder that transformers reads, with tokenizer/ in it."""
    tokens = tokenizer(vocabulary(), params.max_tokens)
    torch.manual_seed(params.seed)
    clip = build_clip(params, len(tokens), tokens.eos_token_id).to(device)
    if device.type == "cpu":
        clip.set_attn_implementation("eager")
    ids = tokenize(tokens, corpus.captions).to(device)
    loss = clip_loss(clip, _on(device, corpus.small)[0], ids, params.clip.batch)
    for row in fit("clip", clip, loss, params.clip, work, params.seed, params.bfloat16):
        yield {"part": "clip", **row}
    clip.half().cpu().save_pretrained(target)
    tokens.save_pretrained(target / "tokenizer")


def claim(work: Path, settings: PretrainParams) -> None:
    """Writes the recipe into `work`, whose state belongs to it; only the three fits (steps, rates) may still change.

    Raises:
        ParamsError: `work` holds the state of another recipe.
    """
    path, recipe = work / "recipe.json", settings.model_dump(mode="json", exclude={"autoencoder", "diffusion", "clip"})
    if path.exists():
        there = json.loads(path.read_text())
        for key, value in recipe.items():
            if there.get(key) != value:
                raise ParamsError(
                    f"pretrain.{key}: {value}, but {work} holds a training with {there.get(key)}; "
                    "set it back, or empty the folder to train from the start"
                )
    write_atomic(path, json.dumps(recipe, indent=1).encode())


def pretrain(params: Params, work: Path, target: Path) -> Iterator[Row]:
    """Makes `embedded` and `embedded-clip` under target; yields rows of the curves. Resumes from `work`."""
    settings, device = params.pretrain, device_of(params.runtime.device)
    claim(work, settings)
    corpus = build(
        work / "corpus", seed=settings.seed, size=settings.size, captions=settings.captions, parity=settings.parity,
        resolution=settings.resolution, workers=params.runtime.workers,
    )  # fmt: skip
    yield from train_diffusion(settings, corpus, work, target / "embedded", device)
    yield from train_clip(settings, corpus, work, target / "embedded-clip", device)
    write_cards(params, work, target)
