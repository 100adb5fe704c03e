from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.frame import Frame

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    return encoded(Image.fromarray(RGB), exif=exif)


@pytest.mark.parametrize(
    "source,expected",
    [
        pytest.param(RGB, RGB, id="rgb array"),
        pytest.param(RGB[:, :, 0], RGB[:, :, [0, 0, 0]], id="grey array"),
        pytest.param(RGB[:, :, :1], RGB[:, :, [0, 0, 0]], id="one channel"),
        pytest.param(np.dstack([RGB, RGB[:, :, 0]]), RGB, id="rgba array"),
        pytest.param(RGB[::-1, ::2], RGB[::-1, ::2], id="non-contiguous array"),
        pytest.param(encoded(Image.fromarray(RGB)), RGB, id="png"),
        pytest.param(encoded(Image.fromarray(RGB[:, :, 0])), RGB[:, :, [0, 0, 0]], id="grey png"),
        pytest.param(encoded(Image.fromarray(np.dstack([RGB, RGB[:, :, 0]]))), RGB, id="rgba png"),
        pytest.param(encoded(Image.fromarray(RGB), "TIFF"), RGB, id="tiff"),
        pytest.param(turned(), np.rot90(RGB, -1), id="exif orientation"),
    ],
)
def test_becomes_rgb(source: NDArray[np.uint8] | bytes, expected: NDArray[np.uint8]) -> None:
    frame = Frame.read(source)
    np.testing.assert_array_equal(frame.pixels, expected)
    assert frame.pixels.flags.c_contiguous


def test_cmyk_becomes_rgb() -> None:
    frame = Frame.read(encoded(Image.new("CMYK", (20, 20), (255, 0, 0, 0)), "JPEG"))
    assert frame.pixels.shape == (20, 20, 3)
    assert frame.pixels[0, 0, 0] < 40 < frame.pixels[0, 0, 1]


PNG = encoded(Image.fromarray(RGB))
JPEG = encoded(Image.fromarray(np.tile(RGB, (8, 8, 1))), "JPEG")
FRAMES = [Image.fromarray(RGB), Image.fromarray(RGB[::-1])]


@pytest.mark.parametrize(
    "source,says",
    [
        pytest.param(b"", "not a readable image", id="zero bytes"),
        pytest.param(b"hello, this is text", "not a readable image", id="text"),
        pytest.param(JPEG[: len(JPEG) // 2], "not a readable image", id="truncated jpeg"),
        pytest.param(PNG[: len(PNG) // 2], "not a readable image", id="truncated png"),
        pytest.param(encoded(Image.new("RGB", (1, 1))), "1×1 pixels; expected at least", id="one pixel"),
        pytest.param(encoded(Image.new("1", (13_000, 13_000))), "expected at most 150,000,000", id="13,000²"),
        pytest.param(
            encoded(Image.new("1", (13_000, 13_000)))[:60], "expected at most 150,000,000", id="13,000², header alone"
        ),
        pytest.param(encoded(Image.new("1", (30_000, 30_000))), "exceeds limit", id="30,000²: Pillow's own limit"),
        pytest.param(
            encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "expected one image", id="animation"
        ),
        pytest.param(encoded(Image.fromarray(RGB[:, :, 0].astype(np.uint16))), "16-bit values", id="16-bit png"),
        pytest.param(encoded(Image.fromarray(RGB[:, :, 0].astype(np.float32)), "TIFF"), "found 32", id="float tiff"),
        pytest.param(RGB.astype(np.uint16), "16-bit values", id="uint16 array"),
        pytest.param(RGB.astype(np.float32), "expected an array of uint8", id="float array"),
        pytest.param(np.full((20, 20), np.nan), "expected an array of uint8", id="array of nan"),
        pytest.param(RGB.reshape(-1), "expected an array", id="flat array"),
        pytest.param(np.zeros((20, 20, 5), np.uint8), "expected an array", id="five channels"),
        pytest.param("missing.png", "missing.png", id="no such file"),
    ],
)
def test_bad_input_says_what_was_expected(source: NDArray[np.uint8] | bytes | str, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        Frame.read(source)


def deep_file(suffix: str, values: NDArray[np.uint16]) -> bytes:
    ok, data = cv2.imencode(suffix, values if values.ndim == 2 else np.ascontiguousarray(values[:, :, ::-1]))
    assert ok
    return data.tobytes()


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("kind", ["array", ".png", ".tiff"])
@pytest.mark.parametrize("colour", [False, True])
def test_deep_values_keep_their_high_bits(bits: int, kind: str, colour: bool) -> None:
    shape = (20, 30, 3) if colour else (20, 30)
    values = np.random.default_rng(0).integers(0, 1 << bits, shape, np.uint16)
    values.flat[0] = (1 << bits) - 1
    frame = Frame.read(values if kind == "array" else deep_file(kind, values), bit_depth=bits)
    expected = (values.astype(int) * 256 // (1 << bits)).reshape(20, 30, -1)
    np.testing.assert_array_equal(frame.pixels, np.broadcast_to(expected, (20, 30, 3)))


@pytest.mark.parametrize(
    "depth,says", [(10, "does not fit the given bit_depth of 10"), (8, "expected 9 to 16"), (17, "expected 9 to 16")]
)
def test_wrong_bit_depth(depth: int, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        Frame.read(np.full((20, 20), 2000, np.uint16), bit_depth=depth)
