"""preprocess.py on a GPU: a camera's bytes there become `clip_pixels` and `sam_pixels` there, in the same geometry."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels import cuda
from vmad_edge.runtime.bundle import ClipInput, SamInput
from vmad_edge.runtime.stages.preprocess import (
    clip_geometry,
    clip_values,
    padding_colour,
    sam_covered,
    sam_values,
)


class CudaPreprocess:
    """Prepared for frames of one size and kind; `queue` allocates nothing, so that a graph can capture it.

    Args:
        x, y: of the padded frame's axes, cropped.
        values: [3,256] float32, what each byte of each colour becomes.
        pixels: [1,3,S,S] float32, what `queue` fills.
    """

    def __init__(
        self,
        device: cuda.Memory,
        kind: cuda.Kind,
        y: cuda.Axis,
        x: cuda.Axis,
        values: NDArray[np.float32],
        pixels: cuda.DeviceArray,
        place: tuple[int, int] = (0, 0),
        colour: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self._device, self._kind, self._place, self._colour = device, kind, place, colour
        self._y, self._x = y.on_device(device.upload), x.on_device(device.upload)
        self._values = device.upload(values)
        self._workspace = device.zeros((cuda.preprocess_workspace(self._x, self._y),), np.uint8)
        self._pixels = pixels

    @staticmethod
    def clip(
        device: cuda.Memory, kind: cuda.Kind, height: int, width: int, spec: ClipInput, pixels: cuda.DeviceArray
    ) -> CudaPreprocess:
        """To `clip_pixels` [1,3,S_c,S_c]. The part of the frame that they show is `clip_geometry`'s view."""
        found = clip_geometry(height, width, spec)
        y, x = (
            cuda.resize_axis(length, resized, spec.resample, start, start + spec.size)
            for length, resized, start in zip(found.canvas, found.resized, found.crop, strict=True)
        )
        colour = padding_colour(spec)
        return CudaPreprocess(device, kind, y, x, clip_values(spec), pixels, found.place, colour)

    @staticmethod
    def sam(
        device: cuda.Memory, kind: cuda.Kind, height: int, width: int, spec: SamInput, pixels: cuda.DeviceArray
    ) -> CudaPreprocess:
        """To `sam_pixels` [1,3,S_s,S_s], of which the frame covers `sam_covered`."""
        y, x = (
            cuda.resize_axis(length, covered, "bilinear")
            for length, covered in zip((height, width), sam_covered(height, width, spec), strict=True)
        )
        return CudaPreprocess(device, kind, y, x, sam_values(spec), pixels)

    def queue(self, frame: cuda.DeviceArray) -> None:
        """Fills the pixels from `frame`, uint8 [h,w] or [h,w,3] as its kind has it, on the device's stream."""
        top, left = self._place
        cuda.preprocess(
            *(frame, self._kind, self._x, self._y, self._values, self._pixels, self._workspace),
            top=top,
            left=left,
            colour=self._colour,
            stream=self._device.stream,
        )
