from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from vmad_edge.runtime.stages.segmentation import mask_logits


@pytest.mark.parametrize(
    "height,width",
    [(64, 64), (48, 64), (200, 300), (300, 200), (30, 20), (64, 7)],  # as large, wider, larger, taller, smaller, thin
)
def test_equals_segment_anythings_postprocessing(height: int, width: int) -> None:
    """`Sam.postprocess_masks`: bilinear to S_s², crop, bilinear to the frame, all with align_corners=False."""
    size = 64
    low = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    scale = size / max(height, width)
    covered = int(height * scale + 0.5), int(width * scale + 0.5)
    full = interpolate(torch.from_numpy(low)[None, None], (size, size), mode="bilinear", align_corners=False)
    full = full[..., : covered[0], : covered[1]]
    expected = interpolate(full, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(mask_logits(low, covered, size, (height, width)), expected, atol=2e-5)
