"""One image from a camera or a file."""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from vmad_edge.runtime.errors import FrameError

MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded."""
MIN_SIDE = 8
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of what is read; of these its build may lack AVIF."""


@dataclass(frozen=True)
class Frame:
    """`pixels` [h,w,3] uint8 RGB, with where it came from and when (seconds since the epoch)."""

    pixels: NDArray[np.uint8]
    id: str
    path: str | None = None
    time: float = field(default_factory=time.time)

    @staticmethod
    def read(source: FrameSource, bit_depth: int | None = None) -> Frame:
        """From an array ([h,w], [h,w,1], [h,w,3] RGB or [h,w,4] RGBA), a path, or an encoded file's bytes.

        EXIF orientation is applied; grey, palette, CMYK and alpha images become RGB (alpha is dropped).

        Args:
            bit_depth: of uint16 arrays and 16-bit files, 9 to 16: how many bits their values use (a 12-bit camera's
                values reach 4095). Their high 8 bits are kept. Never guessed.

        Raises:
            FrameError: unreadable, too small, too large, animated; 16-bit without a fitting `bit_depth`.
        """
        if isinstance(source, Frame):
            return source
        if isinstance(source, np.ndarray):
            return Frame(_from_array(source, bit_depth), "array")
        if isinstance(source, bytes):
            return Frame(_decode(source, "the given bytes", bit_depth), "bytes")
        path = os.fspath(source)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise FrameError(f"{path}: cannot be read ({_why(path, error)})") from None
        return Frame(_decode(data, path, bit_depth), path, path)

    @property
    def pixel_hash(self) -> str:
        """Hex SHA-256 of size and pixels: the same for the same image, whatever its file is called."""
        return hashlib.sha256(f"{self.pixels.shape}".encode() + self.pixels.tobytes()).hexdigest()


FrameSource = Frame | NDArray[Any] | bytes | str | os.PathLike[str]


def _why(path: str, error: OSError) -> str:
    """Why a path could not be read, also one that is a link to nothing or a folder that may not be listed."""
    try:
        if Path(path).is_dir():
            next(Path(path).iterdir(), None)
            return "a folder"
        if Path(path).is_symlink():
            return f"a link to {Path(path).readlink()}: {error.strerror}"
    except OSError as closer:
        return f"a folder that cannot be listed: {closer.strerror}"
    return error.strerror or type(error).__name__


def _from_array(array: NDArray[Any], bit_depth: int | None) -> NDArray[np.uint8]:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise FrameError(f"expected an array [h,w], [h,w,1], [h,w,3] RGB or [h,w,4] RGBA, got shape {array.shape}")
    _check_size(array.shape[1], array.shape[0], "the array")
    if array.dtype == np.uint16:
        array = _to_8_bits(array, bit_depth, "the array")
    if array.dtype != np.uint8:
        raise FrameError(f"expected an array of uint8, or of uint16 with its bit_depth, got {array.dtype}")
    return np.ascontiguousarray(np.broadcast_to(array[:, :, :3], (*array.shape[:2], 3)))


def _decode(data: bytes, name: str, bit_depth: int | None) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: of size, where _check_size is stricter, and of odd metadata
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size, name)
                if (count := getattr(image, "n_frames", 1)) != 1:
                    raise FrameError(f"{name}: expected one image, found {count} (an animation or a stack)")
                if image.mode == "F" or (image.mode == "I" and not _is_16_bit(image)):
                    raise FrameError(f"{name}: expected 8 or 16 bits a channel, found 32; convert it first")
                if not _is_16_bit(image):
                    return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        # Pillow halves 16-bit colour by itself and has no mode for it; OpenCV keeps the values.
        deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        if deep is None or deep.dtype != np.uint16:
            raise FrameError(f"{name}: not a readable 16-bit image")
        return np.ascontiguousarray(_to_8_bits(np.asarray(deep, np.uint16), bit_depth, name)[:, :, ::-1])
    except FrameError:
        raise
    except Exception as error:  # decoders raise many kinds on broken files
        raise FrameError(f"{name}: not a readable image ({error or type(error).__name__})") from None


def _is_16_bit(image: ImageFile.ImageFile) -> bool:
    """Whether the file holds 16 bits a channel, whatever mode Pillow would turn them into ("RGB;16B", "I;16B")."""
    return image.mode.startswith("I;16") or any(";16" in str(tile.args) for tile in image.tile)


def _to_8_bits(values: NDArray[np.uint16], bit_depth: int | None, name: str) -> NDArray[np.uint8]:
    if bit_depth is None:
        raise FrameError(f"{name}: 16-bit values; say how many of the bits they use (bit_depth 10, 12, 16, …)")
    if not 9 <= bit_depth <= 16:
        raise FrameError(f"bit_depth: expected 9 to 16 for 16-bit values, got {bit_depth}")
    if (highest := int(values.max())) >= 1 << bit_depth:
        raise FrameError(f"{name}: a value of {highest} does not fit the given bit_depth of {bit_depth}")
    return (values >> (bit_depth - 8)).astype(np.uint8)


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise FrameError(f"{name}: {width}×{height} pixels; expected at least {MIN_SIDE}×{MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise FrameError(f"{name}: {width}×{height} pixels; expected at most {MAX_PIXELS:,} in all")
