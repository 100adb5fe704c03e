"""One image from a camera or a file."""

from __future__ import annotations

import io
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vmad_edge.runtime.errors import FrameError

MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded."""
MIN_SIDE = 8
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Frame:
    """`pixels` [h,w,3] uint8 RGB, with where it came from and when (seconds since the epoch)."""

    pixels: NDArray[np.uint8]
    id: str
    path: str | None = None
    time: float = field(default_factory=time.time)

    @staticmethod
    def read(source: FrameSource, id: str | None = None) -> Frame:
        """From an array ([h,w], [h,w,1], [h,w,3] RGB or [h,w,4] RGBA, uint8), a path, or an encoded file's bytes.

        EXIF orientation is applied; grey, palette, CMYK and alpha images become RGB (alpha is dropped).

        Raises:
            FrameError: unreadable, too small, too large, animated, or not 8 bits deep.
        """
        if isinstance(source, Frame):
            return source
        if isinstance(source, np.ndarray):
            return Frame(_from_array(source), id or "array")
        if isinstance(source, bytes):
            return Frame(_decode(io.BytesIO(source), "the given bytes"), id or "bytes")
        path = os.fspath(source)
        return Frame(_decode(Path(path), path), id or path, path)


FrameSource = Frame | NDArray[Any] | bytes | str | os.PathLike[str]


def list_images(paths: list[str]) -> list[str]:
    """The given files as they are, and the image files of the given folders, recursively and sorted.

    Raises:
        FrameError: a path that does not exist, or nothing to inspect at all.
    """
    found: list[str] = []
    for path in paths:
        if not Path(path).exists():
            raise FrameError(f"{path} does not exist; expected an image file or a folder of images")
        if Path(path).is_dir():
            inside = (p for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found += sorted(map(str, inside))
        else:
            found.append(path)
    if not found:
        raise FrameError(f"no images in {', '.join(paths)}; looked for {', '.join(sorted(SUFFIXES))}")
    return found


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise FrameError(f"expected a uint8 array (values 0 to 255), got {array.dtype}; scale it to 8 bits first")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise FrameError(f"expected an array [h,w], [h,w,1], [h,w,3] RGB or [h,w,4] RGBA, got shape {array.shape}")
    _check_size(array.shape[1], array.shape[0], "the array")
    return np.ascontiguousarray(np.broadcast_to(array[:, :, :3], (*array.shape[:2], 3)))


def _decode(source: io.BytesIO | Path, name: str) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size is stricter
            with Image.open(source) as image:
                _check_size(*image.size, name)
                if (count := getattr(image, "n_frames", 1)) != 1:
                    raise FrameError(f"{name}: expected one image, found {count} (an animation or a stack)")
                if image.mode.startswith(("I", "F")):
                    raise FrameError(f"{name}: expected 8 bits a channel, found mode {image.mode}; convert it first")
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FrameError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise FrameError(f"{name}: not a readable image ({error or type(error).__name__})") from None


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise FrameError(f"{name}: {width}×{height} pixels; expected at least {MIN_SIDE}×{MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise FrameError(f"{name}: {width}×{height} pixels; expected at most {MAX_PIXELS:,} in all")
