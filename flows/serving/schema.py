"""Requests and answers: their schema, parsing and formatting.

A row of a request is an image and its texts. A row of an answer has a score for each text, the best text or null on a
tie, remarks if there are any (see `Matcher.remarks`), and a heat map of the best text if the request sets `heatmap`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsd.config import Bounds
from dsd.errors import RequestError, brief
from dsd.store import strict_json

if TYPE_CHECKING:
    from dsd.matcher import Heatmap

SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, "image"),  # base64, or the bytes of the file
            ColSpec(Array(DataType.string), "texts"),
            ColSpec(DataType.boolean, "heatmap", required=False),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(DataType.string, "best", required=False),
            ColSpec(Array(DataType.string), "remarks", required=False),
            ColSpec(
                Array(Object([Property("word", DataType.string), Property("map", DataType.string)])),
                "heatmap",
                required=False,
            ),
        ]
    ),
)
Answer = dict[str, Any]


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | bytes
    texts: Annotated[list[str], Field(min_length=1)]
    heatmap: bool = False


class Body(BaseModel):
    """A request in JSON, with one of the two keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: list[Row] = []
    dataframe_records: list[Row] = []


class ValueCount:
    """Counts the JSON values of a body while it arrives, and refuses more than a request can have.

    A value of a few bytes takes hundreds once it is parsed, and each invalid one would be an error of its own.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._rows, self._texts = bounds.max_images, bounds.max_texts
        # A row has `image`, `texts` and `heatmap`, the image and its texts: so many strings, commas and brackets.
        self._most = self._rows * (self._texts + 4) + 2
        self._strings = self._others = 0
        self._inside, self._rest = False, b""

    def add(self, chunk: bytes) -> None:
        """Count a further part of the body; raise RequestError if there are too many values."""
        unescaped = (self._rest + chunk).replace(rb"\\", b"").replace(rb"\"", b"")
        self._rest = b"\\" if unescaped.endswith(b"\\") else b""  # it escapes what comes next
        for number, part in enumerate(unescaped.split(b'"')):
            if number:
                self._inside = not self._inside
                self._strings += self._inside
            if not self._inside:
                self._others += sum(map(part.count, (b",", b"[", b"{")))
        if max(self._strings, self._others) > self._most:
            line = f"send up to {self._rows} images with up to {self._texts} texts each"
            raise RequestError(f"too many values; {line}")


def parse_json(body: bytes | bytearray) -> list[Row]:
    """The rows of a request in JSON. Raises RequestError, in one line, if the body is invalid."""
    try:
        parsed = Body.model_validate_json(body)
        strict_json(body)  # refuses a key given twice, of which pydantic keeps the last value
    except ValidationError as error:
        raise _request_error(error) from None
    except ValueError as error:
        raise RequestError(str(error)) from None
    if parsed.inputs and parsed.dataframe_records:
        raise RequestError("both inputs and dataframe_records; give one")
    return parsed.inputs or parsed.dataframe_records


def parse_table(table: pd.DataFrame) -> list[Row]:
    """The rows of a request as a table. Raises RequestError, in one line, if a row is invalid."""
    try:
        return Body.model_validate({"inputs": list(map(_record, table.to_dict("records")))}).inputs
    except ValidationError as error:
        raise _request_error(error) from None


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table, without empty cells and with lists instead of arrays."""
    filled = {name: value for name, value in record.items() if not (pd.api.types.is_scalar(value) and pd.isna(value))}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in filled.items()}


def _request_error(error: ValidationError) -> RequestError:
    """The first error, with its location."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = [str(part)[:40] for part in first["loc"] if part not in ("str", "bytes")]
    return RequestError(": ".join([*([".".join(location)] if location else []), brief(first["msg"], None)]))


def decode_image(image: str | bytes) -> bytes:
    """Return the bytes of an image file, given in base64 or as they are; raise RequestError for any other text."""
    if isinstance(image, bytes):
        return image
    try:
        return base64.b64decode(image, validate=True)
    except ValueError:
        raise RequestError(
            f"image {image[:40]!a}: not base64; send the file's content (URLs and paths are never opened)"
        ) from None


def encode_heatmap(heatmap: Heatmap) -> list[dict[str, str]]:
    """The map of each word as a grey PNG of the image's size in base64; white is the maximum."""
    words = []
    for word, map_RR in zip(heatmap.words, heatmap.maps, strict=True):
        file = io.BytesIO()
        Image.fromarray((map_RR * 255).round().astype(np.uint8)).save(file, "PNG")
        words.append({"word": word, "map": base64.b64encode(file.getvalue()).decode()})
    return words


def answers_table(answers: Sequence[Answer]) -> pd.DataFrame:
    """The answers as a table; the column `heatmap` only if an answer has one."""
    columns = [name for name in SIGNATURE.outputs.input_names() if any(name in answer for answer in answers)]
    return pd.DataFrame({n: pd.Series([answer.get(n) for answer in answers], dtype=object) for n in columns})
