"""Parity for people: one self-contained page with the figures, their limits and pictures of both sides."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmad_edge.export.parity import COLUMNS, Parity, Stages, row_in_words
from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.pictures import Scale, data_uri, fit, heat

_TEMPLATE = Path(__file__).with_name("parity.html")
_MAGENTA = (255, 0, 255)


class ParityPage:
    """Keeps small pictures of the first `most` frames; `write` makes the page of them and the figures."""

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._rows: list[str] = []

    def add(self, frame: Frame, source: Stages, exported: Stages) -> None:
        """One frame with both sides' `map` and `mask`; what the export did not reach stays empty."""
        if len(self._rows) == self._most:
            return
        scale = Scale(0.0, None, float(np.nanmax(source["map"])) or 1.0)  # one for both
        pictures = []
        for side in (source, exported):
            shown = side.get("map")
            pictures.append("" if shown is None else _picture(heat(frame.pixels, shown, scale)))
        for side in (source, exported):
            mask = side.get("mask")
            pictures.append("" if mask is None else _picture(_tinted(frame.pixels, mask > 0)))
        name, cells = html.escape(Path(frame.id).name), "".join(f"<td>{picture}</td>" for picture in pictures)
        self._rows.append(f"<tr><td>{_picture(frame.pixels)}{name}</td>{cells}</tr>")

    def write(self, path: Path, parity: Parity) -> None:
        stages = []
        for row in parity.stages:
            words = "".join(f"<td>{html.escape(text)}</td>" for text in row_in_words(row))
            passed = "past its limit" if row.broken else "passed" if row.limits else "no limit"
            kind = ' class="broken"' if row.broken else ""
            stages.append(
                f"<tr{kind}><th>{row.stage}</th>{words}<td>{passed}</td><td>{html.escape(row.worst_image)}</td></tr>"
            )
        page = _TEMPLATE.read_text("utf-8")
        for mark, text in (
            (
                "{{facts}}",
                html.escape(
                    f"{parity.precision_in_words}, language model {parity.quantization} ({parity.tensors_in_words})."
                ),
            ),
            (
                "{{outcome}}",
                html.escape(parity.failure or f"All stages within their limits on {len(parity.images)} images."),
            ),
            ("{{flips}}", html.escape(parity.flips_in_words)),
            ("{{columns}}", "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)),
            ("{{stages}}", "\n".join(stages)),
            ("{{pictures}}", "\n".join(self._rows)),
        ):
            page = page.replace(mark, text, 1)
        write_whole(path, page)


def _tinted(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    half = (pixels // 2 + np.array(_MAGENTA, np.uint8) // 2).astype(np.uint8)
    return np.where(mask[:, :, None], half, pixels)


def _picture(pixels: NDArray[np.uint8]) -> str:
    return f'<img alt="" src="{data_uri(fit(pixels))}">'
