"""Few-shot training of the attention prompt (eq. 5 and 6); the backbone stays frozen. Resumable to the bit.

Shapes: E examples of a step, I images and T texts of each that are compared.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsd.backbones import StableDiffusion, device_of, load_diffusion
from dsd.draws import Draw
from dsd.encoding import Encodings, all_texts, diffusion_encodings, read_all
from dsd.engine import observe
from dsd.errors import DataError
from dsd.matching import MatchingExample, Pair, read_examples
from dsd.params import CrossAttentionMethod, Params, TrainingParams, training_of
from dsd.pictures import Pictures
from dsd.prompts import PROMPT, AttentionPrompt
from dsd.scorers import cross_attention
from dsd.store import Store, digest, file_digest, write_atomic

Table = list[list[Pair]]  # I images × T texts of one example


def table(example: MatchingExample, images: int, texts: int, rng: Random) -> tuple[Table, list[list[bool]]]:
    """So many images and texts of the example, and which pairs are right; a right pair first, others at random.

    No other image is right for the first text, nor another text for the first image.
    """
    i, t = rng.choice(example.answer)
    wrong_images = [k for k in range(len(example.images)) if (k, t) not in example.answer]
    wrong_texts = [k for k in range(len(example.texts)) if (i, k) not in example.answer]
    rows, columns = [i, *rng.sample(wrong_images, images - 1)], [t, *rng.sample(wrong_texts, texts - 1)]
    pairs = [[Pair(example.images[row], example.texts[column]) for column in columns] for row in rows]
    return pairs, [[(row, column) in example.answer for column in columns] for row in rows]


def shape(examples: Sequence[MatchingExample], most: int) -> tuple[int, int]:
    """Images and texts of a table: at most so many, and as many as every right pair has wrong ones to fill it with.

    Raises:
        DataError: an example leaves nothing to choose.
    """
    right = [(example, i, t) for example in examples for i, t in example.answer]
    images = min(1 + sum((k, t) not in e.answer for k in range(len(e.images))) for e, _, t in right)
    texts = min(1 + sum((i, k) not in e.answer for k in range(len(e.texts))) for e, i, _ in right)
    if images == texts == 1:
        raise DataError("a few-shot example has neither a wrong image nor a wrong text to train against")
    return min(most, images), min(most, texts)


def contests(scores_EIT: Tensor) -> list[int]:
    """The dimensions along which there is something to choose: images for a text, texts for an image, or both."""
    return [dim for dim in (1, 2) if scores_EIT.shape[dim] > 1]


def matching_loss(scores_EIT: Tensor, right_EIT: Tensor, training: TrainingParams) -> Tensor:
    """Eq. 6 over tables of scores, of which right_EIT [E, I, T] bool marks the right pairs; one of three losses.

    softmax (METHOD: the default): cross-entropy of each right pair among the images of its text and the texts of its
    image. binary: cross-entropy of each pair against the example's mean score. hinge: against the hardest negative of
    row and column, with a margin in units of the score.
    """
    logits_EIT = scores_EIT / training.temperature
    if training.loss == "binary":
        logits_EIT = logits_EIT - logits_EIT.mean((1, 2), keepdim=True)
        return F.binary_cross_entropy_with_logits(logits_EIT, right_EIT.to(logits_EIT.dtype))
    losses = []
    for dim in contests(scores_EIT):
        if training.loss == "softmax":
            losses.append(-logits_EIT.log_softmax(dim)[right_EIT].mean())
        else:
            hardest = scores_EIT.masked_fill(right_EIT, -torch.inf).amax(dim, keepdim=True)
            short = F.relu(training.margin + hardest - scores_EIT)[right_EIT]
            losses.append(short.mean() / training.temperature)
    return torch.stack(losses).mean()


def accuracy(scores_EIT: Tensor, right_EIT: Tensor) -> Tensor:
    """The share of right pairs that beat every wrong pair with the same image or the same text."""
    wrong_EIT = scores_EIT.masked_fill(right_EIT, -torch.inf)
    beaten = [(scores_EIT > wrong_EIT.amax(dim, keepdim=True))[right_EIT] for dim in contests(scores_EIT)]
    return torch.stack(beaten).all(0).float().mean()


class Trainer:
    """The state of one training: prompt, optimiser, step and curve."""

    def __init__(
        self,
        name: str,
        params: Params,
        backbone: StableDiffusion,
        examples: Sequence[MatchingExample],
        latents: Encodings,
        texts: Encodings,
    ) -> None:
        self.training = training_of(params, name)
        method = params.methods[self.training.method]
        assert isinstance(method, CrossAttentionMethod)  # params refuses anything else
        self.name, self.params, self.method, self.backbone = name, params, method, backbone
        self.examples, self._latents, self._texts = examples, latents, texts
        self.shape = shape(examples, self.training.candidates)
        self.prompt = AttentionPrompt(
            text_width=int(backbone.unet.config.cross_attention_dim),
            inner=backbone.layer_widths,
            latent_channels=int(backbone.unet.config.in_channels),
            rank=params.prompt.rank,
            conditional=params.prompt.conditional,
            seed=params.seed,
        ).to(backbone.device)
        self.optimizer = torch.optim.AdamW(self.prompt.parameters(), lr=self.training.learning_rate, weight_decay=0.0)
        self.evidence = params.evidence.model_copy(update={"poolings": (method.pooling,)})
        self.step = 0
        self.curve: list[dict[str, float]] = []

    def _rows(self) -> tuple[list[Table], Tensor, list[Draw]]:
        """The step's tables, their right pairs [E, I, T] and a draw for each: a function of (seed, step) alone."""
        rng = Random(f"train/{self.name}/{self.params.seed}/{self.step}")
        count = min(self.training.examples_per_step, len(self.examples))
        chosen = rng.sample(self.examples, count)
        tables, right = zip(*(table(example, *self.shape, rng) for example in chosen), strict=True)
        seen = [Draw(rng.choice(self.training.levels), rng.getrandbits(62)) for _ in chosen]
        return list(tables), torch.tensor(right, device=self.backbone.device), seen

    def scores(self, tables: list[Table], draws: list[Draw]) -> Tensor:
        """[E, I, T]; the pairs of an example share its draw, which takes most of the variance out."""
        flat = [pair for rows in tables for row in rows for pair in row]
        width = len(flat) // len(tables)
        device = self.backbone.device
        latents = torch.from_numpy(self._latents([pair.image for pair in flat])["latents"]).to(device)
        asked, texts = np.unique([pair.text for pair in flat], return_inverse=True)
        text = self._texts(asked.tolist())
        noise = torch.stack([draw.noise(tuple(latents.shape[1:])) for draw in draws]).to(device)
        timesteps = torch.tensor([draw.timestep(self.backbone.schedule_length) for draw in draws], device=device)
        pooled, attribution, _ = observe(
            self.backbone,
            self.prompt,
            self.evidence,
            latents,
            torch.from_numpy(text["hidden"]).to(device),
            torch.from_numpy(text["content"]).to(device),
            torch.from_numpy(texts).to(device),
            timesteps.repeat_interleave(width),
            noise.repeat_interleave(width, 0),
        )
        # Eq. 7 weights the heads by a gradient, which is itself held fixed while the prompt is updated.
        flat_scores = cross_attention.reduce(
            pooled[:, 0], attribution.detach(), layers=self.method.layers, heads=self.method.heads
        )
        return flat_scores.view(len(tables), *self.shape)

    def advance(self) -> dict[str, float]:
        """One step; returns its row of the curve."""
        training = self.training
        rate = training.learning_rate * min(1.0, (self.step + 1) / max(1, training.warmup))
        rate *= 1 - 0.9 * self.step / training.steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tables, right, draws = self._rows()
        scores = self.scores(tables, draws)
        loss = matching_loss(scores, right, training)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.prompt.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        won = accuracy(scores, right).item()
        self.curve.append({"step": self.step, "loss": round(loss.item(), 6), "accuracy": round(won, 6)})
        return self.curve[-1]

    def save(self, path: Path, key: str) -> None:
        buffer = io.BytesIO()
        state = dict(
            key=key,
            step=self.step,
            curve=self.curve,
            prompt=self.prompt.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        torch.save(state, buffer)
        write_atomic(path, buffer.getvalue())

    def resume(self, path: Path, key: str) -> None:
        """Goes on from a saved state of this very training; another training's state is of no use and is replaced."""
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["key"] == key:
            self.step, self.curve = state["step"], state["curve"]
            self.prompt.load_state_dict(state["prompt"])
            self.optimizer.load_state_dict(state["optimizer"])


def training_key(name: str, params: Params, prepared: Path, backbone_digest: str) -> str:
    """The digest of everything that the prompt of dataset `name` depends on."""
    sections = [
        params.seed,
        params.images,
        params.evidence.model_copy(update={"shard": 1}),
        params.prompt,
    ]
    training = training_of(params, name)
    method, examples = params.methods[training.method], file_digest(prepared / "examples.parquet")
    return digest(name, backbone_digest, examples, training, method, *sections)


def curve_csv(curve: Sequence[dict[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", "loss", "accuracy"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    return text.getvalue().encode()


def train(name: str, params: Params, prepared: Path, cached: Path, target: Path) -> Iterator[dict[str, float]]:
    """Trains the prompt of dataset `name` on its few-shot split; yields a row of the curve per step, resumed ones too.

    Writes `prompt.safetensors`, `curve.csv` and, last, `summary.json`, whose key says that this very training is done.
    """
    backbone = load_diffusion(params.backbones[params.backbone], device_of(params.runtime.device))
    key, state, summary = (
        training_key(name, params, prepared, backbone.digest),
        target / "state.pt",
        target / "summary.json",
    )
    if summary.exists() and json.loads(summary.read_text())["key"] == key:
        with (target / "curve.csv").open(newline="") as file:
            yield from ({k: float(v) for k, v in row.items()} for row in csv.DictReader(file))
        return
    examples = read_examples(prepared / "examples.parquet", "train")
    if not examples:
        raise DataError(f"datasets.{name}.few_shot: leaves no example to train on; raise it or size")
    pictures, texts = Pictures(prepared / "images.parquet"), all_texts(read_all(prepared))
    tables = diffusion_encodings(backbone, pictures, texts, params.images.resolution, Store(cached))
    trainer = Trainer(name, params, backbone, examples, *tables)
    target.mkdir(parents=True, exist_ok=True)
    trainer.resume(state, key)
    yield from list(trainer.curve)
    while trainer.step < trainer.training.steps:
        yield trainer.advance()
        if trainer.step % trainer.training.checkpoint_every == 0:
            trainer.save(state, key)
    trainer.prompt.save(target / PROMPT, backbone.digest)
    write_atomic(target / "curve.csv", curve_csv(trainer.curve))
    size = sum(p.numel() for p in trainer.prompt.parameters())
    tail = trainer.curve[-max(1, len(trainer.curve) // 5) :]
    done = {
        "key": key,
        "examples": len(examples),
        "parameters": size,
        "accuracy": float(np.mean([r["accuracy"] for r in tail])),
    }
    write_atomic(summary, json.dumps(done, indent=2).encode())
    state.unlink(missing_ok=True)
