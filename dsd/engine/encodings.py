"""Encodings of images and texts: computed once and stored, or on access if there are too many texts to store.

Shapes: C latent channels, r latent side, M text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsd.data.examples import MatchingExample, read_examples
from dsd.data.image_table import ImageTable
from dsd.data.images import resize, to_array
from dsd.data.splits import SPLITS
from dsd.errors import TextError
from dsd.models.checkpoint import token_ids
from dsd.progress import progress
from dsd.scorers.evidence import UNCONDITIONAL
from dsd.store import Store, digest
from dsd.versions import versioned

if TYPE_CHECKING:
    from dsd.models.clip import Clip
    from dsd.models.stable_diffusion import StableDiffusion

SHARD = 256  # items that are computed and stored together
HELD = 8  # shards in memory, or the same number of items
Arrays = dict[str, np.ndarray]


class Encodings:
    """Named arrays with one row per item, computed once and stored in shards; a few shards are in memory.

    A missing or damaged shard is computed at its first access, so that reading never fails.

    If not `kept`, items are computed at each access, those of one call in batches, and not stored; the most recently
    used are in memory.
    """

    def __init__(
        self, store: Store, kind: str, source: str, items: Sequence[str], compute: Callable[[list[str]], Arrays], *,
        kept: bool = True,
    ) -> None:  # fmt: skip
        self.items, self.kept, self._kind, self._store, self._compute = items, kept, kind, store, compute
        self._shards = [list(items[i : i + SHARD]) for i in range(0, len(items), SHARD)] if kept else []
        self.keys = [f"{kind}-{digest(source, shard_items)}" for shard_items in self._shards]
        self._place = {item: divmod(n, SHARD) for n, item in enumerate(items)} if kept else {}
        self._read = lru_cache(maxsize=HELD)(self._load)
        self._last: dict[str, Arrays] = {}

    def _load(self, number: int) -> Arrays:
        key = self.keys[number]
        arrays = self._store.read(key) if key in self._store else None
        if arrays is None:
            # As they are read from the store: the memory layout of its input changes the U-Net's last bits.
            arrays = {name: np.ascontiguousarray(array) for name, array in self._compute(self._shards[number]).items()}
            self._store.write(key, arrays)
        return arrays

    def missing(self) -> dict[str, int]:
        """Return the number of items of each missing shard, by key."""
        sizes = {key: len(items) for key, items in zip(self.keys, self._shards, strict=True)}
        return {key: size for key, size in sizes.items() if key not in self._store}

    def make(self, key: str) -> None:
        """Compute the shard of a key unless it exists."""
        self._load(self.keys.index(key))

    def fill(self) -> None:
        """Compute all missing shards."""
        for number in progress(range(len(self._shards)), desc=f"encode {self._kind}", unit="shard"):
            self._load(number)

    def __call__(self, items: Sequence[str]) -> Arrays:
        """Return the rows of the items, stacked in their order."""
        if self.kept:
            places = [self._place[item] for item in items]
            rows = [(self._read(number), row) for number, row in places]
            return {name: np.stack([arrays[name][row] for arrays, row in rows]) for name in rows[0][0]}
        arrays_of = self._unstored(dict.fromkeys(items))
        return {name: np.stack([arrays_of[item][name] for item in items]) for name in arrays_of[items[0]]}

    def _unstored(self, items: Collection[str]) -> dict[str, Arrays]:
        """Return the arrays of items that are not kept, from memory or computed."""
        arrays_of = {item: self._last[item] for item in items if item in self._last}
        missing = [item for item in items if item not in arrays_of]
        for batch in (missing[i : i + SHARD] for i in range(0, len(missing), SHARD)):
            arrays = self._compute(batch)
            # Copies: a view of a row would keep the whole batch in memory.
            arrays_of |= {item: {name: a[n].copy() for name, a in arrays.items()} for n, item in enumerate(batch)}
        remember(self._last, arrays_of, HELD * SHARD)
        return arrays_of


def remember(recent: dict[str, Arrays], used: Mapping[str, Arrays], size: int) -> None:
    """Add the items just used, and forget the least recently used ones above `size`."""
    for item, arrays in used.items():
        recent.pop(item, None)
        recent[item] = arrays
    for item in list(recent)[: max(0, len(recent) - size)]:
        del recent[item]


def all_texts(examples: Iterable[MatchingExample]) -> list[str]:
    """Return the unconditional text and every text of the examples, in order of first appearance."""
    return list(dict.fromkeys([UNCONDITIONAL, *(text for example in examples for text in example.texts)]))


def read_all(prepared: Path) -> Iterator[MatchingExample]:
    """Yield the examples of all splits of a prepared dataset."""
    return (example for split in SPLITS for example in read_examples(prepared / "examples.parquet", split))


def check_tokens(backbone: StableDiffusion, texts: Sequence[str]) -> None:
    """Raise TextError if a text, other than that of the unconditional pass, has no token but special ones."""
    special = set(backbone.tokenizer.all_special_ids)
    for text, ids in zip(texts, token_ids(backbone.tokenizer, texts), strict=True):
        if text != UNCONDITIONAL and special.issuperset(ids):
            raise TextError(f"text {text[:60]!r}: has no token but special ones; give it a word")


def embeddings(backbone: StableDiffusion, texts: list[str]) -> Arrays:
    """Return the fields of `TextEmbeddings` by name; for errors see `check_tokens`."""
    check_tokens(backbone, texts)
    return {name: tensor.cpu().numpy() for name, tensor in backbone.encode_texts(texts)._asdict().items()}


def diffusion_encodings(
    backbone: StableDiffusion, images: ImageTable, texts: Sequence[str], resolution: int, store: Store, kept: int
) -> tuple[Encodings, Encodings]:
    """Return latents [C, r, r] by image id; hidden states [M, D], content mask [M] and truncation by text.

    kept: texts are stored if there are at most this many (`runtime.kept_texts`).
    """

    def latents(ids: list[str]) -> Arrays:
        batch = np.stack([to_array(resize(images[i], parity=None, resolution=resolution)) for i in ids])
        return {"latents": backbone.encode_images(batch).cpu().numpy()}

    image_key = versioned("latents", digest(backbone.digest, resolution))
    text_key = versioned("texts", backbone.text_digest)
    by_text = Encodings(store, "texts", text_key, texts, partial(embeddings, backbone), kept=len(texts) <= kept)
    return Encodings(store, "latents", image_key, images.ids, latents), by_text


def contrastive_encodings(
    clip: Clip, images: ImageTable, texts: Sequence[str], store: Store, kept: int
) -> tuple[Encodings, Encodings]:
    """Return the inputs [F] of CLIP's projections by image id and by text."""

    def image_features(ids: list[str]) -> Arrays:
        return {"features": clip.image_features(np.stack([to_array(images[i]) for i in ids])).cpu().numpy()}

    def text_features(batch: list[str]) -> Arrays:
        return {"features": clip.text_features(batch).cpu().numpy()}

    key = versioned("features", clip.digest)
    by_text = Encodings(store, "clip-text-features", key, texts, text_features, kept=len(texts) <= kept)
    return Encodings(store, "clip-image-features", key, images.ids, image_features), by_text
