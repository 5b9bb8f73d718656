"""Read the JSON settings of a checkpoint, and check those that the libraries leave unchecked.

Every defect raises CheckpointError, with one line that names the file and the key.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dsd.errors import CheckpointError, brief
from dsd.store import strict_json

Model = TypeVar("Model", bound=BaseModel)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number; booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON object; raise CheckpointError if the file is missing or is not one (see `strict_json`)."""
    try:
        settings = strict_json(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"not an object but {type(settings).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: does not load: {brief(error)}") from None
    return settings


def validated(kind: type[Model], settings: object, file: Path) -> Model:
    """Return settings of `file` as a pydantic model; raise CheckpointError with the first key that is wrong."""
    try:
        return kind.model_validate_json(json.dumps(settings), strict=True)  # in JSON, a list may be a tuple
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = "a setting that is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise CheckpointError(f"{file}: {key + ': ' if key else ''}{brief(reason)}") from None


def check_settings(settings: Mapping[str, Any], kind: Any, file: Path | str) -> None:
    """Check that the settings in `file` are of the class `kind` of diffusers or transformers.

    Neither library refuses those of another class, and diffusers takes values of any type: "false" is true to it.
    """
    if not str(kind.__module__).startswith("diffusers"):
        own = kind.config_class.model_type  # a text encoder may have the settings of the whole CLIP
        if (name := settings.get("model_type", own)) not in (own, "clip"):
            raise CheckpointError(f"{file}: model_type {name!r}: only {own} is supported")
        if settings.get("use_attention_mask"):  # of diffusers' pipelines, which then hide padding from the encoder
            raise CheckpointError(f"{file}: use_attention_mask: must be false; texts are encoded with their padding")
        return
    if (name := settings.get("_class_name", kind.__name__)) != kind.__name__:
        raise CheckpointError(f"{file}: _class_name {name!r}: only {kind.__name__} is supported")
    for key, argument in inspect.signature(kind.__init__).parameters.items():
        value = settings.get(key)
        if isinstance(argument.default, bool) and not _all(value, lambda one: isinstance(one, bool)):
            raise CheckpointError(f"{file}: {key} {value!r}: must be true or false")
        if is_number(argument.default) and not _all(value, is_number):
            raise CheckpointError(f"{file}: {key} {value!r}: must be a number")


def _all(value: object, valid: Callable[[object], bool]) -> bool:
    """Return whether a value, or each one of a list, is valid; null, for the default, always is."""
    if isinstance(value, list | tuple):
        return all(_all(one, valid) for one in value)
    return value is None or valid(value)


def component_settings(folder: Path, name: str, kind: Any) -> dict[str, Any]:
    """Read the config.json of a component, in `<folder>/<name>`, and check that it is of the class `kind`."""
    settings = read_settings(file := folder / name / "config.json")
    check_settings(settings, kind, file)
    return settings
