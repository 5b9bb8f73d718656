"""Few-shot training of the attention prompt (eq. 5 and 6); the backbone stays frozen. Resumable to the bit.

Shapes: B rows of a step (examples × candidates), E examples, K candidates of an example.
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
from dsd.params import CrossAttentionMethod, Params, TrainingParams
from dsd.pictures import Pictures
from dsd.prompts import PROMPT, AttentionPrompt
from dsd.scorers import cross_attention
from dsd.store import Store, digest, file_digest, write_atomic


def candidates(example: MatchingExample, count: int, rng: Random) -> list[Pair]:
    """The right pair first, then up to count − 1 wrong ones of the example."""
    every = [(i, t) for i in range(len(example.images)) for t in range(len(example.texts))]
    wrong = [place for place in every if place not in example.answer]
    chosen = [rng.choice(example.answer), *rng.sample(wrong, min(count - 1, len(wrong)))]
    return [Pair(example.images[i], example.texts[t]) for i, t in chosen]


def matching_loss(scores_EK: Tensor, training: TrainingParams) -> Tensor:
    """Eq. 6 over scores of which column 0 is the right pair's; one of three losses (METHOD: softmax is the default).

    softmax: cross-entropy over an example's candidates. binary: cross-entropy of each pair against the example's mean
    score. hinge: against the hardest negative, with a margin in units of the score.
    """
    if training.loss == "hinge":
        return F.relu(training.margin + scores_EK[:, 1:].amax(1) - scores_EK[:, 0]).mean() / training.temperature
    logits_EK = scores_EK / training.temperature
    if training.loss == "softmax":
        return F.cross_entropy(logits_EK, torch.zeros(len(logits_EK), dtype=torch.long, device=logits_EK.device))
    target_EK = torch.zeros_like(logits_EK)
    target_EK[:, 0] = 1
    return F.binary_cross_entropy_with_logits(logits_EK - logits_EK.mean(1, keepdim=True), target_EK)


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
        method = params.methods[params.training.method]
        assert isinstance(method, CrossAttentionMethod)  # params refuses anything else
        self.name, self.params, self.method, self.backbone = name, params, method, backbone
        self.examples, self._latents, self._texts = examples, latents, texts
        self.prompt = AttentionPrompt(
            text_width=int(backbone.unet.config.cross_attention_dim),
            inner=backbone.layer_widths,
            latent_channels=int(backbone.unet.config.in_channels),
            rank=params.prompt.rank,
            conditional=params.prompt.conditional,
            seed=params.seed,
        ).to(backbone.device)
        self.optimizer = torch.optim.AdamW(self.prompt.parameters(), lr=params.training.learning_rate, weight_decay=0.0)
        self.evidence = params.evidence.model_copy(update={"poolings": (method.pooling,)})
        self.step = 0
        self.curve: list[dict[str, float]] = []

    def _rows(self) -> tuple[list[list[Pair]], list[Draw]]:
        """The step's examples as lists of candidates, and a draw for each: a function of (seed, step) alone."""
        rng = Random(f"train/{self.name}/{self.params.seed}/{self.step}")
        count = min(self.params.training.examples_per_step, len(self.examples))
        chosen = rng.sample(range(len(self.examples)), count)
        pairs = [candidates(self.examples[i], self.params.training.candidates, rng) for i in chosen]
        return pairs, [Draw(rng.choice(self.method.levels), rng.getrandbits(62)) for _ in chosen]

    def scores(self, pairs: list[list[Pair]], draws: list[Draw]) -> Tensor:
        """[E, K]; the candidates of an example share its draw, which takes most of the variance out."""
        width = len(pairs[0])
        flat = [pair for row in pairs for pair in row]
        device = self.backbone.device
        latents = torch.from_numpy(self._latents([pair.image for pair in flat])["latents"]).to(device)
        text = self._texts([pair.text for pair in flat])
        noise = torch.stack([draw.noise(tuple(latents.shape[1:])) for draw in draws]).to(device)
        timesteps = torch.tensor([draw.timestep(self.backbone.schedule_length) for draw in draws], device=device)
        pooled, attribution, _ = observe(
            self.backbone,
            self.prompt,
            self.evidence,
            latents,
            torch.from_numpy(text["hidden"]).to(device),
            torch.from_numpy(text["content"]).to(device),
            timesteps.repeat_interleave(width),
            noise.repeat_interleave(width, 0),
        )
        # Eq. 7 weights the heads by a gradient, which is itself held fixed while the prompt is updated.
        flat_scores = cross_attention.reduce(
            pooled[:, 0], attribution.detach(), layers=self.method.layers, heads=self.method.heads
        )
        return flat_scores.view(len(pairs), width)

    def advance(self) -> dict[str, float]:
        """One step; returns its row of the curve."""
        training = self.params.training
        rate = training.learning_rate * min(1.0, (self.step + 1) / max(1, training.warmup))
        rate *= 1 - 0.9 * self.step / training.steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scores = self.scores(*self._rows())
        loss = matching_loss(scores, training)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.prompt.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        right = (scores[:, 0] > scores[:, 1:].amax(1)).float().mean()
        self.curve.append({"step": self.step, "loss": round(loss.item(), 6), "accuracy": round(right.item(), 6)})
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
        params.noise,
        params.evidence.model_copy(update={"shard": 1}),
        params.prompt,
    ]
    method = params.methods[params.training.method]
    return digest(name, backbone_digest, file_digest(prepared / "examples.parquet"), params.training, method, *sections)


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
    while trainer.step < params.training.steps:
        yield trainer.advance()
        if trainer.step % params.training.checkpoint_every == 0:
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
