"""Inspections for people: one self-contained page, and a picture for each frame."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vmad_edge.runtime.console import printable
from vmad_edge.runtime.files import whole_file, write_whole
from vmad_edge.runtime.inspection import Inspection, Verdict
from vmad_edge.runtime.names import Names, joined
from vmad_edge.runtime.rows import Appended

Pixels = NDArray[np.uint8]
COLOURS = {
    Verdict.GOOD: (0, 128, 60),
    Verdict.DEFECT: (200, 30, 30),
    Verdict.UNCERTAIN: (190, 120, 0),
    Verdict.NOT_INSPECTED: (90, 90, 90),
}
_MASK = (255, 0, 255)
_SIDE = 304
_GAP = 12
_TEXT_HEIGHT = 96
_ROW = re.compile('<tr data-name="([^"]*)"')
_PAGE = Path(__file__).with_name("report.html")
_STAGE_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#bab0ac")
_WHOLES = ("screen", "review")
"""Timings that are sums of others."""


class Report:
    """A page of rows, one a frame, and a picture for each. Keeps nothing of them in memory; `write` ends it.

    Args:
        heat_top: the map value that is drawn in the hottest colour, one for the whole report.
        paths: of all frames, so that no two pictures get one name.
    """

    def __init__(self, folder: Path, heat_top: float, paths: Iterable[str] = ()) -> None:
        self._folder, self._heat_top = folder.absolute(), heat_top
        self._names = Names(paths, joined, (".png",))
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
        self._rows = Appended(self._folder, self._scratch)

    def take_over(self, paths: Iterable[str]) -> int:
        """Keep the rows of these frames from the page that an earlier run left here; how many there were."""
        page, names, found = self._folder / "index.html", set(map(printable, paths)), 0
        if page.exists():
            with page.open(encoding="utf-8") as lines:
                for line in lines:
                    if (name := _ROW.match(line)) is not None and html.unescape(name[1]) in names:
                        self._rows.write(line)
                        found += 1
        return found

    def add(self, inspection: Inspection) -> None:
        """One frame's row, then its picture.

        Raises:
            OSError: one of them could not be written; the row is the page's nevertheless, if only the picture failed.
        """
        path = inspection.frame.path or inspection.frame.id
        panels = _panels(inspection, self._heat_top)
        self._rows.write(_row(inspection, printable(path), panels) + "\n")
        write_png(self._folder / f"{self._names.of(path)}.png", _picture(inspection, panels))

    def write(self, facts: Sequence[str]) -> Path:
        """`folder`/index.html, whole or not at all. `facts` are sentences for its head."""
        scale = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None].repeat(16, 0), cv2.COLORMAP_TURBO)[:, :, ::-1]
        head, _, foot = _PAGE.read_text("utf-8").partition("{{rows}}")
        for mark, text in (
            ("{{scale}}", data_uri(Image.fromarray(scale))),
            ("{{heat_top}}", f"{self._heat_top:.3g}"),
            ("{{facts}}", html.escape(printable(" ".join(facts)))),
        ):
            head = head.replace(mark, text, 1)
        target = self._folder / "index.html"
        with whole_file(target) as new, new.open("wb") as page, self._scratch as rows:
            rows.seek(0)
            page.write(head.encode())
            shutil.copyfileobj(rows, page)
            page.write(foot.lstrip("\n").encode())
        return target


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


def heat(inspection: Inspection, top: float) -> Pixels:
    """The anomaly map over the grey frame [h,w,3]; what was not inspected is hatched."""
    if inspection.map is None:
        raise ValueError("expected an Inspection with a map")
    grey = cv2.cvtColor(inspection.frame.pixels, cv2.COLOR_RGB2GRAY)
    level = np.clip(np.nan_to_num(inspection.map) / top, 0, 1)
    colours = cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[:, :, ::-1]
    blend: Pixels = (0.45 * grey[:, :, None] + 0.55 * colours).astype(np.uint8)
    hatched = np.add.outer(*map(np.arange, grey.shape)) % 16 < 3
    blend[np.isnan(inspection.map) & hatched] = 255
    return blend


def _panels(inspection: Inspection, heat_top: float) -> dict[str, Image.Image]:
    """Small pictures by their title."""
    panels = {}
    if inspection.frame.pixels.size:
        panels["frame"] = fit(_outlined(inspection))
    if inspection.map is not None:
        panels["anomaly map"] = fit(heat(inspection, heat_top))
    if inspection.nearest_normal is not None:
        panels["most similar normal place"] = fit(inspection.nearest_normal.picture)
    return panels


def _outlined(inspection: Inspection) -> Pixels:
    """The frame with the mask's outline and the regions' boxes."""
    shown = inspection.frame.pixels.copy()
    line = max(1, round(max(shown.shape[:2]) / 250))
    if inspection.mask is not None:
        outlines, _ = cv2.findContours(inspection.mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, outlines, -1, _MASK, line)
    for region in inspection.regions:
        left, top, right, bottom = region.box
        cv2.rectangle(shown, (left, top), (right - 1, bottom - 1), COLOURS[inspection.verdict], line)
    return shown


def fit(pixels: Pixels) -> Image.Image:
    """As small as a panel of the page."""
    image = Image.fromarray(pixels)
    scale = _SIDE / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _picture(inspection: Inspection, panels: dict[str, Image.Image]) -> Image.Image:
    """The panels side by side, verdict and sentence below."""
    width = max(2, len(panels)) * (_SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _SIDE + _TEXT_HEIGHT + 3 * _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(13), ImageFont.load_default(18)
    for number, (title, panel) in enumerate(panels.items()):
        left = _GAP + number * (_SIDE + _GAP)
        sheet.paste(panel, (left + (_SIDE - panel.width) // 2, _GAP + 16))
        draw.text((left, _GAP - 4), title, "black", small)
    top = _SIDE + 2 * _GAP + 14
    draw.text((_GAP, top), "   ".join(_facts(inspection)), COLOURS[inspection.verdict], large)
    for line, text in enumerate(textwrap.wrap(_words(inspection), width // 7)[:3]):
        draw.text((_GAP, top + 26 + 18 * line), text, "black", small)
    return sheet


def _facts(inspection: Inspection) -> list[str]:
    facts = [inspection.verdict.value]
    if inspection.score is not None:
        facts.append(f"score {inspection.score:.3f}")
    if inspection.p_yes is not None:
        facts.append(f"P(yes) {inspection.p_yes:.2f}")
    if inspection.verdict is not Verdict.NOT_INSPECTED:
        facts.append(f"decided by the {inspection.decided_by}")
    return facts


def in_words(*texts: str | None) -> str:
    """In one line that can be shown."""
    return printable(" ".join(" ".join(filter(None, texts)).split()))


def _words(inspection: Inspection) -> str:
    return in_words(inspection.explanation, inspection.reason)


def _row(inspection: Inspection, name: str, panels: dict[str, Image.Image]) -> str:
    pictures = [
        f'<img alt="{title}" src="{data_uri(panels[title])}">' if title in panels else ""
        for title in ("frame", "anomaly map", "most similar normal place")
    ]
    nearest = inspection.nearest_normal
    beside = "" if nearest is None else f"in {html.escape(printable(nearest.frame))}, cosine {nearest.similarity:.3f}"
    verdict, *facts = _facts(inspection)
    if inspection.compared_with is not None:
        facts.append(f"compared with {inspection.compared_with}")
    regions = "".join(
        f"<div>region {list(r.box)}, {r.area} px, peak {r.peak:.3f}</div>" for r in inspection.regions[:5]
    )
    if len(inspection.regions) > 5:
        regions += f"<div>and {len(inspection.regions) - 5} smaller ones</div>"
    total = sum(inspection.timings_ms.get(whole, 0.0) for whole in _WHOLES)
    score = "" if inspection.score is None else f"{inspection.score:.3f}"
    return (
        f'<tr data-name="{html.escape(name)}" data-verdict="{verdict}" '
        f'data-score="{score or -1}" data-ms="{total:.3f}">'
        f'<td>{pictures[0]}<div class="small">{html.escape(name)}</div></td><td>{pictures[1]}</td>'
        f'<td>{pictures[2]}<div class="small">{beside}</div></td>'
        f'<td><div class="verdict {verdict}">{verdict}</div><div>{html.escape(_words(inspection))}</div>'
        f'<div class="small">{", ".join(facts)}{regions}</div></td>'
        f"<td>{score}</td><td>{_time(inspection.timings_ms, total)}</td></tr>"
    )


def _time(timings_ms: dict[str, float], total: float) -> str:
    """The stages' shares as a bar. SAM's encoder runs beside the language model, so shares can exceed the whole."""
    stages = {stage: ms for stage, ms in timings_ms.items() if stage not in _WHOLES}
    whole = sum(stages.values()) or 1.0
    colours = dict(zip(stages, _STAGE_COLOURS * 2, strict=False))
    bar = "".join(
        f'<i style="width:{100 * ms / whole:.1f}%;background:{colours[stage]}" title="{stage} {ms:.1f} ms"></i>'
        for stage, ms in stages.items()
    )
    words = ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages.items())
    return f'{total:.0f} ms<div class="time">{bar}</div><div class="small">{words}</div>'


def data_uri(image: Image.Image) -> str:
    target = io.BytesIO()
    image.save(target, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode()
