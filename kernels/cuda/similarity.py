"""Patch similarity on CUDA; `vmad_edge.kernels` documents what the operators compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels import _at_least_one, _offsets
from vmad_edge.kernels.cuda.library import (
    DeviceArray,
    Memory,
    aligned,
    call,
    describe,
    library,
    pointer,
    targets,
    view,
    workspace_pointer,
)

Dtype = Literal["float16", "int8"]
Path = Literal["auto", "fused", "split"]
_PATHS = {"auto": 0, "fused": 1, "split": 2}
_SLICE = 64  # bytes; kernels/cuda/tile.cuh
MAX_QUERY_ROWS = 349_504
"""The blocks of a query tile agree in a table of fixed size (kernels/cuda/launchers.h)."""


def row_bytes(width: int, dtype: Dtype) -> int:
    """Bytes of a bank's row: its values, and zeros up to a multiple of 64."""
    return -(-width * (1 if dtype == "int8" else 2) // _SLICE) * _SLICE


@dataclass(frozen=True)
class DeviceBank:
    """A reference bank on the device, of M rows of width D: memory that `normalise` fills.

    `rows` is [M, row_bytes(D, dtype)] uint8; `scale` [M] float32 with int8, None with float16.
    """

    rows: DeviceArray
    scale: DeviceArray | None
    width: int
    dtype: Dtype

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, got {self.width}")
        (count, _), _ = describe("rows", self.rows, 2, "|u1")
        pointer("rows", self.rows, (count, row_bytes(self.width, self.dtype)), "|u1")
        if (self.scale is None) != (self.dtype == "float16"):
            raise ValueError(f"scale: expected one with int8 and none with float16, got {self.scale} and {self.dtype}")
        if self.scale is not None:
            pointer("scale", self.scale, (count,), "<f4")

    def part(self, start: int, count: int) -> DeviceBank:
        """Rows `start` to `start` + `count` − 1, in the same memory."""
        pitch = row_bytes(self.width, self.dtype)
        scale = None if self.scale is None else view(self.scale, (count,), start)
        return DeviceBank(view(self.rows, (count, pitch), start * pitch), scale, self.width, self.dtype)

    def __len__(self) -> int:
        return int(self.rows.__cuda_array_interface__["shape"][0])


@dataclass(frozen=True)
class DeviceOffsets:
    """Bounds of a bank's segments, on the host, where they are checked, and copied to the device."""

    host: NDArray[np.int64]
    device: DeviceArray

    @staticmethod
    def check(offsets: NDArray[np.integer[Any]] | Sequence[int], count: int) -> NDArray[np.int64]:
        """`offsets` [S+1] of a bank of `count` rows, as int64, ready to be copied to the device.

        Raises:
            TypeError, ValueError: as `vmad_edge.kernels.segmented_max_cosine` does.
        """
        return _offsets(offsets, count)


def normalise(features: DeviceArray, bank: DeviceBank, *, stream: int = 0) -> None:
    """`features` [M,D], float32 or float16, into `bank`, of the same M and D.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    count, width, data, half = _features("features", features)
    if (count, width) != (len(bank), bank.width):
        raise ValueError(f"features: expected shape {[len(bank), bank.width]}, got {[count, width]}")
    if count:
        int8, rows, scale = _bank(bank)
        call("vmad_normalise", data, half, count, width, int8, rows, scale, stream)


def try_kernels(memory: Memory) -> None:
    """Run the least of them.

    Raises:
        RuntimeError: no library in this build, or CUDA runs none of its kernels on this GPU.
    """
    library()  # or it says why there is none
    bank = DeviceBank(memory.zeros((1, row_bytes(1, "float16")), np.uint8), None, 1, "float16")
    features = memory.zeros((1, 1), np.float32)
    try:
        normalise(features, bank, stream=memory.stream)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}; the kernels are for {targets()}. Install vmad-edge again on this machine, with CUDACXX naming "
            "its nvcc."
        ) from None
    memory.wait()


def max_cosine_workspace(query_count: int, bank: DeviceBank, k: int = 1, *, path: Path = "auto") -> int:
    """Bytes that `max_cosine` needs as its workspace."""
    k = min(_at_least_one("k", k), len(bank) + 1)
    size: int = library().vmad_max_cosine_workspace(query_count, bank.width, bank.dtype == "int8", k, _PATHS[path])
    return size


def max_cosine(
    query: DeviceArray,
    bank: DeviceBank,
    score: DeviceArray,
    index: DeviceArray,
    workspace: DeviceArray,
    k: int = 1,
    *,
    path: Path = "auto",
    stream: int = 0,
) -> None:
    """The k-th most similar bank row of each query row, into `score` and `index`.

    Args:
        query: [Q,D] float32 or float16, not scaled; Q up to MAX_QUERY_ROWS.
        bank: M ≥ 1 rows of width D.
        score: [Q] float32, written.
        index: [Q] int64, written.
        workspace: [bytes] uint8, at least `max_cosine_workspace(Q, bank, k)`, its first WORKSPACE_ZEROS zero. Calls on
            one stream may share one.
        k: rank of the row, see `vmad_edge.kernels.max_cosine`.
        path: "fused" is one launch and knows rank 1 only; "split" is two launches for each 4,096 bank rows and one
            for the query, with any rank; "auto" takes fused for rank 1.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape, an empty bank, k below 1, more ranks than the path
            knows.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    count, features, half = _query(query, bank)
    k = min(_at_least_one("k", k), len(bank) + 1)  # any rank past the bank is the same NaN
    if path == "fused" and k > 1:
        raise ValueError(f'path "fused": expected k of 1, got {k}')
    outputs = pointer("score", score, (count,), "<f4"), pointer("index", index, (count,), "<i8")
    space = workspace_pointer(workspace, max_cosine_workspace(count, bank, k, path=path))
    if count == 0:
        return
    int8, rows, scale = _bank(bank)
    whole = features, half, count, rows, scale, len(bank), bank.width, int8, k, _PATHS[path], space, *outputs, stream
    call("vmad_max_cosine", *whole)


def segmented_max_cosine_workspace(
    query_count: int, bank: DeviceBank, offsets: DeviceOffsets, *, path: Path = "auto"
) -> int:
    """Bytes that `segmented_max_cosine` needs as its workspace."""
    size: int = library().vmad_segmented_max_cosine_workspace(
        query_count, len(bank), bank.width, bank.dtype == "int8", len(offsets.host) - 1, _PATHS[path]
    )
    return size


def segmented_max_cosine(
    query: DeviceArray,
    bank: DeviceBank,
    offsets: DeviceOffsets,
    score: DeviceArray,
    workspace: DeviceArray,
    *,
    path: Path = "auto",
    stream: int = 0,
) -> None:
    """The best cosine of each query row in each segment of the bank, into `score` [Q,S] float32.

    Args, Raises: as `max_cosine`; `offsets` [S+1] as in `vmad_edge.kernels.segmented_max_cosine`. "auto" takes the
        fused path where segments have 32 rows or more on average: each costs a fused tile a pass over its sums.
    """
    count, features, half = _query(query, bank)
    DeviceOffsets.check(offsets.host, len(bank))
    segments = len(offsets.host) - 1
    bounds = pointer("offsets", offsets.device, (segments + 1,), "<i8")
    output = pointer("score", score, (count, segments), "<f4")
    space = workspace_pointer(workspace, segmented_max_cosine_workspace(count, bank, offsets, path=path))
    if count == 0:
        return
    int8, rows, scale = _bank(bank)
    host = offsets.host.ctypes.data
    whole = features, half, count, rows, scale, len(bank), bank.width, int8, host, bounds, segments, _PATHS[path]
    call("vmad_segmented_max_cosine", *whole, space, output, stream)


def _query(query: DeviceArray, bank: DeviceBank) -> tuple[int, int, bool]:
    count, width, data, half = _features("query", query)
    if width != bank.width:
        raise ValueError(f"query: expected the bank's width {bank.width}, got {width}")
    if len(bank) == 0:
        raise ValueError("bank: expected at least 1 row, got none")
    if count > MAX_QUERY_ROWS:
        raise ValueError(f"query: expected at most {MAX_QUERY_ROWS} rows, got {count}")
    return count, data, half


def _bank(bank: DeviceBank) -> tuple[bool, int, int | None]:
    scale = None if bank.scale is None else pointer("scale", bank.scale, (len(bank),), "<f4")
    shape = len(bank), row_bytes(bank.width, bank.dtype)
    return bank.dtype == "int8", aligned("rows", pointer("rows", bank.rows, shape, "|u1")), scale


def _features(name: str, features: DeviceArray) -> tuple[int, int, int, bool]:
    (count, width), kind = describe(name, features, 2, "<f4", "<f2")
    return count, width, pointer(name, features, (count, width), kind), kind == "<f2"
