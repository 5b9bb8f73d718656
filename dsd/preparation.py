"""From raw files to the examples and pictures that all else reads, and the reader of those pictures."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dsd.datasets import RawExample, benchmark
from dsd.datasets.raw import IMAGES
from dsd.errors import DataError, ImageError, ParamsError, unknown
from dsd.fewshot import SPLITS
from dsd.images import Quarantine, image_id, load_image, resize, to_array
from dsd.matching import MatchingExample, write_examples
from dsd.params import Params
from dsd.progress import progress
from dsd.store import write_atomic

SCHEMA = pa.schema({"id": pa.string(), "png": pa.binary()})
ROW_GROUP = 64  # pictures that are read together when one of them is asked for
AHEAD = 256  # files that are decoded before the first of them is written


class Picture(NamedTuple):
    id: str
    png: bytes


class Pictures:
    """The prepared pictures of a dataset, read when they are asked for; a few row groups are held in memory.

    Args:
        path: the images.parquet that `prepare` writes.

    Raises:
        DataError: no such file, or not what `prepare` writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; prepare the dataset first") from None
        except pa.ArrowException as error:
            raise DataError(f"{path}: not prepared pictures ({error}); prepare the dataset again") from None
        if self._file.schema_arrow != SCHEMA:
            found = ", ".join(self._file.schema_arrow.names)
            raise DataError(f"{path}: not prepared pictures (columns {found}); prepare the dataset again")
        groups = [
            self._file.read_row_group(group, columns=["id"])["id"].to_pylist()
            for group in range(self._file.num_row_groups)
        ]
        self._place = {id: (group, row) for group, ids in enumerate(groups) for row, id in enumerate(ids)}
        self._group = lru_cache(maxsize=8)(self._read)

    @property
    def ids(self) -> list[str]:
        """Image ids, in file order."""
        return list(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, id: str) -> Image.Image:
        """The picture, RGB. Raises KeyError for an id that is not there."""
        if id not in self._place:
            raise KeyError(f"{self.path}: no picture {id!r}")
        group, row = self._place[id]
        return _open(self._group(group)[row])

    def batches(self, size: int) -> Iterator[list[tuple[str, Image.Image]]]:
        """All (id, picture) in file order, at most `size` at a time, which is also what is held in memory."""
        for batch in self._file.iter_batches(size):
            yield [(row["id"], _open(row["png"])) for row in batch.to_pylist()]

    def _read(self, group: int) -> list[bytes]:
        return self._file.read_row_group(group, columns=["png"])["png"].to_pylist()


def prepare(name: str, params: Params, source: Path, target: Path) -> dict[str, int]:
    """Prepare a dataset: decode, resize and identify its pictures, and write its examples with their splits.

    Leaves images.parquet, examples.parquet, quarantine.json and, last, summary.json in `target`; the same
    input gives the same bytes. A picture is stored at `images.parity` pixels a side, or at
    `images.resolution` where parity is null. One that cannot be read is quarantined, and what needs it is
    dropped. A picture that comes up again under another name is stored once, and examples of train or
    validation that share one with a later split are left out.

    Args:
        source: the folder that the dataset was downloaded to.

    Returns:
        What summary.json says: examples by split (train, validation, test), `images` stored, `repeated` and
        `quarantined` files, examples `dropped` for a quarantined file, examples `shared` with a later split.

    Raises:
        ParamsError: no such dataset.
        DataError: annotations that cannot be read or make no sense, or a split without examples.
    """
    if name not in params.datasets:
        raise ParamsError(unknown("dataset", name, params.datasets))
    row = params.datasets[name]
    raw = list(benchmark(row.kind).examples(source, row, seed=params.seed))
    for example in raw:
        _check(name, example)
    (target / "summary.json").unlink(missing_ok=True)

    side = params.images.parity or params.images.resolution
    decode = partial(_decode, source / IMAGES, params.images.max_pixels, side)
    files, quarantine = list(dict.fromkeys(file for example in raw for file in example.images)), Quarantine()
    ids: dict[str, str] = {}
    with _Writer(target / "images.parquet") as writer:
        decoded = _in_threads(decode, files, params.runtime.workers)
        for file, found in progress(decoded, total=len(files), desc=name):
            if isinstance(found, ImageError):
                quarantine.add(file, str(found).removeprefix(f"{source / IMAGES / file}: "))
            else:
                ids[file] = found.id
                writer.add(found)
    quarantine.write(target / "quarantine.json")

    whole = [(e.split, _matching(e, ids)) for e in raw if all(file in ids for file in e.images)]
    apart = _apart(whole)
    counts = Counter(split for split, _ in apart)
    for split in SPLITS:
        if not counts[split] and any(example.split == split for example in raw):
            raise DataError(f"{source}: no example is left for {split}, {len(quarantine)} files quarantined")
    write_examples(target / "examples.parquet", apart)
    summary: dict[str, int] = {
        **{str(split): counts[split] for split in SPLITS},
        "images": len(set(ids.values())),
        "repeated": len(ids) - len(set(ids.values())),
        "quarantined": len(quarantine),
        "dropped": len(raw) - len(whole),
        "shared": len(whole) - len(apart),
    }
    write_atomic(target / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _check(name: str, example: RawExample) -> None:
    images, texts = len(example.images), len(example.texts)
    if not images or not texts:
        raise DataError(f"{name}: example {example.id}: {images} images and {texts} texts, needs both")
    if not all(text.strip() for text in example.texts):
        raise DataError(f"{name}: example {example.id}: a text is empty")
    if not example.answer or not all(0 <= i < images and 0 <= t < texts for i, t in example.answer):
        raise DataError(
            f"{name}: example {example.id}: answer {example.answer} outside {images} images × {texts} texts"
        )


def _decode(folder: Path, max_pixels: int, side: int, file: str) -> Picture | ImageError:
    try:
        image = resize(load_image(folder / file, max_pixels=max_pixels), parity=None, resolution=side)
    except ImageError as error:
        return error
    png = io.BytesIO()
    image.save(png, "PNG")
    return Picture(image_id(to_array(image)), png.getvalue())


def _in_threads(
    decode: Callable[[str], Picture | ImageError], files: Sequence[str], workers: int
) -> Iterator[tuple[str, Picture | ImageError]]:
    """(file, what it decodes to), in order. Pillow decodes outside the interpreter's lock: threads do."""
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(files), AHEAD):
            some = files[start : start + AHEAD]
            yield from zip(some, pool.map(decode, some), strict=True)


def _matching(example: RawExample, ids: dict[str, str]) -> MatchingExample:
    images = tuple(ids[file] for file in example.images)
    return MatchingExample(example.id, images, example.texts, example.answer, example.category)


def _apart(rows: Sequence[tuple[str, MatchingExample]]) -> list[tuple[str, MatchingExample]]:
    """The rows without those that share a picture with a later split: the test set loses none."""
    later: set[str] = set()
    kept: set[str] = set()
    for split in reversed(SPLITS):
        mine = [example for name, example in rows if name == split and not later.intersection(example.images)]
        kept.update(example.id for example in mine)
        later.update(image for example in mine for image in example.images)
    return [(split, example) for split, example in rows if example.id in kept]


class _Writer:
    """Writes images.parquet by row groups, each picture once; the file appears when all is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._rows: list[Picture] = []
        self._seen: set[str] = set()

    def __enter__(self) -> _Writer:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Pictures are compressed already.
        self._writer = pq.ParquetWriter(self._temporary, SCHEMA, compression="none", use_dictionary=False)
        return self

    def add(self, picture: Picture) -> None:
        if picture.id not in self._seen:
            self._seen.add(picture.id)
            self._rows.append(picture)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            rows = [picture._asdict() for picture in self._rows]
            self._writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            self._rows.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                with open(self._temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def _open(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")
