"""How well scores tell defective from normal: exact, whatever the number of pixels, in bounded memory.

An image's pixels are kept as sorted scores. What is measured walks down all distinct scores of all images at once, in
chunks of about `_CHUNK` scores, so no curve and no set of pixels is ever held whole and nothing is binned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
PRO_LIMIT = 0.3
"""AUPRO is the area up to this false positive rate, divided by it (Bergmann et al., MVTec AD)."""
_CHUNK = 1 << 20
_POINTS = 200
"""Of a curve that is kept to be drawn."""


@dataclass(frozen=True)
class Scores:
    """Scores in ascending order: of what is normal [n], of what is defective [m].

    `share` [m] is, for a pixel, 1 / the area of its region: above a threshold they sum up to the regions' overlaps.
    """

    normal: Floats
    defective: Floats
    share: Floats = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Measured:
    """Fractions from 0 to 1; None and empty where there is nothing to tell apart, or (`aupro`, `pro`) no region.

    `roc` and `pro`: (false positive rate, true positive rate or overlap), thinned.
    """

    auroc: float | None = None
    ap: float | None = None
    f1_max: float | None = None
    aupro: float | None = None
    roc: tuple[tuple[float, float], ...] = ()
    pro: tuple[tuple[float, float], ...] = ()


def pixel_scores(anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_]) -> tuple[Scores, int]:
    """An image's pixels, and how many regions (8-connected, as in MVTec AD's own evaluation) its mask [h,w] has.

    What was not inspected (NaN in the map [h,w]) never raises an alarm: it scores −∞.
    """
    scores = np.where(np.isnan(anomaly_map), np.float32(-np.inf), anomaly_map)
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    areas = np.bincount(labels.ravel())
    defective = scores[mask]
    order = np.argsort(defective)
    share = (1 / areas[labels[mask]])[order]  # not of what is outside: that may be nothing
    return Scores(np.sort(scores[~mask]), defective[order], share), count - 1


def measure(parts: Sequence[Scores], regions: int = 0) -> Measured:
    """AUROC, AP (the step-wise sum, without interpolation), the largest F1, and AUPRO of all `parts` together.

    Ties move a curve in one step.
    """
    normals = sum(len(part.normal) for part in parts)
    defects = sum(len(part.defective) for part in parts)
    if not normals or not defects:
        return Measured()
    auroc = ap = f1_max = aupro = 0.0
    fp, tp, overlap = (np.zeros(1) for _ in range(3))
    roc, pro = [(0.0, 0.0)], [(0.0, 0.0)]
    for false, true, covered in _steps(parts):
        fp, tp, overlap = (
            last[-1] + np.concatenate([[0.0], np.cumsum(step)])
            for last, step in ((fp, false), (tp, true), (overlap, covered))
        )
        fpr, tpr = fp / normals, tp / defects
        auroc += _area(fpr, tpr)
        ap += float(np.sum(true / defects * tp[1:] / (tp[1:] + fp[1:])))
        f1_max = max(f1_max, float(np.max(2 * tp / (tp + fp + defects))))
        roc += _thinned(fpr, tpr)
        if regions and fpr[0] < PRO_LIMIT:
            x, y = _up_to(PRO_LIMIT, fpr, overlap / regions)
            aupro += _area(x, y) / PRO_LIMIT
            pro += _thinned(x, y)
    return Measured(auroc, ap, f1_max, aupro if regions else None, tuple(roc), tuple(pro) if regions else ())


def _area(x: Floats, y: Floats) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


def _up_to(limit: float, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The curve's part with x ≤ `limit`, ended on the line to the first point beyond."""
    beyond = int(np.searchsorted(x, limit, "right"))
    if beyond == len(x):
        return x, y
    (x0, x1), (y0, y1) = x[beyond - 1 : beyond + 1], y[beyond - 1 : beyond + 1]
    last = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
    return np.append(x[:beyond], limit), np.append(y[:beyond], last)


def _thinned(x: Floats, y: Floats) -> list[tuple[float, float]]:
    """The points of a rising curve at which x + y has grown by another 1 / `_POINTS`, and the last one."""
    kept = np.append(np.flatnonzero(np.diff(np.floor((x + y) * _POINTS))) + 1, len(x) - 1)
    return [(float(x[i]), float(y[i])) for i in kept]


def _steps(parts: Sequence[Scores]) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """From the highest score down, for each distinct one: how many are normal, how many defective, shares' sum."""
    for high, low in _ranges(parts):
        found: list[tuple[NDArray[Any], ...]] = []
        for part in parts:
            distinct, count = np.unique(part.normal[_between(part.normal, low, high)], return_counts=True)
            nothing = np.zeros(len(distinct))
            found.append((distinct, count, nothing, nothing))
            inside = _between(part.defective, low, high)
            distinct, place, count = np.unique(part.defective[inside], return_inverse=True, return_counts=True)
            nothing = np.zeros(len(distinct))
            share = nothing if not len(part.share) else np.bincount(place, part.share[inside], len(distinct))
            found.append((distinct, nothing, count, share))
        keys, *weights = (np.concatenate(column) for column in zip(*found, strict=True))
        distinct, place = np.unique(keys, return_inverse=True)
        false, true, covered = (np.bincount(place, weight, len(distinct))[::-1] for weight in weights)
        yield false, true, covered


def _ranges(parts: Sequence[Scores]) -> Iterator[tuple[float, float]]:
    """(high, low], downwards, that hold about `_CHUNK` scores each; a score that is more frequent is not split.

    Cuts are taken from every `step`-th score of every image: a range is wrong by less than `step` scores an image.
    """
    arrays = [array for part in parts for array in (part.normal, part.defective) if len(array)]
    step = max(1, _CHUNK // (4 * len(arrays)))
    sample = np.sort(np.concatenate([array[::step] for array in arrays]))
    cuts = np.unique(sample[:: max(1, _CHUNK // step)])[:0:-1]  # not the lowest: below the others is one range
    yield from zip([np.inf, *cuts.tolist()], [*cuts.tolist(), -np.inf], strict=True)


def _between(ascending: Floats, low: float, high: float) -> slice:
    """Where low < score ≤ high, or score ≤ high if `low` is −∞."""
    kind = ascending.dtype.type  # searchsorted with another type would first copy the whole array
    start = 0 if low == -np.inf else int(np.searchsorted(ascending, kind(low), "right"))
    return slice(start, int(np.searchsorted(ascending, kind(high), "right")))
