"""An evaluation for people: one self-contained page, with the published figures beside the measured ones."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from vmad_edge.runtime.evaluate import CategoryResult, Curve, Evaluation, Figures, FrameResult
from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.inspection import Verdict
from vmad_edge.runtime.metrics import PRO_LIMIT

_PAGE = Path(__file__).with_name("evaluate.html")
_SIDE = 220
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
    page = _PAGE.read_text("utf-8")
    for mark, text in (
        ("{{facts}}", html.escape(_facts(evaluation))),
        ("{{warnings}}", "".join(f'<div class="warning">{html.escape(line)}</div>' for line in warnings(evaluation))),
        ("{{columns}}", "".join(f"<th>{_title(name)}</th>" for name in columns)),
        ("{{rows}}", "\n".join(rows)),
        ("{{paper}}", html.escape(paper)),
        ("{{sections}}", "\n".join(_section(c) for c in evaluation.categories)),
    ):
        page = page.replace(mark, text, 1)
    target = folder / "index.html"
    write_whole(target, page)
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
    curves = (
        ("ROC of the frames", figures.image_auroc, "true positive rate", category.image_roc, 1.0),
        ("ROC of the pixels", figures.pixel_auroc, "true positive rate", category.pixel_roc, 1.0),
        ("PRO", figures.aupro, "mean overlap of the regions", category.pro, PRO_LIMIT),
    )
    drawn = "".join(
        _curve(f"{title}, area {100 * area:.1f}%", height, points, limit)
        for title, area, height, points, limit in curves
        if area is not None
    )
    shown = "".join(_figure(frame, why, category.name) for why, frame in _best_and_worst(category.frames))
    return (
        f"<section><h2>{html.escape(category.name)}</h2>"
        f'<div class="curves">{drawn}</div><div class="frames">{shown}</div></section>'
    )


def _curve(title: str, height: str, points: Curve, limit: float) -> str:
    """What `height` names over the false positive rate from 0 to `limit`."""
    path = " ".join(f"{30 + x / limit * _SIDE:.1f},{20 + (1 - y) * _SIDE:.1f}" for x, y in points)
    bottom = 20 + _SIDE
    return (
        f'<svg width="{_SIDE + 50}" height="{_SIDE + 45}" role="img" aria-label="{title}">'
        f'<rect x="30" y="20" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#999"/>'
        f'<polyline points="{path}" fill="none" stroke="#4e79a7" stroke-width="2"/>'
        f'<text x="30" y="14">{title}</text><text x="18" y="{bottom}">0</text><text x="18" y="30">1</text>'
        f'<text transform="translate(24,{_SIDE // 2 + 20}) rotate(-90)" text-anchor="middle">{height}</text>'
        f'<text x="30" y="{bottom + 15}">0</text><text x="{_SIDE + 15}" y="{bottom + 15}">{limit:g}</text>'
        f'<text x="{30 + _SIDE // 2}" y="{bottom + 15}" text-anchor="middle">false positive rate</text></svg>'
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
