"""images.parquet: the prepared images of a dataset, each stored once as PNG and read lazily by row group."""

from __future__ import annotations

import io
import os
import uuid
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dsd.errors import DataError

SCHEMA = pa.schema({"id": pa.string(), "png": pa.binary()})
ROW_GROUP = 64  # images that are read together


class StoredImage(NamedTuple):
    id: str
    png: bytes


class ImageTable:
    """The prepared images of a dataset by id, decoded on access; a few row groups are cached.

    Args:
        path: the images.parquet that `prepare` writes.

    Raises:
        DataError: the file is missing or was not written by `prepare`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; prepare the dataset first") from None
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a table of images ({error}); prepare the dataset again") from None
        if self._file.schema_arrow != SCHEMA:
            columns = ", ".join(self._file.schema_arrow.names)
            raise DataError(f"{path}: not a table of images (columns {columns}); prepare the dataset again")
        groups = [
            self._file.read_row_group(group, columns=["id"])["id"].to_pylist()
            for group in range(self._file.num_row_groups)
        ]
        self._position = {id: (group, row) for group, ids in enumerate(groups) for row, id in enumerate(ids)}
        self._group = lru_cache(maxsize=8)(self._read)

    @property
    def ids(self) -> list[str]:
        """Image ids, in file order."""
        return list(self._position)

    def __len__(self) -> int:
        return len(self._position)

    def __getitem__(self, id: str) -> Image.Image:
        """Return an image as RGB. Raises KeyError for an unknown id."""
        if id not in self._position:
            raise KeyError(f"{self.path}: no image {id!r}")
        group, row = self._position[id]
        return Image.open(io.BytesIO(self._group(group)[row]), formats=["PNG"]).convert("RGB")

    def _read(self, group: int) -> list[bytes]:
        return self._file.read_row_group(group, columns=["png"])["png"].to_pylist()


class ImageTableWriter:
    """Write images.parquet by row group, each image once; the file appears when it is complete."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._pending: list[StoredImage] = []
        self._ids: set[str] = set()

    def __enter__(self) -> ImageTableWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # PNG is already compressed.
        self._writer = pq.ParquetWriter(self._temporary, SCHEMA, compression="none", use_dictionary=False)
        return self

    def add(self, image: StoredImage) -> None:
        if image.id not in self._ids:
            self._ids.add(image.id)
            self._pending.append(image)
        if len(self._pending) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            rows = [image._asdict() for image in self._pending]
            self._writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            self._pending.clear()

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
