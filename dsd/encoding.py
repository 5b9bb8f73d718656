"""Every image through the VAE once, every text through the text encoder once; or, where all texts together would take
more disk than they may, whenever one is asked for.

Shapes: C latent channels, r latent side, M text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from cachetools import LRUCache

from dsd.backbones import Clip, StableDiffusion, device_of, load_clip, load_diffusion
from dsd.evidence import UNCONDITIONAL
from dsd.images import resize, to_array
from dsd.matching import MatchingExample, read_examples
from dsd.params import ContrastiveMethod, Params
from dsd.pictures import Pictures
from dsd.progress import progress
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
            arrays = self._compute(self._shards[number])
            self._store.write(key, arrays)
        return arrays

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


def fits(texts: int, size: int, gigabytes: float) -> bool:
    """Whether so many texts are kept, each of `size` bytes; see `runtime.cache_gigabytes`."""
    return texts * size <= gigabytes * 1e9


def diffusion_encodings(
    backbone: StableDiffusion,
    pictures: Pictures,
    texts: Sequence[str],
    resolution: int,
    store: Store,
    gigabytes: float,
) -> tuple[Encodings, Encodings]:
    """Latents [C, r, r] by image id; hidden states [M, D], content mask [M] and truncation by text."""

    def latents(ids: list[str]) -> Arrays:
        batch = np.stack([to_array(resize(pictures[i], parity=None, resolution=resolution)) for i in ids])
        return {"latents": backbone.encode_images(batch).cpu().numpy()}

    def hidden(batch: list[str]) -> Arrays:
        out = backbone.encode_texts(batch)
        return {
            "hidden": out.hidden.cpu().numpy(),
            "content": out.content.numpy(),
            "truncated": out.truncated.numpy(),
        }

    images = Encodings(store, "latents", digest(backbone.digest, resolution), pictures.ids, latents)
    kept = fits(len(texts), 4 * backbone.max_tokens * backbone.unet.config.cross_attention_dim, gigabytes)
    return images, Encodings(store, "texts", backbone.digest, texts, hidden, kept=kept)


def contrastive_encodings(
    clip: Clip, pictures: Pictures, texts: Sequence[str], store: Store, gigabytes: float
) -> tuple[Encodings, Encodings]:
    """Features [F] by image id and by text: what CLIP's projections see."""

    def images(ids: list[str]) -> Arrays:
        return {"features": clip.image_features(np.stack([to_array(pictures[i]) for i in ids])).cpu().numpy()}

    def words(batch: list[str]) -> Arrays:
        return {"features": clip.text_features(batch).cpu().numpy()}

    kept = fits(len(texts), 4 * clip.model.text_projection.in_features, gigabytes)
    return Encodings(store, "clip-image-features", clip.digest, pictures.ids, images), Encodings(
        store, "clip-text-features", clip.digest, texts, words, kept=kept
    )


def clip_backbones(params: Params) -> list[str]:
    """The CLIP rows that some method names."""
    return sorted({m.backbone for m in params.methods.values() if isinstance(m, ContrastiveMethod)})


def encode(name: str, params: Params, prepared: Path, target: Path) -> dict[str, int | float]:
    """Fills the cache of dataset `name` for every backbone that a method names; returns what was encoded."""
    store, runtime = Store(target), params.runtime
    device, most = device_of(runtime.device), runtime.cache_gigabytes
    pictures, texts = Pictures(prepared / "images.parquet"), all_texts(read_all(prepared))
    backbone = load_diffusion(params.backbones[params.backbone], device, runtime.attention)
    tables = [*diffusion_encodings(backbone, pictures, texts, params.images.resolution, store, most)]
    for row in clip_backbones(params):
        tables += contrastive_encodings(load_clip(params.backbones[row], device), pictures, texts, store, most)
    for table in tables:
        table.fill()
    store.prune({key for table in tables for key in table.keys})
    return {
        "images": len(pictures.ids),
        "texts": len(texts),
        "truncated": backbone.truncated(texts),
        "corrupt": store.corrupt,
    }
