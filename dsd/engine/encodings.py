"""Every image through the VAE once, every text through the text encoder once; or, where there are more texts than may
be stored, whenever one is asked for.

Shapes: C latent channels, r latent side, M text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from cachetools import LRUCache

from dsd.data.examples import MatchingExample, read_examples
from dsd.data.image_table import ImageTable
from dsd.data.images import resize, to_array
from dsd.models import Clip, StableDiffusion
from dsd.progress import progress
from dsd.scorers.evidence import UNCONDITIONAL
from dsd.store import Store, digest
from dsd.versions import versioned

SPLITS = ("train", "validation", "test")
SHARD = 256  # items that are computed and stored together
HELD = 8  # shards, or as many items, that are held in memory
Arrays = dict[str, np.ndarray]


class Encodings:
    """Named arrays with one row an item, computed once and kept in shards of a store.

    An absent or damaged shard is computed when it is first asked for, so a reader never fails on a cache; a few shards
    at a time are held in memory, whatever the number of items.

    Items that are not `kept` are computed when they are asked for, those that are asked for together in one batch.
    Nothing of them is stored; the last used are held in memory, as many of them as of those that are kept.
    """

    def __init__(
        self,
        store: Store,
        kind: str,
        source: str,
        items: Sequence[str],
        compute: Callable[[list[str]], Arrays],
        *,
        kept: bool = True,
    ) -> None:
        self.items, self.kept, self._kind, self._store, self._compute = items, kept, kind, store, compute
        self._shards = [list(items[i : i + SHARD]) for i in range(0, len(items), SHARD)] if kept else []
        self.keys = [f"{kind}-{digest(source, shard_items)}" for shard_items in self._shards]
        self._place = {
            item: (n, row) for n, shard_items in enumerate(self._shards) for row, item in enumerate(shard_items)
        }
        self._read = lru_cache(maxsize=HELD)(self._load)
        self._last: LRUCache[str, Arrays] = LRUCache(maxsize=HELD * SHARD)

    def _load(self, number: int) -> Arrays:
        key = self.keys[number]
        arrays = self._store.read(key) if key in self._store else None
        if arrays is None:
            # In the order in which they are read back: how its input lies in memory moves the U-Net's last bits.
            arrays = {name: np.ascontiguousarray(array) for name, array in self._compute(self._shards[number]).items()}
            self._store.write(key, arrays)
        return arrays

    def missing(self) -> dict[str, int]:
        """The shards that the store lacks: how many items each has, by key."""
        sizes = {key: len(items) for key, items in zip(self.keys, self._shards, strict=True)}
        return {key: size for key, size in sizes.items() if key not in self._store}

    def make(self, key: str) -> None:
        """Computes the shard of a key, unless it is there."""
        self._load(self.keys.index(key))

    def fill(self) -> None:
        """Stores what is kept and not there yet."""
        for number in progress(range(len(self._shards)), desc=f"encode {self._kind}", unit="shard"):
            self._load(number)

    def __call__(self, items: Sequence[str]) -> Arrays:
        """The rows of the items, stacked in their order."""
        if self.kept:
            places = [self._place[item] for item in items]
            rows = [(self._read(number), row) for number, row in places]
            return {name: np.stack([arrays[name][row] for arrays, row in rows]) for name in rows[0][0]}
        found = self._found(dict.fromkeys(items))
        return {name: np.stack([found[item][name] for item in items]) for name in found[items[0]]}

    def _found(self, items: Collection[str]) -> dict[str, Arrays]:
        """Of items that are not kept, those that are held and those that are computed now."""
        found = {item: self._last[item] for item in items if item in self._last}
        lacking = [item for item in items if item not in found]
        for batch in (lacking[i : i + SHARD] for i in range(0, len(lacking), SHARD)):
            arrays = self._compute(batch)
            # Copies: a row of a batch would hold the whole of it.
            found |= {item: {name: array[n].copy() for name, array in arrays.items()} for n, item in enumerate(batch)}
        self._last.update(found)
        return found


def all_texts(examples: Iterable[MatchingExample]) -> list[str]:
    """The unconditional text and every text of the examples, in order of first appearance: neighbours share shards."""
    return list(dict.fromkeys([UNCONDITIONAL, *(text for example in examples for text in example.texts)]))


def read_all(prepared: Path) -> Iterator[MatchingExample]:
    return (example for split in SPLITS for example in read_examples(prepared / "examples.parquet", split))


def diffusion_encodings(
    backbone: StableDiffusion, images: ImageTable, texts: Sequence[str], resolution: int, store: Store, kept: int
) -> tuple[Encodings, Encodings]:
    """Latents [C, r, r] by image id; hidden states [M, D], content mask [M] and truncation by text.

    `kept`: texts are stored where there are at most this many (`runtime.kept_texts`).
    """

    def latents(ids: list[str]) -> Arrays:
        batch = np.stack([to_array(resize(images[i], parity=None, resolution=resolution)) for i in ids])
        return {"latents": backbone.encode_images(batch).cpu().numpy()}

    def embeddings(batch: list[str]) -> Arrays:
        encoded = backbone.encode_texts(batch)
        return {
            "hidden": encoded.hidden.cpu().numpy(),
            "content": encoded.content.numpy(),
            "truncated": encoded.truncated.numpy(),
        }

    image_key = versioned("latents", digest(backbone.digest, resolution))
    text_key = versioned("texts", backbone.digest)
    return Encodings(store, "latents", image_key, images.ids, latents), Encodings(
        store, "texts", text_key, texts, embeddings, kept=len(texts) <= kept
    )


def contrastive_encodings(
    clip: Clip, images: ImageTable, texts: Sequence[str], store: Store, kept: int
) -> tuple[Encodings, Encodings]:
    """Features [F] by image id and by text: the inputs of CLIP's projections."""

    def image_features(ids: list[str]) -> Arrays:
        return {"features": clip.image_features(np.stack([to_array(images[i]) for i in ids])).cpu().numpy()}

    def text_features(batch: list[str]) -> Arrays:
        return {"features": clip.text_features(batch).cpu().numpy()}

    key = versioned("features", clip.digest)
    return Encodings(store, "clip-image-features", key, images.ids, image_features), Encodings(
        store, "clip-text-features", key, texts, text_features, kept=len(texts) <= kept
    )
