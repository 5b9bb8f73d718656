"""Every image through the VAE once, every text through the text encoder once; or, where there are more texts than may
be stored, whenever one is asked for.

Shapes: C latent channels, r latent side, M text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
from cachetools import LRUCache

from dsd.config import ContrastiveMethod, Params
from dsd.data.examples import MatchingExample, read_examples
from dsd.data.image_table import ImageTable
from dsd.data.images import resize, to_array
from dsd.models import Clip, StableDiffusion, device_of, load_clip, load_diffusion
from dsd.models.checkpoint import digest_of
from dsd.progress import progress
from dsd.scorers.evidence import UNCONDITIONAL
from dsd.store import Store, digest

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
    backbone: StableDiffusion,
    pictures: ImageTable,
    texts: Sequence[str],
    resolution: int,
    store: Store,
    kept: int,
) -> tuple[Encodings, Encodings]:
    """Latents [C, r, r] by image id; hidden states [M, D], content mask [M] and truncation by text.

    `kept` is `runtime.kept_texts`.
    """
    return _of_diffusion(backbone.digest, lambda: backbone, pictures, texts, resolution, store, kept)


def _of_diffusion(
    source: str,
    opened: Callable[[], StableDiffusion],
    pictures: ImageTable,
    texts: Sequence[str],
    resolution: int,
    store: Store,
    kept: int,
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
    return images, Encodings(store, "texts", source, texts, hidden, kept=len(texts) <= kept)


def contrastive_encodings(
    clip: Clip, pictures: ImageTable, texts: Sequence[str], store: Store, kept: int
) -> tuple[Encodings, Encodings]:
    """Features [F] by image id and by text: what CLIP's projections see."""
    return _of_contrastive(clip.digest, lambda: clip, pictures, texts, store, kept)


def _of_contrastive(
    source: str, opened: Callable[[], Clip], pictures: ImageTable, texts: Sequence[str], store: Store, kept: int
) -> tuple[Encodings, Encodings]:
    def images(ids: list[str]) -> Arrays:
        return {"features": opened().image_features(np.stack([to_array(pictures[i]) for i in ids])).cpu().numpy()}

    def words(batch: list[str]) -> Arrays:
        return {"features": opened().text_features(batch).cpu().numpy()}

    return Encodings(store, "clip-image-features", source, pictures.ids, images), Encodings(
        store, "clip-text-features", source, texts, words, kept=len(texts) <= kept
    )


def clip_backbones(params: Params) -> list[str]:
    """The CLIP rows that some method names."""
    return sorted({m.backbone for m in params.methods.values() if isinstance(m, ContrastiveMethod)})


def diffusion_of(params: Params) -> Callable[[], StableDiffusion]:
    """What opens the diffusion model under test, once."""
    row, runtime = params.backbones[params.backbone], params.runtime
    return cache(partial(load_diffusion, row, device_of(runtime.device), runtime.attention))


def encodings(
    params: Params, prepared: Path, store: Store, diffusion: Callable[[], StableDiffusion]
) -> list[Encodings]:
    """All that is encoded of a dataset, for every backbone that a method names; one is opened when it is needed."""
    kept, device = params.runtime.kept_texts, device_of(params.runtime.device)
    pictures, texts = ImageTable(prepared / "images.parquet"), all_texts(read_all(prepared))
    source = digest_of(params.backbones[params.backbone])
    tables = [*_of_diffusion(source, diffusion, pictures, texts, params.images.resolution, store, kept)]
    for row in (params.backbones[name] for name in clip_backbones(params)):
        clip = cache(partial(load_clip, row, device))
        tables += _of_contrastive(digest_of(row), clip, pictures, texts, store, kept)
    return tables


def encode(name: str, params: Params, prepared: Path, target: Path) -> dict[str, int | float]:
    """Fills the cache of dataset `name` for every backbone that a method names; returns what was encoded."""
    store, diffusion = Store(target), diffusion_of(params)
    tables = encodings(params, prepared, store, diffusion)
    for table in tables:
        table.fill()
    store.prune({key for table in tables for key in table.keys})
    images, texts, *_ = tables
    return {
        "images": len(images.items),
        "texts": len(texts.items),
        "truncated": diffusion().truncated(texts.items),
        "corrupt": store.corrupt,
    }


def missing(params: Params, prepared: Path, target: Path) -> dict[str, int]:
    """What a dataset's cache lacks: how many items each shard has, by key."""
    tables = encodings(params, prepared, Store(target), diffusion_of(params))
    return {key: size for table in tables for key, size in table.missing().items()}


class Worker:
    """Fills a dataset's cache shard by shard; a backbone stays open from the first that it is needed for."""

    def __init__(self, params: Params, prepared: Path, target: Path) -> None:
        tables = encodings(params, prepared, Store(target), diffusion_of(params))
        self.asked = {key: table for table in tables for key in table.keys}

    def __call__(self, key: str) -> None:
        """Computes the shard of a key, unless it is there."""
        self.asked[key].make(key)
