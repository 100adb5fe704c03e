"""A frame as CLIP and SAM were trained to see it.

Pillow does the resizing because the models were trained behind it: transformers' CLIPImageProcessor (PIL) and
segment-anything's ResizeLongestSide are the oracles, and OpenCV's bicubic differs (it does not antialias).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.bundle import ClipInput, SamInput, Triple
from vmad_edge.runtime.frame import Frame

_RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_BAND = 1 << 22
"""Pixels of a padded frame that are there at a time."""


@dataclass(frozen=True)
class View:
    """The rectangle of the frame, in frame pixels, that `clip_pixels` shows; beyond the frame where it was padded."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class ClipGeometry:
    """How frames of one size become `clip_pixels`. All pairs are vertical, horizontal, in pixels."""

    canvas: tuple[int, int]
    """The frame, padded."""
    place: tuple[int, int]
    """Where the frame lies on it."""
    resized: tuple[int, int]
    """The canvas, resized."""
    crop: tuple[int, int]
    """Where `clip_pixels` begins in that."""
    view: View


def clip_geometry(height: int, width: int, spec: ClipInput) -> ClipGeometry:
    """Of frames of `height` × `width`."""
    y0, x0 = 0, 0
    if spec.pad_to_square:
        side = max(width, height)
        y0, x0 = (side - height) // 2, (side - width) // 2
        height, width = side, side
    new_height, new_width = spec.size, spec.size
    if spec.resize == "shortest_edge":
        if width <= height:
            new_height = int(spec.size * height / width)
        else:
            new_width = int(spec.size * width / height)
    top, left = (new_height - spec.size) // 2, (new_width - spec.size) // 2
    scale_y, scale_x = height / new_height, width / new_width
    view = View(
        left * scale_x - x0,
        top * scale_y - y0,
        (left + spec.size) * scale_x - x0,
        (top + spec.size) * scale_y - y0,
    )
    return ClipGeometry((height, width), (y0, x0), (new_height, new_width), (top, left), view)


def padding_colour(spec: ClipInput) -> tuple[int, int, int]:
    """Of the canvas around a padded frame: the mean, as LLaVA has it."""
    red, green, blue = (int(value * 255) for value in spec.mean)
    return red, green, blue


def clip_pixels(frame: Frame, spec: ClipInput) -> tuple[NDArray[np.float32], View]:
    """`clip_pixels` [1,3,S_c,S_c], and what part of the frame it shows."""
    image = Image.fromarray(frame.pixels)
    geometry = clip_geometry(image.height, image.width, spec)
    if geometry.canvas != (image.height, image.width):
        image = _across(image, geometry, spec)
    image = image.resize(geometry.resized[::-1], _RESAMPLE[spec.resample])
    top, left = geometry.crop
    image = image.crop((left, top, left + spec.size, top + spec.size))
    pixels = np.empty((1, 3, spec.size, spec.size), np.float32)
    _look_up(np.asarray(image), clip_values(spec), pixels)
    return pixels, geometry.view


def _across(image: Image.Image, geometry: ClipGeometry, spec: ClipInput) -> Image.Image:
    """The padded frame, resized to its final width, as Pillow's first pass does it: row by row.

    The canvas is never there as a whole: it may be a hundred times as large as the frame.
    """
    (height, width), (top, left), colour = geometry.canvas, geometry.place, padding_colour(spec)
    across = Image.new("RGB", (geometry.resized[1], height), colour)
    rows = max(1, _BAND // width)
    for start in range(0, image.height, rows):
        piece = image.crop((0, start, image.width, min(start + rows, image.height)))
        band = Image.new("RGB", (width, piece.height), colour)
        band.paste(piece, (left, 0))
        across.paste(band.resize((across.width, piece.height), _RESAMPLE[spec.resample]), (0, top + start))
    return across


def sam_covered(height: int, width: int, spec: SamInput) -> tuple[int, int]:
    """The (height, width) in `sam_pixels` that frames of `height` × `width` cover."""
    scale = spec.size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def sam_pixels(frame: Frame, spec: SamInput) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """`sam_pixels` [1,3,S_s,S_s], and the (height, width) in it that the frame covers."""
    covered = sam_covered(frame.pixels.shape[0], frame.pixels.shape[1], spec)
    image = Image.fromarray(frame.pixels).resize(covered[::-1], Image.Resampling.BILINEAR)
    pixels = np.zeros((1, 3, spec.size, spec.size), np.float32)
    _look_up(np.asarray(image), sam_values(spec), pixels[:, :, : covered[0], : covered[1]])
    return pixels, covered


@cache
def clip_values(spec: ClipInput) -> NDArray[np.float32]:
    """[3,256]: what each byte of each colour becomes in `clip_pixels`.

    Rescaled in float64 and normalised in float32, as transformers does: equal to the last bit.
    """
    return _normalised((_BYTES * spec.rescale_factor).astype(np.float32), spec.mean, spec.std)


@cache
def sam_values(spec: SamInput) -> NDArray[np.float32]:
    """[3,256]: what each byte of each colour becomes in `sam_pixels`."""
    return _normalised(_BYTES.astype(np.float32), spec.mean, spec.std)


_BYTES = np.arange(256, dtype=np.float64)


def _normalised(values: NDArray[np.float32], mean: Triple, std: Triple) -> NDArray[np.float32]:
    """[256] → [3,256]."""
    return (values - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def _look_up(image: NDArray[np.uint8], values: NDArray[np.float32], pixels: NDArray[np.float32]) -> None:
    """[h,w,3] → `pixels` [1,3,h,w], by `values` [3,256]."""
    for colour, plane in enumerate(pixels[0]):
        np.take(values[colour], image[:, :, colour], out=plane, mode="clip")  # a byte is never out of range
