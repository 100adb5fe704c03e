"""Ground-truth masks, as drawing tools and published data sets save them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps

from vmad_edge.runtime.decode import opened
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.files import open_file

SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
"""Where several files could be a frame's mask, the first of these is it."""
_DAMAGED = "damaged, cut off, or none of PNG, BMP, TIFF and JPEG"
_DARK = 128
"""A mask without a brighter value has numbers in it (of kinds, of parts), not white."""
_LEVELS = 16
"""More grey levels than that are not drawn, but left by JPEG or by a soft brush."""


def read_mask(path: Path, size: tuple[int, int], numbered: bool = False) -> tuple[NDArray[np.bool_], str | None]:
    """What is marked [h,w], and a sentence where that is in doubt.

    Marked is what is not black, in 1, 8 or 16 bits a channel. Of a palette the colours count, not their numbers; alpha
    marks nothing. Noise of JPEG beside its marks is told from them at half of the brightest value, and that is a doubt.

    Args:
        size: (height, width) of the frame, upright.
        numbered: a grey or palette file's values are numbers of kinds of defects: all but 0 are marked (VisA).

    Raises:
        FrameError: not readable, or of another size than the frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images: a mask is as large as its frame, or refused
            with open_file(path) as file, Image.open(file, formats=opened()) as image:
                levels = _levels(image, file, path, size, numbered)
    except (FrameError, MemoryError):
        raise
    except Exception as error:  # decoders raise many kinds on broken files, in words that say nothing to a user
        why = error.strerror if isinstance(error, OSError) and error.strerror else _DAMAGED
        raise FrameError(f"{path}: not a readable mask ({why})") from None
    if levels.dtype not in (np.uint8, np.uint16):
        levels = (levels != 0).astype(np.uint8)
    return _marked(levels, numbered)


def turned(path: Path) -> bool:
    """Whether a file's EXIF orientation turns or mirrors what is stored in it; False if it cannot be read."""
    try:
        with open_file(path) as file, Image.open(file, formats=opened()) as image:
            return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
    except Exception:  # decoders raise many kinds on broken files, and the frame's own reader says so
        return False


def _marked(levels: NDArray[np.uint8 | np.uint16], numbered: bool) -> tuple[NDArray[np.bool_], str | None]:
    depth = np.iinfo(levels.dtype).max + 1
    found = np.flatnonzero(cv2.calcHist([levels], [0], None, [depth], [0, depth]))
    found = found[found > 0]
    marked = levels > 0
    if not numbered and len(found) > 1:
        lowest, highest = int(found[0]), int(found[-1])
        if highest < _DARK:
            return marked, f"values from {lowest} to {highest}, none of them white: all are taken for marks"
        if len(found) > _LEVELS or lowest < highest / 8:
            doubt = f"{len(found)} values from {lowest} to {highest}, as JPEG leaves them: the brighter half is marked"
            return levels > highest / 2, doubt
    return marked, "it marks the whole frame" if marked.all() else None


def _levels(
    image: ImageFile.ImageFile, file: BinaryIO, path: Path, size: tuple[int, int], numbered: bool
) -> NDArray[Any]:
    """[h,w]: the brightest of a pixel's colours, or its number."""
    if sorted(image.size) != sorted(size):  # before anything large is decoded
        raise _wrong_size(image.size[::-1], size, path)
    if len(image.getbands()) > 1 and any(";16" in str(tile.args) for tile in image.tile):
        # Pillow keeps the high 8 bits of 16-bit colours, and a mark of 255 would be none.
        file.seek(0)
        colours = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        if colours is None:
            raise FrameError(f"{path}: not a readable mask ({_DAMAGED})")
        values = np.asarray(colours)
    else:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("LA", "La"):
            upright = upright.getchannel("L")
        elif len(upright.getbands()) > 1 or (upright.mode == "P" and not numbered):
            upright = upright.convert("RGB")
        values = np.asarray(upright)
    if values.shape[:2] != size:
        raise _wrong_size(values.shape[:2], size, path)
    return values[:, :, :3].max(axis=2) if values.ndim == 3 else values


def _wrong_size(found: tuple[int, ...], size: tuple[int, int], path: Path) -> FrameError:
    hint = "" if found != size[::-1] else "; it lies on its side: mark the frame as it is shown, turned by EXIF"
    return FrameError(f"{path}: expected a mask of {size[0]}×{size[1]} pixels, found {found[0]}×{found[1]}{hint}")
