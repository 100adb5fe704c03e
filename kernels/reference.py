"""The definition of the kernels in NumPy, to be read and tested against. Slow, and holds all Q·M cosines.

The cosine of two rows is the dot product of the rows scaled to length 1. A row of zeros has cosine 0 with every
other; a row that holds a NaN or an infinity has cosine NaN with every other, and NaN is never the maximum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def max_cosine(
    query: NDArray[np.float32], bank: NDArray[np.float32], k: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`query` [Q,D], `bank` [M,D] → `score` [Q] and `index` [Q] of the k-th best bank row.

    Rows that tie rank by their index, the lowest first. Fewer than k cosines that are not NaN: NaN and −1.
    """
    cosine = _cosine(query, bank)
    if k > len(bank):
        return np.full(len(query), np.nan, np.float32), np.full(len(query), -1)
    index = np.argsort(-cosine, axis=1, kind="stable")[:, k - 1]  # NaN sorts last
    score = np.take_along_axis(cosine, index[:, None], axis=1)[:, 0]
    return score.astype(np.float32), np.where(np.isnan(score), -1, index)


def segmented_max_cosine(
    query: NDArray[np.float32], bank: NDArray[np.float32], offsets: NDArray[np.int64]
) -> NDArray[np.float32]:
    """`query` [Q,D], `bank` [M,D], `offsets` [S+1] → `score` [Q,S], the best in offsets[s]:offsets[s+1].

    A segment without any cosine that is not NaN: NaN.
    """
    return np.fmax.reduceat(_cosine(query, bank), offsets[:-1], axis=1).astype(np.float32)


def _cosine(query: NDArray[np.float32], bank: NDArray[np.float32]) -> NDArray[np.float64]:
    """[Q,M]. Row by row, not as a matrix product, whose rounding may differ between equal rows."""
    unit_query, unit_bank = _unit(query), _unit(bank)
    cosine = np.empty((len(query), len(bank)))
    for i, row in enumerate(unit_query):
        cosine[i] = (unit_bank * row).sum(axis=1)
    return cosine


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    unit = rows.astype(np.float64)
    unit[~np.isfinite(rows).all(axis=1)] = np.nan
    norm = np.sqrt((unit * unit).sum(axis=1, keepdims=True))
    np.divide(unit, norm, out=unit, where=norm != 0)
    return unit
