from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.frame import Frame, check_source
from vmad_edge.runtime.masks import read_mask

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


class Tensor:
    """As torch's: arrays can be made of it, but it is none."""

    def __array__(self) -> NDArray[np.uint8]:
        return RGB


@pytest.mark.parametrize(
    "source", [None, 3, [[1, 2], [3, 4]], Tensor(), object(), (RGB,), {"image": RGB}], ids=lambda s: type(s).__name__
)
def test_what_is_no_source_of_frames_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a NumPy array, a PIL image, a path, .* got \S+$") as caught:
        Frame.read(source)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("depth", ["12", 12.0, True])
def test_a_bit_depth_is_a_number(depth: Any) -> None:
    with pytest.raises(TypeError, match="bit_depth: expected an int or None"):
        Frame.read(RGB, depth)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Image.fromarray(RGB), id="PIL image"),
        pytest.param(lambda: Image.open(io.BytesIO(PNG)), id="PIL image, opened"),
        pytest.param(lambda: Image.fromarray(RGB).convert("RGBA"), id="PIL image with alpha"),
        pytest.param(lambda: bytearray(PNG), id="bytearray"),
        pytest.param(lambda: memoryview(PNG), id="memoryview"),
        pytest.param(lambda: io.BytesIO(PNG), id="file"),
        pytest.param(lambda: io.BufferedReader(io.BytesIO(PNG)), id="buffered file"),
    ],
)
def test_images_buffers_and_files_are_frames(make: Callable[[], Any]) -> None:
    np.testing.assert_array_equal(Frame.read(make()).pixels, RGB)
    np.testing.assert_array_equal(Frame.read(make(), colour="bgr").pixels, RGB[:, :, ::-1])


def closed() -> io.BytesIO:
    file = io.BytesIO(PNG)
    file.close()
    return file


@pytest.mark.parametrize(
    "file,says",
    [
        (io.StringIO("hello"), "a binary file, got one opened as text"),
        (closed(), "a binary file, got a closed one"),
        (cv2.VideoCapture(), "got cv2.VideoCapture"),
    ],
)
def test_what_is_no_open_binary_file_is_a_type_error(file: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        check_source(file, None, "rgb")  # so an inspector raises, too


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pil_images_that_pillow_would_cut_off_at_255_are_refused(dtype: type) -> None:
    with pytest.raises(FrameError, match="expected 8 or 16 bits a channel, grey or RGB, found 32"):
        Frame.read(Image.fromarray((RGB[:, :, 0] * 16.0).astype(dtype)))


def test_a_deep_pil_image() -> None:
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 6
    expected = np.repeat((values >> 4)[:, :, None], 3, 2)
    np.testing.assert_array_equal(Frame.read(Image.fromarray(values), 12).pixels, expected)
    for file in (values, np.repeat(values[:, :, None], 3, 2)):
        opened = Image.open(io.BytesIO(deep_file(".png", file)))
        np.testing.assert_array_equal(Frame.read(opened, 12).pixels, expected)


@pytest.mark.parametrize(
    "array",
    [RGB, RGB[:, :, 0], RGB[:, :, :1], np.dstack([RGB, RGB[:, :, 0]]), RGB.astype(np.uint16), RGB[::-1]],
    ids=["rgb", "grey", "one channel", "rgba", "uint16", "a view"],
)
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_a_frame_keeps_its_pixels_when_the_buffer_is_used_again(array: NDArray[Any], colour: Any) -> None:
    buffer = array.copy()
    frame = Frame.read(buffer, 9, colour)
    before = frame.pixels.copy()
    buffer[:] = 0
    assert not np.shares_memory(buffer, frame.pixels)
    np.testing.assert_array_equal(frame.pixels, before)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["array", "png"])
def test_opencvs_colours(channels: int, kind: str) -> None:
    swapped = cv2.cvtColor(RGB, cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGB2BGRA)
    source = swapped if kind == "array" else encoded(Image.fromarray(swapped))
    np.testing.assert_array_equal(Frame.read(source, colour="bgr").pixels, RGB)
    with pytest.raises(FrameError, match="colour: expected rgb or bgr, got 'gbr'"):
        Frame.read(source, colour="gbr")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order_of_an_array(order: str) -> None:
    values = np.arange(600).reshape(20, 30) * 6
    read = Frame.read(values.astype(f"{order}u2"), 12)
    np.testing.assert_array_equal(read.pixels[:, :, 0], values >> 4)


@pytest.mark.parametrize(
    "height,width,says",
    [
        (8, 100_000, "sides of at most 32,766"),
        (8, 801, "at most 100 times the short one"),
        (8, 150_000_000, "at most 150,000,000"),
        (7, 500, "at least 8×8"),
        (32_767, 1000, "sides of at most 32,766"),
    ],
)
def test_shapes_beyond_the_limits_are_refused_before_they_are_decoded(height: int, width: int, says: str) -> None:
    for side in ((height, width), (width, height)):
        whole = np.broadcast_to(np.uint8(7), side)
        header = b"P5 %d %d 255\n" % side[::-1]
        for source in (whole, header, Image.new("1", side[::-1]) if height * width < 10**8 else header):
            with pytest.raises(FrameError, match=f"{side[1]}×{side[0]} pixels; expected .*{says}|exceeds limits"):
                Frame.read(source)


@pytest.mark.parametrize(
    "data", [b"", b"hello", PNG[:50], JPEG[:-2], b"II*\0" + bytes(9), b"\x89PNG\r\n\x1a\n", b"GIF89a"]
)
def test_no_message_shows_the_inside_of_a_library(data: bytes) -> None:
    with pytest.raises(FrameError, match=r"^the given bytes: ") as caught:
        Frame.read(data)
    assert not any(word in str(caught.value) for word in ("0x", "<", "object", "BytesIO", "buffer", "PIL"))


@pytest.mark.parametrize("pixels", [RGB.astype(float), RGB[:, :, 0], RGB[:, :, :2]], ids=["float", "grey", "two"])
def test_a_frame_is_made_of_rgb_bytes(pixels: Any) -> None:
    with pytest.raises(FrameError, match=r"expected pixels \[h,w,3\] of uint8, got"):
        Frame(pixels, "x")


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "/dev/zero", "a link to a pipe"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    if kind == "a socket":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.close()
    elif kind == "/dev/zero":
        path = Path(kind)
    else:
        os.mkfifo(tmp_path / "pipe" if "link" in kind else path)
        if "link" in kind:
            path.symlink_to(tmp_path / "pipe")
    with pytest.raises(FrameError, match=r"cannot be read \(.*a device, pipe or socket\)"):
        Frame.read(path)


def test_a_path_with_a_nul_is_no_file() -> None:
    with pytest.raises(FrameError, match=r"'a\\x00.png': cannot be read \(no file can have this name\)"):
        Frame.read("a\0.png")


class Endless(io.RawIOBase):
    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size > 0
        return bytes(size)


def test_no_more_is_read_than_a_frame_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmad_edge.runtime.frame.MAX_BYTES", 100_000_000)
    with pytest.raises(FrameError, match="expected at most 100,000,000 bytes, found more"):
        Frame.read(Endless())
    path = tmp_path / "sparse.tif"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FrameError, match="1,099,511,627,776 bytes; expected at most 100,000,000"):
        Frame.read(path)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(PNG)
    sizes = os.fstat

    def grow(handle: int) -> os.stat_result:
        before = sizes(handle)
        with path.open("ab") as file:
            file.write(b"more")
        return before

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(FrameError, match="its length changed meanwhile"):
        Frame.read(path)


def test_premultiplied_alpha_is_dropped_in_grey_as_in_colour() -> None:
    grey = Image.fromarray(np.dstack([RGB[:, :, 0], np.full((20, 30), 255, np.uint8)]), "LA")
    np.testing.assert_array_equal(Frame.read(grey.convert("La")).pixels, RGB[:, :, [0, 0, 0]])


def test_a_deep_file_that_pillow_has_made_shallow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(deep_file(".png", np.repeat(np.arange(600, dtype=np.uint16).reshape(20, 30, 1), 3, 2)))
    image = Image.open(path)
    image.load()
    with pytest.raises(FrameError, match="Pillow does not keep 16-bit files whole"):
        Frame.read(image, 12)
    shallow = tmp_path / "shallow.png"
    shallow.write_bytes(PNG)
    image = Image.open(shallow)
    image.load()
    np.testing.assert_array_equal(Frame.read(image).pixels, RGB)


@pytest.mark.parametrize("read", [Frame.read, lambda path: read_mask(path, (64, 64))], ids=["frame", "mask"])
def test_no_other_program_is_started(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow gives an EPS to Ghostscript, whatever it is called."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 0\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    page = tmp_path / "part.png"
    page.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(FrameError):
        read(page)
    assert not (tmp_path / "started").exists()
    with contextlib.suppress(OSError):
        Image.open(page).load()
    assert (tmp_path / "started").exists()  # as the test would have seen
