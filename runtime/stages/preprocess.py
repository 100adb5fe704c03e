"""A frame as CLIP and SAM were trained to see it.

Pillow does the resizing because the models were trained behind it: transformers' CLIPImageProcessor (PIL) and
segment-anything's ResizeLongestSide are the oracles, and OpenCV's bicubic differs (it does not antialias).
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class View:
    """The rectangle of the frame, in frame pixels, that `clip_pixels` shows; beyond the frame where it was padded."""

    left: float
    top: float
    right: float
    bottom: float


def clip_pixels(frame: Frame, spec: ClipInput) -> tuple[NDArray[np.float32], View]:
    """`clip_pixels` [1,3,S_c,S_c], and what part of the frame it shows."""
    image = Image.fromarray(frame.pixels)
    width, height = image.size
    x0, y0 = 0, 0
    if spec.pad_to_square and width != height:
        side = max(width, height)
        x0, y0 = (side - width) // 2, (side - height) // 2
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in spec.mean))
        square.paste(image, (x0, y0))
        image, width, height = square, side, side
    new_width, new_height = spec.size, spec.size
    if spec.resize == "shortest_edge":
        if width <= height:
            new_height = int(spec.size * height / width)
        else:
            new_width = int(spec.size * width / height)
    left, top = (new_width - spec.size) // 2, (new_height - spec.size) // 2
    image = image.resize((new_width, new_height), _RESAMPLE[spec.resample])
    image = image.crop((left, top, left + spec.size, top + spec.size))
    scale_x, scale_y = width / new_width, height / new_height
    view = View(
        left * scale_x - x0,
        top * scale_y - y0,
        (left + spec.size) * scale_x - x0,
        (top + spec.size) * scale_y - y0,
    )
    # Rescaled in float64 and normalised in float32, as transformers does: equal to the last bit.
    scaled = (np.asarray(image).astype(np.float64) * spec.rescale_factor).astype(np.float32)
    return _normalise(scaled, spec.mean, spec.std), view


def sam_pixels(frame: Frame, spec: SamInput) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """`sam_pixels` [1,3,S_s,S_s], and the (height, width) in it that the frame covers."""
    height, width = frame.pixels.shape[:2]
    scale = spec.size / max(height, width)
    covered = (int(height * scale + 0.5), int(width * scale + 0.5))
    image = Image.fromarray(frame.pixels).resize(covered[::-1], Image.Resampling.BILINEAR)
    pixels = np.zeros((1, 3, spec.size, spec.size), np.float32)
    pixels[:, :, : covered[0], : covered[1]] = _normalise(np.asarray(image).astype(np.float32), spec.mean, spec.std)
    return pixels, covered


def _normalise(image: NDArray[np.float32], mean: Triple, std: Triple) -> NDArray[np.float32]:
    """[h,w,3] → [1,3,h,w]."""
    normal = (image - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])
