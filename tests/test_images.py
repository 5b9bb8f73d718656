"""Loading valid, unusual, corrupt and malicious images."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsd.data.images import ImageSource, image_id, load_image, resize, to_array, to_model
from dsd.errors import DsdError, ImageError, unknown

LIMIT = 1_000_000


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))


def pixels(source: ImageSource) -> np.ndarray:
    return to_array(load_image(source, max_pixels=LIMIT))


def test_every_kind_of_source_gives_the_same_pixels(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    expected = np.array(photo)
    for source in (path, str(path), path.read_bytes(), photo, expected, expected / 255.0, expected[:, :]):
        assert np.array_equal(pixels(source), expected)
    assert np.array_equal(pixels(expected[::2, ::-1]), expected[::2, ::-1])


def test_arrays_of_one_channel_are_grey() -> None:
    grey_HW = np.array([[0, 128], [255, 7]], dtype=np.uint8)
    assert np.array_equal(pixels(grey_HW), np.repeat(grey_HW[..., None], 3, axis=2))
    assert np.array_equal(pixels((grey_HW / 255).astype(np.float32))[..., 1], grey_HW)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"must be \[H, W, 3\], \[H, W, 4\] or \[H, W\]"),
        (np.zeros(4, np.uint8), r"must be \[H, W, 3\], \[H, W, 4\] or \[H, W\]"),
        (np.zeros((4, 4), np.int32), "must be uint8, or float in 0..1"),
        (np.full((4, 4), 1.5), "must lie in 0..1"),
        (np.full((4, 4), np.nan), "must lie in 0..1"),
        (np.zeros((0, 4, 3), np.uint8), "empty image"),
        (np.zeros((2000, 2000), np.uint8), "max_pixels"),
        (np.ma.masked_array(np.zeros((4, 4), np.uint8), mask=True), "a masked array"),
    ],
)
def test_arrays_of_another_kind_are_refused(array: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load_image(array, max_pixels=LIMIT)


def test_truncated_jpeg_is_found(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    data = encoded(photo, "JPEG")
    path.write_bytes(data[: len(data) // 2])
    with Image.open(path) as image:
        image.verify()  # what makes load() necessary
    with pytest.raises(ImageError, match=r"cut\.jpg: .*truncated") as caught:
        load_image(path, max_pixels=LIMIT)
    assert "\n" not in str(caught.value) and isinstance(caught.value, DsdError)


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"<html>not found</html>", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_files_that_are_not_images(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thing.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"thing\.jpg: "):
        load_image(path, max_pixels=LIMIT)
    with pytest.raises(ImageError, match=f"image of {len(data)} bytes: "):
        load_image(data, max_pixels=LIMIT)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png: No such file"):
        load_image(tmp_path / "absent.png", max_pixels=LIMIT)
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path, max_pixels=LIMIT)


@pytest.mark.parametrize("side", [60_000, 1001])
def test_a_bomb_is_refused_by_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="pixels"):
        load_image(png_header(side, side), max_pixels=LIMIT)


def test_zero_size() -> None:
    with pytest.raises(ImageError):
        load_image(png_header(0, 5), max_pixels=LIMIT)
    with pytest.raises(ImageError, match="0 x 5 pixels: empty image"):
        load_image(Image.new("RGB", (0, 5)), max_pixels=LIMIT)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey_HW = np.array([[0, 257], [128 * 257, 65535]], dtype=np.uint16)
    expected = np.array([[0, 1], [128, 255]])
    assert np.array_equal(pixels(encoded(Image.fromarray(grey_HW), "PNG"))[..., 0], expected)
    assert np.array_equal(pixels(encoded(Image.fromarray(grey_HW), "TIFF"))[..., 2], expected)
    assert np.array_equal(pixels(Image.fromarray(grey_HW.astype(np.int32)))[..., 0], expected)
    with pytest.raises(ImageError, match="16 bits"):
        load_image(Image.fromarray(np.array([[70_000]], dtype=np.int32)), max_pixels=LIMIT)
    with pytest.raises(ImageError, match="may be of 8 or of 16 bits"):
        load_image(Image.fromarray(np.array([[0, 255]], dtype=np.int32)), max_pixels=LIMIT)


def test_a_tiff_whose_zero_is_white_is_inverted() -> None:
    grey_HW = np.array([[0, 257], [128 * 257, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey_HW).save(file, "TIFF", tiffinfo={262: 0})
    assert pixels(file.getvalue())[..., 0].tolist() == [[255, 254], [127, 0]]


def test_float_images() -> None:
    assert pixels(Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)))[..., 0].tolist() == [[0, 255]]
    with pytest.raises(ImageError, match=r"0\.\.1"):
        load_image(Image.fromarray(np.array([[0.0, 255.0]], dtype=np.float32)), max_pixels=LIMIT)


def test_transparency_is_composited_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    assert pixels(encoded(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    assert pixels(encoded(palette, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(encoded(palette, "GIF", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    half = encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), "PNG")
    assert pixels(half).tolist() == [[[204, 204, 204]]]
    assert pixels(encoded(Image.new("LA", (1, 1), (9, 0)), "PNG")).tolist() == [[[255, 255, 255]]]
    keyed = encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixels(keyed).tolist() == [[[255, 255, 255]]]
    sixteen = encoded(Image.fromarray(np.array([[5, 2570]], dtype=np.uint16)), "PNG", transparency=5)
    assert pixels(sixteen)[..., 0].tolist() == [[255, 10]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str, photo: Image.Image) -> None:
    image = load_image(photo.convert(mode), max_pixels=LIMIT)
    assert image.mode == "RGB" and image.size == photo.size


def test_cmyk_jpeg() -> None:
    red = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.allclose(pixels(red), [255, 0, 0], atol=3)


def test_exif_orientation_is_applied(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = pixels(encoded(photo, "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(np.array(photo), k=-1))


def test_the_image_passed_in_is_not_modified(photo: Image.Image) -> None:
    before = photo.tobytes()
    loaded = load_image(photo, max_pixels=LIMIT)
    loaded.paste("red", (0, 0, 10, 10))
    assert photo.tobytes() == before


def test_resize_through_parity(photo: Image.Image) -> None:
    direct = resize(photo, parity=None, resolution=32)
    parity = resize(photo, parity=8, resolution=32)
    assert direct.size == parity.size == (32, 32)
    by_hand = photo.resize((8, 8), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    assert parity.tobytes() == by_hand.tobytes() != direct.tobytes()
    assert to_array(parity).std() < to_array(direct).std()  # detail finer than 8 pixels is gone
    with pytest.raises(ValueError, match="> 0"):
        resize(photo, parity=0, resolution=32)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = to_array(resize(Image.fromarray(stripes), parity=None, resolution=8))
    assert np.all(np.abs(small.astype(int) - 127) < 20)


def test_to_model_range_and_layout() -> None:
    images_BHW3 = np.zeros((2, 4, 5, 3), np.uint8)
    images_BHW3[1, 2, 3] = (255, 0, 51)
    images_B3HW = to_model(images_BHW3)
    assert images_B3HW.shape == (2, 3, 4, 5) and images_B3HW.dtype == np.float32
    assert images_B3HW[0].max() == -1
    assert images_B3HW[1, :, 2, 3] == pytest.approx([1, -1, -0.6])
    wrongs: list[Any] = [images_BHW3[0], images_BHW3.astype(np.float32), images_BHW3[..., :2]]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="uint8"):
            to_model(wrong)


def test_to_array_needs_rgb() -> None:
    with pytest.raises(ValueError, match="RGB"):
        to_array(Image.new("L", (2, 2)))


def test_image_id_depends_on_the_pixels(photo: Image.Image, tmp_path: Path) -> None:
    array_HW3 = np.array(photo)
    assert image_id(array_HW3) == image_id(pixels(encoded(photo, "PNG"))) == image_id(pixels(encoded(photo, "BMP")))
    assert image_id(array_HW3[:, ::-1][:, ::-1]) == image_id(array_HW3)  # memory layout does not matter
    assert len(image_id(array_HW3)) == 16
    flat = np.zeros((2, 6, 3), np.uint8)
    others = [array_HW3, array_HW3[::-1], flat, flat.reshape(3, 4, 3), flat.reshape(6, 2, 3)]
    assert len({image_id(other) for other in others}) == len(others)
    with pytest.raises(ValueError, match="uint8"):
        image_id(array_HW3.astype(np.float32))


def test_unknown_names_the_choices() -> None:
    message = unknown("dataset", "scenes-con", ["scenes-com", "comvg"])
    assert message == "unknown dataset 'scenes-con': did you mean 'scenes-com'? (choices: comvg, scenes-com)"
    assert unknown("dataset", "zzz", ["comvg"]) == "unknown dataset 'zzz' (choices: comvg)"
    assert unknown("dataset", "zzz", []) == "unknown dataset 'zzz' (choices: none)"
