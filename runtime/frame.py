"""One image from a camera or a file."""

from __future__ import annotations

import hashlib
import io
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypedDict, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.decode import MAX_PIXELS, check_size, decode, from_image, in_rgb, to_8_bits
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.files import open_file

Colour = Literal["rgb", "bgr"]
MAX_BYTES = 8 * MAX_PIXELS
"""Of an encoded image: 16-bit RGBA of as many pixels."""
_PART = 1 << 24
"""Bytes that a file object is asked for at once: Python takes the memory before it knows how much there is."""


@dataclass(frozen=True)
class Frame:
    """`pixels` [h,w,3] uint8 RGB, with where it came from and when (seconds since the epoch).

    `Frame(…)` takes the array as it is: nobody may write to it afterwards. `Frame.read` copies.

    Raises:
        TypeError: pixels that are no array.
        FrameError: pixels of another shape or dtype.
    """

    pixels: NDArray[np.uint8]
    id: str
    path: str | None = None
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, np.ndarray):
            raise TypeError(f"pixels: expected a NumPy array, got {type(self.pixels).__qualname__}; see Frame.read")
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise FrameError(f"expected pixels [h,w,3] of uint8, got {self.pixels.shape} of {self.pixels.dtype}")

    @staticmethod
    def read(source: FrameSource, bit_depth: int | None = None, colour: Colour = "rgb") -> Frame:
        """From pixels or an encoded image; the frame has its own copy.

        EXIF orientation is applied; grey, palette, CMYK and alpha images become RGB (alpha is dropped). Of a camera's
        JPEG or TIFF with previews the primary picture is taken.

        Args:
            source: an array ([h,w], [h,w,1], [h,w,3] or [h,w,4] with alpha; uint8 or uint16), a PIL image, a path, an
                encoded file's bytes (or bytearray, memoryview), or a binary file object, read from where it stands.
            bit_depth: of uint16 arrays and 16-bit files, 9 to 16: how many bits their values use (a 12-bit camera's
                values reach 4095). Their high 8 bits are kept. Never guessed; not needed where the file says it
                (packed TIFF, PGM and PPM with a maximum below 65535), and then it must agree. Of no meaning for 8 bits.
            colour: "bgr" if the channels are in OpenCV's order, in an array or in what was written to the file.

        Raises:
            TypeError: none of these sources.
            FrameError: unreadable, not whole, too small, too large, too thin, animated; 16-bit without a fitting
                `bit_depth`; an array of another shape or dtype.
        """
        check_source(source, bit_depth, colour)
        if isinstance(source, Frame):
            check_size(source.pixels.shape[1], source.pixels.shape[0], source.id)
            return source
        id, path = "array", None
        if isinstance(source, np.ndarray):
            pixels = _from_array(source, bit_depth)
        elif isinstance(source, Image.Image):
            id = str(getattr(source, "filename", "")) or "image"
            pixels = from_image(source, id, bit_depth)
        elif isinstance(source, bytes | bytearray | memoryview):
            id = "bytes"
            pixels = decode(bytes(source), "the given bytes", bit_depth)
        elif isinstance(source, str | os.PathLike):
            id = path = os.fsdecode(source)
            pixels = decode(_bytes_of(path), path, bit_depth)
        else:
            id = name if isinstance(name := getattr(source, "name", None), str) else "file"
            pixels = decode(_read(source, id), id, bit_depth)
        if colour == "bgr":
            pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
        return Frame(pixels, id, path)

    @property
    def pixel_hash(self) -> str:
        """Hex SHA-256 of size and pixels: the same for the same image, whatever its file is called."""
        return hashlib.sha256(f"{self.pixels.shape}".encode() + self.pixels.tobytes()).hexdigest()


FrameSource = Frame | NDArray[Any] | Image.Image | bytes | bytearray | memoryview | str | os.PathLike[str] | IO[bytes]


class Reading(TypedDict):
    """The options of `Frame.read`, to be passed along: `Frame.read(source, **reading)`."""

    bit_depth: int | None
    colour: Colour


AS_STORED: Reading = {"bit_depth": None, "colour": "rgb"}


def check_source(source: FrameSource, bit_depth: int | None, colour: Colour) -> None:
    """Raises what is wrong with the call and not with the frame.

    Raises:
        TypeError: no source of frames, or a `bit_depth` that is no number.
        FrameError: an array of another shape or dtype than `Frame.read` takes, or of uint16 without its `bit_depth`;
            a `bit_depth` or `colour` that there is not.
    """
    if bit_depth is not None and type(bit_depth) is not int:
        raise TypeError(f"bit_depth: expected an int or None, got {type(bit_depth).__name__}")
    if bit_depth is not None and not 9 <= bit_depth <= 16:
        raise FrameError(f"bit_depth: expected 9 to 16 for 16-bit values, got {bit_depth}")
    if colour not in get_args(Colour):
        raise FrameError(f"colour: expected rgb or bgr, got {colour!r}")
    if isinstance(source, np.ndarray):
        _check_array(source, bit_depth)
    elif not isinstance(source, Frame | Image.Image | bytes | bytearray | memoryview | str | os.PathLike):
        _check_file(source)


def _check_file(source: object) -> None:
    if not (hasattr(source, "read") and hasattr(source, "closed")):  # OpenCV's VideoCapture can `read` too
        raise TypeError(
            "expected a NumPy array, a PIL image, a path, an encoded image's bytes, a binary file or a Frame, "
            f"got {type(source).__module__}.{type(source).__qualname__}"
        )
    if source.closed or isinstance(source, io.TextIOBase):
        raise TypeError(f"expected a binary file, got {'a closed one' if source.closed else 'one opened as text'}")


def _check_array(array: NDArray[Any], bit_depth: int | None) -> None:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise FrameError(f"expected an array [h,w], [h,w,1], [h,w,3] RGB or [h,w,4] RGBA, got shape {array.shape}")
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise FrameError(f"expected an array of uint8, or of uint16 with its bit_depth, got {array.dtype}")
    if array.dtype.itemsize == 2 and bit_depth is None:
        raise FrameError("the array: 16-bit values; say how many of the bits they use (bit_depth 10, 12, 16, …)")


def _from_array(array: NDArray[Any], bit_depth: int | None) -> NDArray[np.uint8]:
    check_size(array.shape[1], array.shape[0], "the array")
    return in_rgb(array if array.dtype == np.uint8 else to_8_bits(array.astype(np.uint16), bit_depth, "the array"))


def _read(file: IO[bytes], name: str) -> bytes:
    data = bytearray()
    part: object = True
    while part and len(data) <= MAX_BYTES:
        try:
            part = file.read(_PART)
        except OSError as error:
            raise FrameError(f"{name}: cannot be read ({error.strerror or type(error).__name__})") from None
        if not isinstance(part, bytes):
            raise TypeError(f"{name}: expected a file opened in binary mode, got {type(part).__name__} of its read()")
        data += part
    if len(data) > MAX_BYTES:
        raise FrameError(f"{name}: expected at most {MAX_BYTES:,} bytes, found more")
    return bytes(data)


def _bytes_of(path: str) -> bytes:
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise FrameError(f"{path}: {size:,} bytes; expected at most {MAX_BYTES:,}")
            data = file.read(size + 1)
    except ValueError:  # NUL, or half a character
        raise FrameError(f"{path!r}: cannot be read (no file can have this name)") from None
    except OSError as error:
        raise FrameError(f"{path}: cannot be read ({_why(path, error)})") from None
    if len(data) != size:
        raise FrameError(f"{path}: cannot be read (its length changed meanwhile: it is being written)")
    return data


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
