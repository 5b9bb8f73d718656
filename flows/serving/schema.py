"""Requests and answers: their schema, parsing and formatting.

A row of a request is an image and its texts. A row of an answer has a score for each text and the best text, and a heat
map if the request sets `heatmap`.
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

from dsd.errors import RequestError

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
            ColSpec(DataType.string, "best"),
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


def parse_json(body: bytes) -> list[Row]:
    """The rows of a request in JSON. Raises RequestError, in one line, if the body is invalid."""
    try:
        parsed = Body.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from None
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
    location = [str(part) for part in first["loc"] if part not in ("str", "bytes")]
    return RequestError(": ".join([*([".".join(location)] if location else []), " ".join(first["msg"].split())]))


def decode_image(image: str | bytes) -> bytes:
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
