"""Inspections for people: a page of all frames, and pictures of each.

DIR/
  index.html             the page: rows that its script shows some at a time; it needs no network and no server
  pictures/NAME          of a frame, all in one and large
  thumbnails/, places/   what the rows show: the frame under its map, its worst place beside a normal one
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from urllib.parse import quote

from vmad_edge.runtime import pictures
from vmad_edge.runtime.bundle import Thresholds
from vmad_edge.runtime.console import printable
from vmad_edge.runtime.files import whole_file, write_whole
from vmad_edge.runtime.inspection import Inspection, on_map
from vmad_edge.runtime.names import PICTURE, Names, joined
from vmad_edge.runtime.pages import described, escaped, filled, template
from vmad_edge.runtime.pictures import NUMBERED, Pixels, facts
from vmad_edge.runtime.rows import Appended

_ROW = re.compile('<article data-name="([^"]*)"')
_PAGE = Path(__file__).with_name("report.html")
_WHOLES = ("screen", "review")
"""Timings that are sums of others."""


class Report:
    """A page of rows, one a frame, and pictures of each. Keeps nothing of them in memory; `write` ends it.

    Args:
        thresholds: of the object, where the maps' colours change; None: there are none.
        paths: of all frames, so that no two pictures get one name.
    """

    def __init__(self, folder: Path, thresholds: Thresholds | None, paths: Iterable[str] = ()) -> None:
        self._folder, self._thresholds = folder.absolute(), thresholds
        self._names = Names(paths, joined, (PICTURE,))
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
        """One frame's row, then its pictures.

        Raises:
            OSError: one of them could not be written; the row is the page's nevertheless, if only a picture failed.
        """
        path = inspection.frame.path or inspection.frame.id
        name = f"{self._names.of(path)}{PICTURE}"
        drawn = {
            "thumbnails": pictures.thumbnail(inspection, self._thresholds),
            "places": pictures.places(inspection),
            "pictures": pictures.sheet(inspection, self._thresholds, _words(inspection)),
        }
        made = {folder: picture for folder, picture in drawn.items() if picture is not None}
        self._rows.write(_row(inspection, printable(path), quote(name), made) + "\n")
        for folder, picture in made.items():
            (self._folder / folder).mkdir(exist_ok=True)
            write_whole(self._folder / folder / name, pictures.jpeg(picture))

    def write(self, facts: Mapping[str, str]) -> Path:
        """`folder`/index.html, whole or not at all. `facts` are for its head."""
        head, _, foot = template(_PAGE).partition("{{rows}}\n")
        kind = "ranked" if self._thresholds is None else ""
        head = filled(head, {"kind": kind, "facts": described(facts), "legend": _legend(self._thresholds)})
        target = self._folder / "index.html"
        with whole_file(target) as new, new.open("wb") as page, self._scratch as rows:
            rows.seek(0)
            page.write(head.encode())
            shutil.copyfileobj(rows, page)
            page.write(foot.encode())
        return target


def in_words(*texts: str | None) -> str:
    """In one line that can be shown."""
    return printable(" ".join(" ".join(filter(None, texts)).split()))


def _words(inspection: Inspection) -> str:
    return in_words(inspection.explanation, inspection.reason)


def _row(inspection: Inspection, name: str, file: str, made: Mapping[str, Pixels]) -> str:
    """One line: `take_over` reads lines. `file` is quoted for a URL."""
    verdict, *more = facts(inspection)
    if inspection.compared_with is not None:
        more.append(f"compared with {inspection.compared_with}")
    total = sum(inspection.timings_ms.get(whole, 0.0) for whole in _WHOLES)
    score = -1.0 if inspection.score is None else inspection.score
    return (
        f'<article data-name="{html.escape(name)}" data-verdict="{verdict}" data-score="{score:.6g}" '
        f'data-ms="{total:.3f}"><div>{_image("thumbnails", "the frame under its anomaly map", file, made)}</div>'
        f"<figure>{_image('places', 'its worst place, beside the most similar normal one', file, made)}"
        f"{_beside(inspection)}</figure>"
        f'<div class="found"><span class="verdict {verdict}">{verdict}</span> <span class="rank"></span>'
        f'<p class="name">{html.escape(name)}</p><p>{html.escape(_words(inspection))}</p>'
        f'<p class="small">{", ".join(more)}</p>{_regions(inspection)}{_times(inspection, total)}</div></article>'
    )


def _image(folder: str, what: str, file: str, made: Mapping[str, Pixels]) -> str:
    """A small picture that opens the large one."""
    if folder not in made:
        return ""
    height, width = made[folder].shape[:2]
    return (
        f'<a class="large" href="pictures/{file}"><img loading="lazy" alt="{what}" src="{folder}/{file}" '
        f'width="{width}" height="{height}"></a>'
    )


def _beside(inspection: Inspection) -> str:
    if (nearest := inspection.nearest_normal) is None:
        return ""
    return (
        "<figcaption>left: its worst place; right: the most similar normal one, in "
        f"{escaped(nearest.frame)}, cosine {nearest.similarity:.3f}</figcaption>"
    )


def _regions(inspection: Inspection) -> str:
    """The numbered ones, by their numbers. Their peaks are on the scores' scale, as the map's colours are."""
    if not inspection.regions:
        return ""
    items = []
    for region in inspection.regions[:NUMBERED]:
        left, top, right, bottom = region.box
        items.append(f"<li>{right - left} × {bottom - top} px at {left}, {top}{_peak(inspection, region.peak)}</li>")
    more = len(inspection.regions) - NUMBERED
    return f'<ol class="regions small">{"".join(items)}</ol>' + (
        f'<p class="small">and {more} smaller</p>' if more > 0 else ""
    )


def _peak(inspection: Inspection, peak: float) -> str:
    """Nothing where the map has none: in a mask on what the screen's crop left out."""
    if inspection.map is None or inspection.score is None or peak != peak:
        return ""
    return f", up to {peak / on_map(1.0, inspection.score, inspection.map):.3f}"


def _times(inspection: Inspection, total: float) -> str:
    stages = "".join(
        f"<tr><td>{stage}</td><td>{ms:.1f}</td></tr>"
        for stage, ms in inspection.timings_ms.items()
        if stage not in _WHOLES
    )
    return f'<details class="small"><summary>{total:.0f} ms</summary><table>{stages}</table></details>'


def _legend(thresholds: Thresholds | None) -> str:
    if thresholds is None:
        return (
            f"<span>{_hue(pictures.RANKED)} a frame’s own highest tenth: where it is least like what it was compared "
            "with. Without thresholds nothing says whether that is a defect</span>"
        )
    good, defect = f"{thresholds.good_below:.3f}", f"{thresholds.defect_above:.3f}"
    return (
        f"<span>no colour: below {good}, GOOD</span> <span>{_hue(pictures.UNSURE)} from {good}, UNCERTAIN</span> "
        f"<span>{_hue(pictures.FAULTY)} from {defect}, DEFECT</span> "
        "<span>each map’s peak is drawn as its frame’s score</span>"
    )


def _hue(ends: tuple[pictures.Stop, pictures.Stop]) -> str:
    colours = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue, _ in ends)
    return f'<i style="background: linear-gradient(90deg, {colours})"></i>'
