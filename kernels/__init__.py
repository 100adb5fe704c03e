"""Patch similarity: for each patch of a frame, the most similar patch of a bank.

What the operators compute is defined in `reference.py`; the C++ in `cpu/` does it block by block, with threads,
and never holds the Q·M cosines. The rules that all share:

- Rows are scaled to length 1. A row of zeros scores 0. A row that holds a NaN or an infinity is a NaN row: in the
  bank it never wins, in the query it scores NaN (index −1).
- Scores are float32, in [−1, 1], about 1e-6 from the exact cosine at most; with a `ReferenceBank` of a reduced dtype
  about 4e-3 (bfloat16) and, for features without outliers, 1e-2 (int8). Ties go to the lowest index. Rows with
  equal values always tie: a score's bits depend on its two rows alone, not on their place, the number of threads or
  whether the bank is an array or a `ReferenceBank`. Rows whose exact cosines differ by less than the rounding may
  rank either way.
- Arrays are float32. float16 and float64 are converted (a float64 beyond float32's range counts as infinite) and
  so are arrays that are not C-contiguous: that is a copy. Other memory is O(Q·k) or O(Q·S), and a block a thread.
- `threads=None` is OMP_NUM_THREADS, else all processors that this process may use, by affinity and CPU quota
  (`processors.py`). More than 512 are 512. The GIL is released.
- The code takes the best path that the processor can, one of `paths()`; VMAD_PATH=NAME makes it another. A path has
  its own rounding: bits are the same on one path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels import _cpu
from vmad_edge.kernels._cpu import paths
from vmad_edge.kernels.bank import Dtype, Features, ReferenceBank, path_number, rows_of
from vmad_edge.kernels.processors import processors

__all__ = ["Dtype", "ReferenceBank", "interval_mean", "max_cosine", "mutual_score", "paths", "segmented_max_cosine"]

_MOST_THREADS = 512  # as in cpu/similarity.cpp
_FRAMES_ROWS = 2304  # query rows a call of mutual_score: enough that preparing the bank anew costs little


def max_cosine(
    query: Features, bank: Features | ReferenceBank, k: int = 1, *, threads: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k-th most similar bank row of each query row.

    Args:
        query: [Q,D].
        bank: [M,D], M ≥ 1.
        k: the rank of the row returned: 2 is the second best, for a query that is in its own bank. Equal rows have
            ranks of their own.
        threads: see the module.

    Returns:
        `score` [Q] float32, the cosine, and `index` [Q] int64, the bank row; NaN and −1 for a NaN query row, or
        where the bank has fewer than k rows that are not NaN.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: wrong shape, unequal widths, an empty bank, k or threads below 1.
    """
    query = rows_of("query", query)
    native, count = _bank(bank, query.shape[1])
    k = min(_at_least_one("k", k), count + 1)  # any rank past the bank is the same NaN
    score, index = np.empty(len(query), np.float32), np.empty(len(query), np.int64)
    _cpu.max_cosine(path_number(), query, native, k, _thread_count(threads), score, index)
    return score, index


def segmented_max_cosine(
    query: Features,
    bank: Features | ReferenceBank,
    offsets: NDArray[np.integer[Any]] | Sequence[int],
    *,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """The best cosine of each query row in each segment of the bank (a segment is one image's patches, say).

    Args:
        query: [Q,D].
        bank: [M,D], M ≥ 1.
        offsets: [S+1] integers rising from 0 to M: segment s is the bank rows offsets[s] to offsets[s+1] − 1.
        threads: see the module.

    Returns:
        `score` [Q,S] float32; NaN for a NaN query row and for a segment of NaN rows.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: wrong shape, unequal widths, an empty bank or segment, other bad offsets, threads below 1.
    """
    query = rows_of("query", query)
    native, count = _bank(bank, query.shape[1])
    bounds = _offsets(offsets, count)
    score = np.empty((len(query), len(bounds) - 1), np.float32)
    _cpu.segmented_max_cosine(path_number(), query, native, bounds, _thread_count(threads), score)
    return score


def mutual_score(features: Features, interval: float = 0.3, *, threads: int | None = None) -> NDArray[np.float32]:
    """How far each patch of unlabelled frames is from the frames that it is nearest to (MuSc, arXiv 2401.16753).

    A patch's distance to a frame is the least Euclidean distance to that frame's patches, rows scaled to length 1:
    √(2 − 2 cosine). Its score is the mean of the ⌊interval · (n − 1)⌋ least distances to the other frames.

    Args:
        features: [n,N,D]: n frames of N patches.
        interval: the share of the other frames, above 0 and at most 1.
        threads: see the module.

    Returns:
        [n,N] float32, 0 to 2; NaN for a NaN patch, or where too many frames are NaN.

    Raises:
        TypeError: not a float array.
        ValueError: another shape or interval; so few frames that the interval holds none.
    """
    if not isinstance(features, np.ndarray) or features.ndim != 3 or features.shape[1] == 0:
        raise ValueError(f"features: expected shape [frames, patches, width], got {list(np.shape(features))}")
    frames, patches, width = features.shape
    _check_interval(interval, frames)
    rows = rows_of("features", features.reshape(-1, width))
    offsets = range(0, len(rows) + 1, patches)
    together = max(1, _FRAMES_ROWS // patches)
    score = np.empty((frames, patches), np.float32)
    for first in range(0, frames, together):
        query = rows[first * patches : (first + together) * patches]
        cosine = segmented_max_cosine(query, rows, offsets, threads=threads).reshape(-1, patches, frames)
        for frame, own in enumerate(cosine, first):
            score[frame] = interval_mean(np.delete(own, frame, axis=1), interval)
    return score


def interval_mean(cosine: NDArray[np.float32], interval: float = 0.3) -> NDArray[np.float32]:
    """Best cosines to each of S frames, [N,S], to `mutual_score`'s scores [N].

    Raises:
        ValueError: the interval holds none of the S.
    """
    count = int(interval * cosine.shape[1])
    if count == 0:
        raise ValueError(f"cosine: expected more than {cosine.shape[1]} frames for an interval of {interval}")
    least = np.sqrt(2 - 2 * -np.partition(-cosine, count - 1, axis=1)[:, :count])
    return np.asarray(least.mean(axis=1))


def _check_interval(interval: float, frames: int) -> None:
    if not 0 < interval <= 1:
        raise ValueError(f"interval: expected a share above 0 and at most 1, got {interval}")
    if int(interval * (frames - 1)) == 0:
        least = math.ceil(1 / interval) + 1
        raise ValueError(f"features: expected at least {least} frames for an interval of {interval}, got {frames}")


def _bank(bank: Features | ReferenceBank, width: int) -> tuple[_cpu.Bank, int]:
    """What the compiled operators take, and how many rows it has; `width` is the query's."""
    given = bank if isinstance(bank, ReferenceBank) else rows_of("bank", bank)
    wanted = given.width if isinstance(given, ReferenceBank) else given.shape[1]
    if len(given) == 0:
        raise ValueError(f"bank: expected at least 1 row, got shape {[0, wanted]}")
    if width != wanted:
        raise ValueError(f"query: expected the bank's width {wanted}, got {width}")
    if isinstance(given, ReferenceBank):
        return given._native(), len(given)
    return _cpu.Bank(0, width, 0, len(given), None, given), len(given)


def _offsets(offsets: NDArray[np.integer[Any]] | Sequence[int], count: int) -> NDArray[np.int64]:
    given = np.asarray(offsets)
    if given.dtype.kind not in "iu":
        raise TypeError(f"offsets: expected integers, got {given.dtype}")
    if given.ndim != 1 or len(given) < 2:
        raise ValueError(f"offsets: expected shape [S+1] with S ≥ 1, got {list(given.shape)}")
    bounds = np.ascontiguousarray(given, np.int64)
    if bounds[0] != 0 or bounds[-1] != count:
        raise ValueError(
            f"offsets: expected to start at 0 and end at {count}, the bank's rows, got {given[0]} and {given[-1]}"
        )
    (falls,) = np.nonzero(bounds[1:] <= bounds[:-1])
    if len(falls):
        s = falls[0]
        raise ValueError(
            f"offsets: expected segments of at least 1 row, got segment {s} from {given[s]} to {given[s + 1]}"
        )
    return bounds


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def _thread_count(threads: int | None) -> int:
    if threads is not None:
        return min(_at_least_one("threads", threads), _MOST_THREADS)
    if setting := os.environ.get("OMP_NUM_THREADS"):
        first = setting.split(",")[0].strip()  # OpenMP allows a list, one number a nesting level
        digits = first.lstrip("0")
        if not (digits and first.isascii() and first.isdecimal()):
            raise ValueError(f"OMP_NUM_THREADS: expected an integer of at least 1, got {setting!r}")
        return min(int(digits[:4]), _MOST_THREADS)  # four are too many already, and no length is too long for int()
    return min(processors(), _MOST_THREADS)
