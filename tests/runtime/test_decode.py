"""What files hold, against decoders that are not the runtime's: tifffile for TIFF, and values written by hand."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.frame import Frame

H, W = 48, 64
RNG = np.random.default_rng(0)
Array = NDArray[Any]


def tiff(values: Array, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, metadata=None, **options)
    return file.getvalue()


def in_rgb(values: Array, bits: int) -> Array:
    """The high 8 of `bits` bits, as [h,w,3]."""
    high = (values.astype(int) * 256 >> bits).reshape(*values.shape[:2], -1)
    return np.broadcast_to(high[:, :, :3], (*values.shape[:2], 3))


def random(bits: int, *channels: int) -> Array:
    values = RNG.integers(0, 1 << bits, (H, W, *channels), np.uint16)
    values.flat[0] = (1 << bits) - 1
    return values


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("compression,predictor", [(None, False), ("zlib", False), ("zlib", True)])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize(
    "photometric,channels,extra",
    [
        *[("minisblack", (), ()), ("miniswhite", (), ()), ("rgb", (3,), ())],
        *[("rgb", (4,), ("unassalpha",)), ("rgb", (4,), ("unspecified",))],
    ],
)
def test_16_bit_tiff(
    order: Any, bits: int, compression: Any, predictor: bool, tile: Any, photometric: Any, channels: Any, extra: Any
) -> None:
    options = {"photometric": photometric, "extrasamples": extra or None, "tile": tile, "byteorder": order}
    data = tiff(random(bits, *channels), compression=compression, predictor=predictor or None, **options)
    stored = tifffile.imread(io.BytesIO(data))  # as stored, whatever its photometric says
    expected = in_rgb((1 << bits) - 1 - stored if photometric == "miniswhite" else stored, bits)
    np.testing.assert_array_equal(Frame.read(data, bits).pixels, expected)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb", "separate", "palette", "unassalpha"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_8_bit_tiff(photometric: str, order: Any) -> None:
    grey, colour = random(8).astype(np.uint8), random(8, 3).astype(np.uint8)
    expected = in_rgb(grey, 8)
    if photometric in ("rgb", "separate"):
        expected = colour
        planes = np.moveaxis(colour, 2, 0).copy() if photometric == "separate" else colour
        data = tiff(
            planes,
            photometric="rgb",
            planarconfig="separate" if photometric == "separate" else "contig",
            byteorder=order,
        )
    elif photometric == "palette":
        table = RNG.integers(0, 65536, (3, 256), np.uint16)
        expected = np.moveaxis(table[:, grey] >> 8, 0, 2)
        data = tiff(grey, photometric="palette", colormap=table, byteorder=order)
    elif photometric == "unassalpha":
        both = np.dstack([grey, grey[::-1]])
        data = tiff(both, photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig", byteorder=order)
    else:
        stored = 255 - grey if photometric == "miniswhite" else grey
        data = tiff(stored, photometric=photometric, byteorder=order)
    np.testing.assert_array_equal(Frame.read(data).pixels, expected)
    np.testing.assert_array_equal(Frame.read(data, 12).pixels, expected)  # of a folder with deep files in it


def packed(values: Array, bits: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF in which samples follow each other without a gap; a row begins with a byte (TIFF 6.0)."""
    height, width, samples = (*values.shape, 1)[:3]
    digits = ("".join(f"{value:0{bits}b}" for value in row.ravel()) for row in values)
    rows = [text.ljust(-(-len(text) // 8) * 8, "0") for text in digits]
    strip = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    after = 8 + 2 + 10 * 12 + 4
    tags = [
        *[(256, 3, 1, width), (257, 3, 1, height), (258, 3, samples, bits if samples == 1 else after), (259, 3, 1, 1)],
        *[(262, 3, 1, photometric), (273, 4, 1, after + 8), (277, 3, 1, samples), (278, 3, 1, height)],
        *[(279, 4, 1, len(strip)), (284, 3, 1, 1)],
    ]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + struct.pack("<I", 0)
    return head + struct.pack("<4H", *[bits] * 4) + strip


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("photometric,channels", [(1, ()), (0, ()), (2, (3,))])
def test_packed_tiff_says_its_depth_itself(bits: int, width: int, photometric: int, channels: Any) -> None:
    values = random(bits, *channels)[:, :width]
    data = packed((1 << bits) - 1 - values if photometric == 0 else values, bits, photometric)
    for said in (None, bits):
        np.testing.assert_array_equal(Frame.read(data, said).pixels, in_rgb(values, bits))
    with pytest.raises(FrameError, match=f"the file says that its values use {bits} bits; got a bit_depth of 16"):
        Frame.read(data, 16)


@pytest.mark.parametrize(
    "values,options,says",
    [
        pytest.param(random(16, 3), {"planarconfig": "separate"}, "planar configuration 2", id="separate planes"),
        pytest.param(random(16, 2), {"extrasamples": ["unassalpha"]}, "2 × 16 bits", id="grey with alpha"),
        pytest.param(random(16, 4), {"photometric": "separated"}, "photometric 5", id="CMYK"),
        pytest.param(random(16, 5), {"photometric": "rgb", "extrasamples": [0, 0]}, "5 × 16 bits", id="five channels"),
        pytest.param(random(16).astype(np.int16), {}, "found 16, signed", id="int16"),
        pytest.param(random(8).astype(np.int8), {}, "found 8, signed", id="int8"),
        pytest.param(random(10).astype(np.float16), {}, "found 16, floating-point", id="float16"),
        pytest.param(random(16).astype(np.float32), {}, "found 32, floating-point", id="float32"),
        pytest.param(random(16).astype(np.uint32), {}, "found 32, unsigned", id="uint32"),
    ],
)
def test_what_is_not_read_is_refused_by_name(values: Array, options: dict[str, Any], says: str) -> None:
    if options.get("planarconfig") == "separate":
        values, options = np.moveaxis(values, 2, 0).copy(), {**options, "photometric": "rgb"}
    elif values.ndim == 3:
        options = {"planarconfig": "contig", "photometric": "minisblack", **options}
    else:
        options = {"photometric": "minisblack"}
    with pytest.raises(FrameError, match=says):
        Frame.read(tiff(values, **options), 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("colour", [False, True])
def test_deep_files_are_turned_like_shallow_ones(orientation: int, form: str, colour: bool) -> None:
    """Pillow's reading of the 8-bit file is the oracle."""
    deep = random(16, *((3,) if colour else ()))
    shallow = Image.fromarray((deep >> 8).astype(np.uint8))
    shallow.getexif()[0x0112] = orientation
    expected = np.array(ImageOps.exif_transpose(shallow).convert("RGB"))
    if form == "TIFF":
        tag = [(274, 3, 1, orientation, True)]
        data = tiff(deep, photometric="rgb" if colour else "minisblack", extratags=tag)
    else:
        data = with_exif(cv2.imencode(".png", deep[..., ::-1] if colour else deep)[1].tobytes(), shallow.getexif())
    np.testing.assert_array_equal(Frame.read(data, 16).pixels, expected)


def with_exif(png: bytes, exif: Image.Exif) -> bytes:
    """`png` with the eXIf chunk that Pillow writes."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG", exif=exif)
    start = file.getvalue().index(b"eXIf") - 4
    chunk = file.getvalue()[start : start + 12 + int.from_bytes(file.getvalue()[start : start + 4], "big")]
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize("channels", [(), (2,), (3,), (4,)])
def test_16_bit_png(channels: tuple[int, ...]) -> None:
    values = random(12, *channels)
    data = png_16(values)
    expected = values if channels != (2,) else values[:, :, :1]
    np.testing.assert_array_equal(Frame.read(data, 12).pixels, in_rgb(expected, 12))
    with pytest.raises(FrameError, match="16-bit values"):
        Frame.read(data)


def png_16(values: Array) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2] if values.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("maxval", [255, 1000, 1023, 4095, 16383, 65535])
def test_pnm_by_its_own_maximum(maxval: int, channels: tuple[int, ...], plain: bool) -> None:
    values = RNG.integers(0, maxval + 1, (H, W, *channels))
    values.flat[0] = maxval
    magic = ("P3" if channels else "P2") if plain else ("P6" if channels else "P5")
    body = values.astype(">u2" if maxval > 255 else ">u1").tobytes()
    if plain:
        body = b"# a comment\n" + b"\n".join(b" ".join(b"%d" % value for value in row.ravel()) for row in values)
    data = f"{magic}\n# by hand\n{W} {H}\n{maxval}\n".encode() + body
    expected = np.broadcast_to((values * 256 // (maxval + 1)).reshape(H, W, -1), (H, W, 3))
    bits = maxval.bit_length()
    np.testing.assert_array_equal(Frame.read(data, bits if bits > 8 else None).pixels, expected)
    if maxval == 65535:
        with pytest.raises(FrameError, match="16-bit values; say how many"):
            Frame.read(data)
        with pytest.raises(FrameError, match="does not fit the given bit_depth of 12"):
            Frame.read(data, 12)
    elif maxval > 255:
        np.testing.assert_array_equal(Frame.read(data).pixels, expected)
        with pytest.raises(FrameError, match=f"the file says that its values use {bits} bits; got a bit_depth of 16"):
            Frame.read(data, 16)
        with pytest.raises(FrameError, match="cut off"):
            Frame.read(data[: -W * 4])


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


PHOTO = Image.fromarray(cv2.GaussianBlur(RNG.integers(0, 256, (480, 640, 3), np.uint8), (0, 0), 3))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"restart_marker_rows": 1}])
def test_a_jpeg_ends_where_its_marker_says(options: dict[str, Any]) -> None:
    whole = jpeg(PHOTO, **options)
    expected = np.array(Image.open(io.BytesIO(whole)))
    for behind in (b"", bytes(4096), b"\xff\xff", b"a camera's signature\xff\xd8\xff", whole[:900]):
        np.testing.assert_array_equal(Frame.read(whole + behind).pixels, expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("filled", [b"", b"\0", b"\xff"])
def test_a_jpeg_that_was_written_in_part_is_refused(options: dict[str, Any], share: float, filled: bytes) -> None:
    whole = jpeg(PHOTO, exif=exif_with_thumbnail(), **options)
    there = int(share * len(whole))
    with pytest.raises(FrameError, match="not a readable image"):
        Frame.read(whole[:there] + filled * (len(whole) - there))


def exif_with_thumbnail() -> bytes:
    """EXIF data whose second directory holds a JPEG, as cameras write them."""
    small = jpeg(PHOTO.resize((160, 120)))
    first = struct.pack("<HHHII", 1, 0x0112, 3, 1, 1) + struct.pack("<I", 8 + 2 + 12 + 4)
    second = struct.pack("<HHHIIHHII", 2, 0x0201, 4, 1, 8 + 18 + 30, 0x0202, 4, 1, len(small)) + bytes(4)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + small


def test_the_primary_picture_of_a_jpeg_with_previews() -> None:
    plain = np.array(Image.open(io.BytesIO(jpeg(PHOTO))))
    np.testing.assert_array_equal(Frame.read(jpeg(PHOTO, exif=exif_with_thumbnail())).pixels, plain)
    file = io.BytesIO()
    PHOTO.save(file, "MPO", save_all=True, append_images=[PHOTO.resize((160, 120)), PHOTO.rotate(180)])
    assert Image.open(io.BytesIO(file.getvalue())).n_frames == 3
    np.testing.assert_array_equal(Frame.read(file.getvalue()).pixels, plain)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("big", [False, True])
def test_the_primary_page_of_a_tiff_with_a_thumbnail(bits: int, first: bool, big: bool) -> None:
    whole = random(bits, 3).astype(np.uint8 if bits == 8 else np.uint16)
    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=big) as writer:
        pages = [(whole, 0), (whole[::2, ::2].copy(), 1), (whole[::4, ::4].copy(), 1)]
        for page, kind in reversed(pages) if first else pages:
            writer.write(page, photometric="rgb", subfiletype=kind, metadata=None)
    np.testing.assert_array_equal(Frame.read(file.getvalue(), 16).pixels, in_rgb(whole, bits))


@pytest.mark.parametrize("kinds,found", [((0, 0), 2), ((0, 0, 1), 2), ((1,), 0), ((2, 2, 2), 3)])
def test_stacks_and_mere_thumbnails_are_refused(kinds: tuple[int, ...], found: int) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for kind in kinds:
            writer.write(random(8).astype(np.uint8), photometric="minisblack", subfiletype=kind, metadata=None)
    with pytest.raises(FrameError, match=f"expected one image, found {found} pages of full size"):
        Frame.read(file.getvalue())


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused(form: str) -> None:
    file = io.BytesIO()
    PHOTO.save(file, form, save_all=True, append_images=[PHOTO.rotate(180), PHOTO])
    with pytest.raises(FrameError, match="expected one image, found 3"):
        Frame.read(file.getvalue())


@pytest.mark.parametrize(
    "form,bits", [("PNG", 8), ("TIFF", 8), ("BMP", 8), ("PPM", 8), ("PNG", 16), ("TIFF", 16), ("PPM", 16)]
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_files_cut_off_are_refused(bits: int, form: str, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    values = random(bits, 3).astype(np.uint8 if bits == 8 else np.uint16)
    data = {
        "TIFF": lambda: tiff(values, photometric="rgb", rowsperstrip=8),
        "PNG": lambda: cv2.imencode(".png", values)[1].tobytes(),
        "BMP": lambda: cv2.imencode(".bmp", values)[1].tobytes(),
        "PPM": lambda: f"P6 {W} {H} {(1 << bits) - 1}\n".encode() + values.byteswap().tobytes(),
    }[form]()
    with pytest.raises(FrameError, match="not a readable image") as caught:
        Frame.read(data[: int(share * len(data))], 16)
    assert "0x" not in str(caught.value) and "io." not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # and the decoders keep quiet


@pytest.mark.parametrize("mode,bits", [("L", 8), ("I;16", 16)])
def test_jpeg_2000(mode: str, bits: int) -> None:
    values = random(bits).astype(np.uint8 if bits == 8 else np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG2000", irreversible=False)
    if bits == 8:
        np.testing.assert_array_equal(Frame.read(file.getvalue()).pixels, in_rgb(values, 8))
    else:
        with pytest.raises(FrameError, match="JPEG 2000 of 16 bits a channel is not read"):
            Frame.read(file.getvalue(), 16)
