"""What surrounds the patch similarity on CUDA: a camera's bytes to a model's pixels, patch scores to a map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels.cuda.library import (
    WORKSPACE_ZEROS,
    DeviceArray,
    call,
    describe,
    library,
    pointer,
    workspace_pointer,
)

Kind = Literal["mono8", "rgb8", "bgr8", "bayer_rg8"]
_KINDS = {"mono8": 0, "rgb8": 1, "bgr8": 2, "bayer_rg8": 3}
Filter = Literal["bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Axis:
    """One axis of a linear operator with a band of weights: output i is Σₜ weights[i,t] · input[first[i] + t].

    `first` [n] int32, `weights` [n,taps] int32 (in 2⁻²²) or float32.
    """

    first: NDArray[np.int32]
    weights: NDArray[Any]

    def on_device(self, upload: Callable[[NDArray[Any]], DeviceArray]) -> DeviceAxis:
        """`upload` copies an array to the device."""
        first, end = int(self.first.min()), int(self.first.max()) + self.weights.shape[1]
        return DeviceAxis(upload(self.first), upload(self.weights), (first, end))


@dataclass(frozen=True)
class DeviceAxis:
    first: DeviceArray
    weights: DeviceArray
    span: tuple[int, int]
    """The inputs that it reads: from, to."""

    def pointers(self, name: str, kind: str) -> tuple[int, int, int, int]:
        """Of `first` and `weights`, the number of outputs, the taps."""
        (count, taps), _ = describe(f"{name}.weights", self.weights, 2, kind)
        first = pointer(f"{name}.first", self.first, (count,), "<i4")
        return first, pointer(f"{name}.weights", self.weights, (count, taps), kind), count, taps


def resize_axis(length: int, resized: int, filter: Filter, start: int = 0, stop: int | None = None) -> Axis:
    """Outputs start…stop of `length` pixels resized to `resized`, in the fixed-point weights of Pillow's resize.

    The filters widen with the step where pixels become fewer (antialiasing), as Pillow's do.
    """
    reach, shape = _FILTERS[filter]
    step = length / resized
    stretch = max(step, 1.0)
    centre = (np.arange(start, resized if stop is None else stop) + 0.5) * step
    first = np.maximum((centre - reach * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach * stretch + 0.5).astype(np.int64), length)
    place = first[:, None] + np.arange((end - first).max())
    weights = shape(np.abs((place - centre[:, None] + 0.5) * (1 / stretch)))
    weights[place >= end[:, None]] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # one after the other, as Pillow sums them
    return Axis(first.astype(np.int32), np.trunc(weights * (1 << 22) + np.copysign(0.5, weights)).astype(np.int32))


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = −1/2, x ≥ 0."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((x - 5) * x + 8) * x - 4
    return np.where(x < 1, near, np.where(x < 2, -0.5 * far, 0.0))


_FILTERS: dict[Filter, tuple[float, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "bilinear": (1.0, lambda x: np.maximum(1 - x, 0)),
    "bicubic": (2.0, _cubic),
    "lanczos": (3.0, lambda x: np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)),
}


def preprocess_workspace(x: DeviceAxis, y: DeviceAxis) -> int:
    """Bytes that `preprocess` needs as its workspace."""
    (columns,), _ = describe("x.first", x.first, 1, "<i4")
    return WORKSPACE_ZEROS + 3 * (y.span[1] - y.span[0]) * columns


def preprocess(
    frame: DeviceArray,
    kind: Kind,
    x: DeviceAxis,
    y: DeviceAxis,
    values: DeviceArray,
    pixels: DeviceArray,
    workspace: DeviceArray,
    *,
    top: int = 0,
    left: int = 0,
    colour: tuple[int, int, int] = (0, 0, 0),
    stream: int = 0,
) -> None:
    """A frame's bytes → decoded, padded, resized, cropped, normalised.

    To the last bit as Pillow resizes along x and then along y. Pillow itself takes y first for some frames taller than
    wide since its version 13: then bytes differ by the rounding between the two, and by what bicubic overshoots.

    Args:
        frame: [h,w,3] uint8 (rgb8, bgr8) or [h,w] (mono8; bayer_rg8, whose first row is red, green, red, …; colours
            that a pixel lacks are the mean of its nearest).
        x, y: of `resize_axis`, over a canvas on which the frame lies at (`top`, `left`) and which is `colour` (red,
            green, blue) elsewhere; cropped where they leave outputs out.
        values: [3,256] float32, what each byte of each colour becomes.
        pixels: [1,3,H,W] float32, written; 0 below and right of what x and y give.
        workspace: [bytes] uint8, at least `preprocess_workspace(x, y)`.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    shape, _ = describe("frame", frame, 3 if kind in ("rgb8", "bgr8") else 2, "|u1")
    if shape[2:] not in ((), (3,)) or min(shape[:2]) < 3:
        raise ValueError(f"frame: expected {kind} of at least 3 × 3 pixels, got shape {list(shape)}")
    source = pointer("frame", frame, shape, "|u1")
    columns, rows = x.pointers("x", "<i4"), y.pointers("y", "<i4")
    (_, _, height, width), _ = describe("pixels", pixels, 4, "<f4")
    if height < rows[2] or width < columns[2]:
        raise ValueError(f"pixels: expected room for {rows[2]} × {columns[2]}, got {height} × {width}")
    target = pointer("pixels", pixels, (1, 3, height, width), "<f4")
    table = pointer("values", values, (3, 256), "<f4")
    space = workspace_pointer(workspace, preprocess_workspace(x, y)) + WORKSPACE_ZEROS
    origin = source, _KINDS[kind], *shape[:2], top, left, bytes(colour)
    read = y.span[0], y.span[1] - y.span[0]
    call("vmad_preprocess", *origin, *columns, *rows, *read, table, space, target, height, width, stream)


def map_axis(grid: int, fine: int, sigma: float, positions: NDArray[np.floating[Any]]) -> Axis:
    """One axis of the anomaly map: `grid` patches, enlarged to `fine` pixels (bilinear), smoothed, read at `positions`.

    Args:
        sigma: of the Gaussian, in fine pixels; 0 for none. Cut off at 4σ; the edge repeats.
        positions: [n] in fine pixels, 0 the first one's centre. Where they leave the fine pixels, −½ to fine − ½,
            nothing was inspected.
    """
    enlarged = _between((np.arange(fine) + 0.5) * (grid / fine) - 0.5, grid)
    if sigma:
        reach = round(sigma * 8 + 1) // 2
        bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        near = np.clip(np.arange(fine)[:, None] + np.arange(-reach, reach + 1), 0, fine - 1)
        enlarged = np.einsum("t,ftg->fg", bell / bell.sum(), enlarged[near])
    dense = _between(positions, fine) @ enlarged
    taps = int((grid - np.argmax(dense[:, ::-1] != 0, axis=1) - np.argmax(dense != 0, axis=1)).max())
    first = np.minimum(np.argmax(dense != 0, axis=1), grid - taps)
    weights = np.take_along_axis(dense, first[:, None] + np.arange(taps), axis=1)
    first[(positions < -0.5) | (positions > fine - 0.5)] = -1
    return Axis(first.astype(np.int32), weights.astype(np.float32))


def _between(positions: NDArray[Any], count: int) -> NDArray[np.float64]:
    """[n,count]: linear interpolation at `positions`; the outermost values hold beyond them."""
    inside = np.clip(positions.astype(np.float64), 0, count - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(inside[:, None] - np.arange(count))))


def anomaly_map(score: DeviceArray, y: DeviceAxis, x: DeviceAxis, map: DeviceArray, *, stream: int = 0) -> None:
    """Patch scores `score` [g,g] float32 → `map` [h,w] float32; NaN where nothing was inspected.

    Args:
        y, x: of `map_axis`, of h and w outputs over a grid of g.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    (grid, _), _ = describe("score", score, 2, "<f4")
    if max(y.span[1], x.span[1]) > grid:
        raise ValueError(f"score: expected a grid of {max(y.span[1], x.span[1])} or more, got {grid}")
    rows, columns = y.pointers("y", "<f4"), x.pointers("x", "<f4")
    source = pointer("score", score, (grid, grid), "<f4")
    target = pointer("map", map, (rows[2], columns[2]), "<f4")
    call("vmad_anomaly_map", source, grid, *rows, *columns, target, stream)


def top_mean_workspace(count: int) -> int:
    """Bytes that `top_mean` needs as its workspace."""
    size: int = library().vmad_top_mean_workspace(count)
    return size


def top_mean(
    values: DeviceArray, result: DeviceArray, workspace: DeviceArray, *, one_in: int = 100, stream: int = 0
) -> None:
    """Into `result` [2] float32: the largest value, and the mean of the largest n // `one_in` (at least one).

    Args:
        values: [n] or [h,w] float32. NaN is left out, and not counted in n; NaN alone gives NaN.
        workspace: [bytes] uint8, at least `top_mean_workspace(n)`, its first WORKSPACE_ZEROS zero.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    shape = tuple(values.__cuda_array_interface__["shape"])
    count = int(np.prod(shape))
    if not 0 < count < 1 << 32:
        raise ValueError(f"values: expected 1 to 2³² − 1 of them, got shape {list(shape)}")
    source, target = pointer("values", values, shape, "<f4"), pointer("result", result, (2,), "<f4")
    space = workspace_pointer(workspace, top_mean_workspace(count))
    call("vmad_top_mean", source, count, one_in, space, target, stream)
