"""Whether a frame can be judged at all: is there light, is it sharp, is it whole? No network is asked.

A frame is measured on its grey picture: on up to 256 of its columns and of its rows in full resolution, on a reduced
picture, and on crops in full resolution. A person who enrolls or calibrates shows good frames, of which the limits are
learned; without, they are what no camera's frame of anything passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from vmad_edge.runtime.bundle import Record
from vmad_edge.runtime.decode import MAX_SIDE
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.inspection import Reason
from vmad_edge.runtime.stages.tiles import Box

_SAMPLED = 256
"""Rows and columns that are looked at, spread evenly."""
_FLAT = 4
"""A line whose grey levels differ by no more is constant; JPEG and sensors add that much to one."""
_REDUCED = 256
"""Longer side of the reduced picture."""
_CROPS, _CROP = 5, 64
"""A side: of a grid of crops, and of a crop."""
_WIDTH = 0.85
"""Share of the width over which the picture ends at once where a transfer did; few objects are as wide and straight."""
_RING = 16
"""Rows over which a JPEG smears the edge of what is missing."""
_JUMP = 12
"""Grey levels from one pixel to the next that are more than noise."""
_SAME_KIND = 3
"""Frames of one size, or all grey or all coloured, from which on that is no accident. [ASSUME]"""


@dataclass(frozen=True)
class Fitness:
    """What was measured. Grey levels are 0 … 255, shares 0 … 1."""

    size: tuple[int, int]
    """(height, width)."""
    coloured: float
    """Share of pixels whose channels differ."""
    brightest: float
    """Grey level that a thousandth of the pixels are above."""
    darkest: float
    """… that a thousandth are below."""
    mean: float
    black: float
    """Share of pixels with nothing in any channel."""
    white: float
    """Share of pixels with a channel that is full."""
    contrast: float
    """Grey levels between the extremes of a row or of a column, whichever has less, in the hundredth that has most."""
    correlation: float
    """Of pixels two apart, along rows or columns, whichever is stronger: 0 of noise."""
    edges: float
    """The steepest two hundredth of the reduced picture's steps from pixel to pixel, as a share of all its levels."""
    detail: float
    """Deviation of the smoothed Laplacian in the four crops that have most, as a share of the levels between the
    extremes."""
    flat_rows: float
    """Constant rows one after the other, as a share of all."""
    flat_columns: float
    seam: float
    """Share of the columns that jump between two rows, beyond the share that does one row before or after."""
    cut: float
    """Share of the frame that a constant band along one side takes, if the picture ends there from one line to the
    next over most of the width: what was not transferred. Bands on two opposite sides are a frame's own border."""


Number = Annotated[float, Field(allow_inf_nan=False)]


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("expected the lower limit first")
    return limits


Levels = Annotated[
    tuple[Annotated[Number, Field(ge=0, le=255)], Annotated[Number, Field(ge=0, le=255)]], AfterValidator(_ordered)
]
Shares = Annotated[
    tuple[Annotated[Number, Field(ge=0, le=1)], Annotated[Number, Field(ge=0, le=1)]], AfterValidator(_ordered)
]


_Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]


class FitnessLimits(Record):
    """The least and most of each number of `Fitness`. As they stand here: of a frame of which nothing is known."""

    frames: Annotated[int, Field(ge=0)] = 0
    """Good frames that they were learned from; 0: from none."""
    size: tuple[_Side, _Side] | None = None
    """(height, width), where all had the same; None: any."""
    grey: bool | None = None
    """Whether all were grey or all coloured; None: both, or too few to tell."""
    brightest: Levels = (16, 255)
    darkest: Levels = (0, 240)
    mean: Levels = (0, 255)
    black: Shares = (0, 1)
    white: Shares = (0, 1)
    contrast: Levels = (4, 255)
    correlation: Shares = (0.1, 1)
    edges: Shares = (0.04, 1)
    detail: Shares = (0, 1)
    flat_rows: Shares = (0, 1)
    flat_columns: Shares = (0, 1)
    seam: Shares = (0, 1)
    cut: Shares = (0, 0.04)


class UnfitError(FrameError):
    """A frame that cannot be judged, and its reason code."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class _Check(NamedTuple):
    """One side of one number: a frame below its lower limit (side 0) or above its upper one (side 1) is unfit."""

    number: str
    side: int
    reason: Reason
    what: str
    advice: str


_LIGHT = "look at lamp, lens cap, aperture and exposure"
_TRANSFER = "look at cable, trigger and buffers"
_PICTURE = "look at what the camera sees, and at its test pattern"
_FOCUS = "look at focus, lens and working distance"
_CHECKS = (
    _Check("brightest", 0, Reason.UNFIT_DARK, "too dark: its brightest pixels have grey level", _LIGHT),
    _Check("darkest", 1, Reason.UNFIT_BRIGHT, "too bright: its darkest pixels have grey level", _LIGHT),
    _Check("contrast", 0, Reason.UNFIT_CONSTANT, "shows nothing: grey levels along its rows or columns span", _PICTURE),
    _Check(
        "correlation", 0, Reason.UNFIT_CONSTANT, "shows nothing but noise: neighbouring pixels correlate by", _PICTURE
    ),
    _Check(
        "cut", 1, Reason.UNFIT_TORN, "not whole: a constant band that begins from one line to the next takes", _TRANSFER
    ),
    _Check("flat_rows", 1, Reason.UNFIT_TORN, "not whole: rows without any content make up", _TRANSFER),
    _Check("flat_columns", 1, Reason.UNFIT_TORN, "not whole: columns without any content make up", _TRANSFER),
    _Check("seam", 1, Reason.UNFIT_TORN, "torn: between two rows alone jump, of all columns,", _TRANSFER),
    _Check("mean", 0, Reason.UNFIT_DARK, "too dark: its mean grey level is", _LIGHT),
    _Check("black", 1, Reason.UNFIT_DARK, "too dark: black pixels make up", _LIGHT),
    _Check("mean", 1, Reason.UNFIT_BRIGHT, "too bright: its mean grey level is", _LIGHT),
    _Check("white", 1, Reason.UNFIT_BRIGHT, "too bright: pixels with a saturated channel make up", _LIGHT),
    _Check("edges", 0, Reason.UNFIT_BLURRED, "blurred: its steepest edges have, of its contrast,", _FOCUS),
    _Check("detail", 0, Reason.UNFIT_BLURRED, "blurred: its finest detail has, of its contrast,", _FOCUS),
)
"""In the order asked: first what leaves nothing to see, then what is missing, then what is seen badly."""


def measure(pixels: NDArray[np.uint8], region: Box | None = None) -> Fitness:
    """`pixels` [h,w,3] RGB → its numbers. Some three milliseconds for a megapixel on one core.

    Args:
        region: of interest: all but the size is of what lies in it. None: the whole frame.
    """
    size = pixels.shape[0], pixels.shape[1]
    left, top, right, bottom = region or (0, 0, size[1], size[0])
    pixels = pixels[top:bottom, left:right]
    height, width = pixels.shape[:2]
    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    rows = _sampled(grey, (min(width, _SAMPLED), height))
    columns = np.asarray(cv2.transpose(_sampled(grey, (width, min(height, _SAMPLED)))), np.uint8)
    few = _sampled(pixels, (min(width, _SAMPLED), min(height, _SAMPLED)))
    levels = np.cumsum(cv2.calcHist([cv2.cvtColor(few, cv2.COLOR_RGB2GRAY)], [0], None, [256], [0, 256])[:, 0])
    darkest, brightest = np.searchsorted(levels, (0.001 * levels[-1], 0.999 * levels[-1])).tolist()
    of_rows, of_columns = _spans(rows), _spans(columns)
    return Fitness(
        size=size,
        coloured=_coloured(few),
        brightest=float(brightest),
        darkest=float(darkest),
        mean=cv2.mean(rows)[0],
        black=_between(few, 0, 2),
        white=1 - _between(few, 0, 253),
        contrast=min(float(np.percentile(spans, 99)) for spans in (of_rows, of_columns)),
        correlation=max(_correlation(rows), _correlation(columns)),
        edges=_edges(grey),
        detail=_detail(grey, brightest - darkest),
        flat_rows=_longest(of_rows <= _FLAT) / height,
        flat_columns=_longest(of_columns <= _FLAT) / width,
        seam=_seam(rows),
        cut=max(_cut(rows, of_rows), _cut(columns, of_columns)),
    )


def unfit(found: Fitness, limits: FitnessLimits) -> tuple[Reason, str] | None:
    """Why the frame cannot be judged, as a code and as a sentence with what was measured, the limit, and what to do."""
    if limits.size is not None and found.size != limits.size:
        (height, width), (h, w) = limits.size, found.size
        return Reason.UNFIT_SIZE, (
            f"{w}×{h} pixels; all {limits.frames} good frames have {width}×{height}: look at the camera's settings, or "
            "enroll frames like this"
        )
    if (limits.grey is True and found.coloured > 0.5) or (limits.grey is False and found.coloured == 0):
        kinds = {True: "grey (one channel)", False: "in colour (three channels)"}
        return Reason.UNFIT_SIZE, (
            f"{kinds[not limits.grey]}; all {limits.frames} good frames are {kinds[limits.grey]}: look at the camera's "
            "pixel format, or enroll frames like this"
        )
    for check in _CHECKS:
        value, limit = getattr(found, check.number), getattr(limits, check.number)[check.side]
        if value < limit if check.side == 0 else value > limit:
            known = f"{limits.frames} good frames say" if limits.frames else "of any frame,"
            return check.reason, (
                f"{check.what} {_said(check.number, value)}; {known} at {('least', 'most')[check.side]} "
                f"{_said(check.number, limit)}: {check.advice}"
            )
    return None


def check(pixels: NDArray[np.uint8], limits: FitnessLimits, region: Box | None = None) -> Fitness:
    """What `pixels` [h,w,3] RGB measure; `region` as of `measure`.

    Raises:
        UnfitError: they are not within the limits.
    """
    found = measure(pixels, region)
    if (fault := unfit(found, limits)) is not None:
        raise UnfitError(*fault)
    return found


def learned(good: Sequence[Fitness]) -> FitnessLimits:
    """The limits that good frames' numbers give, nowhere wider than those of a frame of which nothing is known.

    A limit is the frames' own extreme, and beyond it a share of what they differ by and of the way to the end of the
    scale: both are large for few frames. Of a hundred frames and more the outermost hundredth on each side is ignored.
    [ASSUME: the shares]
    """
    anything = FitnessLimits()
    limits: dict[str, Any] = {check.number: list(getattr(anything, check.number)) for check in _CHECKS}
    for check in _CHECKS:
        values = sorted((getattr(frame, check.number) for frame in good), reverse=check.side == 1)
        ignored = len(values) // 100
        extreme, other = values[ignored], values[-1 - ignored]
        end = (0, 255 if getattr(anything, check.number)[1] > 1 else 1)[check.side]
        margin = min(1, 20 / len(good)) * abs(other - extreme) + (0.12 + 0.45 / math.sqrt(len(good))) * abs(
            extreme - end
        )
        limit, widest = extreme + (-1, 1)[check.side] * margin, limits[check.number][check.side]
        limits[check.number][check.side] = max(limit, widest) if check.side == 0 else min(limit, widest)
    sizes = {frame.size for frame in good}
    greys = {True if frame.coloured == 0 else False if frame.coloured > 0.1 else None for frame in good}
    enough = len(good) >= _SAME_KIND
    return FitnessLimits(
        frames=len(good),
        size=sizes.pop() if enough and len(sizes) == 1 else None,
        grey=greys.pop() if enough and len(greys) == 1 else None,
        **{number: tuple(pair) for number, pair in limits.items()},
    )


def _said(number: str, value: float) -> str:
    return f"{value:.0f}" if number in ("brightest", "darkest", "mean", "contrast") else f"{100 * value:.3g}%"


def _sampled(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_NEAREST), np.uint8)


def _spans(lines: NDArray[np.uint8]) -> NDArray[np.int32]:
    """[n,m] → [n]: what the levels of each line span."""
    most, least = (cv2.reduce(lines, 1, extreme)[:, 0] for extreme in (cv2.REDUCE_MAX, cv2.REDUCE_MIN))
    return np.asarray(np.subtract(most, least, dtype=np.int32))


def _between(pixels: NDArray[np.uint8], lower: int, upper: int) -> float:
    """Share of the pixels whose channels all lie there."""
    inside = cv2.inRange(pixels, (lower, lower, lower), (upper, upper, upper))
    return cv2.countNonZero(inside) / inside.size


def _coloured(pixels: NDArray[np.uint8]) -> float:
    red, green, blue = cv2.split(pixels)
    apart = cv2.max(cv2.absdiff(red, green), cv2.absdiff(green, blue))
    return cv2.countNonZero(cv2.threshold(apart, _FLAT, 255, cv2.THRESH_BINARY)[1]) / red.size


def _longest(flags: NDArray[np.bool_]) -> int:
    """The longest run of True."""
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int(np.max(ends[1::2] - ends[::2], initial=0))


def _correlation(lines: NDArray[np.uint8]) -> float:
    """Across lines two apart, 0 … 1; noise of a sensor's colour pattern ends before."""
    few = lines[:, :: max(1, lines.shape[1] // 64)].astype(np.float32)
    few -= few.mean()
    power = float(np.vdot(few, few)) / few.size
    return min(1.0, abs(float(np.vdot(few[:-2], few[2:]))) / few[2:].size / power) if power else 0.0


def _edges(grey: NDArray[np.uint8]) -> float:
    height, width = grey.shape
    by = max(1, min(max(height, width) // _REDUCED, min(height, width) // 8))
    height, width = height // by, width // by
    reduced = cv2.resize(grey[: height * by, : width * by], (width, height), interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(reduced.astype(np.float32), (0, 0), 0.8)  # else it is noise that is steepest
    steps = np.concatenate([np.abs(smooth[:, 1:] - smooth[:, :-1]).ravel(), np.abs(smooth[1:] - smooth[:-1]).ravel()])
    few = max(1, len(steps) // 200)
    return min(1.0, float(np.partition(steps, -few)[-few:].mean()) / (float(np.ptp(smooth)) + 1))


def _detail(grey: NDArray[np.uint8], levels: float) -> float:
    height, width = grey.shape
    tops, lefts = (np.linspace(0, max(0, side - _CROP), _CROPS, dtype=int).tolist() for side in (height, width))
    crops = (grey[top : top + _CROP, left : left + _CROP] for top in tops for left in lefts)
    deviations = sorted(cv2.meanStdDev(_laplacian(crop))[1].item() for crop in crops)
    return min(1.0, math.fsum(deviations[-4:]) / 4 / (levels + 1))


def _laplacian(crop: NDArray[np.uint8]) -> NDArray[np.float32]:
    # Of a slightly smoothed picture (Marr and Hildreth 1980): a sensor's noise would outdo what a lens can show.
    smooth = cv2.GaussianBlur(crop.astype(np.float32), (5, 5), 1)
    return np.asarray(cv2.Laplacian(smooth, cv2.CV_32F), np.float32)


def _seam(rows: NDArray[np.uint8]) -> float:
    _, jumps = cv2.threshold(cv2.absdiff(rows[1:], rows[:-1]), _JUMP, 255, cv2.THRESH_BINARY)
    jumping = cv2.reduce(jumps, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F)[:, 0] / 255
    beside = np.maximum(np.concatenate([[0], jumping[:-1]]), np.concatenate([jumping[1:], [0]]))
    return max(0.0, float((jumping - beside).max()))


def _cut(lines: NDArray[np.uint8], spans: NDArray[np.int32]) -> float:
    """Of the two sides at which `lines` [n,m] begin and end."""
    first, last = _missing(lines[::-1], spans[::-1]), _missing(lines, spans)
    return abs(last - first) / len(lines)


def _missing(lines: NDArray[np.uint8], spans: NDArray[np.int32]) -> int:
    """Constant lines at the end of `lines` [n,m], if what comes before them stops at once; else 0."""
    told = np.flatnonzero((spans > _FLAT) | (np.abs(lines[:, 0].astype(np.int32) - int(lines[-1, 0])) > _FLAT))
    if not len(told) or told[-1] == len(lines) - 1:
        return 0
    begin = int(told[-1]) + 1
    around = lines[max(0, begin - _RING) : begin + 1].astype(np.int32)
    steps = np.quantile(np.abs(np.diff(around, axis=0)), 1 - _WIDTH, axis=1)
    whole = float(np.quantile(np.abs(around[0] - around[-1]), 1 - _WIDTH))
    return len(lines) - begin if steps.max() >= max(6.0, 0.6 * whole) else 0
