"""The stage `cache`: encode every image and text of a dataset once."""

from __future__ import annotations

from dsd.engine.encodings import Encodings
from dsd.engine.session import Session


def tables(session: Session) -> list[Encodings]:
    """Return all encodings of a dataset, of every backbone that a method uses."""
    return [*session.diffusion_encodings, *(table for name in session.clip_names for table in session.features(name))]


def encode(session: Session) -> dict[str, int | float]:
    """Fill the cache of a dataset; return the numbers of images, texts, truncated texts and damaged shards."""
    encodings = tables(session)
    for table in encodings:
        table.fill()
    session.cache.prune({key for table in encodings for key in table.keys})
    images, texts, *_ = encodings
    return {
        "images": len(images.items),
        "texts": len(texts.items),
        "truncated": session.backbone.truncated(texts.items),
        "corrupt": session.cache.corrupt,
    }


def missing(session: Session) -> dict[str, int]:
    """Return the number of items of each missing shard of a dataset's cache, by key."""
    return {key: size for table in tables(session) for key, size in table.missing().items()}


class Worker:
    """Fills a dataset's cache shard by shard, with a session of its own."""

    def __init__(self, session: Session) -> None:
        self.shards = {key: table for table in tables(session) for key in table.keys}

    def __call__(self, key: str) -> None:
        """Compute the shard of a key unless it exists."""
        self.shards[key].make(key)
