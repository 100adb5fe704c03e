"""SAM's mask decoder output → a mask in the frame's pixels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def mask_logits(
    low_res_mask: NDArray[np.float32], covered: tuple[int, int], size: int, frame_size: tuple[int, int]
) -> NDArray[np.float32]:
    """`low_res_masks[i,0]` [S_s/4,S_s/4] → logits [h,w] in the frame's pixels; the mask is logit > 0.

    Bilinear to S_s², cut to the part that the frame covers, bilinear to the frame (segment-anything's
    `postprocess_masks`, align_corners=False).

    Args:
        covered: (height, width) from `sam_pixels`.
        size: S_s.
        frame_size: (height, width) of the frame.
    """
    full = cv2.resize(low_res_mask, (size, size), interpolation=cv2.INTER_LINEAR)
    full = np.ascontiguousarray(full[: covered[0], : covered[1]])
    return np.asarray(cv2.resize(full, frame_size[::-1], interpolation=cv2.INTER_LINEAR), np.float32)
