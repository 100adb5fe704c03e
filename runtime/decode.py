"""Encoded images to 8-bit RGB: Pillow reads them, libjpeg's strict wrapper where Pillow would hide its warnings, OpenCV
where Pillow would drop the low bits of 16-bit values."""

from __future__ import annotations

import io
import re
import struct
import warnings
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from vmad_edge.runtime.damage import DamageError, check_strips, check_whole, decode_jpeg
from vmad_edge.runtime.errors import FrameError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of what is read; of these its build may lack AVIF."""
MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded."""
MAX_BYTES_A_PIXEL, MAX_METADATA = 16, 1 << 26
"""Of a file: decoding takes at most ten times the frame's own bytes and six times the file's."""
MAX_TILE = 1024 * 1024
"""Of a TIFF's tiles, in pixels; they may be as large as the picture, too."""
MAX_PAGES = 100
"""Of a TIFF, thumbnails among them."""
MIN_SIDE, MAX_SIDE = 8, 32_766
"""OpenCV's, in what draws the maps."""
MAX_ASPECT = 100
"""Long side to short side: a system that pads or crops to a square sees nothing of thinner frames."""

_NEVER_FILLED = ("AVIF", "JPEG", "MPO", "PNG", "WEBP")
"""Formats whose missing parts are found whether Pillow is told to fill them in or not."""
_TIFF = {b"II*\0": ("<L", 4), b"MM\0*": (">L", 4), b"II+\0": ("<Q", 8)}
"""Of a TIFF's and a little-endian BigTIFF's first bytes: how and where the first page's offset is written."""
_LOSSLESS = {1, 5, 8, 32773, 32946}
"""None, LZW, Deflate, PackBits and Adobe's Deflate: the compressions of TIFF that are read with more than 8 bits."""


def decode(data: bytes, name: str, bit_depth: int | None) -> NDArray[np.uint8]:
    """[h,w,3] RGB, turned as its EXIF data say; `bit_depth` as for `Frame.read`.

    Of several pictures in a file the primary one is taken where the file says which that is: a camera's JPEG with
    previews (MPO), a TIFF with pages of reduced resolution.

    Raises:
        FrameError: not readable, not whole, too small, too large, too thin; an animation or a stack; deep values that
            `bit_depth` does not fit, or in an arrangement that is not read.
    """
    if not data:
        raise FrameError(f"{name}: not a readable image (it is empty)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: of size, where check_size is stricter, and of odd metadata
            return _decode(data, name, bit_depth)
    except (FrameError, MemoryError):
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise FrameError(f"{name}: not a readable image (damaged from its start on, or none of {known})") from None
    except Image.DecompressionBombError:
        raise FrameError(f"{name}: its size exceeds limits; expected at most {MAX_PIXELS:,} pixels in all") from None
    except DamageError as error:
        raise FrameError(f"{name}: not a readable image (damaged: {error})") from None
    except Exception:  # decoders raise many kinds on broken files, in words that say nothing to a user
        raise FrameError(f"{name}: not a readable image (damaged or cut off)") from None


def from_image(image: Image.Image, name: str, bit_depth: int | None) -> NDArray[np.uint8]:
    """[h,w,3] RGB of a PIL image, turned as its EXIF data say.

    Raises:
        FrameError: as of `decode`; a file of more than 8 bits that was opened with Pillow, which drops some of them.
    """
    check_size(*image.size, name)
    if (file := getattr(image, "fp", None)) is not None and getattr(image, "n_frames", 1) == 1:
        file.seek(0)  # opened, and not decoded yet: what Pillow would fill in, or drop, is in the file
        return decode(file.read(), name, bit_depth)
    if image.format is not None and (image.mode.startswith("I;16") or _is_16_bit(image) or _was_16_bit(image)):
        raise FrameError(f"{name}: Pillow does not keep 16-bit files whole; give the path or the file's bytes instead")
    if image.mode.startswith("I;16"):
        return in_rgb(to_8_bits(np.asarray(image).astype(np.uint16), bit_depth, name))
    _check_mode(image, name)
    try:
        return _in_pillow(image.convert("LA") if image.mode == "La" else image, name)
    except ValueError:
        raise FrameError(f"{name}: PIL's mode {image.mode} is not read; convert it to RGB first") from None
    except (OSError, SyntaxError):  # opened, and decoded only now
        raise FrameError(f"{name}: not a readable image (damaged or cut off)") from None


def check_size(width: int, height: int, name: str) -> None:
    """Raises a FrameError for what no system sees anything of, or what would need too much memory."""
    found = f"{name}: {width}×{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise FrameError(f"{found}; expected at least {MIN_SIDE}×{MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise FrameError(f"{found}; expected at most {MAX_PIXELS:,} in all")
    if max(width, height) > MAX_SIDE:
        raise FrameError(f"{found}; expected sides of at most {MAX_SIDE:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise FrameError(f"{found}; expected the long side to be at most {MAX_ASPECT} times the short one")


def to_8_bits(values: NDArray[np.uint16], bit_depth: int | None, name: str) -> NDArray[np.uint8]:
    """The high 8 of the `bit_depth` bits that `values` use."""
    if bit_depth is None:
        raise FrameError(f"{name}: 16-bit values; say how many of the bits they use (bit_depth 10, 12, 16, …)")
    if (highest := int(values.max())) >= 1 << bit_depth:
        raise FrameError(f"{name}: a value of {highest} does not fit the given bit_depth of {bit_depth}")
    return (values >> (bit_depth - 8)).astype(np.uint8)


def in_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[h,w], [h,w,1], [h,w,3] or [h,w,4] → a new array [h,w,3]; alpha is dropped."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels == 3:
        return np.array(pixels, order="C")
    code = cv2.COLOR_GRAY2RGB if channels == 1 else cv2.COLOR_RGBA2RGB  # ten times as fast as NumPy's copy
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), code), np.uint8)


def _decode(data: bytes, name: str, bit_depth: int | None) -> NDArray[np.uint8]:
    if data[:4] in _TIFF:
        data, page = _primary_page(data, name)
        _check_parts(data, page, name)
        if max(page.get(258, (1,))) > 8:
            return _deep_tiff(data, page, name, bit_depth)
    with Image.open(io.BytesIO(data), formats=opened()) as image:
        _check_header(data, *image.size, name)
        check_whole(data)
        if image.format not in ("MPO", "TIFF") and (count := getattr(image, "n_frames", 1)) != 1:
            raise FrameError(f"{name}: expected one image, found {count} (an animation or a stack)")
        if image.format == "PPM" and image.mode in ("I", "RGB") and (maxval := _maxval(image)) > 255:
            return _deep_pnm(data, image, maxval, name, bit_depth)
        if image.format == "JPEG2000" and (bits := _bits_of_jpeg2000(data)) > 8:
            raise FrameError(f"{name}: JPEG 2000 of {bits} bits a channel is not read; convert it to TIFF or PNG first")
        if image.format == "PNG" and _is_16_bit(image):
            return _deep_png(data, image, name, bit_depth)
        _check_mode(image, name)
        if image.format in ("JPEG", "MPO"):
            pixels = decode_jpeg(data)
            if image.mode != "CMYK":  # of which Pillow makes other colours
                return _upright(pixels, image)
        return _in_pillow(image, name)


def _in_pillow(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """[h,w,3] RGB of an image that may be decoded only here.

    Raises:
        FrameError: an application told Pillow to fill in what is missing of files.
    """
    filled = ImageFile.LOAD_TRUNCATED_IMAGES
    asked = bool(getattr(image, "tile", ())) and image.format not in _NEVER_FILLED
    pixels = np.array(image.convert("RGB"))
    if asked and (filled or ImageFile.LOAD_TRUNCATED_IMAGES):
        raise FrameError(
            f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so that a {image.format} file "
            "that is cut off would be read as a picture; unset it"
        )
    return _upright(pixels, image)


def _upright(pixels: NDArray[np.uint8], image: Image.Image) -> NDArray[np.uint8]:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in (5, 6, 7, 8):
        pixels = np.asarray(cv2.transpose(pixels), np.uint8)
    mirrored = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)  # left to right, both, top to bottom
    return pixels if mirrored is None else np.asarray(cv2.flip(pixels, mirrored), np.uint8)


def _check_mode(image: Image.Image, name: str) -> None:
    """Raises a FrameError for what Pillow would cut off at 255 without a word, or has no colours of."""
    if image.mode in ("F", "I", "LAB"):
        kind = "L*a*b* colours" if image.mode == "LAB" else "32"
        raise FrameError(f"{name}: expected 8 or 16 bits a channel, grey or RGB, found {kind}; convert it first")


@cache
def opened() -> tuple[str, ...]:
    """The formats to give to `Image.open`, which tries all others too (an EPS called .png starts Ghostscript)."""
    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)  # MPO is opened as JPEG


def _is_16_bit(image: Image.Image) -> bool:
    """Whether a file just opened holds 16 bits a channel, whatever mode Pillow would turn them into ("RGB;16B")."""
    return any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))


def _was_16_bit(image: Image.Image) -> bool:
    """The same of a loaded one, by its file; of one that came from a file object nothing tells any more."""
    try:
        with Image.open(getattr(image, "filename", ""), formats=opened()) as again:
            return _is_16_bit(again)
    except (OSError, SyntaxError, ValueError):
        return False


def _primary_page(data: bytes, name: str) -> tuple[bytes, ImageFileDirectory_v2]:
    """A TIFF with the offset of its only full page in front, and that page's tags."""
    form, place = _TIFF[data[:4]]
    begin = data[: 2 * place]
    pages: dict[int, ImageFileDirectory_v2] = {}
    file, (offset,) = io.BytesIO(data), struct.unpack(form, data[place : 2 * place])
    while offset and offset not in pages:
        if len(pages) == MAX_PAGES:
            raise FrameError(f"{name}: expected one image, found more than {MAX_PAGES} pages (a stack)")
        file.seek(offset)
        pages[offset] = ImageFileDirectory_v2(begin)
        pages[offset].load(file)
        offset = pages[offset].next
    whole = [offset for offset, page in pages.items() if not (page.get(254, 0) & 5 or page.get(255) == 2)]
    if len(whole) != 1:
        raise FrameError(
            f"{name}: expected one image, found {len(whole)} pages of full size (a stack, or a raw file's preview)"
        )
    page = pages[whole[0]]
    if (kind := max(page.get(339, (1,)))) not in (1, 4) or max(page.get(258, (1,))) > 16:
        what = {2: "signed", 3: "floating-point"}.get(kind, "unsigned")
        raise FrameError(
            f"{name}: expected 8 or 16 bits a channel, unsigned, found {max(page.get(258, (1,)))}, {what}; "
            "convert it first"
        )
    return data[:place] + struct.pack(form, whole[0]) + data[2 * place :], page


def _check_header(data: bytes, width: int, height: int, name: str) -> None:
    check_size(width, height, name)
    if len(data) > (most := MAX_BYTES_A_PIXEL * width * height + MAX_METADATA):
        raise FrameError(f"{name}: {len(data):,} bytes of {width}×{height} pixels; expected at most {most:,}")


def _check_parts(data: bytes, page: ImageFileDirectory_v2, name: str) -> None:
    """That its strips or tiles are there, whole, and no larger than the picture asks for."""
    width, height = page[256], page[257]
    _check_header(data, width, height, name)
    most = max(width * height, MAX_TILE)
    if page.get(322, 1) * page.get(323, 1) > most:
        raise FrameError(f"{name}: tiles of {page[322]}×{page[323]} pixels in a picture of {width}×{height}")
    lengths = page.get(279) or page.get(325)
    if lengths is not None:  # of what is not compressed, old files do not say them
        parts = zip(page.get(273) or page[324], lengths, strict=True)
        check_strips(data, page.get(259, 1), parts, page.get(347, b""), most)


def _deep_tiff(data: bytes, page: ImageFileDirectory_v2, name: str, bit_depth: int | None) -> NDArray[np.uint8]:
    samples, photometric = (int(page.get(tag, 1)) for tag in (277, 262))
    bits, planar, compression = page[258], page.get(284, 1), page.get(259, 1)
    if not (
        set(bits) in ({10}, {12}, {14}, {16})
        and (photometric, samples) in ((0, 1), (1, 1), (2, 3), (2, 4))
        and (planar == 1 or samples == 1)
        and page.get(266, 1) == 1
        and compression in ({1} if bits[0] < 16 else _LOSSLESS)
    ):
        raise FrameError(
            f"{name}: a TIFF of {samples} × {bits[0]} bits (photometric {photometric}, planar configuration {planar}, "
            f"compression {compression}) is not read; expected grey, RGB or RGBA of 10, 12, 14 or 16 bits, the "
            "channels side by side, compressed without loss or (below 16 bits) not at all; convert it first"
        )
    values = _with_opencv(data)
    if bits[0] == 16:
        pixels = to_8_bits(values, bit_depth, name)
    else:
        _agree(bits[0], bit_depth, name)
        pixels = (values >> 8).astype(np.uint8)  # OpenCV moves packed values up to 16 bits
    return in_rgb(255 - pixels if photometric == 0 else pixels)


def _deep_png(data: bytes, image: ImageFile.ImageFile, name: str, bit_depth: int | None) -> NDArray[np.uint8]:
    image.load()  # OpenCV fills what is missing of a file with black; Pillow raises
    return _upright(in_rgb(to_8_bits(_with_opencv(data), bit_depth, name)), image)


def _with_opencv(data: bytes) -> NDArray[np.uint16]:
    """[h,w] or [h,w,c] in the order RGB(A), as stored."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise ValueError("not decoded")
    return np.asarray(values[:, :, 2::-1] if values.ndim == 3 else values, np.uint16)


def _maxval(image: ImageFile.ImageFile) -> int:
    codec, _, _, args = image.tile[0]
    return int(args[-1]) if codec.startswith("ppm") and args else 65535 if _is_16_bit(image) else 255


def _deep_pnm(
    data: bytes, image: ImageFile.ImageFile, maxval: int, name: str, bit_depth: int | None
) -> NDArray[np.uint8]:
    codec, _, offset, _ = image.tile[0]
    shape = image.height, image.width, 3 if image.mode == "RGB" else 1
    values: NDArray[Any]
    if codec == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b"", data[offset:])
        values = np.fromstring(text, np.int64, sep=" ")[: np.prod(shape)]
    else:
        values = np.frombuffer(data, ">u2", int(np.prod(shape)), offset)
    values = values.reshape(shape)
    if not 0 <= values.min() <= values.max() <= maxval:
        raise FrameError(f"{name}: a value of {values.max()}, where the file says that they reach {maxval}")
    if maxval == 65535:  # of any 16-bit array's file, whatever its values use
        return in_rgb(to_8_bits(values.astype(np.uint16), bit_depth, name))
    _agree(maxval.bit_length(), bit_depth, name)
    return in_rgb((values.astype(np.uint32) * 256 // (maxval + 1)).astype(np.uint8))


def _agree(bits: int, bit_depth: int | None, name: str) -> None:
    if bit_depth not in (None, bits):
        raise FrameError(f"{name}: the file says that its values use {bits} bits; got a bit_depth of {bit_depth}")


def _bits_of_jpeg2000(data: bytes) -> int:
    """Of the first channel, from the codestream's SIZ segment."""
    start = data.index(b"\xff\x4f\xff\x51")
    return (data[start + 42] & 0x7F) + 1
