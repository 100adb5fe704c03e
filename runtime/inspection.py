"""The one result type: what was found on a frame, who decided, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import View

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom exclusive."""


class Verdict(str, Enum):
    GOOD = "GOOD"
    DEFECT = "DEFECT"
    UNCERTAIN = "UNCERTAIN"
    NOT_INSPECTED = "NOT_INSPECTED"


@dataclass(frozen=True)
class Region:
    """One connected defect, in the frame's pixels."""

    box: Box
    area: int
    """Pixels."""
    peak: float
    """Largest value of the anomaly map inside."""
    centroid: tuple[float, float]
    """x, y."""


@dataclass(frozen=True)
class NearestNormal:
    """The enrolled place most similar to the frame's most abnormal patch."""

    frame: str
    """Id of the enrolled frame."""
    box: Box
    """The patch in that frame's pixels."""
    similarity: float
    """Cosine."""
    picture: NDArray[np.uint8] = field(repr=False)
    """[s,s,3] RGB: the patch and what lies around it."""


@dataclass(frozen=True)
class Features:
    """What the review needs of the screen: `patches` [N,D] and `patches_multi` [L,N,D] float32, and where they lie."""

    patches: NDArray[np.float32]
    patches_multi: NDArray[np.float32]
    view: View


@dataclass(frozen=True)
class Screening:
    """What the screen found; the Inspection says what that means."""

    features: Features
    score: float
    map: NDArray[np.float32]
    worst: tuple[int, float]
    """Of the most abnormal patch: the nearest row of the similarity source, and the cosine to it."""


@dataclass(frozen=True)
class Inspection:
    frame: Frame = field(repr=False)
    object: str
    verdict: Verdict
    decided_by: Literal["screen", "review"] = "screen"
    reason: str | None = None
    """Why it was not inspected, or what kept the review from its end."""
    score: float | None = None
    """The screen's image score; None if NOT_INSPECTED."""
    compared_with: str | None = None
    """The similarity source: "normal features", "references", either "and stream", or "unlabelled frames"."""
    map: NDArray[np.float32] | None = field(default=None, repr=False)
    """[h,w] anomaly map in the frame's pixels; NaN where the frame was not inspected."""
    regions: tuple[Region, ...] = ()
    """From the mask where there is one, else from the map; the largest first."""
    nearest_normal: NearestNormal | None = None
    p_yes: float | None = None
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    """[h,w] in the frame's pixels; None without a review, or if P(yes) < 0.5."""
    language_map: NDArray[np.float32] | None = field(default=None, repr=False)
    """[h,w], like `map`: DSSL's second similarity, of the review's visual tokens. None without a review."""
    explanation: str | None = None
    seg_forced: bool = False
    """The answer reached its token limit and `<seg>` was forced."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    deadline_met: bool | None = None
    """Whether the verdict stood before the deadline; None if none was given."""
    features: Features | None = field(default=None, repr=False)
    """Kept until a review has used them."""

    def without_arrays(self) -> Inspection:
        """The same result without pixels, maps, mask and pictures: what a long run keeps of each frame."""
        return replace(
            self,
            frame=replace(self.frame, pixels=np.zeros((0, 0, 3), np.uint8)),
            map=None,
            mask=None,
            language_map=None,
            nearest_normal=None,
            features=None,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that `vmad inspect --json` prints."""
        return {
            "path": self.frame.path or self.frame.id,
            "object": self.object,
            "verdict": self.verdict.value,
            "score": self.score,
            "p_yes": self.p_yes,
            "regions": [
                {
                    "box": list(r.box),
                    "area": r.area,
                    "peak": None if np.isnan(r.peak) else r.peak,  # a mask on what the screen's crop left out
                    "centroid": list(r.centroid),
                }
                for r in self.regions
            ],
            "explanation": self.explanation,
            "reason": self.reason,
            "decided_by": self.decided_by,
            "compared_with": self.compared_with,
            "seg_forced": self.seg_forced,
            "timings_ms": {stage: round(value, 3) for stage, value in self.timings_ms.items()},
            "deadline_met": self.deadline_met,
        }


def find_regions(where: NDArray[np.bool_], anomaly_map: NDArray[np.float32]) -> tuple[Region, ...]:
    """The 8-connected regions of `where` [h,w], the largest first."""
    count, labels, stats, centroids = cv2.connectedComponentsWithStats(where.astype(np.uint8), connectivity=8)
    regions = []
    for label in range(1, count):
        x, y, width, height, area = (int(value) for value in stats[label])
        inside = labels[y : y + height, x : x + width] == label
        values = anomaly_map[y : y + height, x : x + width][inside]
        peak = float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")
        cx, cy = (float(value) for value in centroids[label])
        regions.append(Region((x, y, x + width, y + height), area, peak, (cx, cy)))
    return tuple(sorted(regions, key=lambda region: -region.area))
