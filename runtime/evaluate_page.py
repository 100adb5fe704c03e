"""An evaluation for people: a page, with the published figures beside the measured ones."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from vmad_edge.runtime.evaluate import CategoryResult, Curve, Evaluation, Figures, FrameResult
from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.inspection import Verdict
from vmad_edge.runtime.metrics import PRO_LIMIT
from vmad_edge.runtime.pages import filled, template

_PAGE = Path(__file__).with_name("evaluate.html")
_SIDE, _BINS = 220, 30
_EACH = 2
"""Best and worst frames shown of each kind."""


@dataclass(frozen=True)
class Published:
    """A data set's mean in VMAD's Table I (arXiv 2409.20146), percent. Its AP column does not say of what."""

    dataset: str
    categories: str
    image_auroc: float
    pixel_auroc: float
    aupro: float
    ap: float


PUBLISHED = (
    Published(
        "MVTec AD",
        "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper",
        *(95.8, 96.1, 91.2, 87.6),
    ),
    Published(
        "VisA",
        "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum",
        *(89.7, 93.8, 84.6, 85.2),
    ),
)


def write_page(evaluation: Evaluation, folder: Path) -> Path:
    """`folder`/index.html, for the folder that `evaluate` filled."""
    settings = evaluation.settings
    published = next(
        (p for p in PUBLISHED if set(p.categories.split()) == {c.name for c in evaluation.categories}), None
    )
    columns = [name for name in Figures.model_fields if name != "p_yes_auroc" or settings.review]
    rows = [
        _row(c.name, c.figures, columns, (c.enrolled, len(c.frames), c.not_inspected, _unfit(c)))
        for c in evaluation.categories
    ]
    rows.append(_row("mean", evaluation.mean, columns, ("", "", "", ""), "mean"))
    paper = ""
    if published is not None:
        cells = "".join(f"<td>{getattr(published, name, '')}</td>" for name in columns)
        rows.append(f'<tr class="paper"><td>VMAD’s paper, mean</td><td></td><td></td><td></td><td></td>{cells}</tr>')
        paper = (
            f"Published for {published.dataset}, not measured here; the paper’s AP, of {published.ap}, names no level."
        )
    marks = {
        "facts": html.escape(_facts(evaluation)),
        "warnings": "".join(f'<div class="warning">{html.escape(line)}</div>' for line in warnings(evaluation)),
        "columns": "".join(f"<th>{_title(name)}</th>" for name in columns),
        "rows": "\n".join(rows),
        "paper": html.escape(paper),
        "sections": "\n".join(_section(c) for c in evaluation.categories),
    }
    target = folder / "index.html"
    write_whole(target, filled(template(_PAGE), marks))
    return target


def warnings(evaluation: Evaluation) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    found = []
    for category in evaluation.categories:
        if category.not_inspected:
            reason = next(f.reason for f in category.frames if f.verdict is Verdict.NOT_INSPECTED)
            found.append(
                f"{category.name}: {category.not_inspected} frames were not inspected and count in no figure "
                f"(the first: {reason})"
            )
        if category.unfit(False) or category.unfit(True):
            found.append(
                f"{category.name}: of those, unfit to be judged: {category.unfit(False)} good and "
                f"{category.unfit(True)} defective frames"
            )
        if any(out := (category.out_of_scope(False), category.out_of_scope(True))):
            found.append(f"{category.name}: out of scope: {out[0]} good and {out[1]} defective frames")
        if category.unmarked:
            found.append(
                f"{category.name}: {category.unmarked} defective frames have no mask, or an empty one; they count for "
                "the image figures alone"
            )
        if doubtful := [frame for frame in category.frames if frame.doubt is not None]:
            found.append(
                f"{category.name}: {len(doubtful)} masks may mean something else than they are taken for "
                f"(the first, of {doubtful[0].name}: {doubtful[0].doubt})"
            )
        if category.left_out:
            found.append(f"{category.name}: left out: {category.left_out}")
        if category.unlabelled:
            found.append(f"{category.name}: {category.unlabelled} more frames have no labels and are in no figure")
        if category.not_submitted:
            found.append(
                f"{category.name}: the submission lacks {len(category.not_submitted)} maps "
                f"(the first: {category.not_submitted[0]})"
            )
        sides = {frame.defective for frame in category.frames if frame.score is not None}
        kinds = {False: "normal (in a folder called good, ok or normal)", True: "defective"}
        if missing := [kind for side, kind in kinds.items() if side not in sides]:
            found.append(
                f"{category.name}: nothing to tell apart, so no figures: no inspected frame is {' or '.join(missing)}"
            )
    return found


def _unfit(category: CategoryResult) -> str:
    return f"{category.unfit(False)} good, {category.unfit(True)} defective"


def _facts(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    compared = "the bundle’s normal features" if settings.shots == 0 else f"{settings.shots} normal frames, enrolled"
    lanes = "screen and review" if settings.review else "the screen alone"
    return (
        f"{settings.dataset}, bundle {settings.bundle[:16]}; compared with {compared} (seed {settings.seed}); {lanes}."
    )


def _title(column: str) -> str:
    words = {"auroc": "AUROC", "ap": "AP", "f1": "F1", "p": "P(yes)", "yes": ""}
    return "AUPRO" if column == "aupro" else " ".join(filter(None, (words.get(w, w) for w in column.split("_"))))


def _row(name: str, figures: Figures, columns: Sequence[str], counts: Sequence[int | str], kind: str = "") -> str:
    values = (getattr(figures, column) for column in columns)
    cells = [*counts, *("–" if value is None else f"{100 * value:.1f}" for value in values)]
    return f'<tr class="{kind}"><td>{html.escape(name)}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _section(category: CategoryResult) -> str:
    figures = category.figures
    working = None if figures.image_auroc is None else _working(category)
    curves = (
        ("ROC of the frames", figures.image_auroc, "true positive rate", category.image_roc, 1.0, working),
        ("ROC of the pixels", figures.pixel_auroc, "true positive rate", category.pixel_roc, 1.0, None),
        ("PRO", figures.aupro, "mean overlap of the regions", category.pro, PRO_LIMIT, None),
    )
    drawn = "".join(
        _curve(f"{title}, area {100 * area:.1f}%", height, points, limit, rings)
        for title, area, height, points, limit, rings in curves
        if area is not None
    )
    shown = "".join(_figure(frame, why, category.name) for why, frame in _best_and_worst(category.frames))
    return (
        f"<section><h2>{html.escape(category.name)}</h2>"
        f'<div class="curves">{_histogram(category)}{drawn}</div><div class="frames">{shown}</div></section>'
    )


def _marks(category: CategoryResult) -> dict[str, float]:
    """The scores from which on verdicts change."""
    thresholds = category.thresholds
    return {} if thresholds is None else {"UNCERTAIN": thresholds.good_below, "DEFECT": thresholds.defect_above}


def _scores(category: CategoryResult, defective: bool) -> NDArray[np.float64]:
    return np.array([f.score for f in category.frames if f.defective is defective and f.score is not None], float)


def _working(category: CategoryResult) -> dict[str, tuple[float, float]]:
    """The shares of good and of defective frames whose scores reach each mark; there are frames of both."""
    sides = _scores(category, False), _scores(category, True)
    shares = {name: [float((scores >= mark).mean()) for scores in sides] for name, mark in _marks(category).items()}
    return {name: (good, bad) for name, (good, bad) in shares.items()}


def _histogram(category: CategoryResult) -> str:
    """Of the frames' scores: good ones up, defective ones down, so that none hides another."""
    sides, marks = {"good": _scores(category, False), "bad": _scores(category, True)}, _marks(category)
    values = np.concatenate([*sides.values(), list(marks.values())])
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    counts = {side: np.histogram(scores, edges)[0] for side, scores in sides.items()}
    tallest, middle, step = max(1, *map(max, counts.values())), 20 + _SIDE / 2, _SIDE / _BINS
    unit = (_SIDE / 2 - 14) / tallest
    bars = "".join(
        f'<rect class="{side}" x="{30 + place * step:.1f}" width="{step - 1:.1f}" height="{count * unit:.1f}" '
        f'y="{middle - count * unit * (side == "good"):.1f}"/>'
        for side, found in counts.items()
        for place, count in enumerate(found)
        if count
    )
    places = {name: 30 + (mark - edges[0]) / (edges[-1] - edges[0]) * _SIDE for name, mark in marks.items()}
    lines = "".join(
        f'<line class="from" x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{20 + _SIDE}"/>'
        + _label(x, 32 + 14 * number, f"{name} {marks[name]:.3f}")
        for number, (name, x) in enumerate(places.items())
    )
    return _drawing(
        "scores of the frames",
        f'{bars}<line class="frame" x1="30" x2="{30 + _SIDE}" y1="{middle}" y2="{middle}"/>{lines}',
        (f"good ↑ defective ↓, up to {tallest}", f"{edges[0]:.3g}", "score", f"{edges[-1]:.3g}"),
    )


def _curve(
    title: str, height: str, points: Curve, limit: float, working: Mapping[str, tuple[float, float]] | None
) -> str:
    """What `height` names over the false positive rate from 0 to `limit`, and where the thresholds lie on it."""

    def place(x: float, y: float) -> tuple[float, float]:
        return 30 + x / limit * _SIDE, 20 + (1 - y) * _SIDE

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    rings = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>{_label(x, y + (14 if y < 20 + _SIDE / 2 else -6), name)}'
        for name, (x, y) in ((name, place(*point)) for name, point in (working or {}).items())
    )
    return _drawing(
        title, f'<polyline points="{path}"/>{rings}', (height, "0", "false positive rate", f"{limit:g}"), ("0", "1")
    )


def _label(x: float, y: float, text: str) -> str:
    """Beside x, on the side with more room."""
    side, anchor = (-5, "end") if x > 30 + _SIDE / 2 else (5, "start")
    return f'<text class="mark" x="{x + side:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _drawing(title: str, inside: str, axes: tuple[str, str, str, str], heights: tuple[str, str] = ("", "")) -> str:
    """`inside` a square with what `axes` say: upwards; to the right its begin, name and end."""
    upwards, left, across, right = axes
    bottom = 20 + _SIDE
    return (
        f'<svg width="{_SIDE + 60}" height="{_SIDE + 45}" viewBox="0 0 {_SIDE + 60} {_SIDE + 45}" role="img" '
        f'aria-label="{title}"><rect class="frame" x="30" y="20" width="{_SIDE}" height="{_SIDE}"/>{inside}'
        f'<text x="30" y="14">{title}</text><text x="18" y="{bottom}">{heights[0]}</text>'
        f'<text x="18" y="30">{heights[1]}</text>'
        f'<text transform="translate(24,{_SIDE // 2 + 20}) rotate(-90)" text-anchor="middle">{upwards}</text>'
        f'<text x="30" y="{bottom + 15}">{left}</text>'
        f'<text x="{_SIDE + 30}" y="{bottom + 15}" text-anchor="end">{right}</text>'
        f'<text x="{30 + _SIDE // 2}" y="{bottom + 15}" text-anchor="middle">{across}</text></svg>'
    )


def _best_and_worst(frames: Sequence[FrameResult]) -> list[tuple[str, FrameResult]]:
    scored = sorted((f for f in frames if f.score is not None), key=lambda frame: frame.score or 0.0)
    good = [frame for frame in scored if not frame.defective]
    bad = [frame for frame in scored if frame.defective]
    chosen = {
        "worst: a defect that scores low": bad[:_EACH],
        "worst: a good part that scores high": good[::-1][:_EACH],
        "best: a defect that scores high": bad[_EACH:][::-1][:_EACH],
        "best: a good part that scores low": good[:-_EACH][:_EACH],
    }
    return [(why, frame) for why, some in chosen.items() for frame in some]


def _figure(frame: FrameResult, why: str, category: str) -> str:
    picture = quote(f"{category}/frames/{frame.name}/panel.jpg")
    return (
        f'<figure><a href="{picture}"><img loading="lazy" alt="frame and anomaly map" src="{picture}"></a>'
        f"<figcaption><b>{why}</b><br>{html.escape(frame.name)}: {frame.verdict.value}, score {frame.score:.3f}"
        "</figcaption></figure>"
    )
