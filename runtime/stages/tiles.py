"""What of a frame is inspected, and in which pieces: a region of interest, an ignore mask, tiles."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from vmad_edge.runtime.bundle import Record
from vmad_edge.runtime.decode import MIN_SIDE
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import View

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom exclusive."""
Size = tuple[int, int]
"""(height, width)."""
MOST_TILES = 32
"""Along a side: a thousand in all."""
LEAST_OVERLAP, MOST_OVERLAP = 0.1, 0.5
"""With less, a defect between two tiles is whole in neither; with more, the same is looked at again and again."""


class Tiles(Record):
    """Squares that cover the region of interest, each of which goes through the encoder like a frame of its own."""

    count: int = 1
    """Along the longer side; along the shorter one as many as it takes. 1: the region as a whole, square or not."""
    overlap: float = 0.25
    """Share of a tile's side that the next one covers too, at least."""

    @field_validator("count")
    @classmethod
    def _few(cls, count: int) -> int:
        if not 1 <= count <= MOST_TILES:
            raise ValueError(f"expected 1 to {MOST_TILES} tiles along the longer side, got {count}")
        return count

    @field_validator("overlap")
    @classmethod
    def _share(cls, overlap: float) -> float:
        if not LEAST_OVERLAP <= overlap <= MOST_OVERLAP:
            raise ValueError(f"expected an overlap of {LEAST_OVERLAP} to {MOST_OVERLAP} of a tile, got {overlap:g}")
        return overlap

    def side(self, size: Size) -> int:
        """Pixels, of a tile of a region of that size."""
        return math.ceil(max(size) / (self.count - (self.count - 1) * self.overlap))

    def spans(self, length: int, side: int) -> list[tuple[int, int]]:
        """Start and stop of each tile along a side of the region, evenly spread."""
        if length <= side:
            return [(0, length)]
        number = math.ceil((length - self.overlap * side) / ((1 - self.overlap) * side) - 1e-9)
        return [(round(start), round(start) + side) for start in np.linspace(0, length - side, number).tolist()]


_ONE = Tiles()


@dataclass(frozen=True)
class Tile:
    """A piece of a frame that the encoder, and the review, sees as a whole."""

    frame: Frame
    """Its pixels alone; those to ignore are filled in, so that nothing hangs on them."""
    box: Box
    """Where it lies in the whole frame."""
    ignored: NDArray[np.bool_] | None = None
    """[h,w] of its pixels; None: none."""

    @staticmethod
    def whole(frame: Frame) -> Tile:
        return Tile(frame, _whole(_size(frame)))

    @property
    def size(self) -> Size:
        return _size(self.frame)

    def in_frame(self, values: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
        """`values` [h,w] of the tile's pixels → [H,W] of a frame of that size; NaN elsewhere, and where ignored."""
        return values if self.size == size and self.ignored is None else merged([(self, values)], size)

    def view_in_frame(self, view: View) -> View:
        left, top, _, _ = self.box
        return View(view.left + left, view.top + top, view.right + left, view.bottom + top)

    def marked(self, mask: NDArray[np.bool_], size: Size) -> NDArray[np.bool_]:
        """`mask` [h,w] of the tile's pixels → [H,W] of a frame of that size; what is ignored is not marked."""
        whole = np.zeros(size, np.bool_)
        cut(whole, self.box)[...] = mask if self.ignored is None else mask & ~self.ignored
        return whole


@dataclass(frozen=True, eq=False)
class Layout:
    """Of one object's frames, in their pixels. As it stands here: the whole frame at once.

    Raises:
        VmadError: a region without an inside, or outside of the mask; a mask that leaves nothing of it, or that
            ignores nothing.
    """

    region: Box | None = None
    """Of interest: nothing else is looked at. None: the whole frame."""
    ignored: NDArray[np.bool_] | None = field(default=None, repr=False)
    """[h,w], of the frame's size; None: nothing is ignored."""
    tiles: Tiles = _ONE

    def __post_init__(self) -> None:
        if self.region is not None:
            four = len(self.region) == 4 and all(isinstance(edge, int | np.integer) for edge in self.region)
            left, top, right, bottom = self.region if four else (0, 0, 0, 0)
            if min(left, top) < 0 or min(right - left, bottom - top) < MIN_SIDE:
                raise VmadError(
                    "expected a region of interest LEFT,TOP,RIGHT,BOTTOM in the frame's whole pixels, from 0,0 on and "
                    f"at least {MIN_SIDE} wide and high, got {_said(self.region)}"
                )
        if self.ignored is not None:
            if self.ignored.ndim != 2 or self.ignored.dtype != np.bool_:
                found = f"{list(self.ignored.shape)} {self.ignored.dtype}"
                raise VmadError(f"expected an ignore mask [h,w] of bool, of the frame's size, got {found}")
            if not self.ignored.any():
                raise VmadError(
                    "the ignore mask ignores nothing: expected white where not to look (alpha does not count)"
                )
            if self.region is not None and (fault := _beyond(self.region, _shape(self.ignored))):
                raise VmadError(f"the ignore mask has {_by(_shape(self.ignored))} pixels; {fault}")
            if cut(self.ignored, self.region).all():
                raise VmadError("the ignore mask leaves nothing to inspect: expected black where to look")

    @property
    def is_whole(self) -> bool:
        """Whether frames are inspected whole and at once."""
        return self.region is None and self.ignored is None and self.tiles.count == 1

    def fault(self, size: Size) -> str | None:
        """Why a frame of that size cannot be inspected so; None: it can."""
        if self.region is not None and (fault := _beyond(self.region, size)):
            return f"{_by(size)} pixels; {fault}: look at the camera's settings, or enroll with another --roi"
        if self.ignored is not None and _shape(self.ignored) != size:
            return (
                f"{_by(size)} pixels; the ignore mask has {_by(_shape(self.ignored))}: look at the camera's settings, "
                "or enroll with a mask of the frame's size (--ignore)"
            )
        region = self.box(size)
        side = self.tiles.side((region[3] - region[1], region[2] - region[0]))
        if side < MIN_SIDE:
            return (
                f"{_by(size)} pixels; {self.tiles.count} tiles along the longer side would have {side} each, expected "
                f"at least {MIN_SIDE}: enroll with fewer --tiles"
            )
        return None

    def box(self, size: Size) -> Box:
        """What is looked at of a frame of that size."""
        return self.region or _whole(size)

    def cut(self, frame: Frame, fill: tuple[int, int, int]) -> list[Tile]:
        """The tiles of a frame, row by row; those that are ignored altogether are left out.

        Args:
            fill: the colour of ignored pixels.
        """
        left, top, right, bottom = self.box(_size(frame))
        width, height = right - left, bottom - top
        side = self.tiles.side((height, width))
        boxes = [
            (left + x0, top + y0, left + x1, top + y1)
            for y0, y1 in self.tiles.spans(height, side)
            for x0, x1 in self.tiles.spans(width, side)
        ]
        tiles = (self._tile(frame, box, fill) for box in boxes)
        return [tile for tile in tiles if tile.ignored is None or not tile.ignored.all()]

    def _tile(self, frame: Frame, box: Box, fill: tuple[int, int, int]) -> Tile:
        pixels = cut(frame.pixels, box)
        ignored = None if self.ignored is None else cut(self.ignored, box)
        if ignored is None or not ignored.any():
            return Tile(replace(frame, pixels=pixels), box)
        return Tile(
            replace(frame, pixels=np.where(ignored[:, :, None], np.array(fill, np.uint8), pixels)), box, ignored
        )

    @property
    def key(self) -> str:
        """Equal for equal layouts; of the whole frame empty."""
        mask = b"" if self.ignored is None else np.packbits(self.ignored).tobytes()
        return "" if self.is_whole else f"{self.in_words()} {hashlib.sha256(mask).hexdigest()}"

    def in_words(self) -> str:
        """For people."""
        if self.is_whole:
            return "the whole frame"
        said = ["the whole frame" if self.region is None else f"region of interest {_said(self.region)}"]
        if self.ignored is not None:
            said.append(f"{cut(self.ignored, self.region).mean():.1%} of it ignored")
        if self.tiles.count > 1:
            said.append(f"{self.tiles.count} tiles along its longer side, which overlap by {self.tiles.overlap:.0%}")
        return ", ".join(said)


WHOLE = Layout()
"""The whole frame at once."""


def merged(parts: Iterable[tuple[Tile, NDArray[np.float32]]], size: Size) -> NDArray[np.float32]:
    """Each tile's map [h,w] → that of a frame of `size`; NaN where no tile has a number, and where ignored.

    Where tiles overlap the mean, weighted by how far a pixel lies inside of each: from one tile to the next it goes
    over without a step.
    """
    total, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for tile, values in parts:
        weight = np.outer(*map(_window, tile.size))
        weight[np.isnan(values) if tile.ignored is None else np.isnan(values) | tile.ignored] = 0
        cut(total, tile.box)[...] += np.where(weight > 0, values, 0) * weight
        cut(weights, tile.box)[...] += weight
    total[weights == 0] = np.nan
    return np.divide(total, weights, out=total, where=weights > 0)


def _window(length: int) -> NDArray[np.float32]:
    """[length]: 1 at both ends, rising by 1 a pixel."""
    return np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)).astype(np.float32)


def cut(array: NDArray[Any], box: Box | None) -> NDArray[Any]:
    """What of an array [h,w,…] lies in the box; None: all."""
    left, top, right, bottom = box or _whole(_shape(array))
    return array[top:bottom, left:right]


def _shape(array: NDArray[Any]) -> Size:
    return array.shape[0], array.shape[1]


def _size(frame: Frame) -> Size:
    return _shape(frame.pixels)


def _whole(size: Size) -> Box:
    return 0, 0, size[1], size[0]


def _beyond(region: Box, size: Size) -> str | None:
    outside = region[2] > size[1] or region[3] > size[0]
    return f"the region of interest {_said(region)} reaches beyond" if outside else None


def _said(region: Box) -> str:
    return ",".join(map(str, region))


def _by(size: Size) -> str:
    return f"{size[1]}×{size[0]}"
