"""Inspections as pictures: what a frame's map says, where its regions are, and what its worst place is like."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vmad_edge.runtime.bundle import Thresholds
from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.inspection import Inspection, NearestNormal, Verdict, on_map
from vmad_edge.runtime.stages.tiles import Box

Pixels = NDArray[np.uint8]
COLOURS = {
    Verdict.GOOD: (0, 128, 60),
    Verdict.DEFECT: (200, 30, 30),
    Verdict.UNCERTAIN: (190, 120, 0),
    Verdict.NOT_INSPECTED: (90, 90, 90),
}
NUMBERED = 9
"""Regions of a frame that have a number, the largest ones."""
THUMBNAIL, _LARGE, _PLACE = 320, 800, 200
"""Longest sides in pixels."""
_AROUND = 7
"""Sides of a place's surroundings, in patches."""
_OUTLINE = (0, 230, 255)
_GAP = 8
_DEEPEST = 1.5
"""Times defect_above: from there on the colours stay the same."""

Stop = tuple[int, int, int, float]
"""Red, green, blue, and how much of them."""
UNSURE: tuple[Stop, Stop] = ((255, 225, 60, 0.35), (255, 160, 0, 0.7))
FAULTY: tuple[Stop, Stop] = ((215, 25, 25, 0.6), (200, 0, 200, 0.8))
RANKED: tuple[Stop, Stop] = ((120, 190, 255, 0.3), (40, 60, 220, 0.75))
"""The hues' first and last colours: light amber, then dark red. Their lightness tells them apart without hue."""


@dataclass(frozen=True)
class Scale:
    """Of a map's colours: none below `begin`, one hue from there, another from `change`, its deepest from `top` on.

    Without `change` one hue ranks the values: nobody said what they mean.
    """

    begin: float
    change: float | None
    top: float

    @staticmethod
    def of(values: NDArray[np.float32], score: float, thresholds: Thresholds | None) -> Scale:
        """A frame's: UNCERTAIN begins at `begin`, DEFECT at `change`. Without thresholds its own highest tenth."""
        if thresholds is None:
            return Scale(float(np.nanquantile(values, 0.9)), None, float(np.nanmax(values)))
        good, defect = thresholds.good_below, thresholds.defect_above
        begin, change, top = (on_map(value, score, values) for value in (good, defect, _DEEPEST * defect))
        return Scale(begin, change, top)

    def colours(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of `values` [n] from `begin` on: red, green, blue and their share [n,4]."""
        marks = [mark for mark in (self.begin, self.change, self.top) if mark is not None]
        hues = _ramp(RANKED, 256) if self.change is None else np.vstack([_ramp(UNSURE, 128), _ramp(FAULTY, 128)])
        found: NDArray[np.float32] = hues[np.interp(values, marks, np.linspace(0, 255, len(marks)).round()).astype(int)]
        return found


def _ramp(ends: tuple[Stop, Stop], count: int) -> NDArray[np.float32]:
    return np.linspace(*ends, count, dtype=np.float32)


def heat(pixels: Pixels, values: NDArray[np.float32], scale: Scale) -> Pixels:
    """`pixels` [h,w,3] under the colours of `values` [h,w]; what was not inspected (NaN) is grey and hatched.

    Under a colour they are grey, so that a brown part does not change it.
    """
    shown, grey = pixels.copy(), cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None]
    coloured, unseen = values >= scale.begin, np.isnan(values)
    colours = scale.colours(values[coloured])
    share = colours[:, 3:]
    shown[coloured] = grey[coloured] * (1 - share) + colours[:, :3] * share
    shown[unseen] = grey[unseen] // 2 + 64
    shown[unseen & (np.add.outer(*map(np.arange, values.shape)) % 16 < 3)] = 200
    return shown


def outlined(pixels: Pixels, mask: NDArray[np.bool_] | None) -> Pixels:
    """A copy of `pixels` [h,w,3] with the outline of `mask` [h,w]."""
    shown = pixels.copy()
    if mask is not None:
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, outlines, -1, _OUTLINE, max(1, round(max(shown.shape[:2]) / 250)))
    return shown


def fit(pixels: Pixels, side: int = THUMBNAIL) -> Pixels:
    """As large as `side` allows."""
    height, width = pixels.shape[:2]
    zoom = side / max(height, width)
    return _sized(pixels, (max(1, round(height * zoom)), max(1, round(width * zoom))))


def _sized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """`size` is (height, width)."""
    how = cv2.INTER_AREA if size[0] < pixels.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=how), np.uint8)


def thumbnail(inspection: Inspection, thresholds: Thresholds | None) -> Pixels | None:
    """The frame under its map's colours, with its regions; None: there are no pixels."""
    if not inspection.frame.pixels.size:
        return None
    return _numbered(heated(inspection, fit(inspection.frame.pixels), thresholds), inspection)


def places(inspection: Inspection) -> Pixels | None:
    """The frame's worst place, and beside it the most similar normal one; None: it has none."""
    nearest = inspection.nearest_normal
    return None if nearest is None else joined(_places(inspection, nearest, _PLACE))


def sheet(inspection: Inspection, thresholds: Thresholds | None, words: str) -> Pixels | None:
    """All in one: the frame with its regions, its map, both places; below it the verdict and `words`."""
    if not inspection.frame.pixels.size:
        return None
    large = fit(inspection.frame.pixels, _LARGE)
    mask = None if inspection.mask is None else _sized(inspection.mask.astype(np.uint8), large.shape[:2]) > 0
    panels = [_numbered(outlined(large, mask), inspection)]
    if inspection.map is not None:
        panels.append(_numbered(heated(inspection, large, thresholds), inspection))
    wide = large.shape[1] > 2 * large.shape[0]
    if inspection.nearest_normal is not None:
        side = _LARGE if wide else large.shape[0]
        panels.append(joined(_places(inspection, inspection.nearest_normal, (side - _GAP) // 2), below=not wide))
    whole = joined(panels, below=wide)
    return joined([whole, _footer(inspection, words, whole.shape[1])], below=True)


def heated(inspection: Inspection, shown: Pixels, thresholds: Thresholds | None) -> Pixels:
    """`shown`, the frame at any size, under its map's colours; as it is without a map."""
    if inspection.map is None or inspection.score is None:
        return shown
    resized = cv2.resize(inspection.map, shown.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    values = np.asarray(resized, np.float32)
    return heat(shown, values, Scale.of(values, inspection.score, thresholds))


def _numbered(shown: Pixels, inspection: Inspection) -> Pixels:
    """`shown` with the regions' boxes; the largest have their numbers, as the page lists them."""
    zoom = max(shown.shape[:2]) / max(inspection.frame.pixels.shape[:2])
    sheet = Image.fromarray(shown)
    draw = ImageDraw.Draw(sheet)
    font = _font(max(12, max(sheet.size) // 50))
    for number, region in reversed(list(enumerate(inspection.regions, 1))):
        left, top, right, bottom = (zoom * side for side in region.box)
        _box(draw, (left, top, right, bottom))
        if number <= NUMBERED:
            width, height = (round(size) for size in draw.textbbox((0, 0), str(number), font)[2:])
            x, y = min(left, sheet.width - width - 8), max(0.0, top - height - 4)
            draw.rectangle((x, y, x + width + 8, y + height + 4), "black")
            draw.text((x + 4, y), str(number), "white", font)
    return np.asarray(sheet)


def _box(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float]) -> None:
    """White in black: it shows on everything."""
    left, top, right, bottom = box
    for out, colour in ((2, "black"), (1, "white"), (0, "black")):
        draw.rectangle((left - out, top - out, max(left, right - 1) + out, max(top, bottom - 1) + out), None, colour)


def _places(inspection: Inspection, nearest: NearestNormal, side: int) -> list[Pixels]:
    """The inspected frame's worst place and the normal one, both `side` high or wide, in surroundings of one size."""
    left, top, right, bottom = nearest.place
    zoom = side / max(right - left, bottom - top)
    size = max(1, round((bottom - top) * zoom)), max(1, round((right - left) * zoom))
    return [
        _around(inspection.frame.pixels, nearest.place, size),
        _around(nearest.picture, nearest.patch, size),
    ]


def _around(pixels: Pixels, patch: Box, size: tuple[int, int]) -> Pixels:
    """`patch` of `pixels`, in a box, amid its surroundings."""
    (left, right), (top, bottom) = (_extent(patch[axis], patch[axis + 2], pixels.shape[1 - axis]) for axis in (0, 1))
    shown = Image.fromarray(_sized(pixels[top:bottom, left:right], size))
    x, y = size[1] / (right - left), size[0] / (bottom - top)
    box = ((patch[0] - left) * x, (patch[1] - top) * y, (patch[2] - left) * x, (patch[3] - top) * y)
    _box(ImageDraw.Draw(shown), box)
    return np.asarray(shown)


def _extent(start: int, stop: int, length: int) -> tuple[int, int]:
    """`_AROUND` times as much, moved into what there is."""
    whole = min(length, _AROUND * (stop - start))
    first = min(max(0, (start + stop - whole) // 2), length - whole)
    return first, first + whole


def joined(panels: Sequence[Pixels], below: bool = False) -> Pixels:
    """Beside each other, or one below the other."""
    axis = 0 if below else 1
    across = max(panel.shape[1 - axis] for panel in panels)
    gap = np.full((_GAP, across, 3) if below else (across, _GAP, 3), 255, np.uint8)
    padded = []
    for panel in panels:
        missing = [(0, 0), (0, 0), (0, 0)]
        missing[1 - axis] = 0, across - panel.shape[1 - axis]
        padded += [np.pad(panel, missing, constant_values=255), gap]
    return np.concatenate(padded[:-1], axis)


def _footer(inspection: Inspection, words: str, width: int) -> Pixels:
    small, large = _font(18), _font(24)
    lines = textwrap.wrap(words, max(20, width // 9))[:3]
    footer = Image.new("RGB", (width, 40 + 24 * len(lines)), "white")
    draw = ImageDraw.Draw(footer)
    draw.text((_GAP, 4), "   ".join(facts(inspection)), COLOURS[inspection.verdict], large)
    for number, line in enumerate(lines):
        draw.text((_GAP, 38 + 24 * number), line, "black", small)
    return np.asarray(footer)


def facts(inspection: Inspection) -> list[str]:
    """The verdict, and what it rests on."""
    found = [inspection.verdict.value]
    if inspection.score is not None:
        found.append(f"score {inspection.score:.3f}")
    if inspection.p_yes is not None:
        found.append(f"P(yes) {inspection.p_yes:.2f}")
    if inspection.verdict is not Verdict.NOT_INSPECTED:
        found.append(f"decided by the {inspection.decided_by}")
    if inspection.verdict is Verdict.GOOD and not inspection.released:
        found.append("not released")
    return found


def write_png(path: Path, image: Image.Image) -> None:
    """Raises: OSError: it cannot be written there; then nothing is."""
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    write_whole(path, png.getvalue())


def write_map(path: Path, heat: NDArray[np.float32]) -> None:
    """`heat` [h,w] as a TIFF of one float32 channel, not compressed: every reader has that. NaN stays NaN.

    Raises:
        OSError: it cannot be written there.
    """
    _, data = cv2.imencode(".tiff", heat, (cv2.IMWRITE_TIFF_COMPRESSION, 1))
    write_whole(path, data.tobytes())


def jpeg(pixels: Pixels) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "JPEG", quality=85)
    return target.getvalue()


def data_uri(pixels: Pixels) -> str:
    """For a page that is to be one file."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(pixels)).decode()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
