"""annotations.jsonl: the examples of a downloaded dataset, one JSON object per line, with images named by file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dsd.data.splits import Split
from dsd.errors import DataError
from dsd.store import write_atomic

ANNOTATIONS = "annotations.jsonl"
IMAGES = "images"


@dataclass(frozen=True, slots=True)
class RawExample:
    """A matching example before its images are decoded.

    `images` are file names in the dataset's images folder, `answer` the true (image index, text index) pairs. It is
    empty if no candidate is right; every method is then wrong.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: str
    split: Split
    images: tuple[str, ...]
    texts: tuple[str, ...]
    answer: tuple[tuple[int, int], ...]
    category: str


def image_choice(id: str, split: Split, images: tuple[str, str], texts: tuple[str, ...], category: str) -> RawExample:
    """Return an example of a positive and a negative image, given in this order, in random order.

    In the few-shot split it also has the second text, which is true of the negative image (2 × 2).
    """
    true, count = Random(id).randrange(2), 2 if split == "train" else 1
    answer = ((true, 0), (1 - true, 1))[:count]
    return RawExample(id, split, images[::-1] if true else images, texts[:count], answer, category)


def write_annotations(folder: Path, examples: Iterable[RawExample]) -> None:
    """Write the examples atomically; equal examples give equal bytes."""
    lines = [json.dumps(asdict(example), sort_keys=True, ensure_ascii=False) + "\n" for example in examples]
    write_atomic(folder / ANNOTATIONS, "".join(lines).encode())


def read_annotations(folder: Path, prefix: str = "") -> Iterator[RawExample]:
    """Read the examples in file order; each id must start with `prefix`.

    Raises:
        DataError: the file is missing, a line is not an example, or an id has another prefix; names file, line and key.
    """
    path, adapter = folder / ANNOTATIONS, TypeAdapter(RawExample)
    if not path.exists():
        raise DataError(f"{path}: no such file; download the dataset first")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                example = adapter.validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(str(part) for part in first["loc"])
                raise DataError(f"{path}:{number}: {key + ': ' if key else ''}{first['msg']}") from None
            if not example.id.startswith(prefix):
                raise DataError(f"{path}: {example.id} is not of {prefix}; download the dataset again")
            yield example
