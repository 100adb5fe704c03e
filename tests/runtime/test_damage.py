"""Files that lost a part: refused, or read as the whole file is. Pillow's reading of the whole file is the oracle."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.frame import Frame

ROOT = Path(__file__).parents[2]
PARTS = [
    ROOT / "demo" / "parts" / "defective" / f"{name}.jpg" for name in ("casting_crack", "circuit_board_missing_feature")
]
COOKIES = ROOT.parent / "shared" / "data" / "cookies"
NOISE = np.random.default_rng(0)


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def deep(picture: Image.Image) -> NDArray[np.uint16]:
    return np.asarray(picture).astype(np.uint16) * 257


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", metadata=None, rowsperstrip=32, **options)
    return file.getvalue()


CODED: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG": lambda picture: encoded(picture, "JPEG", quality=90),
    "JPEG, own tables": lambda picture: encoded(picture, "JPEG", quality=90, optimize=True),
    "JPEG, restarts": lambda picture: encoded(picture, "JPEG", quality=90, restart_marker_rows=1),
    "JPEG, progressive": lambda picture: encoded(picture, "JPEG", quality=90, progressive=True),
    "JPEG, grey": lambda picture: encoded(picture.convert("L"), "JPEG"),
    "JPEG, CMYK": lambda picture: encoded(picture.convert("CMYK"), "JPEG", quality=90),
    "PNG": lambda picture: encoded(picture, "PNG"),
    "PNG, 16 bits": lambda picture: cv2.imencode(".png", deep(picture))[1].tobytes(),
    "WebP": lambda picture: encoded(picture, "WEBP", quality=95),
    "WebP, lossless": lambda picture: encoded(picture, "WEBP", lossless=True, method=1),
    "JPEG 2000": lambda picture: encoded(picture, "JPEG2000", tile_size=(192, 192)),
    "GIF": lambda picture: encoded(picture, "GIF"),
    "TIFF, LZW": lambda picture: encoded(picture, "TIFF", compression="tiff_lzw"),
    "TIFF, Deflate": lambda picture: encoded(picture, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, Deflate, 16 bits": lambda picture: tiff(deep(picture), compression="zlib", predictor=True),
    "TIFF, JPEG": lambda picture: encoded(picture, "TIFF", compression="jpeg", quality=90),
    "TIFF, PackBits": lambda picture: encoded(picture, "TIFF", compression="packbits"),
}
RAW: dict[str, Callable[[Image.Image], bytes]] = {
    "BMP": lambda picture: encoded(picture, "BMP"),
    "PPM": lambda picture: encoded(picture, "PPM"),
    "TGA": lambda picture: encoded(picture, "TGA"),
    "TIFF": lambda picture: encoded(picture, "TIFF"),
    "TIFF, 16 bits": lambda picture: tiff(deep(picture)),
}
"""In which a hole of zeros is black: bytes that are missing are seen, those that were changed are not."""
if "AVIF" in Image.registered_extensions().values():
    CODED["AVIF"] = lambda picture: encoded(picture, "AVIF", quality=90, speed=10)


def end(data: bytes) -> bytes:
    """How a whole file ends: a marker, a chunk, the checksum of a strip."""
    return data[-2:] if data.startswith(b"\xff\xd8") else data[-12:]


SHORTER: dict[str, Callable[[bytes], bytes]] = {
    **{f"cut at {share}": lambda data, share=share: data[: int(len(data) * share)] for share in (0.3, 0.6, 0.9, 0.99)},  # type: ignore[misc]
    **{
        f"cut at {share}, ended": lambda data, share=share: data[: int(len(data) * share)] + end(data)  # type: ignore[misc]
        for share in (0.3, 0.6, 0.9, 0.99)
    },
    **{
        f"512 removed at {share}": lambda data, share=share: (
            data[: int(len(data) * share)]  # type: ignore[misc]
            + data[int(len(data) * share) + 512 :]
        )
        for share in (0.2, 0.5, 0.8)
    },
}
ZEROED: dict[str, Callable[[bytes], bytes]] = {
    **{
        f"{length} zeroed at {share}": lambda data, share=share, length=length: (
            data[: int(len(data) * share)]  # type: ignore[misc]
            + bytes(length)
            + data[int(len(data) * share) + length :]
        )
        for share, length in ((0.2, 512), (0.35, 4096), (0.5, 512), (0.65, 512), (0.8, 512))
    },
    **{
        f"the last {share} zeroed": lambda data, share=share: (
            data[: -int(len(data) * share)]  # type: ignore[misc]
            + bytes(int(len(data) * share))
        )
        for share in (0.1, 0.5)
    },
}


@cache
def photographs() -> tuple[Image.Image, ...]:
    paths = [PARTS[0], *sorted(COOKIES.rglob("*.jpg"))[:1]]
    return tuple(Image.open(path).convert("RGB") for path in paths)


def read_wrongly(kind: Callable[[Image.Image], bytes], damages: dict[str, Callable[[bytes], bytes]]) -> list[str]:
    wrong = []
    for number, picture in enumerate(photographs()):
        data = kind(picture)
        expected = Frame.read(data, 16).pixels
        for name, damage in damages.items():
            if len(damage(data)) >= 0.1 * len(data) and damage(data) != data:
                try:
                    pixels = Frame.read(damage(data), 16).pixels
                except FrameError:
                    continue
                if not np.array_equal(pixels, expected):
                    wrong.append(f"{name} of {number}")
    return wrong


@pytest.mark.parametrize("kind", {**CODED, **RAW})
def test_what_misses_a_part_is_refused(kind: str) -> None:
    wrong = read_wrongly({**CODED, **RAW}[kind], SHORTER)
    if kind == "JPEG, progressive":  # in the last bit of its coefficients, one hole in six leaves a valid code
        wrong = [found for found in wrong if not found.startswith("512 removed")]
    assert wrong == []


@pytest.mark.parametrize("kind", CODED)
def test_a_hole_of_zeros_is_refused(kind: str) -> None:
    assert read_wrongly(CODED[kind], ZEROED) == []


@pytest.mark.parametrize("kind", {**CODED, **RAW})
def test_whole_files_are_read_as_pillow_does(kind: str) -> None:
    for picture in photographs():
        data = {**CODED, **RAW}[kind](picture)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if "16" not in kind else np.asarray(picture)
        if kind == "PNG, 16 bits":
            expected = expected[:, :, ::-1]  # as OpenCV wrote it
        np.testing.assert_array_equal(Frame.read(data, 16).pixels, expected)


@pytest.mark.parametrize("quality", [5, 75, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2, "4:1:1", "4:4:0"])
@pytest.mark.parametrize(
    "options", [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_blocks": 7}], ids=str
)
@pytest.mark.parametrize("shape", [(203, 331)])
def test_a_jpeg_has_pillows_pixels(
    quality: int, subsampling: Any, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    picture = photographs()[0].resize(shape)
    if subsampling == "4:4:0":
        factor = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440]
        data = cv2.imencode(".jpg", np.asarray(picture), [cv2.IMWRITE_JPEG_QUALITY, quality, *factor])[1].tobytes()
    else:
        data = encoded(picture, "JPEG", quality=quality, subsampling=subsampling, **options)
    np.testing.assert_array_equal(Frame.read(data).pixels, np.asarray(Image.open(io.BytesIO(data))))


FLAT = {
    "white": Image.new("RGB", (1024, 1024), "white"),
    "part on black": Image.new("RGB", (1024, 1024)),
    "clipped": Image.fromarray(
        np.clip(np.asarray(Image.open(PARTS[0])).astype(int) * 3 - 255, 0, 255).astype(np.uint8)
    ),
    "gradient": Image.linear_gradient("L").resize((1024, 1024)).convert("RGB"),
}
FLAT["part on black"].paste(Image.open(PARTS[0]), (300, 300))


@pytest.mark.parametrize("picture", FLAT)
@pytest.mark.parametrize("kind", CODED)
def test_flat_parts_of_a_picture_are_no_holes(kind: str, picture: str) -> None:
    Frame.read(CODED[kind](FLAT[picture]), 16)


JPEG = encoded(Image.open(PARTS[0]), "JPEG", quality=90)


@pytest.mark.parametrize(
    "stray",
    [b"\0", b"\xff", b"\x55" * 3, bytes(1000), b"\xff" * 100, b" " * 40, b"\r\n"],
    ids=lambda b: f"{len(b)} {b[:1]!r}",
)
def test_stray_bytes_before_a_jpegs_end_are_no_damage(stray: bytes) -> None:
    expected = np.asarray(Image.open(io.BytesIO(JPEG)))
    np.testing.assert_array_equal(Frame.read(JPEG[:-2] + stray + JPEG[-2:]).pixels, expected)
    for share in (0.5, 0.9):  # nor do they hide any
        with pytest.raises(FrameError, match="not a readable image"):
            Frame.read(JPEG[: int(share * len(JPEG))] + stray + JPEG[-2:])


def test_a_sequential_jpeg_that_does_not_name_its_spectrum() -> None:
    at = JPEG.index(b"\0\x3f\0", JPEG.index(b"\xff\xda"))
    odd = JPEG[:at] + bytes(3) + JPEG[at + 3 :]
    np.testing.assert_array_equal(Frame.read(odd).pixels, np.asarray(Image.open(io.BytesIO(JPEG))))
    for damaged in (odd[:9000] + odd[9700:], odd[:9000] + bytes(512) + odd[9512:]):
        with pytest.raises(FrameError, match="not a readable image"):
            Frame.read(damaged)


def _adobe(jpeg: bytes, transform: int) -> bytes:
    """With Adobe's segment in place of JFIF's."""
    return jpeg[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + bytes([transform]) + jpeg[20:]


def _changed(jpeg: bytes, behind: bytes, value: int) -> bytes:
    at = jpeg.index(behind) + len(behind)
    return jpeg[:at] + bytes([value]) + jpeg[at + 1 :]


ODD_HEADERS: dict[str, Callable[[Image.Image], bytes]] = {
    "JFIF 2": lambda picture: _changed(encoded(picture, "JPEG"), b"JFIF\0", 2),
    "JFIF 0": lambda picture: _changed(encoded(picture.convert("L"), "JPEG"), b"JFIF\0", 0),
    "Adobe's transform 7": lambda picture: _adobe(encoded(picture, "JPEG"), 7),
    "Adobe's transform 7 of CMYK": lambda picture: _changed(
        encoded(picture.convert("CMYK"), "JPEG"), b"Adobe\x00\x64\0\0\0\0", 7
    ),
    "a colour profile without its first part": lambda picture: _changed(
        encoded(picture, "JPEG", icc_profile=b"profile"), b"ICC_PROFILE\0", 9
    ),
}


@pytest.mark.parametrize("kind", ODD_HEADERS)
def test_odd_headers_of_a_jpeg_are_no_damage(kind: str) -> None:
    odd = ODD_HEADERS[kind](Image.open(PARTS[0]))
    np.testing.assert_array_equal(Frame.read(odd).pixels, np.asarray(Image.open(io.BytesIO(odd)).convert("RGB")))
    middle = len(odd) // 2
    for damaged in (odd[:middle] + b"\xff\xd9", odd[:middle] + odd[middle + 700 :]):  # nor do they hide any
        with pytest.raises(FrameError, match="not a readable image"):
            Frame.read(damaged)


def test_a_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    """libjpeg has nothing to warn of; Pillow shows it smoothed."""
    whole = encoded(Image.open(PARTS[0]), "JPEG", progressive=True)
    place = len(whole)
    for _ in range(9):
        place = whole.rindex(b"\xff\xda", 0, place)
        with pytest.raises(FrameError, match="its last scans are missing"):
            Frame.read(whole[:place] + b"\xff\xd9")


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    whole = encoded(Image.open(PARTS[0]), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(FrameError, match="more than 100 scans"):
        Frame.read(whole[:last] + whole[last:-2] * 2000 + b"\xff\xd9")


@pytest.mark.parametrize("kind", [b"IHDR", b"pHYs", b"tEXt", b"IDAT", b"IEND", b"prVt"])
def test_a_wrong_checksum_of_any_png_chunk_is_refused(kind: bytes) -> None:
    info = PngInfo()
    info.add_text("part", "gear")
    info.add(b"prVt", b"of a camera", after_idat=True)
    data = encoded(photographs()[0], "PNG", pnginfo=info, dpi=(300, 300))
    np.testing.assert_array_equal(Frame.read(data).pixels, np.asarray(photographs()[0]))
    start = data.index(kind)
    at = start + 4 + int.from_bytes(data[start - 4 : start], "big")
    with pytest.raises(FrameError, match=r"checksum is wrong|damaged"):
        Frame.read(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


PASSES = {
    "row by row": [(0, 0, 1, 1)],
    "interlaced": [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)],
}
"""Of a PNG: first row and column, and the steps to the next ones (the standard's table)."""


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("shape", [(9, 13, 3), (64, 50, 4), (33, 8, 1), (40, 41, 2)])
def test_a_png_with_fewer_rows_than_its_header_says_is_refused(shape: tuple[int, int, int], kind: str) -> None:
    """All its checksums are right; Pillow leaves the rest black."""
    values = NOISE.integers(0, 256, shape, np.uint8)
    parts = [values[top::down, left::right] for top, left, down, right in PASSES[kind]]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", shape[1], shape[0], 8, {1: 0, 2: 4, 3: 2, 4: 6}[shape[2]], 0, 0, len(parts) > 1)

    def png(rows: bytes) -> bytes:
        chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"]
        coded = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(coded)

    whole = png(rows)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(whole))).reshape(shape), values)
    np.testing.assert_array_equal(Frame.read(whole).pixels, np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))
    for length in (len(rows) - 1, len(rows) // 2, 0):
        with pytest.raises(FrameError, match="not a readable image"):
            Frame.read(png(rows[:length]))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", {**CODED, **RAW})
def test_an_application_that_lets_pillow_fill_files_gets_no_filled_frame(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = {**CODED, **RAW}[kind](photographs()[0])
    for share in (0.3, 0.7, 0.95):
        with pytest.raises(FrameError):
            Frame.read(data[: int(share * len(data))], 16)
        with pytest.raises((FrameError, OSError)):  # Pillow itself opens no file cut in its headers
            Frame.read(Image.open(io.BytesIO(data[: int(share * len(data))])), 16)
    if kind in ("JPEG", "PNG", "WebP"):
        Frame.read(data)


def png(body: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """64×64 pixels, whatever `body` holds."""
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    coded = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


def tiff_64(body: bytes, compression: int, *tags: tuple[int, int, int]) -> bytes:
    """64×64 grey pixels; tags: number, count of 32-bit values, value or its offset."""
    own = {256: 64, 257: 64, 258: 8, 259: compression, 262: 1, 277: 1}
    place = {322: (324, 325)}.get(tags[0][0], (273, 279)) if tags else (273, 279)
    entries = sorted(
        [*((tag, 1, value) for tag, value in own.items()), *tags, (place[0], 1, 0), (place[1], 1, len(body))]
    )
    start = 8 + 2 + 12 * len(entries) + 4
    entries = [(tag, count, start if tag == place[0] else value) for tag, count, value in entries]
    directory = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + body


def bombs() -> dict[str, bytes]:
    zeros = zlib.compress(bytes(100_000_000), 9)
    tiles = struct.pack(">HIIIIIIIIH", 0, 8000, 8000, 0, 0, 32, 32, 0, 0, 3) + b"\7\1\1" * 3
    page = struct.pack("<HHHIIHHIIHHII", 3, 254, 4, 1, 1, 256, 3, 1, 64, 257, 3, 1, 64)
    pages = b"".join(page + struct.pack("<I", 8 + (number + 1) * 42) for number in range(100_000))
    return {
        "iCCP": png(b"", (b"iCCP", b"x\0\0" + zeros)),
        "zTXt": png(b"", (b"zTXt", b"x\0\0" + zeros)),
        "iTXt": png(b"", (b"iTXt", b"x\0\1\0\0\0" + zeros)),
        "IDAT": png(zeros),
        "strip": tiff_64(zeros, 8),
        "tile": tiff_64(zeros, 8, (322, 1, 60_000), (323, 1, 60_000)),
        "tag": tiff_64(bytes(4096), 1, (40_000, 0x3FFFFFFF, 8)),
        "pages": b"II*\0" + struct.pack("<I", 8) + pages + bytes(6),
        "tiles of JPEG 2000": b"\xff\x4f\xff\x51" + struct.pack(">H", len(tiles) + 2) + tiles + bytes(64),
        "values as text": b"P2 64 64 1000\n" + b"7 " * 20_000_000,
    }


_MEASURE = """
import sys
from pathlib import Path
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.frame import Frame

def memory(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024

for path in sys.argv[1:2] + sys.argv[1:]:
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS:")
    try:
        size = Frame.read(data, 16).pixels.nbytes
    except FrameError:
        size = 0
    print(memory("VmHWM:") - before, len(data), size)
"""


def test_decoding_takes_ten_times_the_frame_and_six_times_the_file_at_most(tmp_path: Path) -> None:
    picture = photographs()[0].resize((1000, 750))
    hungry = ("JPEG, progressive", "JPEG, CMYK", "PNG, 16 bits", "WebP", "TIFF, LZW")  # by measuring them all
    files = {**{kind: CODED[kind](picture) for kind in hungry}, **bombs()}
    for number, data in enumerate(files.values()):
        (tmp_path / f"{number:03}").write_bytes(data)
    paths = sorted(map(str, tmp_path.iterdir()))
    run = subprocess.run([sys.executable, "-c", _MEASURE, *paths], capture_output=True, text=True, check=True)
    _warm_up, *lines = run.stdout.splitlines()
    for kind, line in zip(files, lines, strict=True):
        taken, length, size = map(int, line.split())
        assert taken <= 10 * size + 6 * length + (8 << 20), kind
        assert (size == picture.width * picture.height * 3) == (kind in hungry), kind
