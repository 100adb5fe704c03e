"""What is missing of an encoded image, by its own lengths, checksums and codes: decoders fill it in without a word."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

MAX_SCANS = 100
"""Of a JPEG: each of them passes over the whole picture. Encoders write 1 to about 20."""
MAX_TILES = 16_384
"""Of a JPEG 2000: OpenJPEG takes some 6 kB for each before it decodes."""

_ZEROS = 32
"""As many zero bytes in a JPEG's scan are a hole, where zeros would code coefficients: 4 blocks of nothing but the most
frequent one. Whole pictures (photographed, clipped, drawn) had a quarter of it at most."""
_SECTOR = 512
"""As many zeros in arithmetic codes are a hole. Large flat pictures come near it; only WebP's fastest lossless method
(-z 0), and its fastest ones at quality 100, write longer runs where a frame is flat."""
_STRAY = 8
"""Fewer bytes than a hole leaves over, before a JPEG's end (webcams write them); longer ones if they are all alike."""
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of a PNG's passes: first column and row, and how far the next ones are."""
_PIECE = 4096
"""Bytes that are inflated at once: deflate makes at most 1,032 of one."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A JPEG's marker, where entropy-coded data end; FF 00 and the restart markers are part of them."""
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


class DamageError(Exception):
    """An image that is not whole; the message says what is wrong with it, in words."""


def check_whole(data: bytes) -> None:
    """Raises a DamageError for what is plainly not whole; what is in no known format passes.

    Of pixels that are not coded (BMP, PNM, TGA, a plain TIFF) a hole cannot be told from black, and of arithmetic codes
    (WebP, JPEG 2000, AVIF) bytes that were changed, other than to zeros, cannot be told from others. A JPEG has no
    checksums: changed or lost bytes behind which its codes fall into step again pass, and shift what follows.
    """
    for begin, check in _CHECKS.items():
        if begin.match(data):
            try:
                check(data)
            except (IndexError, ValueError, struct.error):
                raise DamageError("cut off") from None


def check_strips(
    tiff: bytes, compression: int, parts: Iterable[tuple[int, int]], tables: bytes, most_pixels: int
) -> None:
    """Raises a DamageError for strips or tiles of a TIFF that are missing or damaged.

    Args:
        parts: offset and length of each.
        tables: what JPEG-compressed ones have in common (tag 347), or nothing.
        most_pixels: that a JPEG-compressed one can have.
    """
    for start, length in parts:
        strip = tiff[start : start + length]
        if not strip or len(strip) < length:
            raise DamageError("cut off")
        if compression in (8, 32946):
            _check_deflate(strip)
        elif compression == 7:
            jpeg = tables[:-2] + strip[2:] if tables else strip
            _check_jpeg(jpeg)
            if np.prod(simplejpeg.decode_jpeg_header(jpeg, strict=False)[:2]) > most_pixels:
                raise DamageError("a strip larger than the picture")
            decode_jpeg(jpeg)
        elif compression in (32773, 50000):  # PackBits, Zstandard
            _check_zeros(strip, 0, length)


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """[h,w,3] RGB, as Pillow decodes it, of a JPEG that `check_whole` passed.

    Raises:
        DamageError: libjpeg would have had to make up a part of it.
    """
    try:
        return np.asarray(simplejpeg.decode_jpeg(data), np.uint8)
    except ValueError as error:
        why = str(error)  # an error, or the first of its warnings
    if (mended := _mended(data, why)) != data:
        return decode_jpeg(mended)
    stray = _EXTRANEOUS.search(why)
    if stray is None:
        raise DamageError(why)
    *_, end = _segments(data)
    body, count = data[: end.start], int(stray[1])
    bare = body[:-count] if count <= _STRAY else body.rstrip(body[-1:])
    try:
        return np.asarray(simplejpeg.decode_jpeg(bare + b"\xff\xd9"), np.uint8)
    except ValueError:
        raise DamageError(f"{count} bytes too many, as a hole leaves them") from None


def _mended(jpeg: bytes, why: str) -> bytes:
    """With headers that libjpeg takes without a warning, if `why` is one of what it decodes as if they were so."""
    mended = bytearray(jpeg)
    segments = list(_segments(jpeg))
    for marker, payload, _, data in segments:
        start = data.start - len(payload)
        if marker == 0xDA and why.startswith("Invalid SOS"):  # of a sequential one: some cameras write zeros
            mended[data.start - 3 : data.start] = b"\0\x3f\0"
        elif marker == 0xE0 and "unknown JFIF revision" in why and payload.startswith(b"JFIF\0"):
            mended[start + 5] = 1
        elif marker == 0xE2 and "bad ICC marker" in why and payload.startswith(b"ICC_PROFILE\0"):
            mended[start] = 0  # so that it is somebody else's
        elif marker == 0xEE and "Unknown Adobe color transform" in why and payload.startswith(b"Adobe"):
            colours = next(frame.payload[5] for frame in segments if frame.marker in (0xC0, 0xC1, 0xC2))
            mended[start + 11] = 1 if colours == 3 else 2  # YCbCr, YCCK
    return bytes(mended)


class _Segment(NamedTuple):
    marker: int
    payload: bytes
    start: int
    """Of the marker."""
    data: slice
    """The entropy-coded data behind a scan's header."""


def _segments(jpeg: bytes) -> Iterator[_Segment]:
    """Up to the first picture's end; what lies behind (padding, previews, a signature) may be anything."""
    found = _MARKER.search(jpeg, 2)
    while found and found[1] != b"\xd9":
        behind = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
        following = _MARKER.search(jpeg, behind)
        end = following.start() if following else len(jpeg)
        yield _Segment(found[1][0], jpeg[found.end() + 2 : behind], found.start(), slice(behind, end))
        found = following
    if not found:
        raise DamageError("cut off: the JPEG does not end")
    yield _Segment(0xD9, b"", found.start(), slice(0, 0))


def _check_jpeg(jpeg: bytes) -> None:
    scans, components, progressive = 0, 0, False
    missing_bits: dict[tuple[int, int], int] = {}  # by component and coefficient
    most_frequent: dict[int, int] = {}  # by table: what its shortest code, of zeros alone, stands for
    for marker, payload, _, data in _segments(jpeg):
        if marker == 0xC4:
            place = 0
            while place < len(payload):
                count = sum(payload[place + 1 : place + 17])
                most_frequent[payload[place]] = payload[place + 17] if count else 0
                place += 17 + count
        elif marker in (0xC0, 0xC1, 0xC2):
            components, progressive = payload[5], marker == 0xC2
        elif marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise DamageError(f"more than {MAX_SCANS} scans")
            shown = payload[1 : 1 + 2 * payload[0] : 2]
            tables = [16 | table & 15 for table in payload[2 : 1 + 2 * payload[0] : 2]]
            first, last, low = payload[1 + 2 * payload[0] :] if progressive else (0, 63, 0)
            missing_bits.update({(part, place): low & 15 for part in shown for place in range(first, last + 1)})
            coded = last > 0 and any(most_frequent.get(table, 0) & 15 for table in tables)
            if coded and bytes(_ZEROS) in jpeg[data].rstrip(b"\0"):  # those before the end may be padding
                raise DamageError("a hole of zeros")
    if components and (len(missing_bits) < 64 * components or any(missing_bits.values())):
        raise DamageError("its last scans are missing")


def _check_png(png: bytes) -> None:
    place, kind = 8, b""
    inflate, missing = zlib.decompressobj(), 0
    while kind != b"IEND":
        (length,), kind = struct.unpack_from(">I", png, place), png[place + 4 : place + 8]
        (crc,) = struct.unpack_from(">I", png, place + 8 + length)
        if zlib.crc32(memoryview(png)[place + 4 : place + 8 + length]) != crc:
            raise DamageError("a chunk's checksum is wrong")
        content = memoryview(png)[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            missing = _rows_length(content)
        elif kind == b"IDAT":
            for start in range(0, length, _PIECE):
                if missing > 0 and not inflate.eof:
                    missing -= len(inflate.decompress(content[start : start + _PIECE]))
        place += 12 + length
    if missing > 0:
        raise DamageError("cut off: it has fewer rows than its header says")


def _rows_length(header: memoryview) -> int:
    """Bytes of a PNG's rows, each behind that of its filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _PNG_CHANNELS[colour]
    length = 0
    for left, top, right, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        length += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return length


def _check_webp(webp: bytes) -> None:
    end = 8 + int.from_bytes(webp[4:8], "little")
    place = 12
    while place < end:
        kind, length = struct.unpack_from("<4sI", webp, place)
        if place + 8 + length > len(webp):
            raise DamageError("cut off")
        if kind in (b"ALPH", b"VP8 ", b"VP8L"):
            _check_zeros(webp, place + 8, place + 8 + length)
        place += 8 + length + length % 2


def _check_boxes(file: bytes) -> None:
    """Of ISO's base media files: AVIF, and JPEG 2000 as JP2."""
    place = 0
    while place < len(file):
        length, kind = struct.unpack_from(">I4s", file, place)
        if kind == bytes(4):
            break  # padding behind the last box
        if length == 1:
            (length,) = struct.unpack_from(">Q", file, place + 8)
        end = place + length if length else len(file)
        if end > len(file) or 0 < length < 8:
            raise DamageError("cut off")
        if kind == b"mdat":
            _check_zeros(file, place, end)
        elif kind == b"jp2c":
            _check_codestream(file[place + 8 : end])
        place = end


def _check_codestream(code: bytes) -> None:
    """Of JPEG 2000: all its tiles are there, in parts that follow each other to the end marker."""
    right, bottom, *_, width, height, left, top = struct.unpack_from(">8I", code, 8)
    tiles = -(-(right - left) // width) * -(-(bottom - top) // height)
    if tiles > MAX_TILES:
        raise DamageError(f"{tiles:,} tiles; expected at most {MAX_TILES:,}")
    place = 2
    while code[place : place + 2] != b"\xff\x90":
        place += 2 + struct.unpack_from(">H", code, place + 2)[0]
    _check_zeros(code, place, len(code))
    found = set()
    while code[place : place + 2] == b"\xff\x90":
        tile, length = struct.unpack_from(">HI", code, place + 4)
        found.add(tile)
        place = place + length if length else len(code.rstrip(b"\0")) - 2  # 0: to the end
    if code[place : place + 2] != b"\xff\xd9" or len(found) < tiles:
        raise DamageError("cut off: its tiles are not all there")


def _check_zeros(coded: bytes, start: int, end: int) -> None:
    if coded.find(bytes(_SECTOR), start, end) >= 0:
        raise DamageError(f"{_SECTOR} zeros in a row, as a hole leaves them")


def _check_deflate(strip: bytes) -> None:
    """Reads to the checksum at its end, which libtiff does not."""
    inflate = zlib.decompressobj()
    rest = strip
    while rest and not inflate.eof:
        inflate.decompress(rest, 1 << 20)
        rest = inflate.unconsumed_tail
    if not inflate.eof:
        raise DamageError("cut off")


_CHECKS = {
    re.compile(rb"\xff\xd8"): _check_jpeg,
    re.compile(rb"\x89PNG\r\n\x1a\n"): _check_png,
    re.compile(rb"RIFF....WEBP", re.DOTALL): _check_webp,
    re.compile(rb"....(ftypavi|jP  )", re.DOTALL): _check_boxes,
    re.compile(rb"\xff\x4f\xff\x51"): _check_codestream,
}
