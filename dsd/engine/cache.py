"""The stage cache: every image and text of a dataset is encoded, once."""

from __future__ import annotations

from dsd.engine.encodings import Encodings
from dsd.engine.session import Session


def tables(session: Session) -> list[Encodings]:
    """All encodings of a dataset, of every backbone that a method names."""
    clips = (table for backbone in session.clips for table in session.features(backbone))
    return [*session.diffusion_encodings, *clips]


def encode(session: Session) -> dict[str, int | float]:
    """Fill the cache of a dataset; returns the numbers of images, texts, truncated texts and damaged shards."""
    every = tables(session)
    for table in every:
        table.fill()
    session.cache.prune({key for table in every for key in table.keys})
    images, texts, *_ = every
    return {
        "images": len(images.items),
        "texts": len(texts.items),
        "truncated": session.backbone.truncated(texts.items),
        "corrupt": session.cache.corrupt,
    }


def missing(session: Session) -> dict[str, int]:
    """The shards that a dataset's cache lacks: the number of items of each, by key."""
    return {key: size for table in tables(session) for key, size in table.missing().items()}


class Worker:
    """Fills a dataset's cache shard by shard, with a session of its own."""

    def __init__(self, session: Session) -> None:
        self.shards = {key: table for table in tables(session) for key in table.keys}

    def __call__(self, key: str) -> None:
        """Compute the shard of a key, unless it is there."""
        self.shards[key].make(key)
