"""Procedurally drawn parts: an image, what is wrong with it, and where. Everything follows from the generator's seed.

A part is drawn as colour and height; the height is lit from one side, so that holes, dents and threads cast the
shading that a person expects. Lengths are in units of the frame's side; an object's own outline is in units of its own
and put into the frame by its pose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from vmad_edge.export.reference.drawing import (
    Canvas,
    Colour,
    Coverage,
    Field,
    Points,
    Pose,
    Rng,
    against,
    between,
    blob,
    circle,
    grain,
    grid,
    lattice,
    noise,
    rounded_box,
    streaks,
    tone,
    turn,
    turned_grid,
)

Kind = Literal[
    "scratch", "stain", "pit", "crack", "missing feature", "fibre", "dent", "chipped edge", "bubble", "burn mark"
]
KINDS: tuple[Kind, ...] = ("scratch", "stain", "pit", "crack", "missing feature", "fibre", "dent", "chipped edge")
UNSEEN_KINDS: tuple[Kind, ...] = ("bubble", "burn mark")
"""Never trained on."""
PLACES = (
    ("upper left", "upper centre", "upper right"),
    ("centre left", "centre", "centre right"),
    ("lower left", "lower centre", "lower right"),
)

Image: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.bool_]
SMALLEST = 0.003
"""A defect whose mask is a smaller share of the frame fell off the part: another part is drawn."""


@dataclass(frozen=True)
class Part:
    image: Image
    """[S,S,3], RGB."""
    kinds: NDArray[np.uint8]
    """[S,S]: 0 normal, else 1 + the defect's index in (*KINDS, *UNSEEN_KINDS)."""
    object: str
    kind: Kind | None
    """Of a part with exactly one defect."""
    place: str | None
    """Of the one defect."""

    @property
    def mask(self) -> Mask:
        """[S,S], true on defects."""
        return self.kinds > 0


def draw(rng: Rng, family: str | None = None, defects: Sequence[Kind] = (), size: int = 256) -> Part:
    """One part of `family` (a name in FAMILIES or UNSEEN_FAMILIES; None: any of FAMILIES) with these defects.

    Where defects overlap, the later one is drawn over the earlier; each asked for can still be seen. The camera has a
    random stream of its own: without its defects, the same seed gives the same photograph of the same part.
    """
    name, camera = family or str(rng.choice(list(FAMILIES))), rng.spawn(1)[0]
    while True:
        canvas = Canvas(rng, size)
        (FAMILIES | UNSEEN_FAMILIES)[name](rng, canvas, "missing feature" in defects)
        for kind in defects:
            if kind != "missing feature":
                canvas.mark(_DEFECTS[kind](rng, canvas), _label(kind))
        if all(np.count_nonzero(canvas.kinds == _label(kind)) >= SMALLEST * size * size for kind in defects):
            break
    image = _photograph(camera, canvas)
    if len(defects) != 1:
        return Part(image, canvas.kinds, name, None, None)
    return Part(image, canvas.kinds, name, defects[0], place(canvas.kinds > 0))


def random_kind(rng: Rng) -> Kind:
    return cast(Kind, str(rng.choice(KINDS)))


def place(mask: Mask) -> str:
    """Which of the frame's 3×3 fields holds the centroid of `mask`."""
    rows, columns = np.nonzero(mask)
    row, column = (int(3 * (v.mean() + 0.5) / n) for v, n in ((rows, mask.shape[0]), (columns, mask.shape[1])))
    return PLACES[row][column]


def _label(kind: Kind) -> int:
    return 1 + (*KINDS, *UNSEEN_KINDS).index(kind)


# --- grounds and surfaces


def _ground(rng: Rng, canvas: Canvas) -> Colour:
    """Fill the canvas with a bench, belt or cloth; returns its colour."""
    low, high = ((4, 45), (190, 245), (20, 215))[rng.choice(3, p=(0.4, 0.2, 0.4))]
    colour = tone(rng, low, high, rng.choice([4, 22]))
    size, angle = canvas.size, rng.uniform(0, np.pi)
    canvas.colour[:] = colour.astype(np.float32)[:, None, None]
    match rng.integers(8):
        case 0 | 1:  # mottled
            canvas.colour += np.float32(between(rng, 2, 25)) * noise(rng, size, between(rng, 0.02, 0.3), 4)
        case 2:  # woven
            u, v = turned_grid(size, angle)
            period = rng.uniform(80, 250)
            canvas.colour += np.float32(rng.uniform(3, 12)) * cv2.multiply(np.sin(u * period), np.sin(v * period))
        case 3:  # a gradient
            canvas.colour += np.float32(rng.uniform(15, 70)) * turned_grid(size, rng.uniform(0, 2 * np.pi))[0]
        case 4:  # a conveyor's lines
            v = turned_grid(size, angle)[1]
            canvas.colour += np.float32(rng.uniform(-25, 25)) * (np.mod(v, rng.uniform(0.05, 0.3)) < 0.012)
        case 5:  # brushed or planed
            canvas.colour += np.float32(rng.uniform(2, 14)) * streaks(rng, turned_grid(size, angle)[1], 0.006)
        case 6:  # speckled
            speckle = grain(rng, size) > rng.uniform(1.3, 2.2)
            canvas.colour += np.float32(rng.uniform(-30, 30)) * speckle
        case _:
            pass
    if rng.random() < 0.25:  # clutter at the rim
        for _ in range(int(rng.integers(1, 5))):
            at = turn(np.array([[rng.uniform(0.48, 0.62), rng.uniform(-0.5, 0.5)]]), rng.integers(4) * np.pi / 2)[0]
            canvas.paint(canvas.cover(blob(rng, at + 0.5, rng.uniform(0.03, 0.15), 0.2)), tone(rng, 10, 240, 40))
    return colour


def _object(
    rng: Rng,
    canvas: Canvas,
    outline: Points,
    low: float,
    high: float,
    tint: float,
    hue: tuple[float, float, float] = (1, 1, 1),
) -> tuple[Pose, Colour]:
    """A body of this outline on a ground with its shadow; returns its pose and its colour."""
    angle = rng.uniform(0, 2 * np.pi)
    turned = turn(outline, angle)
    least, extent = turned.min(0), np.ptp(turned, 0)
    scale = (0.95 - 0.45 * rng.random() ** 2) / extent.max()  # most parts fill the frame
    pose = Pose(angle, scale, rng.uniform(0.05, 0.95, 2) * (1 - scale * extent) - scale * least)
    ground, body = _ground(rng, canvas), pose(outline)
    if rng.random() < 0.6:
        shadow = canvas.cover(body + canvas.light * rng.uniform(0.005, 0.035))
        shadow = np.asarray(cv2.blur(shadow, (2 * (canvas.size // 40) + 1,) * 2), np.uint8)
        canvas.paint(shadow, ground * 0.25, rng.uniform(0.2, 0.8))
    canvas.ground = canvas.colour.copy()
    colour = np.clip(against(rng, ground, low, high, tint) * hue, 4, 250)
    inside = canvas.cover(body)
    canvas.paint(inside, colour, lift=50)
    canvas.part = (inside > 127).view(np.uint8)
    canvas.rim = body
    return pose, colour


def _texture(rng: Rng, canvas: Canvas, colour: Colour) -> None:
    """The canvas becomes a surface of this colour that fills the frame and may be torn at the frame's border."""
    canvas.ground = np.empty_like(canvas.colour)
    canvas.ground[:] = against(rng, colour, 10, 225, 15).astype(np.float32)[:, None, None]
    canvas.ground += np.float32(10) * noise(rng, canvas.size, 0.05, 3)
    canvas.colour[:] = colour.astype(np.float32)[:, None, None]
    canvas.part[:] = 1
    along = np.linspace(0, 1, 20)
    canvas.rim = np.array([p for t in along for p in ((t, 0.0), (t, 1.0), (0.0, t), (1.0, t))])


def _surface(rng: Rng, canvas: Canvas, rough: float, angle: float = 0.0, brushed: float = 0.0) -> None:
    """Normal variation: soft shading, mottling up to `rough`, with probability `brushed` machining marks."""
    size = canvas.size
    amount = np.float32(rng.uniform(0, 12)) * noise(rng, size, 0.5)
    amount += np.float32(between(rng, 0.5, rough)) * noise(rng, size, between(rng, 0.012, 0.12), 4)
    if rng.random() < brushed:
        amount += np.float32(between(rng, 1, 10)) * streaks(rng, turned_grid(size, angle)[1], rng.uniform(0.004, 0.01))
    if rng.random() < 0.25:
        speckle = grain(rng, size) > rng.uniform(1.2, 2.2)
        amount += np.float32(rng.uniform(-2.5, 2.5) * rough) * speckle
    canvas.shade(amount)


def _features(
    rng: Rng,
    canvas: Canvas,
    outlines: list[Points],
    colour: Colour | Field,
    lift: float,
    omit: bool,
    hole: bool = False,
) -> None:
    """Draw each outline, with `omit` all but one; no defect can lie on a hole."""
    inside = [i for i, outline in enumerate(outlines) if outline.min() > 0.02 and outline.max() < 0.98]
    skipped = int(rng.choice(inside)) if omit and inside else -1
    kept = [outline for i, outline in enumerate(outlines) if i != skipped]
    coverage = canvas.cover(*kept)
    canvas.paint(coverage, colour, lift=lift)
    spread = rng.choice([0, 3, 8])
    if spread and not hole:
        tones = np.zeros((canvas.size, canvas.size), np.float32)
        for outline in kept:
            cv2.fillPoly(tones, [canvas.fixed(outline)], (rng.normal(0, spread),), cv2.LINE_8, 4)
        canvas.shade(tones)
    if hole:
        canvas.part[coverage > 0] = 0
    if skipped >= 0:
        canvas.mark(canvas.cover(outlines[skipped]), _label("missing feature"))


def _print(rng: Rng, canvas: Canvas, pose: Pose, at: Points, colour: Colour) -> None:
    """A row of marks as a maker prints or stamps them: lines that are no scratches."""
    tall = rng.uniform(0.03, 0.07)
    strokes = rng.integers(0, 3, (int(rng.integers(3, 9)), 4, 2)) * np.array([0.3, 0.5]) * tall
    rows = [pose(at + stroke + np.array([0.9 * tall * k, 0])) for k, stroke in enumerate(strokes)]
    ink = np.clip(colour + rng.choice([-1, 1]) * rng.uniform(15, 90), 4, 250)
    canvas.paint(canvas.line(*rows, width=0.005) * canvas.part, ink, lift=rng.choice([-15, 0, 15]))


# --- families: each draws a good part, or one whose missing feature it marks


def _plate(rng: Rng, canvas: Canvas, omit: bool) -> None:
    half = np.array([0.5, rng.uniform(0.25, 0.5)])
    pose, colour = _object(rng, canvas, rounded_box(half[0], half[1], rng.uniform(0.02, 0.15)), 50, 225, 14)
    _surface(rng, canvas, 6, pose.angle, 0.6)
    if rng.random() < 0.3:
        _print(rng, canvas, pose, half * rng.uniform(-0.8, 0.3, 2), colour)
    if rng.random() < 0.5:
        inset = pose(rounded_box(half[0] * 0.93, half[1] * 0.93, 0.03))
        canvas.paint(canvas.line(inset, width=0.006, closed=True), colour * 0.8, lift=-30)
    if half[1] > 0.35 and rng.random() < 0.5:
        n = int(rng.integers(4, 9))
        spots = circle(np.zeros(2), 0.7 * half.min(), n)
        bore = rng.uniform(0.06, 0.16)
        _features(rng, canvas, [pose(circle(np.zeros(2), bore))], canvas.ground * 0.6, -60, False, hole=True)
        radius = rng.uniform(0.03, 0.055)
    else:
        columns, rows = int(rng.integers(2, 6)), int(rng.integers(2, 4))
        spots = lattice(columns, rows, *(half * rng.uniform(1.6, 1.9)))
        radius = rng.uniform(0.03, min(0.07, 0.4 * half[1] / rows))
    if omit or rng.random() < 0.8:
        corners = int(rng.choice([4, 6, 28], p=(0.15, 0.15, 0.7)))
        holes = [pose(circle(p, radius, corners)) for p in spots]
        _features(rng, canvas, holes, canvas.ground * 0.6, -60, omit, hole=True)


def _gear(rng: Rng, canvas: Canvas, omit: bool) -> None:
    n = int(rng.integers(9, 21))
    root, top = 0.5 * rng.uniform(0.74, 0.84), rng.uniform(0.2, 0.34)
    tooth = np.array([(root, -0.3), (0.5, -top * 0.55), (0.5, top * 0.55), (root, 0.3)])
    a = 2 * np.pi / n * (np.arange(n)[:, None] + tooth[None, :, 1])
    teeth = np.stack([np.cos(a), np.sin(a)], -1) * tooth[None, :, :1]
    outline = teeth.copy()
    skipped = int(rng.integers(n))
    if omit:  # what is left there is the root circle
        outline[skipped] *= root / np.linalg.norm(outline[skipped], axis=-1, keepdims=True)
    pose, colour = _object(rng, canvas, outline.reshape(-1, 2), 40, 225, 14)
    _surface(rng, canvas, 6, pose.angle, 0.4)
    if omit:
        canvas.mark(canvas.cover(pose(teeth[skipped])), _label("missing feature"))
    if rng.random() < 0.6:
        groove = pose(circle(np.zeros(2), root * rng.uniform(0.75, 0.9), 72))
        canvas.paint(canvas.line(groove, width=0.012, closed=True), colour * 0.85, lift=-35)
    holes = [circle(np.zeros(2), rng.uniform(0.08, 0.15), 40)]
    if rng.random() < 0.6:
        holes += [circle(p, rng.uniform(0.035, 0.06)) for p in circle(np.zeros(2), 0.26, int(rng.integers(4, 7)))]
    _features(rng, canvas, [pose(h) for h in holes], canvas.ground * 0.6, -60, False, hole=True)


def _casting(rng: Rng, canvas: Canvas, omit: bool) -> None:
    if rng.random() < 0.6:
        outline = blob(rng, np.zeros(2), 0.5, rng.uniform(0.005, 0.05), 90)
    else:
        outline = rounded_box(0.5, rng.uniform(0.32, 0.5), rng.uniform(0.1, 0.3))
    n = int(rng.integers(3, 8))
    pose, colour = _object(rng, canvas, outline, 35, 215, rng.choice([6, 30]))
    _surface(rng, canvas, 22)
    _surface(rng, canvas, 10)
    canvas.height += np.float32(between(rng, 2, 25)) * noise(rng, canvas.size, between(rng, 0.02, 0.1), 3)
    least = np.linalg.norm(outline, axis=1).min()
    if rng.random() < 0.3:
        _print(rng, canvas, pose, least * rng.uniform(-0.5, 0.2, 2), colour)
    if rng.random() < 0.5:
        ring = pose(outline * rng.uniform(0.85, 0.92))
        canvas.paint(canvas.line(ring, width=rng.uniform(0.01, 0.03), closed=True), colour * 1.05, 0.4, 40)
    if rng.random() < 0.2:  # grains of another stuff, all over
        grains = [pose(blob(rng, p, rng.uniform(0.015, 0.04), 0.15, 10)) for p in rng.uniform(-0.45, 0.45, (24, 2))]
        inclusions = np.maximum.reduce([canvas.cover(*grains[k::4]) for k in range(4)]) * canvas.part
        canvas.paint(inclusions, np.clip(colour + rng.uniform(-60, 40), 4, 250), rng.uniform(0.5, 0.9), lift=6)
    spots = circle(np.zeros(2), 0.6 * least, n)
    boss, bore = rng.uniform(0.06, 0.09) * 2 * least, rng.uniform(0.4, 0.65)
    if rng.random() < 0.5:
        _features(rng, canvas, [pose(blob(rng, p, boss * 1.3, 0.02)) for p in spots], colour * 1.1, 25, False)
    if omit or rng.random() < 0.7:
        holes = [pose(circle(p, boss * bore)) for p in spots]
        _features(rng, canvas, holes, colour * rng.uniform(0.25, 0.6), -50, omit, hole=True)


def _connector(rng: Rng, canvas: Canvas, omit: bool) -> None:
    half = np.array([0.5, rng.uniform(0.18, 0.4)])
    rows, n = int(rng.integers(1, 4)), int(rng.integers(4, 10))
    outline = rounded_box(half[0], half[1], rng.uniform(0.01, 0.06))
    pose, colour = _object(rng, canvas, outline, 10, 220, 45)
    if rng.random() < 0.7:
        canvas.paint(canvas.cover(pose(rounded_box(half[0] * 0.94, half[1] * 0.86, 0.02))), colour * 0.8, lift=-30)
    _surface(rng, canvas, 6)
    metal = tone(rng, 150, 225, 5) * (np.array([1.0, 0.85, 0.5]) if rng.random() < 0.6 else 1.0)
    pitch = 1.8 * half[0] / n
    pin = rounded_box(pitch * rng.uniform(0.2, 0.36), half[1] * (0.5, 0.27, 0.18)[rows - 1], 0.006)
    spots = lattice(n, rows, 1.8 * half[0], 1.6 * half[1])
    recesses = [pose(pin * 1.15 + p) for p in spots]
    _features(rng, canvas, recesses, colour * 0.4, -25, False)  # the recesses stay when a pin is missing
    _features(rng, canvas, [pose(pin + p + rng.normal(0, 0.002, 2)) for p in spots], metal, 50, omit)


def _circuit_board(rng: Rng, canvas: Canvas, omit: bool) -> None:
    half = np.array([0.5, rng.uniform(0.3, 0.5)])
    hues = ((0.5, 1.6, 0.9), (0.45, 0.85, 1.7), (1.9, 0.6, 0.5), (1.0, 1.0, 1.0), (0.7, 1.4, 0.9))
    hue = hues[rng.integers(len(hues))]
    pose, board = _object(rng, canvas, rounded_box(half[0], half[1], 0.02), 25, 150, 6, hue)
    _surface(rng, canvas, 5)
    traces = []
    for _ in range(int(rng.integers(4, 12))):
        start, stop = rng.uniform(-0.9, 0.9, (2, 2)) * half
        bend = min(abs(stop - start)) * np.sign(stop - start)
        traces.append(pose(np.array([start, start + bend, stop])))
    canvas.paint(canvas.line(*traces, width=rng.uniform(0.006, 0.012)), board * 1.35 + 8, 0.8, 8)
    solder, package = tone(rng, 150, 225, 8), against(rng, board, 10, 210, 30, 22)
    vias = [pose(circle(p, 0.009, 10)) for p in rng.uniform(-0.95, 0.95, (int(rng.integers(1, 20)), 2)) * half]
    canvas.paint(canvas.cover(*vias), solder * 0.9)
    columns, rows = int(rng.integers(3, 7)), int(rng.integers(2, 5))
    cell = 1.8 * half / (columns, rows)
    spots = lattice(columns, rows, *(1.8 * half))
    if rng.random() < 0.6:  # one large circuit in place of four cells
        chip = min(cell) * rng.uniform(0.6, 0.85)
        at = spots[rng.integers(columns - 1)] + cell / 2
        spots = spots[np.abs((spots - at) / cell).max(1) > 0.6]
        leg = rounded_box(0.09 * chip, 0.03 * chip, 0.01 * chip)
        legs = [leg + np.array([s * chip, y]) for s in (-1.0, 1.0) for y in np.linspace(-0.85, 0.85, 8) * chip]
        _features(rng, canvas, [pose(turn(o, np.pi / 2 * k) + at) for o in legs for k in (0, 1)], solder, 15, False)
        dark = tone(rng, 15, 50, 3)
        canvas.paint(canvas.cover(pose(rounded_box(0.95 * chip, 0.95 * chip, 0.02 * chip) + at)), dark, lift=35)
        dot = np.array([0.7, 0.7]) * chip
        canvas.paint(canvas.cover(pose(circle(at - dot, 0.09 * chip))), dark * 1.8 + 20)
    body = rounded_box(min(cell) * rng.uniform(0.26, 0.4), min(cell) * rng.uniform(0.15, 0.27), 0.005)
    if len(spots) == 0:
        return
    reach = np.array([body[:, 0].max(), 0])
    pad = rounded_box(reach[0] * 0.35, body[:, 1].max() * 0.9, 0.003)
    pads = [pose(pad + p + side * reach) for p in spots for side in (-1, 1)]
    _features(rng, canvas, pads, solder, 10, False)
    skew = rng.choice([0, 0.04])
    bodies = [pose(turn(body, rng.normal(0, skew)) + p + rng.normal(0, 0.002, 2)) for p in spots]
    _features(rng, canvas, bodies, package, 35, omit)


def _blister(rng: Rng, canvas: Canvas, omit: bool) -> None:
    columns, rows = int(rng.integers(2, 6)), int(rng.integers(2, 4))
    half = np.array([0.5, 0.5 * min(1.0, rows / columns * rng.uniform(0.9, 1.3))])
    pose, foil = _object(
        rng, canvas, rounded_box(half[0], half[1], rng.uniform(0.02, 0.08)), 90, 225, rng.choice([5, 40])
    )
    _surface(rng, canvas, 9, pose.angle, 0.3)
    if rng.random() < 0.4:  # an embossed foil
        u, v = turned_grid(canvas.size, pose.angle + np.pi / 4)
        canvas.height += 8 * canvas.part * cv2.multiply(np.sin(u * 180), np.sin(v * 180))
    if rng.random() < 0.4:
        _print(rng, canvas, pose, half * rng.uniform(-0.9, 0.2, 2), foil)
    cell = 1.84 * half / (columns, rows)
    spots = lattice(columns, rows, *(1.84 * half))
    if rng.random() < 0.6:
        tablet = circle(np.zeros(2), min(cell) * rng.uniform(0.28, 0.36))
    else:
        tablet = turn(rounded_box(min(cell) * 0.4, min(cell) * 0.2, min(cell) * 0.19), rng.choice([0, np.pi / 2]))
    pockets = [pose(tablet * rng.uniform(1.16, 1.22) + p) for p in spots]
    _features(rng, canvas, pockets, foil * rng.uniform(0.72, 0.9), 35, False)
    jitter = rng.choice([0, 0.006])
    pill = against(rng, foil * 0.8, 60, 245, 45, 22)
    tablets = [pose(turn(tablet, rng.normal(0, 0.05)) + p + rng.normal(0, jitter, 2)) for p in spots]
    _features(rng, canvas, tablets, pill, 25, omit)


def _fabric(rng: Rng, canvas: Canvas, omit: bool) -> None:
    size, period, angle = canvas.size, between(rng, 0.02, 0.06), rng.uniform(0, 2 * np.pi)
    bend = np.float32(rng.uniform(0, 0.008)) * noise(rng, size, 0.2)
    u, v = turned_grid(size, angle)
    u, v = (u + bend) / np.float32(period), (v + bend) / np.float32(period)
    warp, weft = np.floor(u), np.floor(v)
    over = np.mod(warp + rng.integers(1, 3) * weft, rng.integers(2, 6)) == 0
    a = tone(rng, 40, 225, 45)
    b = np.clip(a + rng.normal(0, between(rng, 3, 60), 3), 10, 245)
    _texture(rng, canvas, a)
    across_warp, across_weft = (np.sin(np.float32(np.pi) * (c - f)) for c, f in ((u, warp), (v, weft)))
    if omit:
        at = rng.integers(size // 5, size * 4 // 5, 2)
        run = (weft == weft[at[0], at[1]]) & (np.abs(u - u[at[0], at[1]]) < rng.uniform(0.12, 0.28) / period)
        over &= ~run
        canvas.mark(run.view(np.uint8) * np.uint8(255), _label("missing feature"))
    lift = np.where(over, across_weft, across_warp)
    if omit:
        lift[run & (across_warp < 0.75)] = -0.3
    depth = rng.uniform(0.25, 0.6)
    canvas.colour += over * (b - a).astype(np.float32)[:, None, None]
    if rng.random() < 0.3:  # woven stripes
        stripe = np.mod(np.where(over, weft, warp), rng.integers(4, 14)) < rng.integers(1, 4)
        canvas.colour += stripe * rng.uniform(-45, 45, 3).astype(np.float32)[:, None, None]
    canvas.colour *= np.float32(1 - depth) + np.float32(depth) * lift
    canvas.height = 40 * lift
    threads = streaks(rng, v * np.float32(period), period) + streaks(rng, u * np.float32(period), period)
    canvas.shade(np.float32(rng.uniform(0, 5)) * threads)
    _surface(rng, canvas, 8)


def _wood(rng: Rng, canvas: Canvas, omit: bool) -> None:
    size, angle = canvas.size, rng.uniform(0, 2 * np.pi)
    colour = tone(rng, 70, 205, 5) * np.array([1.12, 0.95, 0.72])
    _texture(rng, canvas, np.clip(colour, 0, 245))
    v = turned_grid(size, angle)[1]
    wave = noise(rng, size, rng.uniform(0.3, 0.7)) * np.float32(rng.uniform(0.01, 0.06))
    rings = np.sin((v + wave) * np.float32(between(rng, 25, 140)) + 2 * noise(rng, size, 0.4))
    amount = np.float32(rng.uniform(3, 16)) * rings * np.abs(rings)
    amount += np.float32(rng.uniform(3, 10)) * streaks(rng, v + wave, rng.uniform(0.004, 0.012))
    pores = streaks(rng, v + 0.3 * wave, 0.004) * noise(rng, size, 0.05)
    amount += np.float32(rng.uniform(2, 18)) * np.minimum(pores, 0)
    canvas.colour *= 1 + amount * np.float32(1 / colour.mean())
    _surface(rng, canvas, 5)
    step = rng.uniform(0.1, 0.22)
    tracks = np.arange(-0.75, 0.75, step) + rng.uniform(0, step)
    if rng.random() < 0.5:  # grooves of several lengths' pieces: one piece may not have been cut
        if not omit and rng.random() < 0.4:
            return
        width, length = rng.uniform(0.012, 0.022), rng.uniform(0.25, 0.4)
        pieces = [
            rounded_box(length / 2, width / 2, 0.003) + np.array([x, y])
            for y in tracks
            for x in np.arange(-2, 3) * length
        ]
        _features(rng, canvas, [turn(p, angle) + 0.5 for p in pieces], colour * 0.45, -40, omit)
        canvas.rim = np.concatenate([canvas.rim, *(turn(p, angle)[::8] + 0.5 for p in pieces)])
    elif omit or rng.random() < 0.5:  # dowels
        radius, dark = rng.uniform(0.018, 0.035), colour * rng.uniform(0.5, 0.8)
        apart = step * rng.uniform(0.8, 1.3)
        spots = [(x, y) for y in tracks[::2] for x in np.arange(-0.75, 0.75, apart)]
        _features(rng, canvas, [turn(circle(np.array(p), radius), angle) + 0.5 for p in spots], dark, -15, omit)


def _tile(rng: Rng, canvas: Canvas, omit: bool) -> None:
    size, angle = canvas.size, rng.uniform(0, 2 * np.pi)
    colour = tone(rng, 60, 235, rng.choice([3, 25]))
    _texture(rng, canvas, colour)
    match rng.integers(4):
        case 0:  # veins
            vein = np.abs(noise(rng, size, rng.uniform(0.1, 0.3), 3))
            canvas.shade(np.float32(rng.uniform(-28, 28)) * np.minimum(vein * 3, 1))
        case 1:  # flecks
            flecks = np.maximum(noise(rng, size, between(rng, 0.012, 0.03)) - np.float32(0.45), 0)
            canvas.shade(np.float32(rng.uniform(-60, 60)) * flecks)
        case 2:  # ground
            canvas.shade(np.float32(between(rng, 2, 10)) * streaks(rng, turned_grid(size, angle)[1], 0.005))
        case _:
            pass
    _surface(rng, canvas, 10)
    side, offset = between(rng, 0.24, 1.6), rng.uniform(-0.5, 0.5, 2)
    if rng.random() < 0.75:  # joints
        across = np.arange(-5, 6) * side
        lines = [np.array([(x, -2.0), (x, 2.0)]) for x in across] + [np.array([(-2.0, y), (2.0, y)]) for y in across]
        joints = [turn(line + offset, angle) + 0.5 for line in lines]
        canvas.ground[:] = against(rng, colour, 20, 225, 8, 18).astype(np.float32)[:, None, None]
        canvas.paint(canvas.line(*joints, width=rng.uniform(0.008, 0.02)), canvas.ground, lift=-40)
        canvas.rim = np.concatenate([np.linspace(joint[0], joint[1], 100) for joint in joints])
    if not omit and rng.random() < 0.35:
        return
    pitch = side / max(1, round(side / rng.uniform(0.14, 0.34)))  # as many on each tile
    corners = int(rng.choice([3, 4, 6, 28]))
    radius = pitch * rng.uniform(0.16, 0.34)
    ink = against(rng, colour, 20, 230, rng.choice([3, 60]), between(rng, 12, 60))
    motif = turn(circle(np.zeros(2), radius, corners), rng.uniform(0, np.pi))
    n = 2 * (int(1.2 / pitch) + 1)
    spots = lattice(n, n, n * pitch, n * pitch) + offset
    motifs = [turn(motif + p + rng.normal(0, 0.001, 2), angle) + 0.5 for p in spots]
    _features(rng, canvas, motifs, ink, rng.choice([-15, 0, 15]), omit)


def _bottle_top(rng: Rng, canvas: Canvas, omit: bool) -> None:
    n = int(rng.integers(17, 25))
    t = np.linspace(0, 2 * np.pi, 12 * n, endpoint=False)
    radius = 0.5 - rng.uniform(0.01, 0.03) * np.abs(np.sin(n * t / 2))
    outline = radius[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    pose, colour = _object(rng, canvas, outline, 30, 230, 60)
    _surface(rng, canvas, 5, pose.angle, 0.2)
    a = 2 * np.pi / n * np.arange(n) + np.pi / n
    flute = np.array([(0.40, -0.1), (0.475, -0.32), (0.475, 0.32), (0.40, 0.1)])
    angles = a[:, None] + 2 * np.pi / n * flute[:, 1]
    flutes = flute[:, 0, None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    shift = rng.choice([-0.35, 0.4])
    _features(rng, canvas, [pose(f) for f in flutes], np.clip(colour * (1 + shift) + 40 * shift, 4, 250), 30, omit)
    canvas.paint(canvas.line(pose(circle(np.zeros(2), 0.38, 60)), width=0.008, closed=True), colour * 0.75, lift=-30)
    ink = against(rng, colour, 20, 240, 60)
    motif = circle(np.zeros(2), rng.uniform(0.1, 0.25), int(rng.choice([3, 4, 5, 6, 28])))
    canvas.paint(canvas.cover(pose(motif)), ink, lift=6)
    if rng.random() < 0.5:
        canvas.paint(canvas.cover(pose(motif * rng.uniform(0.5, 0.8))), against(rng, ink, 20, 240, 60))


def _cable(rng: Rng, canvas: Canvas, omit: bool) -> None:
    """A cut cable, seen from its end."""
    pose, colour = _object(rng, canvas, circle(np.zeros(2), 0.5, 72), 15, 225, 30)
    _surface(rng, canvas, 7)
    filler = against(rng, colour, 15, 200, 12, 18)
    canvas.paint(canvas.cover(pose(circle(np.zeros(2), 0.43, 60))), filler, lift=-20)
    _surface(rng, canvas, 5)
    n = int(rng.integers(3, 6))
    core = 0.43 * np.sin(np.pi / n) / (1 + np.sin(np.pi / n)) * 0.96
    spots = turn(circle(np.zeros(2), 0.42 - core, n), rng.uniform(0, np.pi))
    skipped = int(rng.integers(n)) if omit else -1
    copper = tone(rng, 140, 200, 5) * (np.array([1.15, 0.8, 0.55]) if rng.random() < 0.7 else 1.0)
    layers = int(rng.integers(2, 4))
    strand = core * 0.66 / (2 * layers - 1)
    bundle = [np.zeros(2)]
    for k in range(1, layers):
        bundle += list(circle(np.zeros(2), 2 * k * strand, 6 * k))
    for i, spot in enumerate(spots):
        if i == skipped:
            canvas.mark(canvas.cover(pose(circle(spot, core * 0.9))), _label("missing feature"))
            continue
        insulation = against(rng, filler, 30, 235, 80, 25)
        canvas.paint(canvas.cover(pose(circle(spot, core))), insulation, lift=25)
        canvas.paint(canvas.cover(pose(circle(spot, core * 0.7))), copper * 0.35, lift=-20)
        strands = [pose(circle(spot + p + rng.normal(0, 0.04 * strand, 2), strand * 0.93, 12)) for p in bundle]
        _features(rng, canvas, strands, np.clip(copper, 0, 250), 25, False)


def _leather(rng: Rng, canvas: Canvas, omit: bool) -> None:
    size, angle = canvas.size, rng.uniform(0, 2 * np.pi)
    colour = tone(rng, 25, 190, 6) * rng.choice([(1.25, 0.85, 0.6), (1.0, 1.0, 1.0), (1.1, 0.95, 0.8)])
    _texture(rng, canvas, np.clip(colour, 4, 240))
    seeds = np.ones((size, size), np.uint8)
    pebble = between(rng, 0.02, 0.05)
    n = round(1 / pebble)
    at = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1) + rng.uniform(0, 1, (n, n, 2))) * (size / n)
    seeds[tuple(np.minimum(at.reshape(-1, 2).astype(int), size - 1).T)] = 0
    cells = np.minimum(cv2.distanceTransform(seeds, cv2.DIST_L2, 3) / np.float32(0.7 * pebble * size), 1)
    canvas.height -= np.float32(rng.uniform(15, 60)) * cells**2
    canvas.colour *= 1 - np.float32(rng.uniform(0.05, 0.3)) * cells**2
    _surface(rng, canvas, 9)
    if not omit and rng.random() < 0.3:
        return
    pitch, width = rng.uniform(0.05, 0.09), rng.uniform(0.008, 0.014)
    thread = against(rng, colour, 20, 235, 25, 35)
    rows = (np.array([0.0]), np.array([-0.04, 0.04]))[rng.integers(2)] + rng.uniform(-0.25, 0.25)
    seam = turn(np.array([[-1.0, rows.mean()], [1.0, rows.mean()]]), angle) + 0.5
    canvas.paint(canvas.line(seam, width=0.012), colour * 0.6, lift=-30)
    canvas.rim = np.concatenate([canvas.rim, np.linspace(seam[0], seam[1], 40)])
    stitch = turn(rounded_box(pitch * 0.36, width, width * 0.9), rng.normal(0, 0.15))
    spots = [(x, y) for y in rows for x in np.arange(-0.75, 0.75, pitch)]
    _features(rng, canvas, [turn(stitch + p, angle) + 0.5 for p in spots], thread, 30, omit)


Family: TypeAlias = Callable[[Rng, Canvas, bool], None]
FAMILIES: dict[str, Family] = {
    "plate": _plate,
    "gear": _gear,
    "casting": _casting,
    "connector": _connector,
    "circuit board": _circuit_board,
    "blister": _blister,
    "fabric": _fabric,
    "wood": _wood,
    "tile": _tile,
}
UNSEEN_FAMILIES: dict[str, Family] = {"bottle top": _bottle_top, "cable": _cable, "leather": _leather}
"""Never trained on."""


# --- defects: each draws itself on the part and returns what it covers


def _spot(rng: Rng, canvas: Canvas) -> Points:
    """A random point on the part, if chance allows away from its rim."""
    for reach in (0.02, 0.0):
        for _ in range(60):
            at = rng.uniform(0.04, 0.96, 2)
            around = ((at + np.array([(0, 0), (-reach, 0), (reach, 0), (0, -reach), (0, reach)])) * canvas.size).astype(
                int
            )
            if canvas.part[around[:, 1], around[:, 0]].all():
                return at
    return at


def _local(canvas: Canvas, at: Points) -> tuple[Colour, float]:
    """Mean colour around a point, and how much the lightness varies there."""
    (x, y), r = (at * canvas.size).astype(int), max(3, canvas.size // 24)
    box = np.s_[..., max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
    weight = canvas.part[box].astype(np.float32) + np.float32(1e-3)
    weight /= weight.sum()
    mean = (canvas.colour[box] * weight).sum((1, 2))
    lightness = canvas.colour[box].mean(0)
    deviation = float(np.sqrt((weight * (lightness - mean.mean()) ** 2).sum()))
    return mean.astype(np.float64), deviation


def _differ(rng: Rng, lightness: float, deviation: float, faintest: float) -> float:
    """A change of lightness that a person can see on a surface that varies so much; often faint."""
    by = between(rng, faintest, 100) + 0.9 * deviation
    up, down = 248 - lightness, lightness - 6
    rooms = [room for room in (up, -down) if abs(room) >= by] or [max(up, -down, key=abs)]
    room = float(rng.choice(rooms))
    return float(np.copysign(min(by, abs(room)), room))


def _walk(rng: Rng, at: Points, length: float, steps: int, wander: float, heading: float, jag: float = 0.0) -> Points:
    """A path of `steps` strides centred on `at` whose heading wanders; each stride swerves from it by `jag`."""
    turns = heading + np.cumsum(rng.normal(0, wander, steps)) + rng.normal(0, jag, steps)
    path: Points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * length / steps, 0)
    return np.asarray(path - path.mean(0) + at)


def _scratch(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    colour, deviation = _local(canvas, at)
    change = _differ(rng, colour.mean(), deviation, 20)
    heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.12, 0.5)
    coverage = np.zeros((canvas.size, canvas.size), np.uint8)
    for k in range(int(rng.choice([1, 1, 2, 3, 5]))):
        start = at + rng.uniform(-0.03, 0.03, 2) * (k > 0)
        path = _walk(rng, start, length * rng.uniform(0.6, 1), 12, 0.04, heading + rng.normal(0, 0.05))
        coverage = np.maximum(coverage, canvas.line(path, width=rng.uniform(0.004, 0.011)))
    coverage *= canvas.part
    canvas.paint(coverage, colour + change, rng.uniform(0.75, 1), -20)
    return coverage


def _stain(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    colour, deviation = _local(canvas, at)
    change = _differ(rng, colour.mean(), deviation, 13)
    radius = between(rng, 0.022, 0.15)
    coverage = canvas.cover(blob(rng, at, radius, 0.18))
    for _ in range(int(rng.integers(0, 4))):
        drop = at + rng.normal(0, radius, 2)
        coverage = np.maximum(coverage, canvas.cover(blob(rng, drop, radius * rng.uniform(0.15, 0.5), 0.15)))
    soft = np.asarray(cv2.GaussianBlur(coverage, (0, 0), between(rng, 0.002, 0.02) * canvas.size), np.uint8)
    soft *= canvas.part
    hues = np.array([(0.3, 0.0, -0.3), (0.0, 0.0, 0.05), (-0.3, 0.0, 0.3), (0.35, -0.2, -0.15), (0.0, 0.0, 0.0)])
    tint = hues[rng.integers(len(hues))] * rng.uniform(30, 110)
    canvas.paint(soft, np.clip(colour + change + tint, 0, 252), rng.uniform(0.7, 0.95))
    if rng.random() < 0.4:  # a dried rim
        rim = cv2.absdiff(soft, cv2.erode(soft, np.ones((5, 5), np.uint8)))
        canvas.paint(np.asarray(rim, np.uint8), np.clip(colour + 1.6 * change + tint, 0, 252), 0.6)
    return soft


def _pit(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    colour, deviation = _local(canvas, at)
    change = _differ(rng, colour.mean(), deviation, 22)
    coverage = np.zeros((canvas.size, canvas.size), np.uint8)
    spread, n = rng.uniform(0.02, 0.05), int(rng.choice([1, 1, 2, 3, 4, 8]))
    for k in range(n):
        centre = at + rng.normal(0, spread, 2) * (k > 0)
        coverage = np.maximum(coverage, canvas.cover(blob(rng, centre, between(rng, 0.009, 0.03), 0.15, 14)))
    coverage *= canvas.part
    if change > 0:  # on a dark part the pit shows its bright lip
        lip = cv2.morphologyEx(coverage, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        canvas.paint(np.asarray(lip, np.uint8) * canvas.part, colour + change)
    canvas.paint(coverage, colour - abs(change) if change < 0 else colour * 0.3, rng.uniform(0.75, 1), -70)
    return coverage


def _crack(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    colour, deviation = _local(canvas, at)
    change = _differ(rng, colour.mean(), deviation, 28)
    heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.5)
    trunk = _walk(rng, at, length, 18, 0.12, heading, 0.7)  # it keeps its direction: what curls is a fibre
    coverage = canvas.line(trunk, width=rng.uniform(0.004, 0.011))
    for _ in range(int(rng.integers(0, 4))):
        fork = trunk[rng.integers(3, 15)]
        branch = _walk(rng, fork, length * rng.uniform(0.2, 0.45), 8, 0.12, heading + rng.uniform(-1.2, 1.2), 0.7)
        coverage = np.maximum(coverage, canvas.line(branch - branch[0] + fork, width=0.004))
    coverage *= canvas.part
    dark = colour + change if change < 0 or colour.mean() < 40 else colour * 0.25
    canvas.paint(coverage, dark, rng.uniform(0.8, 1), -45)
    return coverage


def _fibre(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    local, deviation = _local(canvas, at)
    change = _differ(rng, local.mean(), deviation, 28)
    turns = np.cumsum(np.cumsum(rng.normal(0, rng.uniform(0.02, 0.06), 40))) + rng.uniform(0, 2 * np.pi)
    path = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * rng.uniform(0.2, 0.6) / 40, 0)
    path = path - path.mean(0) + at
    width = rng.uniform(0.004, 0.01)
    shadow = cv2.blur(canvas.line(path + 0.009 * canvas.light, width=width), (3, 3))
    canvas.paint(np.asarray(shadow, np.uint8), local * 0.3, 0.5)
    coverage = canvas.line(path, width=width)
    tint = rng.uniform(-60, 60, 3)
    canvas.paint(coverage, np.clip(local + change + tint - tint.mean(), 0, 255), lift=50)
    return coverage


def _window(canvas: Canvas, at: Points, reach: float) -> tuple[Any, Field, Field]:
    """The box within `reach` of a point: its index, and x and y from the point."""
    low, high = (np.clip((at + s * reach) * canvas.size, 0, canvas.size).astype(int) for s in (-1, 1))
    box = np.s_[..., low[1] : high[1], low[0] : high[0]]
    x, y = grid(canvas.size)
    return box, x[box] - np.float32(at[0] - 0.5), y[box] - np.float32(at[1] - 0.5)


def _dent(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    colour, deviation = _local(canvas, at)
    amount = abs(_differ(rng, colour.mean(), deviation, 16))
    radius, stretch, angle = between(rng, 0.014, 0.05), rng.uniform(0.4, 1), rng.uniform(0, np.pi)
    box, x, y = _window(canvas, at, 3 * radius)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    bowl = np.exp(-0.5 * (along**2 + (across / stretch) ** 2) / radius**2).astype(np.float32)
    down = turn(canvas.light[None], -angle)[0]  # the light, along and across the dent
    slope = bowl * (along * down[0] + across * down[1] / stretch**2) / radius
    shade = slope / max(float(np.abs(slope).max()), 1e-6) - np.float32(0.3) * bowl
    canvas.colour[box] += np.float32(amount) * shade * canvas.part[box]
    coverage = np.zeros((canvas.size, canvas.size), np.uint8)
    coverage[box] = (bowl > 0.06) * canvas.part[box] * np.uint8(255)
    return coverage


def _chipped_edge(rng: Rng, canvas: Canvas) -> Coverage:
    in_frame = canvas.rim[((canvas.rim >= 0) & (canvas.rim <= 1)).all(1)]
    at = in_frame[rng.integers(len(in_frame))]
    outline = blob(rng, at, between(rng, 0.03, 0.15), 0.2, 18)
    coverage = canvas.cover(outline + rng.normal(0, 0.004, outline.shape)) * canvas.part
    colour, deviation = _local(canvas, at)
    face = np.clip(colour + _differ(rng, colour.mean(), deviation, 14) * 0.7, 4, 250)
    canvas.paint(coverage, face, 0.85, -25)
    gone = canvas.cover(at + (outline - at) * rng.uniform(0.65, 0.9)) * canvas.part
    canvas.paint(gone, canvas.ground, lift=-25)
    return coverage


def _bubble(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    colour, deviation = _local(canvas, at)
    amount = np.float32(abs(_differ(rng, colour.mean(), deviation, 18)))
    coverage = np.zeros((canvas.size, canvas.size), np.uint8)
    for k in range(int(rng.choice([1, 1, 2, 3, 5]))):
        centre, radius = at + rng.normal(0, 0.05, 2) * (k > 0), between(rng, 0.014, 0.05)
        box, x, y = _window(canvas, centre, 1.4 * radius)
        far = np.hypot(x, y) / radius
        inside = np.clip((1 - far) * radius * canvas.size, 0, 1)
        dome = -(x * canvas.light[0] + y * canvas.light[1]) / radius * inside
        ring = np.exp(-(((far - 0.95) / 0.13) ** 2))
        glint = np.exp(
            -(
                ((x + 0.4 * radius * canvas.light[0]) ** 2 + (y + 0.4 * radius * canvas.light[1]) ** 2)
                / (0.2 * radius) ** 2
            )
        )
        canvas.colour[box] += amount * (dome - 0.45 * ring + glint).astype(np.float32) * canvas.part[box]
        coverage[box] = np.maximum(coverage[box], (far < 1) * canvas.part[box] * np.uint8(255))
    return coverage


def _burn_mark(rng: Rng, canvas: Canvas) -> Coverage:
    at = _spot(rng, canvas)
    colour, deviation = _local(canvas, at)
    change = _differ(rng, colour.mean(), deviation, 28)
    char = (
        np.clip(colour + change, 4, 250) if colour.mean() < 60 else (colour - abs(change)).clip(4) * (1.05, 0.85, 0.7)
    )
    radius = rng.uniform(0.03, 0.09)
    outline = blob(rng, at, radius, 0.2)
    halo = np.asarray(cv2.GaussianBlur(canvas.cover(outline), (0, 0), 0.35 * radius * canvas.size), np.uint8)
    halo *= canvas.part
    canvas.paint(halo, 0.5 * (colour * (1.0, 0.85, 0.65) + char), 0.75)
    core = canvas.cover(at + (outline - at) * rng.uniform(0.4, 0.75))
    core = np.asarray(cv2.GaussianBlur(core, (0, 0), 0.12 * radius * canvas.size), np.uint8)
    canvas.paint(core * canvas.part, char, 0.9)
    return halo


_DEFECTS: dict[Kind, Callable[[Rng, Canvas], Coverage]] = {
    "scratch": _scratch,
    "stain": _stain,
    "pit": _pit,
    "crack": _crack,
    "fibre": _fibre,
    "dent": _dent,
    "chipped edge": _chipped_edge,
    "bubble": _bubble,
    "burn mark": _burn_mark,
}


def _photograph(rng: Rng, canvas: Canvas) -> Image:
    """Light the height from one side; add a gradient, a reflection, exposure, blur, noise, gamma and JPEG's traces."""
    size = canvas.size
    colour = canvas.colour
    if rng.random() < 0.25:  # a grey camera
        colour = np.tensordot(np.array([0.3, 0.59, 0.11], np.float32), colour, 1)[None]
    height = cv2.GaussianBlur(canvas.height, (0, 0), 0.003 * size)
    strength = rng.uniform(0.25, 0.9) * size / 256 / 4 * canvas.light
    colour = colour + cv2.addWeighted(
        cv2.Sobel(height, cv2.CV_32F, 1, 0), strength[0], cv2.Sobel(height, cv2.CV_32F, 0, 1), strength[1], 0
    )
    x, y = grid(size)
    tilt = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    light = 1 + tilt[0] * x + tilt[1] * y - np.float32(max(0.0, rng.uniform(-0.4, 0.8))) * (x * x + y * y)
    brightest = np.partition(colour[:, ::8, ::8].max(0).ravel(), -size // 8)[-size // 8]
    exposure = min(np.clip(rng.normal(1, 0.13), 0.6, 1.35), 250 / max(float(brightest), 1))  # what burns out is lost
    colour *= light * np.float32(exposure)
    if len(colour) == 3:
        colour *= rng.uniform(0.93, 1.07, (3, 1, 1)).astype(np.float32)
    if rng.random() < 0.2:  # a lamp's reflection
        at = rng.uniform(-0.5, 0.5, 2)
        glare = (x - np.float32(at[0])) ** 2 + (y - np.float32(at[1])) ** 2
        colour += np.float32(rng.uniform(5, 40)) * cv2.exp(glare * np.float32(-1 / between(rng, 0.01, 0.2)))
    blur, rough = between(rng, 0.0012, 0.004) * size, np.float32(between(rng, 0.4, 7))
    if rng.random() < 0.25:  # a flat light
        flat = np.float32(rng.uniform(0.45, 0.9))
        colour = colour * flat + (1 - flat) * np.float32(rng.uniform(60, 180))
        rough *= flat**2
    shared, coloured = grain(rng, size), rng.random() < 0.4
    planes = []
    for plane in colour:
        smooth = cv2.GaussianBlur(plane, (0, 0), blur)
        smooth += rough * (grain(rng, size) if coloured else shared)
        planes.append(np.clip(smooth, 0, 255).astype(np.uint8))
    image = cv2.merge(planes * (3 // len(planes)))
    curve = 255 * (np.arange(256) / 255) ** rng.uniform(0.8, 1.25)
    image = cv2.LUT(image, np.round(curve).astype(np.uint8))
    if rng.random() < 0.25:
        grey = len(planes) == 1
        _, coded = cv2.imencode(
            ".jpg", image[..., 0] if grey else image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(45, 96))]
        )
        image = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    return np.asarray(image, np.uint8)
