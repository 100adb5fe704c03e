"""Pictures for people: a frame, its heat map, its mask, and the sentence."""

from __future__ import annotations

import textwrap

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vmad_edge.runtime.inspection import Inspection, Verdict

COLOURS = {
    Verdict.GOOD: (0, 128, 60),
    Verdict.DEFECT: (200, 30, 30),
    Verdict.UNCERTAIN: (190, 120, 0),
    Verdict.NOT_INSPECTED: (90, 90, 90),
}
_PANEL = 320
_GAP = 12
_TEXT_HEIGHT = 96


def picture(inspection: Inspection, heat_top: float) -> Image.Image:
    """Side by side: the frame with boxes and mask outline, the heat map, and the nearest normal place; text below.

    Args:
        heat_top: the map value that is drawn in the hottest colour; one value for a whole report.
    """
    panels = [(_fit(_outlined(inspection)), "frame")] if inspection.frame.pixels.size else []
    if inspection.map is not None:
        panels.append((_fit(heat(inspection, heat_top)), "anomaly map"))
    if inspection.nearest_normal is not None:
        panels.append((_fit(inspection.nearest_normal.picture), "most similar normal place"))
    width = max(2, len(panels)) * (_PANEL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _PANEL + _TEXT_HEIGHT + 3 * _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(13), ImageFont.load_default(18)
    for number, (panel, title) in enumerate(panels):
        left = _GAP + number * (_PANEL + _GAP)
        sheet.paste(panel, (left + (_PANEL - panel.width) // 2, _GAP + 16))
        draw.text((left, _GAP - 4), title, "black", small)
    top = _PANEL + 2 * _GAP + 14
    draw.text((_GAP, top), _headline(inspection), COLOURS[inspection.verdict], large)
    words = " ".join(filter(None, (inspection.explanation, inspection.reason)))
    for line, text in enumerate(textwrap.wrap(words, width // 7)[:3]):
        draw.text((_GAP, top + 26 + 18 * line), text, "black", small)
    return sheet


def heat(inspection: Inspection, top: float) -> NDArray[np.uint8]:
    """The anomaly map over the grey frame [h,w,3]; what was not inspected is hatched."""
    assert inspection.map is not None
    grey = cv2.cvtColor(inspection.frame.pixels, cv2.COLOR_RGB2GRAY)
    level = np.clip(np.nan_to_num(inspection.map) / top, 0, 1)
    colours = cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[:, :, ::-1]
    blend: NDArray[np.uint8] = (0.45 * grey[:, :, None] + 0.55 * colours).astype(np.uint8)
    hatched = np.add.outer(*map(np.arange, grey.shape)) % 16 < 3
    blend[np.isnan(inspection.map) & hatched] = 255
    return blend


def _outlined(inspection: Inspection) -> NDArray[np.uint8]:
    shown = inspection.frame.pixels.copy()
    line = max(1, round(max(shown.shape[:2]) / 250))
    colour = COLOURS[inspection.verdict]
    if inspection.mask is not None:
        outlines, _ = cv2.findContours(inspection.mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, outlines, -1, (255, 0, 255), line)
    for region in inspection.regions:
        left, top, right, bottom = region.box
        cv2.rectangle(shown, (left, top), (right - 1, bottom - 1), colour, line)
    return shown


def _fit(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = (_PANEL - 16) / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _headline(inspection: Inspection) -> str:
    parts = [inspection.verdict.value]
    if inspection.score is not None:
        parts.append(f"score {inspection.score:.3f}")
    if inspection.p_yes is not None:
        parts.append(f"P(yes) {inspection.p_yes:.2f}")
    if inspection.verdict is not Verdict.NOT_INSPECTED:
        parts.append(f"decided by the {inspection.decided_by}")
    return "   ".join(parts)
