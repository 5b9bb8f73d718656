"""images.parquet: the prepared pictures of a dataset, each once, written by row groups and read when asked for."""

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
ROW_GROUP = 64  # pictures that are read together when one of them is asked for


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

    def _read(self, group: int) -> list[bytes]:
        return self._file.read_row_group(group, columns=["png"])["png"].to_pylist()


class PictureWriter:
    """Writes images.parquet by row groups, each picture once; the file appears when all is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._rows: list[Picture] = []
        self._seen: set[str] = set()

    def __enter__(self) -> PictureWriter:
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
