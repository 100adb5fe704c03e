"""The one result type: what was found on a frame, who decided, and how long it took."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.bundle import ReviewRule, Thresholds
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.tiles import WHOLE, Box, Layout, Tile


class Verdict(str, Enum):
    GOOD = "GOOD"
    DEFECT = "DEFECT"
    UNCERTAIN = "UNCERTAIN"
    NOT_INSPECTED = "NOT_INSPECTED"


class Reason(str, Enum):
    """Why a frame was not inspected, is out of scope, or what became of its review; beside it is a sentence."""

    UNREADABLE = "unreadable"
    UNFIT_DARK = "unfit_dark"
    UNFIT_BRIGHT = "unfit_bright"
    UNFIT_CONSTANT = "unfit_constant"
    UNFIT_BLURRED = "unfit_blurred"
    UNFIT_TORN = "unfit_torn"
    UNFIT_SIZE = "unfit_size"
    OUT_OF_SCOPE = "out_of_scope"
    NOT_RELEASED = "not_released"
    NOTHING_TO_COMPARE = "nothing_to_compare"
    SCREEN_LATE = "screen_late"
    SCREEN_FAULT = "screen_fault"
    REVIEW_SHED = "review_shed"
    REVIEW_LATE = "review_late"
    REVIEW_FAULT = "review_fault"
    REVIEW_CANCELLED = "review_cancelled"
    FRAME_MISSING = "frame_missing"
    FRAME_LATE = "frame_late"
    FRAME_INCOMPLETE = "frame_incomplete"
    FRAME_FROZEN = "frame_frozen"
    CRASHED = "crashed"
    NOT_TOLD = "not_told"

    @property
    def is_unfit(self) -> bool:
        """The frame was read, and cannot be judged."""
        return self.value.startswith("unfit_")


def verdict_of(score: float, thresholds: Thresholds | None) -> Verdict:
    """What the screen's score means."""
    if thresholds is None:
        return Verdict.UNCERTAIN
    if score < thresholds.good_below:
        return Verdict.GOOD
    return Verdict.DEFECT if score >= thresholds.defect_above else Verdict.UNCERTAIN


def settled(verdict: Verdict, p_yes: float, rule: ReviewRule | None, reason: Reason | None = None) -> Verdict:
    """What a review makes of the screen's verdict.

    It settles UNCERTAIN, by a rule that somebody calibrated for the object, or the bundle's maker gave; it never turns
    DEFECT into GOOD. What is UNCERTAIN for another `reason` than its score it may call DEFECT, not GOOD.
    """
    if verdict is not Verdict.UNCERTAIN or rule is None:
        return verdict
    if rule.defect_above is not None and p_yes >= rule.defect_above:
        return Verdict.DEFECT
    if rule.good_below is not None and p_yes < rule.good_below and reason is None:
        return Verdict.GOOD
    return Verdict.UNCERTAIN


def screened(score: float, thresholds: Thresholds | None, in_scope: bool) -> tuple[Verdict, Reason | None]:
    """The screen's verdict, and why where that is not its score: what is out of scope is UNCERTAIN."""
    return (verdict_of(score, thresholds), None) if in_scope else (Verdict.UNCERTAIN, Reason.OUT_OF_SCOPE)


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
    jpeg: bytes = field(repr=False)
    """What CLIP saw of that frame."""
    cell: tuple[int, int]
    """The patch's row and column."""
    grid: int
    place: Box
    """The most abnormal patch in the inspected frame's pixels."""

    @cached_property
    def picture(self) -> NDArray[np.uint8]:
        """[s,s,3] RGB: what CLIP saw of that frame. Made when it is asked for."""
        return np.asarray(Image.open(io.BytesIO(self.jpeg)).convert("RGB"))

    @property
    def patch(self) -> Box:
        """The patch in `picture`'s pixels."""
        side = self.picture.shape[0] / self.grid
        (top, bottom), (left, right) = ((round(place * side), round((place + 1) * side)) for place in self.cell)
        return left, top, right, bottom


@dataclass(frozen=True)
class Features:
    """What the review needs of the screen: `patches` [N,D] and `patches_multi` [L,N,D] float32, and where they lie."""

    patches: NDArray[np.float32]
    patches_multi: NDArray[np.float32]
    view: View
    """In the pixels of the tile."""
    tile: Tile | None = None
    """What of the frame they are of; None: the whole frame."""


class Later(Features):
    """Of a frame that is seldom reviewed: its megabytes are left where they are, and made anew for who asks."""

    def __init__(self, view: View, encode: Callable[[], Features], tile: Tile | None = None) -> None:
        self.__dict__.update(view=view, tile=tile, _encode=encode)

    def __getattr__(self, name: str) -> Any:
        if name not in ("patches", "patches_multi"):
            raise AttributeError(name)
        found: Features = self.__dict__["_encode"]()
        self.__dict__.update(patches=found.patches, patches_multi=found.patches_multi)
        return self.__dict__[name]


@dataclass(frozen=True)
class Screening:
    """What the screen found; the Inspection says what that means."""

    features: Features
    score: float
    map: NDArray[np.float32]
    worst: tuple[int, float]
    """Of the most abnormal patch: the nearest row of the similarity source, and the cosine to it."""
    worst_place: Box
    """That patch in the frame's pixels."""
    scope_distance: float | None = None
    """See `Inspection`."""


@dataclass(frozen=True)
class Inspection:
    frame: Frame = field(repr=False)
    object: str
    verdict: Verdict
    decided_by: Literal["screen", "review"] = "screen"
    reason: str | None = None
    """Why it was not inspected, that it is out of scope, or what kept the review from its end."""
    reason_code: Reason | None = None
    released: bool = False
    """Somebody showed that this bundle sees this object's defects, see `Inspector.standing`. Else a GOOD one is no
    more than not unlike what it was compared with."""
    score: float | None = None
    """The screen's image score; None if NOT_INSPECTED."""
    scope_distance: float | None = None
    """Cosine distance to the nearest enrolled frame, see `Scope`; None where there is no scope check."""
    compared_with: str | None = None
    """The similarity source: "normal features", "references", either "and stream", or "unlabelled frames"."""
    map: NDArray[np.float32] | None = field(default=None, repr=False)
    """[h,w] anomaly map in the frame's pixels; NaN where the frame was not inspected."""
    layout: Layout = field(default=WHOLE, repr=False)
    """What of the frame is inspected: region of interest, ignore mask, tiles."""
    regions: tuple[Region, ...] = ()
    """From the mask where there is one, and those of the map that it does not touch; the largest first."""
    nearest_normal: NearestNormal | None = None
    p_yes: float | None = None
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    """[h,w] in the frame's pixels; None without a review, or if P(yes) < 0.5."""
    draw_language_map: Callable[[], NDArray[np.float32]] | None = field(default=None, repr=False, compare=False)
    explanation: str | None = None
    seg_forced: bool = False
    """The answer reached its token limit and `<seg>` was forced."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    deadline_met: bool | None = None
    """Whether the result, with the review that was asked for, was there before the deadline; None if none was given."""
    deadline: float | None = field(default=None, repr=False, compare=False)
    """The screen's, or of the whole `inspect`: a time.monotonic() value."""
    features: Features | None = field(default=None, repr=False)
    """Kept until a review has used them."""
    review_rule: ReviewRule | None = field(default=None, repr=False, compare=False)
    """What a review may settle; None: nothing."""

    @cached_property
    def language_map(self) -> NDArray[np.float32] | None:
        """[h,w], like `map`: DSSL's second similarity, of the review's visual tokens. None without a review.

        Made when it is asked for.
        """
        return None if self.draw_language_map is None else self.draw_language_map()

    def without_arrays(self) -> Inspection:
        """The same result without pixels, maps, mask and pictures: what a long run keeps of each frame."""
        return replace(
            self,
            frame=replace(self.frame, pixels=np.zeros((0, 0, 3), np.uint8)),
            map=None,
            mask=None,
            draw_language_map=None,
            nearest_normal=None,
            features=None,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that `vmad inspect --json` prints."""
        return {
            "path": self.frame.path or self.frame.id,
            "frame_id": self.frame.id,
            "time": self.frame.time,
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
            "reason_code": None if self.reason_code is None else self.reason_code.value,
            "decided_by": self.decided_by,
            "compared_with": self.compared_with,
            "released": self.released,
            "seg_forced": self.seg_forced,
            "timings_ms": {stage: round(value, 3) for stage, value in self.timings_ms.items()},
            "deadline_met": self.deadline_met,
        }


def on_map(value: float, score: float, anomaly_map: NDArray[np.float32]) -> float:
    """Where `value`, one of image scores, lies on the map of a frame with this `score`.

    Smoothing presses a map's peaks, and a score is of several patches. So a map is read as if its peak was the score:
    then the worst place looks as the verdict says, and above `good_below` there is a place to look at.
    """
    peak = float(np.nanmax(anomaly_map))
    return peak * (value / score) if score > 0 and peak > 0 else value


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
    return largest_first(regions)


def largest_first(regions: Iterable[Region]) -> tuple[Region, ...]:
    return tuple(sorted(regions, key=lambda region: -region.area))
