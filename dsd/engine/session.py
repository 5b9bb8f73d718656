"""A session: everything that a run on one dataset opens, each once at its first use.

Shapes: C candidates, E pairs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch

from dsd.config import ContrastiveMethod, NoiseParams, Params
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.encodings import Arrays, Encodings, all_texts, contrastive_encodings, diffusion_encodings, read_all
from dsd.engine.engine import Engine
from dsd.errors import CheckpointError, DataError
from dsd.models import device_of, load_clip, load_diffusion
from dsd.models.checkpoint import DTYPES
from dsd.models.clip_heads import FILES, Head, load_head
from dsd.models.prompts import PROMPT, AttentionPrompt
from dsd.progress import progress
from dsd.scorers.evidence import Shard
from dsd.store import Store, digest, file_digest
from dsd.versions import versioned

if TYPE_CHECKING:
    from dsd.models.clip import Clip
    from dsd.models.stable_diffusion import StableDiffusion


class Folders(NamedTuple):
    """The folders of a dataset that the previous stages wrote."""

    prepared: Path
    cached: Path
    trained: Path

    @classmethod
    def of(cls, data: Path, dataset: str) -> Folders:
        return cls(*(data / stage / dataset for stage in ("prepare", "cache", "train")))


def similar_starts(texts: Sequence[str], length: int) -> list[str]:
    """Return the texts whose first `length` bytes are also those of another text, whatever their case and spaces.

    A token is at least one byte, so no others can have the same first `length` tokens.
    """
    by_start: dict[bytes, list[str]] = {}
    for text in dict.fromkeys(texts):
        letters = unicodedata.normalize("NFC", "".join(text.lower().split()))
        by_start.setdefault(letters.encode()[:length], []).append(text)
    return [text for alike in by_start.values() if len(alike) > 1 for text in alike]


class Session:
    """Models, encodings and engines of a run on dataset `name`."""

    def __init__(self, name: str, params: Params, folders: Folders, *, cores: int | None = None) -> None:
        """`cores`: see `Engine`."""
        self.name, self.params, self.folders = name, params, folders
        self.cache = Store(folders.cached)
        self._cores = cores
        self._engines: dict[str, Engine] = {}
        self._clips: dict[str, Clip] = {}
        self._features: dict[str, tuple[Encodings, Encodings]] = {}
        self._indistinct: dict[str, dict[str, str]] = {}

    @cached_property
    def device(self) -> torch.device:
        return device_of(self.params.runtime.device)

    @property
    def scoring_noise(self) -> NoiseParams:
        """The noise levels and draws of scoring on this dataset."""
        return self.params.noise_of(self.name)

    @cached_property
    def images(self) -> ImageTable:
        return ImageTable(self.folders.prepared / "images.parquet")

    @cached_property
    def texts(self) -> list[str]:
        return all_texts(read_all(self.folders.prepared))

    def examples(self, split: str) -> list[MatchingExample]:
        """Read the examples of a split, of validation and test without the `indistinct` ones.

        Raises:
            DataError: the dataset is not prepared.
        """
        indistinct = () if split == "train" else self.indistinct(split)
        examples = [example for example in self._all_examples(split) if example.id not in indistinct]
        if not examples and split != "train":
            raise DataError(f"{self.name}: no example of the split {split} is left, {len(indistinct)} left out as ties")
        return examples

    def _all_examples(self, split: str) -> list[MatchingExample]:
        file = self.folders.prepared / "examples.parquet"
        if not file.exists():
            raise DataError(f"{file}: no such file; run `make reproduce` first")
        return read_examples(file, split)

    def indistinct(self, split: str) -> dict[str, str]:
        """Return the examples of a split that have two equal candidates, at least to a backbone, with the reason.

        The scores of these candidates are equal: a tie, which is nobody's win.
        """
        if split not in self._indistinct:
            twice = (e.id for e in self._all_examples(split) if len(set(e.images)) < len(e.images))
            reasons = self._indistinct[split] = dict.fromkeys(twice, "two images have the same pixels")
            for name in (self.params.backbone, *self.clip_names):
                model = self.backbone if name == self.params.backbone else self.clip(name)
                for example in self._all_examples(split):
                    alike = similar_starts(example.texts, model.max_tokens - 2)  # without the begin and end token
                    if alike and len(set(model.text_ids(alike))) < len(alike):
                        reasons.setdefault(example.id, f"two texts are one to {name}")
        return self._indistinct[split]

    @cached_property
    def backbone(self) -> StableDiffusion:
        """The diffusion model under test; its components are opened at first use."""
        row, runtime = self.params.backbones[self.params.backbone], self.params.runtime
        return load_diffusion(row, self.device, runtime.attention, lazy=True)

    @cached_property
    def diffusion_encodings(self) -> tuple[Encodings, Encodings]:
        """The latents of the images and the embeddings of the texts."""
        resolution, kept = self.params.images.resolution, self.params.runtime.kept_texts
        return diffusion_encodings(self.backbone, self.images, self.texts, resolution, self.cache, kept)

    def training_of(self, prompt: str) -> str | None:
        """Return the method whose training writes an attention prompt; None for "none"."""
        return None if prompt == "none" else self.params.prompted

    def prompt_file(self, prompt: str) -> Path | None:
        """Return the file of an attention prompt; None for "none"."""
        training, (_, _, own) = self.training_of(prompt), prompt.partition("/")
        return self.folders.trained / training / own / PROMPT if training else None

    def prompt(self, prompt: str) -> AttentionPrompt | None:
        """Load an attention prompt, None for "none"; raise CheckpointError if it is missing or of another backbone."""
        file = self.prompt_file(prompt)
        return AttentionPrompt.load(file, self.backbone.digest) if file else None

    def evidence_key(self, prompt: str) -> str:
        """Return the digest of everything that evidence depends on, except its rows; for errors see `prompt`."""
        self.prompt(prompt)
        file, row = self.prompt_file(prompt), self.params.backbones[self.params.backbone]
        trained = None if file is None else file_digest(file)
        settings, resolution = self.params.evidence.settings(prompt), self.params.images.resolution
        content = digest(self.backbone.text_digest, trained, settings, resolution, str(DTYPES[row.dtype]))
        return versioned("evidence", content)

    def engine(self, prompt: str) -> Engine:
        """Return the engine of evidence under a prompt: "none", "few-shot", or a `prompt_without` (dsd.scorers)."""
        if prompt not in self._engines:
            learned, encodings = self.prompt(prompt), self.diffusion_encodings
            evidence, size = self.params.evidence, self.params.runtime.batch_size
            self._engines[prompt] = Engine(self.backbone, learned, evidence, *encodings, size, self._cores)
        return self._engines[prompt]

    def fill_evidence(
        self, prompt: str, shards: Sequence[Shard], store: Store, title: str,
        keep: Callable[[Arrays], Arrays] = lambda arrays: arrays,
    ) -> int:  # fmt: skip
        """Compute missing and damaged shards; return the number of computed (pair, draw) rows.

        The engine is opened only if a shard is missing. keep: maps the evidence to the arrays to store.
        """
        computed = 0
        bar = progress(total=sum(len(shard.rows) for shard in shards), desc=title, unit="row", unit_scale=True)
        for shard in shards:
            if shard.key not in store or store.read(shard.key) is None:
                store.write(shard.key, keep(self.engine(prompt).compute(shard.rows)))
                computed += len(shard.rows)
            bar.update(len(shard.rows))
        bar.close()
        return computed

    def clip(self, backbone: str) -> Clip:
        """Return the CLIP of a row of `backbones`, opened at its first use."""
        if backbone not in self._clips:
            self._clips[backbone] = load_clip(self.params.backbones[backbone], self.device, lazy=True)
        return self._clips[backbone]

    def features(self, backbone: str) -> tuple[Encodings, Encodings]:
        """Return a CLIP's features of the images and of the texts."""
        if backbone not in self._features:
            clip, kept = self.clip(backbone), self.params.runtime.kept_texts
            self._features[backbone] = contrastive_encodings(clip, self.images, self.texts, self.cache, kept)
        return self._features[backbone]

    @property
    def clip_names(self) -> list[str]:
        """The rows of `backbones` that contrastive methods use."""
        return sorted({m.own_backbone for m in self.params.methods.values() if m.contrastive and m.own_backbone})

    def head(self, name: str) -> Head:
        """Return the trained head of a contrastive method."""
        method = cast(ContrastiveMethod, self.params.methods[name])
        clip, features = self.clip(method.backbone), self.features(method.backbone)
        return load_head(method, clip, *features, self.folders.trained / name)

    def cosines_key(self, name: str, requested: Sequence[Pair]) -> str:
        """Return the key of the cosines of these pairs under a contrastive method."""
        method = self.params.methods[name]
        file = FILES.get(method.learns or "")
        path = self.folders.trained / name / file if file else None
        if path and not path.exists():
            raise CheckpointError(f"{path}: no such file; train {name} with the stage `train`")
        weights = file_digest(path) if path else None
        return versioned("cosines", digest(self.clip(str(method.own_backbone)).digest, weights, requested))

    @torch.inference_mode()
    def cosines(self, name: str, requested: Sequence[Pair]) -> np.ndarray:
        """Return the cosine [E] of each pair under a contrastive method."""
        head, size = self.head(name), self.params.runtime.batch_size
        batches = [requested[i : i + size] for i in range(0, len(requested), size)]
        bar = progress(batches, desc="cosines", unit="batch", leave=False)
        cosines = np.concatenate([head(batch).float().cpu().numpy() for batch in bar])
        if not np.isfinite(cosines).all():
            raise CheckpointError(f"methods.{name}: cosines are NaN or infinite; set dtype of its backbone to float32")
        return cosines

    def proposals(self, proposer: str, examples: Sequence[MatchingExample]) -> list[np.ndarray]:
        """Return the scores [C] of each example's candidates under a contrastive method."""
        requested = pairs(examples)
        scores = dict(zip(requested, self.cosines(proposer, requested).astype(float).tolist(), strict=True))
        return [np.array([scores[pair] for pair in pairs([example])]) for example in examples]
