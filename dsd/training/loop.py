"""Few-shot training (eq. 6) of the attention prompt and of the tuned CLIPs; the backbone is frozen.

One loop, resumable to the bit; see `dsd.training.base.Learner`. Processes launched together by Accelerate share the
examples of each step; the steps are those of one process.

Shapes: E examples of a step, I images and T texts of each.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor, nn

from dsd.config import Params, TrainingParams
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, Pair
from dsd.engine.session import Session
from dsd.errors import DataError
from dsd.models.checkpoint import locate
from dsd.scorers.evidence import prompt_without
from dsd.scorers.fusion import folds
from dsd.store import check_libraries, digest, file_digest, libraries, write_atomic, write_csv
from dsd.training import LEARNERS
from dsd.training.base import Learner, Table
from dsd.versions import versioned

log = logging.getLogger(__name__)

CURVE, SUMMARY = "curve.csv", "summary.json"
DIGEST = hashlib.sha256().digest_size  # bytes before a saved state: torch.load does not detect most damage


def table(example: MatchingExample, images: int, texts: int, rng: Random) -> tuple[Table, list[list[bool]]]:
    """Choose images and texts of an example, a right pair first and others at random; return also which are right.

    Except the first, no image is right for the first text, and no text for the first image.
    """
    i, t = rng.choice(example.answer)
    wrong_images = [k for k in range(len(example.images)) if (k, t) not in example.answer]
    wrong_texts = [k for k in range(len(example.texts)) if (i, k) not in example.answer]
    rows, columns = [i, *rng.sample(wrong_images, images - 1)], [t, *rng.sample(wrong_texts, texts - 1)]
    pairs = [[Pair(example.images[row], example.texts[column]) for column in columns] for row in rows]
    return pairs, [[(row, column) in example.answer for column in columns] for row in rows]


def shape(examples: Sequence[MatchingExample], most: int) -> tuple[int, int]:
    """Return the images and texts of a table: at most `most`, and at most what the wrong pairs of each example allow.

    Raises:
        DataError: no example has a wrong image or text.
    """
    right = [(example, i, t) for example in examples for i, t in example.answer]
    images = min(1 + sum((k, t) not in e.answer for k in range(len(e.images))) for e, _, t in right)
    texts = min(1 + sum((i, k) not in e.answer for k in range(len(e.texts))) for e, i, _ in right)
    if images == texts == 1:
        raise DataError("a few-shot example has neither a wrong image nor a wrong text to train against")
    return min(most, images), min(most, texts)


def contested_dims(scores_EIT: Tensor) -> list[int]:
    """Return the dimensions with several candidates: images for a text, texts for an image, or both."""
    return [dim for dim in (1, 2) if scores_EIT.shape[dim] > 1]


def matching_loss(scores_EIT: Tensor, right_EIT: Tensor, training: TrainingParams) -> Tensor:
    """Return the loss of eq. 6 over tables of scores; right_EIT [E, I, T] bool marks the right pairs.

    softmax: cross-entropy of each right pair among the images of its text and the texts of its
    image. binary: cross-entropy of each pair against the example's mean score. hinge: against the hardest negative of
    row and column, with a margin in units of the score.
    """
    logits_EIT = scores_EIT / training.temperature
    if training.loss == "binary":
        logits_EIT = logits_EIT - logits_EIT.mean((1, 2), keepdim=True)
        return F.binary_cross_entropy_with_logits(logits_EIT, right_EIT.to(logits_EIT.dtype))
    losses = []
    for dim in contested_dims(scores_EIT):
        if training.loss == "softmax":
            losses.append(-logits_EIT.log_softmax(dim)[right_EIT].mean())
        else:
            hardest = scores_EIT.masked_fill(right_EIT, -torch.inf).amax(dim, keepdim=True)
            short = F.relu(training.margin + hardest - scores_EIT)[right_EIT]
            losses.append(short.mean() / training.temperature)
    return torch.stack(losses).mean()


def accuracy(scores_EIT: Tensor, right_EIT: Tensor) -> Tensor:
    """Return the share of right pairs that score above every wrong pair with the same image or text."""
    wrong_EIT = scores_EIT.masked_fill(right_EIT, -torch.inf)
    above = [(scores_EIT > wrong_EIT.amax(dim, keepdim=True))[right_EIT] for dim in contested_dims(scores_EIT)]
    return torch.stack(above).all(0).float().mean()


class Training(NamedTuple):
    """A training of a dataset: of a method, on the whole few-shot split or without one of its folds.

    folder: under that of the trained weights of the dataset.
    """

    method: str
    fold: int | None = None

    @property
    def folder(self) -> str:
        """Its folder, and its name."""
        return self.method if self.fold is None else f"{self.method}/{prompt_without(self.fold).partition('/')[2]}"


def trainings(params: Params) -> list[Training]:
    """Return the trainings of each dataset: of each trained method, and of the prompts that a fusion is fitted with."""
    whole = [Training(method) for method in params.trained]
    if params.prompted is None or not any(method.fits_weights for method in params.methods.values()):
        return whole
    return whole + [Training(params.prompted, fold) for fold in range(params.fusion.prompt_folds)]


class Processes:
    """The processes that Accelerate has launched together, or this one alone.

    Each scores some of a step's examples and gathers the others' scores, so that all compute the same loss. The
    gradient through its own scores is its part of the whole gradient.
    """

    def __init__(self, state: PartialState) -> None:
        self.count, self.number = state.num_processes, state.process_index

    def own(self, examples: int, number: int | None = None) -> slice:
        """Return which of the examples belong to this process, or to process `number`."""
        n = self.number if number is None else number
        return slice(examples * n // self.count, examples * (n + 1) // self.count)

    def joined(self, own_EIT: Tensor, examples: int) -> Tensor:
        """Return the scores of all examples; only this process's own are differentiable."""
        if self.count == 1:
            return own_EIT
        padded = F.pad(own_EIT.detach(), (0, 0, 0, 0, 0, math.ceil(examples / self.count) - len(own_EIT)))
        parts = list(gather(padded).chunk(self.count))
        for number, part in enumerate(parts):
            own = self.own(examples, number)
            parts[number] = part[: own.stop - own.start]
        parts[self.number] = own_EIT
        return torch.cat(parts)

    def add_up(self, weights: Sequence[nn.Parameter]) -> None:
        """Replace this process's part of the gradient by the whole."""
        if self.count > 1:
            for weight in weights:
                weight.grad = reduce(weight.grad, "sum")


class Trainer:
    """The state of one training: learner, optimizer, step and curve."""

    def __init__(
        self, name: str, training: TrainingParams, seed: int, learner: Learner, examples: Sequence[MatchingExample]
    ) -> None:
        self.name, self.training, self.seed, self.learner, self.examples = name, training, seed, learner, examples
        self.shape = shape(examples, training.candidates)
        self.batch = min(training.examples_per_step, len(examples))
        self.processes = Processes(PartialState())
        # Round first: 0.07 × 100 is slightly more than 7.
        steps = math.ceil(round(training.epochs * len(examples) / self.batch, 6))
        self.steps = max(1, training.least_steps, steps)
        self.weights = list(learner.module.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=training.learning_rate, weight_decay=0.0)
        self.step = 0
        self.curve: list[dict[str, float]] = []

    def _rows(self) -> tuple[list[Table], Tensor, list[Draw]]:
        """Return the step's tables, their right pairs [E, I, T] and a draw for each, determined by name, seed and step.

        Methods with the same number of examples per step train on the same tables.
        """
        rng = Random(f"train/{self.name}/{self.seed}/{self.step}")
        chosen = rng.sample(self.examples, self.batch)
        tables, right = zip(*(table(example, *self.shape, rng) for example in chosen), strict=True)
        levels = self.training.levels or ()
        draws = [Draw(rng.choice(levels), rng.getrandbits(62)) for _ in chosen if levels]
        return list(tables), torch.tensor(right, device="cpu"), draws

    def advance(self) -> dict[str, float]:
        """Take one step and return its row of the curve.

        Raises:
            DataError: the loss or its gradient is not finite; nothing has changed.
        """
        training = self.training
        rate = training.learning_rate * min(1.0, (self.step + 1) / max(1, training.warmup))
        rate *= 1 - 0.9 * self.step / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tables, right, draws = self._rows()
        own = self.processes.own(len(tables))
        scores = self.processes.joined(self.learner.scores(tables[own], draws[own]), len(tables))
        right = right.to(scores.device)
        loss = matching_loss(scores, right, training)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.add_up(self.weights)
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise DataError(f"step {self.step + 1}: the loss is {loss.item():g} and its gradient {norm.item():g}")
        self.optimizer.step()
        self.step += 1
        share = accuracy(scores, right).item()
        self.curve.append({"step": self.step, "loss": round(loss.item(), 6), "accuracy": round(share, 6)})
        return self.curve[-1]

    def save(self, path: Path, key: str) -> None:
        if self.processes.number > 0:
            return
        buffer, weights, moments = io.BytesIO(), self.learner.module.state_dict(), self.optimizer.state_dict()
        torch.save(dict(key=key, step=self.step, curve=self.curve, module=weights, optimizer=moments), buffer)
        data = buffer.getvalue()
        write_atomic(path, hashlib.sha256(data).digest() + data)

    def resume(self, path: Path, key: str) -> None:
        """Restore a saved state if it is of this key; the state of another training is ignored."""
        if not path.exists():
            return
        content = path.read_bytes()
        if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
            log.warning("%s is damaged: the training restarts", path)
            return
        state: dict[str, Any] = torch.load(io.BytesIO(content[DIGEST:]), weights_only=True)
        if state["key"] == key:
            self.step, self.curve = state["step"], state["curve"]
            self.learner.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])


def training_key(session: Session, training: Training) -> str:
    """Return the digest of everything that a training on a dataset depends on."""
    params, row = session.params, session.params.methods[training.method]
    examples = file_digest(session.folders.prepared / "examples.parquet")
    opened = params.backbones[params.backbone_of(training.method)]
    _, backbone = locate(opened)
    if opened.dtype != "float32":
        backbone = digest(backbone, opened.dtype)
    learned: dict[str, list[Any]] = {
        "attention prompt": [{**params.evidence.settings("few-shot"), "shard": 1}, params.prompt],
        "context": [params.context],
    }
    sections = [params.training[training.method], row, params.seed, params.images, *learned.get(str(row.learns), [])]
    if training.fold is not None:
        sections += [training.fold, params.fusion.prompt_folds]
    content = digest(session.name, backbone, examples, *sections)
    return versioned("heads" if row.contrastive else "prompts", content)


def examples_of(session: Session, training: Training) -> list[MatchingExample]:
    """Return the few-shot examples of a training; for errors see `folds`."""
    examples = session.examples("train")
    if training.fold is None:
        return examples
    fold_n = folds(examples, session.params.fusion.prompt_folds)
    return [example for example, fold in zip(examples, fold_n, strict=True) if fold != training.fold]


def is_done(target: Path, key: str) -> bool:
    """Return whether the folder holds the undamaged results of the training of this key."""
    try:
        summary = json.loads((target / SUMMARY).read_text())
        intact = all(file_digest(target / name) == content for name, content in summary["files"].items())
        if done := bool(intact and summary["key"] == key):
            check_libraries(target, summary.get("libraries", {}))
        return done
    except (FileNotFoundError, ValueError, KeyError):
        return False


def train(session: Session, training: Training) -> Iterator[dict[str, float]]:
    """Train a method on the few-shot split of a dataset; yield a row of the curve per step, including earlier ones.

    Writes the learned weights, `curve.csv` and, last, `summary.json` with their key and digests, into the training's
    folder. With several processes only the first writes, into folders that all of them can read.

    Without a fold, `least_steps` is lowered in proportion: every example is seen as often.

    Raises:
        DataError: the split is empty or has no wrong candidate, or the loss is not finite.
    """
    name, params, method = session.name, session.params, training.method
    target = session.folders.trained / training.folder
    PartialState(cpu=params.runtime.device == "cpu")  # assigns a GPU to each process
    key, state = training_key(session, training), target / "state.pt"
    if is_done(target, key):
        with (target / CURVE).open(newline="") as file:
            yield from ({k: float(v) for k, v in row.items()} for row in csv.DictReader(file))
        return
    every, examples = session.examples("train"), examples_of(session, training)
    if not examples:
        raise DataError(f"datasets.{name}.few_shot: leaves no example to train on; raise it or size")
    row = params.training[method]
    row = row.model_copy(update={"least_steps": round(row.least_steps * len(examples) / len(every))})
    learner = LEARNERS[str(params.methods[method].learns)](session, method)
    trainer = Trainer(name, row, params.seed, learner, examples)
    if trainer.batch < (count := trainer.processes.count):
        problem = f"{trainer.batch} examples of a step on {name} are too few for {count} processes; launch fewer"
        raise DataError(f"training.{method}.examples_per_step: {problem}")
    target.mkdir(parents=True, exist_ok=True)
    trainer.resume(state, key)
    yield from list(trainer.curve)
    while trainer.step < trainer.steps:
        try:
            step = trainer.advance()
        except DataError as error:
            trainer.save(state, key)
            raise DataError(
                f"{state}: {training.folder} on {name} stopped after step {trainer.step}, which is kept ({error}); "
                f"lower training.{method}.learning_rate"
            ) from None
        yield step
        if trainer.step % trainer.training.checkpoint_every == 0:
            trainer.save(state, key)
    if trainer.processes.number > 0:
        return
    trainer.learner.save(target / trainer.learner.file)
    write_csv(target / CURVE, ["step", "loss", "accuracy"], trainer.curve)
    tail = trainer.curve[-max(1, len(trainer.curve) // 5) :]
    done = {
        "key": key,
        "libraries": libraries(),
        "files": {name: file_digest(target / name) for name in (trainer.learner.file, CURVE)},
        "examples": len(examples),
        "parameters": sum(weight.numel() for weight in trainer.weights),
        "accuracy": float(np.mean([row["accuracy"] for row in tail])),
    }
    write_atomic(target / SUMMARY, json.dumps(done, indent=2).encode())
    state.unlink(missing_ok=True)
