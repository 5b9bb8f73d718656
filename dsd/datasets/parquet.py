"""Parquet as the `datasets` library writes it: rows, the declared kinds of columns, and pictures.

A column of pictures is a struct of bytes and path. Only the columns that are asked for are read, batch by batch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from dsd.datasets.repository import Place, Repository
from dsd.datasets.selection import Content
from dsd.errors import DataError, ImageError

BATCH = 64  # pictures that are held at once
Kind = TypeVar("Kind")


def rows(repository: Repository, file: str, kind: type[Kind]) -> list[Kind]:
    """All rows of a file; its columns are the fields of the dataclass.

    Raises:
        DataError: no Parquet, or a column that is not there or holds something else; names the file, the row from 0
            and the column.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    adapter: TypeAdapter[Kind] = TypeAdapter(kind)
    found: list[Kind] = []
    with _opened(repository, file, names) as parquet:
        for batch in parquet.iter_batches(columns=names):
            for values in batch.to_pylist():
                try:
                    found.append(adapter.validate_python(values))
                except ValidationError as error:
                    first = error.errors()[0]
                    column = ".".join(str(part) for part in first["loc"])
                    where = f"{repository.root / file}, row {len(found)}"
                    raise DataError(f"{where}: {column}: {first['msg']}, found {first['input']!r}") from None
    return found


def integers(repository: Repository, file: str, column: str) -> list[int]:
    """A column of integers.

    Raises:
        DataError: no Parquet, or no such column in it.
    """
    with _opened(repository, file, [column]) as parquet:
        values = parquet.read(columns=[column])[column]
    if not pa.types.is_integer(values.type) or values.null_count:
        raise DataError(f"{repository.root / file}: column {column!r} is {values.type}, must be integers without gaps")
    return list(values.to_pylist())


def features(repository: Repository, file: str) -> dict[str, dict[str, Any]]:
    """What the columns are declared as: {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": […]}}.

    Raises:
        DataError: no Parquet, or none that declares anything.
    """
    with _opened(repository, file, ()) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
        names = ", ".join(parquet.schema_arrow.names)
    try:
        declared = dict(json.loads(metadata[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{repository.root / file}: does not say which of its columns are pictures and classes (columns: {names})"
        ) from None
    return {name: feature if isinstance(feature, dict) else {} for name, feature in declared.items()}


def pictures(repository: Repository, wanted: Mapping[Place, str]) -> Iterator[tuple[str, Content]]:
    """(name, content) of the picture at every place, file by file.

    Raises:
        DataError: no Parquet, or a column that is not there or holds no pictures.
    """
    files: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for place, name in wanted.items():
        files[place.file][place.column][int(place.row)] = name
    for file in sorted(files):
        with _opened(repository, file, sorted(files[file])) as parquet:
            for column, names in sorted(files[file].items()):
                kind = parquet.schema_arrow.field(column).type
                if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                    raise DataError(f"{repository.root / file}: column {column!r} is {kind}, no pictures")
                for row, value in _values(parquet, column, names):
                    yield names[row], _content(f"{repository.root / file}, row {row}", value)


def _values(parquet: pq.ParquetFile, column: str, wanted: Mapping[int, str]) -> Iterator[tuple[int, Any]]:
    """(row, value) of the wanted rows, from no other row groups than theirs."""
    first = 0
    for group in range(parquet.num_row_groups):
        after = first + parquet.metadata.row_group(group).num_rows
        if any(first <= row < after for row in wanted):
            for batch in parquet.iter_batches(BATCH, row_groups=[group], columns=[column]):
                yield from ((first + n, batch[0][n].as_py()) for n in range(len(batch)) if first + n in wanted)
                first += len(batch)
        first = after


def _content(where: str, value: Any) -> Content:
    if value is None:
        return ImageError(f"{where}: no picture")
    if not value["bytes"]:
        return ImageError(f"{where}: a path ({value.get('path')!r}) without the bytes of the picture")
    return bytes(value["bytes"])


@contextmanager
def _opened(repository: Repository, file: str, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    path = repository.root / file
    try:
        with pq.ParquetFile(path) as parquet:
            there = parquet.schema_arrow.names
            for column in columns:
                if column not in there:
                    raise DataError(f"{path}: no column {column!r} (columns: {', '.join(there)})")
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: does not read as Parquet: {' '.join(str(error).split())[:200]}") from None
