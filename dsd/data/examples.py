"""The one shape of a matching problem, and the pairs that a set of them asks for.

I images, T texts of an example. ComVG: 2 × 1. RefCOCOg: 1 × 10. VQA: 1 × answers. Winoground: 2 × 2.
Classification: 1 × classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dsd.store import write_atomic

AT_ONCE = 64  # examples that are read together


@dataclass(frozen=True, slots=True)
class MatchingExample:
    """Which image goes with which text?

    `images` are image ids (`dsd.data.images.image_id`), `texts` the texts themselves, `answer` the true (image index,
    text index) pairs, `category` the slot or kind of question that metrics are broken down by. Without a true pair
    every method answers wrong.
    """

    id: str
    images: tuple[str, ...]
    texts: tuple[str, ...]
    answer: tuple[tuple[int, int], ...]
    category: str

    @property
    def cluster(self) -> str:
        """What examples must share to be dependent: the sentence of an image choice, else the image."""
        return self.texts[0] if len(self.texts) == 1 else self.images[0]


class Pair(NamedTuple):
    """Unique over a whole dataset, however many examples share it."""

    image: str
    text: str


def pairs(examples: Iterable[MatchingExample]) -> list[Pair]:
    """Every (image, text) that the examples compare, once, in order of first appearance."""
    seen = {Pair(image, text): None for e in examples for image in e.images for text in e.texts}
    return list(seen)


def text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "images": pa.list_(pa.string()),
        "texts": pa.list_(pa.string()),
        "answer": pa.list_(pa.list_(pa.int32())),
        "category": pa.string(),
        "split": pa.string(),
    }
)


def write_examples(path: Path, rows: Iterable[tuple[str, MatchingExample]]) -> None:
    """Writes (split, example) rows as one Parquet file, atomically."""
    table = pa.Table.from_pylist(
        [
            dict(id=e.id, images=e.images, texts=e.texts, answer=e.answer, category=e.category, split=split)
            for split, e in rows
        ],
        schema=SCHEMA,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_examples(path: Path, split: str) -> list[MatchingExample]:
    """The examples of a split ("train", "validation" or "test"), in file order."""
    # A few at a time: the texts of all examples may be millions.
    batches = pq.ParquetFile(path).iter_batches(AT_ONCE)
    rows = (row for batch in batches for row in batch.filter(pc.field("split") == split).to_pylist())
    return [
        MatchingExample(
            r["id"],
            tuple(r["images"]),
            tuple(r["texts"]),
            tuple((i, t) for i, t in r["answer"]),
            r["category"],
        )
        for r in rows
    ]
