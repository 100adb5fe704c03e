"""Patch similarity: for each patch of a frame, the most similar patch of a bank.

What the operators compute is defined in `reference.py`; the C++ in `cpu/` does it block by block, with threads,
and never holds the Q·M cosines. The rules that all share:

- Rows are scaled to length 1. A row of zeros scores 0. A row that holds a NaN or an infinity is a NaN row: in the
  bank it never wins, in the query it scores NaN (index −1).
- Scores are float32, in [−1, 1], about 1e-6 from the exact cosine at most. Ties go to the lowest index. Rows with
  equal values always tie: a score's bits depend on its two rows alone, not on their place, the number of threads or
  whether the bank is an array or a `ReferenceBank`. Rows whose exact cosines differ by less than the rounding may
  rank either way.
- Arrays are float32. float16 and float64 are converted (a float64 beyond float32's range counts as infinite) and
  so are arrays that are not C-contiguous: that is a copy. Other memory is O(Q·k) or O(Q·S), and a block a thread.
- `threads=None` is OMP_NUM_THREADS, else all processors that this process may use. The GIL is released.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels import _cpu

__all__ = ["ReferenceBank", "max_cosine", "segmented_max_cosine"]

Features = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class ReferenceBank:
    """Features [M,D] scaled to length 1 once, for many calls. `from_array` is the only way to one."""

    _rows: NDArray[np.float32]

    @staticmethod
    def from_array(features: Features, dtype: str = "float32") -> ReferenceBank:
        """`features` [M,D], float16, float32 or float64; they are copied.

        Raises:
            TypeError: not a float array.
            ValueError: not [M,D] with M and D at least 1; a dtype other than float32.
        """
        if dtype != "float32":
            raise ValueError(f'dtype: expected "float32" (bfloat16, float16, int8 are yet to come), got {dtype!r}')
        rows = _bank_rows(features)
        unit = np.empty_like(rows)
        _cpu.normalise(rows, unit)
        unit.flags.writeable = False
        return ReferenceBank(unit)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        """D."""
        return int(self._rows.shape[1])


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
    query, rows = _features("query", query), _bank_rows(bank)
    _same_width(query, rows)
    k = min(_at_least_one("k", k), len(rows) + 1)  # any rank past the bank is the same NaN
    score, index = np.empty(len(query), np.float32), np.empty(len(query), np.int64)
    _cpu.max_cosine(query, rows, isinstance(bank, ReferenceBank), k, _thread_count(threads), score, index)
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
    query, rows = _features("query", query), _bank_rows(bank)
    _same_width(query, rows)
    bounds = _offsets(offsets, len(rows))
    score = np.empty((len(query), len(bounds) - 1), np.float32)
    _cpu.segmented_max_cosine(query, rows, isinstance(bank, ReferenceBank), bounds, _thread_count(threads), score)
    return score


def _features(name: str, features: Features) -> NDArray[np.float32]:
    kinds = (np.float16, np.float32, np.float64)
    if not isinstance(features, np.ndarray) or features.dtype.type not in kinds:
        got = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"{name}: expected an array of float16, float32 or float64, got {got}")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [rows, width] with width ≥ 1, got {list(features.shape)}")
    with np.errstate(over="ignore"):
        return np.require(features, np.float32, ["C", "ALIGNED", "ENSUREARRAY"])


def _bank_rows(bank: Features | ReferenceBank) -> NDArray[np.float32]:
    rows = bank._rows if isinstance(bank, ReferenceBank) else _features("bank", bank)
    if len(rows) == 0:
        raise ValueError(f"bank: expected at least 1 row, got shape {list(rows.shape)}")
    return rows


def _same_width(query: NDArray[np.float32], rows: NDArray[np.float32]) -> None:
    if query.shape[1] != rows.shape[1]:
        raise ValueError(f"query: expected the bank's width {rows.shape[1]}, got {query.shape[1]}")


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
        return _at_least_one("threads", threads)
    if setting := os.environ.get("OMP_NUM_THREADS"):
        first = setting.split(",")[0].strip()  # OpenMP allows a list, one number a nesting level
        if not first.isdecimal() or int(first) < 1:
            raise ValueError(f"OMP_NUM_THREADS: expected an integer of at least 1, got {setting!r}")
        return int(first)
    return len(os.sched_getaffinity(0))
