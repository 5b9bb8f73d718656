"""Every image through the VAE once, every text through the text encoder once.

Shapes: C latent channels, r latent side, M text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np

from dsd.backbones import Clip, StableDiffusion, device_of, load_clip, load_diffusion
from dsd.backbones.checkpoint import digest_of
from dsd.evidence import UNCONDITIONAL
from dsd.images import resize, to_array
from dsd.matching import MatchingExample, read_examples
from dsd.params import ContrastiveMethod, Params
from dsd.pictures import Pictures
from dsd.progress import progress
from dsd.store import Store, digest

SPLITS = ("train", "validation", "test")
Arrays = dict[str, np.ndarray]


class Encodings:
    """Named arrays with one row an item, computed once and kept in shards of a store.

    An absent or damaged shard is computed when it is first asked for, so a reader never fails on a cache; a few shards
    at a time are held in memory, whatever the number of items.
    """

    def __init__(
        self,
        store: Store,
        kind: str,
        source: str,
        items: Sequence[str],
        compute: Callable[[list[str]], Arrays],
        shard: int = 256,
    ) -> None:
        self.kind, self.items, self._store, self._compute = kind, list(items), store, compute
        self._shards = [list(items[i : i + shard]) for i in range(0, len(items), shard)]
        self.keys = [f"{kind}-{digest(source, shard_items)}" for shard_items in self._shards]
        self._place = {
            item: (n, row) for n, shard_items in enumerate(self._shards) for row, item in enumerate(shard_items)
        }
        self._read = lru_cache(maxsize=8)(self._load)

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
        for number in progress(range(len(self._shards)), desc=f"encode {self.kind}", unit="shard"):
            self._load(number)

    def __call__(self, items: Sequence[str]) -> Arrays:
        """The rows of the items, stacked in their order."""
        rows = [(self._read(number), row) for number, row in (self._place[item] for item in items)]
        return {name: np.stack([arrays[name][row] for arrays, row in rows]) for name in rows[0][0]}

    def column(self, name: str) -> np.ndarray:
        """One array of all items."""
        return np.concatenate([self._load(number)[name] for number in range(len(self._shards))])


def all_texts(examples: Sequence[MatchingExample]) -> list[str]:
    """The unconditional text and every text of the examples, in order of first appearance: neighbours share shards."""
    return list(dict.fromkeys([UNCONDITIONAL, *(text for example in examples for text in example.texts)]))


def read_all(prepared: Path) -> list[MatchingExample]:
    return [example for split in SPLITS for example in read_examples(prepared / "examples.parquet", split)]


def diffusion_encodings(
    backbone: StableDiffusion, pictures: Pictures, texts: Sequence[str], resolution: int, store: Store
) -> tuple[Encodings, Encodings]:
    """Latents [C, r, r] by image id; hidden states [M, D], content mask [M] and truncation by text."""
    return _of_diffusion(backbone.digest, lambda: backbone, pictures, texts, resolution, store)


def _of_diffusion(
    source: str,
    opened: Callable[[], StableDiffusion],
    pictures: Pictures,
    texts: Sequence[str],
    resolution: int,
    store: Store,
) -> tuple[Encodings, Encodings]:
    def latents(ids: list[str]) -> Arrays:
        batch = np.stack([to_array(resize(pictures[i], parity=None, resolution=resolution)) for i in ids])
        return {"latents": opened().encode_images(batch).cpu().numpy()}

    def hidden(batch: list[str]) -> Arrays:
        out = opened().encode_texts(batch)
        return {
            "hidden": out.hidden.cpu().numpy(),
            "content": out.content.numpy(),
            "truncated": out.truncated.numpy(),
        }

    images = Encodings(store, "latents", digest(source, resolution), pictures.ids, latents)
    return images, Encodings(store, "texts", source, texts, hidden)


def contrastive_encodings(
    clip: Clip, pictures: Pictures, texts: Sequence[str], store: Store
) -> tuple[Encodings, Encodings]:
    """Features [F] by image id and by text: what CLIP's projections see."""
    return _of_contrastive(clip.digest, lambda: clip, pictures, texts, store)


def _of_contrastive(
    source: str, opened: Callable[[], Clip], pictures: Pictures, texts: Sequence[str], store: Store
) -> tuple[Encodings, Encodings]:
    def images(ids: list[str]) -> Arrays:
        return {"features": opened().image_features(np.stack([to_array(pictures[i]) for i in ids])).cpu().numpy()}

    def words(batch: list[str]) -> Arrays:
        return {"features": opened().text_features(batch).cpu().numpy()}

    return Encodings(store, "clip-image-features", source, pictures.ids, images), Encodings(
        store, "clip-text-features", source, texts, words
    )


def clip_backbones(params: Params) -> list[str]:
    """The CLIP rows that some method names."""
    return sorted({m.backbone for m in params.methods.values() if isinstance(m, ContrastiveMethod)})


def encodings(params: Params, prepared: Path, store: Store) -> list[Encodings]:
    """All that is encoded of a dataset, for every backbone that a method names; one is opened when it is needed."""
    device, row = device_of(params.runtime.device), params.backbones[params.backbone]
    pictures, texts = Pictures(prepared / "images.parquet"), all_texts(read_all(prepared))
    diffusion = cache(partial(load_diffusion, row, device, params.runtime.attention))
    tables = [*_of_diffusion(digest_of(row), diffusion, pictures, texts, params.images.resolution, store)]
    for row in (params.backbones[name] for name in clip_backbones(params)):
        tables += _of_contrastive(digest_of(row), cache(partial(load_clip, row, device)), pictures, texts, store)
    return tables


def encode(name: str, params: Params, prepared: Path, target: Path) -> dict[str, int | float]:
    """Fills the cache of dataset `name` for every backbone that a method names; returns what was encoded."""
    store = Store(target)
    tables = encodings(params, prepared, store)
    for table in tables:
        table.fill()
    store.prune({key for table in tables for key in table.keys})
    truncated = sum(int(table.column("truncated").sum()) for table in tables if table.kind == "texts")
    return {
        "images": len(tables[0].items),
        "texts": len(tables[1].items),
        "truncated": truncated,
        "corrupt": store.corrupt,
    }


def missing(params: Params, prepared: Path, target: Path) -> dict[str, int]:
    """What a dataset's cache lacks: how many items each shard has, by key."""
    return {key: size for table in encodings(params, prepared, Store(target)) for key, size in table.missing().items()}


class Worker:
    """Fills a dataset's cache shard by shard; a backbone stays open from the first that it is needed for."""

    def __init__(self, params: Params, prepared: Path, target: Path) -> None:
        self.asked = {key: table for table in encodings(params, prepared, Store(target)) for key in table.keys}

    def __call__(self, key: str) -> None:
        """Computes the shard of a key, unless it is there."""
        self.asked[key].make(key)
