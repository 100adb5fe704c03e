"""Whether a frame shows what was enrolled at all: its mean patch against those of the enrolled frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from vmad_edge.kernels import ReferenceBank, max_cosine
from vmad_edge.runtime.bundle import Record

Floats = NDArray[np.float32]

MARGIN, SPREAD = 3.0, 4.0
"""See `scope_limit`. Chosen, as the next, on eleven products (benchmarks/scope.py). [ASSUME]"""
LEAST = 0.06
"""No limit is lower: of parts that are always photographed alike, a defect moves one nearly as far. [ASSUME]"""


class ScopeLimit(Record):
    """Frames farther than this from all enrolled ones are out of scope."""

    descriptor: Literal["patch_mean"] = "patch_mean"
    """What is compared: the mean of a frame's inspected patches."""
    limit: Annotated[float, Field(ge=LEAST, le=2)]
    """A cosine distance, 1 − cosine."""


@dataclass(frozen=True)
class Scope:
    """The enrolled frames' descriptors [F,D] float32, and how far from the nearest one a frame may be.

    The nearest neighbour's distance tells frames of another kind well (Sun et al. 2022, arXiv 2204.06507) and, unlike
    Mahalanobis' distance, needs no covariance, which few frames do not give. The mean patch, and not `cls`: that of the
    reference model tells defects more than products, so a defect moved it as far as another product does.
    """

    descriptors: Floats
    limit: ScopeLimit

    @staticmethod
    def learned(descriptors: Floats) -> Scope | None:
        """With the limit from each frame's distance to the others; None for fewer than two frames."""
        if len(descriptors) < 2:
            return None
        others, _ = max_cosine(descriptors, descriptors, k=2)  # nothing is nearer to a frame than itself
        limit = scope_limit(1 - others)
        return None if limit is None else Scope(descriptors, limit)

    def distance(self, patches: Floats) -> float:
        """Of a frame with these inspected patches [n,D]: 0 … 2, NaN if one of them is NaN."""
        cosine, _ = max_cosine(descriptor(patches)[None], self._bank)
        return 1 - float(cosine[0])

    @cached_property
    def _bank(self) -> ReferenceBank:
        return ReferenceBank.from_array(self.descriptors)


def descriptor(patches: Floats) -> Floats:
    """[D], of inspected patches [n,D]."""
    return np.asarray(patches.mean(axis=0), np.float32)


def in_words(scope: Scope | None) -> str:
    """For people."""
    return "no scope check" if scope is None else f"in scope up to {scope.limit.limit:.3f} from an enrolled frame"


def scope_limit(distances: ArrayLike) -> ScopeLimit | None:
    """From normal frames' distances [F] to (other) enrolled ones; None without any.

    `MARGIN` times the largest: of few frames it says little about the next one. A frame of something else among them,
    whose own distance is large, must not let all others in: what exceeds `SPREAD` times the median counts as that.
    """
    found = np.asarray(distances, np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    largest = min(float(found.max()), SPREAD * float(np.median(found)))
    return ScopeLimit(limit=min(max(LEAST, MARGIN * largest), 2.0))
