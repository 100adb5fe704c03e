"""similarity.py on a GPU: patches there become patch scores and an anomaly map there."""

from __future__ import annotations

import numpy as np

from vmad_edge.kernels import ReferenceBank, cuda
from vmad_edge.runtime.bundle import Similarity
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.similarity import NormalFeatures, References


class CudaSimilarity:
    """A similarity source on the device, for N patches a frame; `queue` allocates nothing, so that a graph can capture
    it. Rows are kept as float16 there, int8 ones as int8: a cosine may be 1e-3 off (int8: 1e-2).

    Attributes:
        score: [N] float32, as `source.compare` has it.
        counted: [N] float32, the score of the patches that count (see `cuda.patch_scores`).
        nearest: of `source.compare`'s similarity and index.

    Raises:
        VmadError: no memory left.
        RuntimeError: no CUDA kernels in this build, or CUDA refuses.
    """

    def __init__(self, source: NormalFeatures | References, memory: cuda.Memory, patches: int) -> None:
        self._stream = memory.stream
        self.score, self.counted = (memory.zeros((patches,), np.float32) for _ in range(2))
        features = source if isinstance(source, NormalFeatures) else source.beside
        self.nearest = Nearest(source.bank if isinstance(source, References) else source.normal, memory, patches)
        self._nearest = [self.nearest]
        self._contrast: tuple[Nearest, Nearest] | None = None
        self._temperature, self._weights = 1.0, (1.0, 1.0)
        if features is not None and features.abnormal is not None:
            normal = self.nearest if features is source else Nearest(features.normal, memory, patches)
            self._contrast = normal, Nearest(features.abnormal, memory, patches)
            self._nearest = list(dict.fromkeys([self.nearest, *self._contrast]))
            self._temperature = features.spec.temperature
            if features is not source:
                weight, gain = features.spec.reference_weight, features.spec.reference_gain
                self._weights = 1 - weight, weight * gain

    def update(self) -> bool:
        """Follows the source's banks; True where what was captured must be captured again."""
        return True in [nearest.bank.update() for nearest in self._nearest]

    def queue(self, patches: cuda.DeviceArray, counts: cuda.DeviceArray) -> None:
        """Fills `score`, `counted` and `nearest` from `patches` [N,D]; `counts` [N] uint8."""
        for nearest in self._nearest:
            nearest.queue(patches)
        alone = self._contrast is not None and self._contrast[0] is self.nearest  # the bundle's features alone
        cuda.patch_scores(
            *(self.score, self.counted, counts),
            nearest=None if alone else self.nearest.similarity,
            contrast=self._contrast and (self._contrast[0].similarity, self._contrast[1].similarity),
            temperature=self._temperature,
            contrast_weight=self._weights[0],
            distance_weight=self._weights[1],
            stream=self._stream,
        )


class Nearest:
    """`similarity` [N] float32 and `index` [N] int64 (in `bank.device`) of each patch's nearest row in a bank."""

    def __init__(self, bank: ReferenceBank, memory: cuda.Memory, patches: int) -> None:
        self._stream = memory.stream
        self.bank = cuda.MirroredBank(bank, memory)
        self.similarity, self.index = memory.zeros((patches,), np.float32), memory.zeros((patches,), np.int64)
        # Enough for any bank: what rank 1 needs does not depend on its rows.
        self._workspace = memory.zeros((cuda.max_cosine_workspace(patches, self.bank.device),), np.uint8)

    def queue(self, patches: cuda.DeviceArray) -> None:
        """From `patches` [N,D]."""
        outputs = self.similarity, self.index, self._workspace
        cuda.max_cosine(patches, self.bank.device, *outputs, stream=self._stream)


class CudaMap:
    """`map` [h,w] float32 in a frame's pixels, as `anomaly_map` has it, and the frame's score, from patch scores."""

    def __init__(
        self, memory: cuda.Memory, grid: int, view: View, spec: Similarity, clip_size: int, frame_size: tuple[int, int]
    ) -> None:
        self._stream, self._grid = memory.stream, grid
        height, width = frame_size
        # Pixel centres of the frame, in pixels of `clip_pixels`.
        y = (np.arange(height) + 0.5 - view.top) * (clip_size / (view.bottom - view.top)) - 0.5
        x = (np.arange(width) + 0.5 - view.left) * (clip_size / (view.right - view.left)) - 0.5
        self._y, self._x = (
            cuda.map_axis(grid, clip_size, spec.smoothing_sigma, positions).on_device(memory.upload)
            for positions in (y, x)
        )
        self.map = memory.zeros(frame_size, np.float32)
        self.largest = memory.zeros((2,), np.float32)
        """[2]: the largest score that counts, and the mean of the top 1% of them."""
        self._workspace = memory.zeros((cuda.top_mean_workspace(grid * grid),), np.uint8)

    def queue(self, similarity: CudaSimilarity) -> None:
        """From its scores."""
        scores = cuda.view(similarity.score, (self._grid, self._grid))
        cuda.anomaly_map(scores, self._y, self._x, self.map, stream=self._stream)
        cuda.top_mean(similarity.counted, self.largest, self._workspace, stream=self._stream)
