"""SAM's encoder on a GPU: a frame goes up, `image_embeddings` come back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels import cuda
from vmad_edge.runtime.bundle import SamInput
from vmad_edge.runtime.engines import DeviceEngine
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess_cuda import CudaPreprocess


class CudaSamEncoder:
    """`sam_pixels` are made on the device too. In a thread of its own its stream runs beside the language model's.

    Args:
        encoder: the bundle's sam_encoder.

    Raises:
        VmadError: no memory left.
        RuntimeError: no CUDA kernels in this build, or none that this GPU can run.
    """

    def __init__(self, encoder: DeviceEngine, spec: SamInput) -> None:
        self._encoder, self._spec = encoder, spec
        self._size: tuple[int, ...] | None = None
        encoder.thread.call(self._open)

    def run(self, frame: Frame) -> NDArray[np.float32]:
        """`image_embeddings` [1,256,S_s/16,S_s/16] of a frame."""
        return self._encoder.thread.call(self._run, frame)

    def _open(self) -> None:
        self._device = self._encoder.thread.device
        self._pixels = self._device.zeros((1, 3, self._spec.size, self._spec.size), np.float32)
        self._inputs = {"sam_pixels": self._pixels}
        self._outputs = self._encoder.outputs(self._inputs)
        cuda.try_kernels(self._device)

    def _run(self, frame: Frame) -> NDArray[np.float32]:
        if frame.pixels.shape != self._size:
            height, width, _ = frame.pixels.shape
            self._frame = self._device.zeros(frame.pixels.shape, np.uint8)
            self._preprocess = CudaPreprocess.sam(self._device, "rgb8", height, width, self._spec, self._pixels)
            self._size = frame.pixels.shape
        self._device.write(self._frame, frame.pixels)
        self._preprocess.queue(self._frame)
        self._encoder.queue(self._inputs, self._outputs)
        return self._device.download(self._outputs["image_embeddings"])
