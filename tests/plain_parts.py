"""Frames for tests that need no object: a plain part on a plain ground, and a camera's noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def plain_part(rng: np.random.Generator, deviation: float, height: int, width: int) -> NDArray[Any]:
    """[h,w,3] of about 80 (the part, its middle half) and 160, neither rounded nor clipped."""
    frame = np.full((height, width, 3), 160.0)
    frame[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 80
    return frame + rng.normal(0, deviation, frame.shape)
