"""Check the arguments of the public API: options, images and texts of a wrong kind are one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from io import IOBase
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from dsd.data.images import ImageSource
from dsd.errors import ImageError, ParamsError, TextError, unknown


def check_texts(texts: Sequence[str]) -> None:
    """Raise TextError if one of the texts is empty or not valid Unicode."""
    for number, text in enumerate(texts):
        if not text.strip():
            raise TextError(f"text {number + 1} of {len(texts)} is empty; give it at least one word")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise TextError(f"text {number + 1} of {len(texts)}, {text[:40]!a}: half a character (a lone surrogate)")
        if "\0" in text:
            raise TextError(f"text {number + 1} of {len(texts)}, {text[:40]!a}: has a NUL character")


def text_list(texts: Sequence[str] | str) -> list[str]:
    """Return one or several texts as a list; raise TextError if they are anything else."""
    if isinstance(texts, AbstractSet | Mapping):
        raise TextError(f"texts: {type(texts).__name__} has no order; give a list")
    if isinstance(texts, np.ndarray):
        texts = texts.reshape(-1).tolist() if texts.ndim < 2 else [texts]
    several = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else [texts]
    for number, text in enumerate(several):
        if not isinstance(text, str):
            raise TextError(f"text {number + 1} of {len(several)}: must be a string, found {type(text).__name__}")
    check_texts(several)
    return several


def image_list(images: Sequence[ImageSource] | ImageSource | Tensor) -> list[ImageSource]:
    """Return one or several images as a list of what `load_image` reads; raise ImageError if they are anything else."""
    if isinstance(images, str | Path | bytes | Image.Image):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return [_array(image) for image in (images if images.ndim == 4 else [images])]
    if not isinstance(images, Iterable) or isinstance(images, AbstractSet | Mapping | IOBase | bytearray | memoryview):
        raise ImageError(f"images: must be images or a list of images, found {type(images).__name__}")
    several = list(images)
    for number, image in enumerate(several):
        if not isinstance(image, str | Path | bytes | Image.Image | np.ndarray | Tensor):
            what = f"image {number + 1} of {len(several)}: must be a path, bytes, a PIL image, an array or a tensor"
            raise ImageError(f"{what}, found {type(image).__name__}")
    return [_array(image) if isinstance(image, Tensor) else image for image in several]


def _array(image: np.ndarray | Tensor) -> np.ndarray:
    """Return a tensor as an array [H, W, C]; its channels are first if the first dimension can be one.

    Raises:
        ImageError: it has no plain values, or both the first and the last dimension can be channels.
    """
    if isinstance(image, np.ndarray):
        return image
    name = f"tensor {str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
    if image.layout != torch.strided or image.is_quantized or image.is_meta or image.is_complex():
        raise ImageError(f"{name}: must be dense, with real values")
    plain = image.detach().cpu().resolve_neg()
    plain = plain.float() if plain.is_floating_point() else plain  # numpy has no bfloat16
    channels_first = plain.ndim == 3 and plain.shape[0] in (1, 3, 4)
    if channels_first and plain.shape[2] in (3, 4):
        raise ImageError(f"{name}: the first or the last dimension could be the channels; give an array [H, W, C]")
    array = np.asarray((plain.permute(1, 2, 0) if channels_first else plain).numpy())
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raise ParamsError unless the value of an option is one of the choices."""
    if value not in choices:
        raise ParamsError(f"{option}: {unknown(option, str(value), choices)}")


def check_path(option: str, value: object) -> None:
    """Raise ParamsError unless the value of an option is a path or a hub id."""
    if not isinstance(value, str | Path) or not str(value):
        raise ParamsError(f"{option}: must be a path or a hub id, found {value!r}")


def check_count(option: str, value: object) -> None:
    """Raise ParamsError unless the value of an option is a whole number above 0."""
    if type(value) is not int or value < 1:
        raise ParamsError(f"{option}: must be a whole number above 0, found {value!r}")


@contextmanager
def option_errors() -> Iterator[None]:
    """Turn pydantic's error for an option into a ParamsError of one line."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        option, reason = first["loc"][0] if first["loc"] else "options", first["msg"].removeprefix("Value error, ")
        if key := first.get("ctx", {}).get("key"):  # of a word where a number belongs
            raise ParamsError(f"{key}: {reason}") from None
        raise ParamsError(f"{option}: {reason}, found {first['input']!r}") from None
