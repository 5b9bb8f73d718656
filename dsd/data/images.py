"""Load, resize and identify images.

Shapes: B batch, H height, W width, 3 channels red, green, blue.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dsd.errors import ImageError, brief

MAX_PIXELS = 40_000_000  # of an image that a user passes
log = logging.getLogger(__name__)

ImageSource = str | Path | bytes | Image.Image | np.ndarray

PHOTOMETRIC = 262  # the TIFF tag whose value 0 is WhiteIsZero
SIXTEEN_BITS = ("PNG", "PPM")  # formats that Pillow opens in the mode of 32 bits, with values of 16

# Only these Pillow readers are enabled: others run external programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def load_image(source: ImageSource, *, max_pixels: int) -> Image.Image:
    """Read an image as RGB, with EXIF orientation applied and transparency composited on white.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array [H, W, 3], [H, W, 4] (with transparency) or
            [H, W] of uint8 or of floats in 0..1.
        max_pixels: maximum number of pixels. It is checked against the header, before anything is decoded.

    Returns:
        A new RGB image; a Pillow image passed in is not modified.

    Raises:
        ImageError: one line with the image's name and the reason: missing, truncated, unknown format, too large,
            empty, or values out of range.
    """
    name = _name(source)
    try:
        if isinstance(source, np.ndarray):
            return _decode(Image.fromarray(_array_to_uint8(source, max_pixels)), max_pixels)
        if isinstance(source, Image.Image):
            return _decode(source, max_pixels)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            return _decode(image, max_pixels)
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image (formats read: {', '.join(FORMATS)})") from None
    # Pillow's decoders raise many types of exception on corrupt bytes: OSError, SyntaxError, struct.error, …
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{name}: {brief(reason, None)}") from error


def resize(image: Image.Image, *, parity: int | None, resolution: int) -> Image.Image:
    """Resize an RGB image to `resolution` × `resolution` pixels, first to `parity` × `parity` unless that is None.

    With parity 224 the diffusion model gets no more detail than CLIP. Both settings are from the first paper (He et
    al. 2023, "Discriminative Diffusion Models as Few-shot Vision and Language Learners"). The paper names no filter;
    this one is bicubic, antialiased when it shrinks.
    """
    sizes = (resolution,) if parity is None else (parity, resolution)
    for size in sizes:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return image


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Copy an RGB image to an array [H, W, 3] of uint8."""
    if image.mode != "RGB":
        raise ValueError(f"an RGB image is needed, not {image.mode}: read it with load_image")
    return np.array(image, dtype=np.uint8)


def to_model(images_BHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert [B, H, W, 3] uint8 to [B, 3, H, W] float32 in -1..1, the input of the VAE."""
    if images_BHW3.dtype != np.uint8 or images_BHW3.ndim != 4 or images_BHW3.shape[-1] != 3:
        raise ValueError(f"images must be [B, H, W, 3] uint8, not {images_BHW3.shape} {images_BHW3.dtype}")
    return np.ascontiguousarray(images_BHW3.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(127.5) - 1


def image_id(image: NDArray[np.uint8]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of an image's shape and pixels.

    Copies of an image under other names have the same id, so each image is encoded once.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, not {image.dtype}")
    return hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()[:16]


def _name(source: ImageSource) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array {source.dtype} {list(source.shape)}"
    if not isinstance(source, Image.Image):
        raise ImageError(f"must be a path, bytes, a PIL image or an array, found {type(source).__name__}")
    return str(getattr(source, "filename", "")) or f"image of mode {source.mode}"


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels: empty image")
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")


def _decode(image: Image.Image, max_pixels: int) -> Image.Image:
    _check_size(image.size, max_pixels)  # only the header is read so far
    image.load()  # verify() accepts truncated files
    if image.mode == "I" and image.format not in SIXTEEN_BITS and np.asarray(image).max() <= 255:
        raise ValueError("grey values of 32 bits up to 255 may be of 8 or of 16 bits; convert it to one of them")
    inverted = image.mode[0] in "IF" and _white_is_zero(image)  # Pillow inverts those of 8 bits only
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        grey = _array_to_uint8(np.asarray(image), max_pixels)
    elif image.mode.startswith("I"):
        grey = _sixteen_bits_to_uint8(image)
    else:
        return _to_rgb(image)
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB")


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF file declares that 0 is white."""
    return bool(getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")  # convert() always copies


def _sixteen_bits_to_uint8(image: Image.Image) -> NDArray[np.uint8]:
    """Scale a 16-bit greyscale image to [H, W] uint8; Pillow's own conversion clips at 255."""
    grey_HW = np.asarray(image).astype(np.int64)
    if grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise ValueError(f"grey values {grey_HW.min()}..{grey_HW.max()} are not those of 16 bits")
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey_HW[grey_HW == transparent] = 65535
    return np.rint(grey_HW / 257).astype(np.uint8)


def _array_to_uint8(array: NDArray[Any], max_pixels: int) -> NDArray[np.uint8]:
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError("a masked array; fill the masked pixels first")
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError("an image array must be [H, W, 3], [H, W, 4] or [H, W]")
    _check_size((array.shape[1], array.shape[0]), max_pixels)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array, dtype=np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError("an image array must be uint8, or float in 0..1")
    if not np.all((array >= 0) & (array <= 1)):
        raise ValueError("a float image array must lie in 0..1")
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> Image.Image:
    """A heat map [R, R] in 0…1 over its image [R, R, 3]: high attention is bright, low attention dim and grey."""
    colour = image.astype(np.float32)
    grey = colour.mean(-1, keepdims=True) * 0.35 + 18
    lit = heat[..., None].clip(0, 1)
    glow = np.array([255, 214, 92], np.float32)
    warm = colour + 0.28 * lit**2 * (glow - colour)
    return Image.fromarray((grey + lit * (warm - grey)).clip(0, 255).astype(np.uint8))
