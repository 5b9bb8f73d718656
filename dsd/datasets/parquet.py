"""Read Parquet files as the `datasets` library writes them: rows, declared column types, and images.

A column of images is a struct of bytes and path. Only the requested columns are read, batch by batch.
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

from dsd.data.hub import Location, Repository
from dsd.datasets.published import Content
from dsd.errors import DataError, ImageError, brief

BATCH = 64  # images in memory at once
Columns = TypeVar("Columns")


def read_rows(repository: Repository, file: str, columns: type[Columns]) -> list[Columns]:
    """Read all rows of a file; the columns are the fields of the dataclass.

    Raises:
        DataError: the file is not Parquet, or a column is missing or has other values; names the file, the row (from
            0) and the column.
    """
    names = [field.name for field in fields(columns)]  # type: ignore[arg-type]
    adapter: TypeAdapter[Columns] = TypeAdapter(columns)
    rows: list[Columns] = []
    with _open(repository, file, names) as parquet:
        for batch in parquet.iter_batches(columns=names):
            for values in batch.to_pylist():
                try:
                    rows.append(adapter.validate_python(values))
                except ValidationError as error:
                    first = error.errors()[0]
                    column = ".".join(str(part) for part in first["loc"])
                    where = f"{repository.root / file}, row {len(rows)}"
                    raise DataError(f"{where}: {column}: {first['msg']}, found {first['input']!r}") from None
    return rows


def read_integers(repository: Repository, file: str, column: str) -> list[int]:
    """Read a column of integers.

    Raises:
        DataError: the file is not Parquet or has no such column.
    """
    with _open(repository, file, [column]) as parquet:
        values = parquet.read(columns=[column])[column]
    if not pa.types.is_integer(values.type) or values.null_count:
        raise DataError(f"{repository.root / file}: column {column!r} is {values.type}, must be integers without nulls")
    return list(values.to_pylist())


def read_features(repository: Repository, file: str) -> dict[str, dict[str, Any]]:
    """Read the declared column types: {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": […]}}.

    Raises:
        DataError: the file is not Parquet or declares no types.
    """
    with _open(repository, file, ()) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
        names = ", ".join(parquet.schema_arrow.names)
    try:
        declared = dict(json.loads(metadata[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{repository.root / file}: does not declare which columns are images and classes (columns: {names})"
        ) from None
    return {name: feature if isinstance(feature, dict) else {} for name, feature in declared.items()}


def read_images(repository: Repository, wanted: Mapping[Location, str]) -> Iterator[tuple[str, Content]]:
    """Yield (name, content) of the image at each location, file by file.

    Raises:
        DataError: a file is not Parquet, or a column is missing or holds no images.
    """
    files: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for location, name in wanted.items():
        files[location.file][location.column][int(location.row)] = name
    for file in sorted(files):
        with _open(repository, file, sorted(files[file])) as parquet:
            for column, names in sorted(files[file].items()):
                kind = parquet.schema_arrow.field(column).type
                if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                    raise DataError(f"{repository.root / file}: column {column!r} is {kind}, not images")
                for row, value in _values(parquet, column, names):
                    yield names[row], _content(f"{repository.root / file}, row {row}", value)


def _values(parquet: pq.ParquetFile, column: str, wanted: Mapping[int, str]) -> Iterator[tuple[int, Any]]:
    """Yield (row, value) of the wanted rows; other row groups are skipped."""
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
        return ImageError(f"{where}: no image")
    if not value["bytes"]:
        return ImageError(f"{where}: a path ({value.get('path')!r}) without the bytes of the image")
    return bytes(value["bytes"])


@contextmanager
def _open(repository: Repository, file: str, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    path = repository.root / file
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise DataError(f"{path}: no column {column!r} (columns: {', '.join(names)})")
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {brief(error, 200)}") from None
