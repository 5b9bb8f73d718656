"""Matching examples, their (image, text) pairs, and examples.parquet.

I images × T texts per example. ComVG: 2 × 1. RefCOCOg: 1 × 10. VQA: 1 × answers. Winoground: 2 × 2.
Classification: 1 × classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dsd.store import write_atomic

AT_ONCE = 64  # examples per batch that is read


@dataclass(frozen=True, slots=True)
class MatchingExample:
    """One matching problem: which image goes with which text?

    `images` are image ids (`dsd.data.images.image_id`), `answer` the true (image index, text index) pairs, `category`
    the slot or question type that metrics are broken down by. An example without a true pair counts as wrong for every
    method.
    """

    id: str
    images: tuple[str, ...]
    texts: tuple[str, ...]
    answer: tuple[tuple[int, int], ...]
    category: str

    @property
    def cluster(self) -> str:
        """Key of the bootstrap cluster: the sentence if there is only one text, else the first image."""
        return self.texts[0] if len(self.texts) == 1 else self.images[0]


class Pair(NamedTuple):
    """A candidate: one image with one text. Examples may share it."""

    image: str
    text: str


def pairs(examples: Iterable[MatchingExample]) -> list[Pair]:
    """All pairs of the examples, without duplicates, in order of first appearance."""
    return list(dict.fromkeys(Pair(image, text) for e in examples for image in e.images for text in e.texts))


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
    """Write (split, example) rows as one Parquet file, atomically."""
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
    """Read the examples of a split ("train", "validation" or "test"), in file order."""
    # In small batches: there may be millions of texts.
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
