"""Procedurally drawn parts: an image, what is wrong with it, and where. Everything follows from the generator's seed.

A part is drawn as colour and height; the height is lit from one side, so that holes, dents and threads cast the
shading that a person expects. Lengths are in units of the frame's side unless they say pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

Kind = Literal["scratch", "stain", "pit", "crack", "missing feature", "fibre"]
KINDS: tuple[Kind, ...] = ("scratch", "stain", "pit", "crack", "missing feature", "fibre")
PLACES = (
    ("upper left", "upper centre", "upper right"),
    ("centre left", "centre", "centre right"),
    ("lower left", "lower centre", "lower right"),
)

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Points = NDArray[np.float64]
Colour = NDArray[np.float64]
Field = NDArray[np.floating[Any]]
"""Float32 in fact."""


@dataclass(frozen=True)
class Part:
    image: Image
    """[S,S,3], RGB."""
    mask: Mask
    """[S,S], true on the defect."""
    object: str
    kind: Kind | None
    place: str | None


def draw(
    rng: np.random.Generator,
    family: str | None = None,
    defect: Kind | Literal["random"] | None = None,
    size: int = 256,
) -> Part:
    """One part of `family` (a name in FAMILIES; None: any) with a defect of this kind (None: a good part)."""
    name = family or str(rng.choice(list(FAMILIES)))
    kind = cast(Kind, str(rng.choice(KINDS))) if defect == "random" else defect
    while True:
        canvas = _Canvas(size)
        missing = FAMILIES[name](rng, canvas, kind == "missing feature")
        mask = missing if kind in (None, "missing feature") else _DEFECTS[kind](rng, canvas)
        if kind is None or mask.sum() >= 0.0012 * size * size:
            break  # else the defect fell off the part: draw another
    image = _photograph(rng, canvas)
    return Part(image, mask, name, kind, None if kind is None else place(mask))


def place(mask: Mask) -> str:
    """Which of the frame's 3×3 fields holds the centroid of `mask`."""
    rows, columns = np.nonzero(mask)
    row, column = (int(3 * (v.mean() + 0.5) / n) for v, n in ((rows, mask.shape[0]), (columns, mask.shape[1])))
    return PLACES[row][column]


class _Canvas:
    """Colour, height (both 8 bit) and extent of what is drawn so far."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = np.zeros((size, size, 3), np.uint8)
        self.height = np.full((size, size), 128, np.uint8)
        self.part = np.zeros((size, size), np.uint8)

    def fixed(self, points: Points) -> NDArray[np.int32]:
        """Points [n,2] (x, y) as OpenCV's fixed point with 4 fractional bits."""
        return np.round(points * self.size * 16).astype(np.int32)[:, None]

    def polygon(self, points: Points, colour: Colour, height: int) -> None:
        cv2.fillPoly(self.colour, [self.fixed(points)], colour.tolist(), cv2.LINE_AA, 4)
        cv2.fillPoly(self.height, [self.fixed(points)], (height,), cv2.LINE_AA, 4)

    def region(self, points: Points) -> Mask:
        mask = np.zeros((self.size, self.size), np.uint8)
        cv2.fillPoly(mask, [self.fixed(points)], (1,), cv2.LINE_8, 4)
        return mask > 0

    def line(self, points: Points, width: float, closed: bool = False) -> Field:
        """Antialiased polyline as coverage [S,S] in 0…1; `width` in units of the frame."""
        out = np.zeros((self.size, self.size), np.uint8)
        thickness = max(1, round(width * self.size))
        cv2.polylines(out, [self.fixed(points)], closed, (255,), thickness, cv2.LINE_AA, 4)
        return out.astype(np.float32) / 255

    def blend(self, coverage: Field, colour: Colour) -> None:
        alpha = coverage[..., None]
        self.colour = (self.colour * (1 - alpha) + alpha * colour.astype(np.float32)).astype(np.uint8)

    def sink(self, coverage: Field, depth: float) -> None:
        """Lower the height where covered; a negative depth raises it."""
        self.height = np.clip(self.height - depth * coverage, 0, 255).astype(np.uint8)

    def texture(self, amount: Field) -> None:
        self.colour = np.clip(self.colour + amount[..., None], 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, size: int, cell: float) -> Field:
    """Smooth noise [size,size], about −1…1, with features of `cell` pixels."""
    n = max(2, round(size / cell))
    coarse = rng.uniform(-1, 1, (n, n)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)


def _turn(points: Points, angle: float) -> Points:
    c, s = np.cos(angle), np.sin(angle)
    turned: Points = points @ np.array([[c, s], [-s, c]])
    return turned


def _circle(centre: Points, radius: float, n: int = 28) -> Points:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return centre + radius * np.stack([np.cos(t), np.sin(t)], 1)


def _box(half_width: float, half_height: float, corner: float) -> Points:
    """Rectangle with round corners about the origin."""
    t = np.linspace(0, np.pi / 2, 6)
    arc = corner * np.stack([np.cos(t), np.sin(t)], 1)
    quarter = np.array([half_width - corner, half_height - corner])
    corners = [
        _turn(arc, k * np.pi / 2) + quarter * sign for k, sign in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1)))
    ]
    return np.concatenate(corners)


def _tone(rng: np.random.Generator, low: float, high: float, tint: float) -> Colour:
    """A colour of lightness low…high whose channels differ by about `tint`."""
    return np.clip(rng.uniform(low, high) + rng.uniform(-tint, tint, 3), 4, 250)


def _centre(rng: np.random.Generator) -> Points:
    return 0.5 + rng.uniform(-0.04, 0.04, 2)


def _background(rng: np.random.Generator, canvas: _Canvas) -> Colour:
    """Fill the canvas with a bench, belt or cloth; returns its colour."""
    colour = _tone(rng, 20, 215, 18)
    canvas.colour[:] = colour.astype(np.uint8)
    canvas.height[:] = 60
    match rng.integers(3):
        case 0:
            canvas.texture(rng.uniform(2, 10) * _noise(rng, canvas.size, canvas.size * rng.uniform(0.01, 0.1)))
        case 1:
            rows = np.arange(canvas.size, dtype=np.float32) / canvas.size
            stripes = np.sin(rows * rng.uniform(40, 160))[:, None] * np.ones(canvas.size, np.float32)
            canvas.texture(rng.uniform(2, 8) * (stripes if rng.random() < 0.5 else stripes.T))
        case _:
            pass
    return colour


def _against(rng: np.random.Generator, ground: Colour, low: float, high: float, tint: float) -> Colour:
    """A tone that can be told from the ground."""
    while True:
        colour = _tone(rng, low, high, tint)
        if abs(colour.mean() - ground.mean()) > 35:
            return colour


def _brushed(rng: np.random.Generator, canvas: _Canvas, amount: float) -> None:
    """Machining marks along one axis."""
    grain = rng.standard_normal((canvas.size, canvas.size), np.float32)
    grain = cv2.blur(grain, (31, 1) if rng.random() < 0.5 else (1, 31)) * 5.5
    canvas.texture(np.where(canvas.part > 0, amount * grain, 0).astype(np.float32))


def _plate(rng: np.random.Generator, canvas: _Canvas, omit: bool) -> Mask:
    ground = _background(rng, canvas)
    colour = _against(rng, ground, 70, 215, 14)
    centre, angle = _centre(rng), rng.uniform(-0.35, 0.35)
    half = rng.uniform(0.33, 0.42, 2)
    outline = _turn(_box(half[0], half[1], rng.uniform(0.02, 0.12)), angle) + centre
    canvas.polygon(outline, colour, 150)
    canvas.part[canvas.region(outline)] = 1
    _brushed(rng, canvas, rng.uniform(0, 6))
    if rng.random() < 0.5:
        inset = _turn(_box(half[0] * 0.92, half[1] * 0.92, 0.03), angle) + centre
        canvas.sink(canvas.line(inset, 0.006, closed=True), 30)
    if rng.random() < 0.5:
        n = int(rng.integers(4, 9))
        spots = _circle(np.zeros(2), 0.68 * half.min(), n)
        bore: float = rng.uniform(0.05, 0.12)
        canvas.polygon(_circle(centre, bore), ground * 0.6, 40)
        canvas.part[canvas.region(_circle(centre, bore + 0.01))] = 0
        radius = min(rng.uniform(0.025, 0.05), 1.4 * half.min() / n)
    else:
        columns, rows = rng.integers(2, 4, 2)
        x = np.linspace(-0.7, 0.7, columns) * half[0]
        y = np.linspace(-0.7, 0.7, rows) * half[1]
        spots = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        radius = rng.uniform(0.028, 0.06)
    return _features(
        rng, canvas, [_circle(_turn(p[None], angle) + centre, radius) for p in spots], ground * 0.6, 40, omit
    )


def _features(
    rng: np.random.Generator, canvas: _Canvas, outlines: list[Points], colour: Colour, height: int, omit: bool
) -> Mask:
    """Draw each outline; with `omit`, all but one. Returns where the missing one should be."""
    skipped = int(rng.integers(len(outlines))) if omit else -1
    for i, outline in enumerate(outlines):
        if i != skipped:
            canvas.polygon(outline, colour, height)
            if height < 100:  # a hole: no defect can lie on it
                canvas.part[canvas.region(outline)] = 0
    return canvas.region(outlines[skipped]) if omit else np.zeros((canvas.size, canvas.size), bool)


def _gear(rng: np.random.Generator, canvas: _Canvas, omit: bool) -> Mask:
    ground = _background(rng, canvas)
    colour = _against(rng, ground, 60, 215, 14)
    centre, phase = _centre(rng), rng.uniform(0, 2 * np.pi)
    n = int(rng.integers(10, 20))
    outer = rng.uniform(0.37, 0.45)
    root = outer * rng.uniform(0.78, 0.86)
    canvas.polygon(_circle(centre, root, 72), colour, 150)
    canvas.part[canvas.region(_circle(centre, root, 72))] = 1
    step, top = 2 * np.pi / n, rng.uniform(0.2, 0.32)
    tooth = [(root * 0.97, -0.27), (outer, -top * 0.55), (outer, top * 0.55), (root * 0.97, 0.27)]
    teeth = []
    for k in range(n):
        a = np.array([phase + step * (k + f) for _, f in tooth])
        r = np.array([r for r, _ in tooth])
        teeth.append(centre + np.stack([r * np.cos(a), r * np.sin(a)], 1))
    missing = _features(rng, canvas, teeth, colour, 150, omit)
    _brushed(rng, canvas, rng.uniform(0, 5))
    if rng.random() < 0.6:
        canvas.sink(canvas.line(_circle(centre, root * 0.86, 72), 0.012, closed=True), 35)
    bore = outer * rng.uniform(0.18, 0.3)
    holes = [_circle(centre, bore, 40)]
    if rng.random() < 0.6:
        holes += [_circle(p, outer * 0.11) for p in _circle(centre, outer * 0.53, int(rng.integers(4, 7)))]
    _features(rng, canvas, holes, ground * 0.6, 40, omit=False)
    return missing


def _connector(rng: np.random.Generator, canvas: _Canvas, omit: bool) -> Mask:
    ground = _background(rng, canvas)
    colour = _against(rng, ground, 15, 200, 45)
    centre, angle = _centre(rng), rng.uniform(-0.3, 0.3)
    half = np.array([rng.uniform(0.36, 0.43), rng.uniform(0.2, 0.34)])
    outline = _turn(_box(half[0], half[1], rng.uniform(0.01, 0.05)), angle) + centre
    canvas.polygon(outline, colour, 150)
    canvas.part[canvas.region(outline)] = 1
    rows, n = int(rng.integers(1, 3)), int(rng.integers(4, 9))
    canvas.texture(3 * _noise(rng, canvas.size, 3) * canvas.part)
    if rng.random() < 0.7:
        inset = _turn(_box(half[0] * 0.93, half[1] * 0.86, 0.02), angle) + centre
        canvas.polygon(inset, colour * 0.8, 118)
    metal = _tone(rng, 150, 220, 5) * (np.array([1.0, 0.85, 0.5]) if rng.random() < 0.6 else 1.0)
    pitch = 1.7 * half[0] / n
    pin = _box(pitch * rng.uniform(0.2, 0.33), half[1] * (0.5 if rows == 1 else 0.27), 0.006)
    pins = [
        _turn(pin + np.array([(i - (n - 1) / 2) * pitch, (j - (rows - 1) / 2) * 0.8 * half[1]]), angle) + centre
        for j in range(rows)
        for i in range(n)
    ]
    _features(rng, canvas, pins, colour * 0.45, 100, omit=False)  # the recesses stay when a pin is missing
    small = [p.mean(0) + (p - p.mean(0)) * 0.86 for p in pins]
    return _features(rng, canvas, small, metal, 185, omit)


def _fabric(rng: np.random.Generator, canvas: _Canvas, omit: bool) -> Mask:
    size = canvas.size
    period, angle = rng.uniform(0.028, 0.055), rng.uniform(-0.6, 0.6)
    y, x = np.mgrid[:size, :size].astype(np.float32) / np.float32(size)
    bend = 0.006 * _noise(rng, size, size / 5)
    u = (x * np.cos(angle) + y * np.sin(angle) + bend) / period
    v = (y * np.cos(angle) - x * np.sin(angle) + bend) / period
    warp, weft = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    twill = int(rng.integers(2, 5))
    over = (warp + weft) % twill == 0
    across_warp, across_weft = np.sin(np.pi * (u - warp)), np.sin(np.pi * (v - weft))
    missing = np.zeros((size, size), bool)
    if omit:
        row, start = np.floor(v[tuple(rng.integers(size // 5, size * 4 // 5, 2))]), rng.uniform(0.1, 0.4)
        along = u * period
        first = along.min() + start * (along.max() - along.min())
        missing = (weft == row) & (along > first) & (along < first + rng.uniform(0.25, 0.5))
    over &= ~missing
    lift = np.where(over, across_weft, across_warp)
    lift[missing & (across_warp < 0.6)] = 0
    a, b = _tone(rng, 60, 220, 45), _tone(rng, 60, 220, 45)
    shade = (0.45 + 0.55 * lift)[..., None].astype(np.float32)
    canvas.colour = (np.where(over[..., None], a, b) * shade).astype(np.uint8)
    canvas.height = (90 + 60 * lift).astype(np.uint8)
    canvas.part[:] = 1
    return missing


def _tile(rng: np.random.Generator, canvas: _Canvas, omit: bool) -> Mask:
    colour = _tone(rng, 90, 235, 25)
    canvas.colour[:] = _tone(rng, 60, 190, 8).astype(np.uint8)
    canvas.height[:] = 90
    centre, angle = _centre(rng), rng.uniform(-0.12, 0.12)
    half = rng.uniform(0.42, 0.47)
    outline = _turn(_box(half, half, 0.015), angle) + centre
    canvas.polygon(outline, colour, 150)
    canvas.part[canvas.region(outline)] = 1
    if rng.random() < 0.5:
        vein = np.abs(_noise(rng, canvas.size, canvas.size * rng.uniform(0.1, 0.25)))
        canvas.texture(np.where(canvas.part > 0, rng.uniform(-22, 22) * vein, 0).astype(np.float32))
    else:
        canvas.texture(rng.uniform(2, 9) * _noise(rng, canvas.size, 3) * canvas.part)
    n = int(rng.integers(2, 5))
    ink = _against(rng, colour, 30, 220, 60)
    radius = half / n * rng.uniform(0.25, 0.55)
    corners = int(rng.choice([3, 4, 6, 28]))
    grid = (np.arange(n) - (n - 1) / 2) * 2 * half / n * 0.95
    spots = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    turned = rng.uniform(0, np.pi)
    motif = _turn(_circle(np.zeros(2), radius, corners), turned)
    motifs = [_turn(motif + p, angle) + centre for p in spots]
    return _features(rng, canvas, motifs, ink, int(rng.choice([140, 150, 158])), omit)


FAMILIES: dict[str, Callable[[np.random.Generator, _Canvas, bool], Mask]] = {
    "plate": _plate,
    "gear": _gear,
    "connector": _connector,
    "fabric": _fabric,
    "tile": _tile,
}


def _spot(rng: np.random.Generator, canvas: _Canvas) -> Points:
    """A random point on the part, away from its rim."""
    inner = cv2.erode(canvas.part, np.ones((5, 5), np.uint8), borderValue=0)
    rows, columns = np.nonzero(inner)
    i = rng.integers(len(rows))
    return (np.array([columns[i], rows[i]]) + 0.5) / canvas.size


def _lightness(canvas: _Canvas, at: Points) -> float:
    x, y = (at * canvas.size).astype(int)
    return float(canvas.colour[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].mean())


def _differ(rng: np.random.Generator, lightness: float, by: float) -> float:
    """A lightness at least `by` away, on the side with room."""
    if lightness + by > 235 or (lightness - by > 15 and rng.random() < 0.5):
        return max(5.0, lightness - by * rng.uniform(1, 1.5))
    return min(250.0, lightness + by * rng.uniform(1, 1.5))


def _walk(rng: np.random.Generator, at: Points, length: float, steps: int, wander: float, heading: float) -> Points:
    """A path of `steps` strides centred on `at` whose heading wanders."""
    turns = heading + np.cumsum(rng.normal(0, wander, steps))
    path: Points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * length / steps, 0)
    return np.asarray(path - path.mean(0) + at)


def _grown(canvas: _Canvas, coverage: Field, margin: float) -> Mask:
    """Where the part is covered, with the margin that a person's brush leaves."""
    r = max(1, round(margin * canvas.size))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1))
    return cv2.dilate((coverage > 0.25).astype(np.uint8), kernel) > 0


def _scratch(rng: np.random.Generator, canvas: _Canvas) -> Mask:
    at = _spot(rng, canvas)
    heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5)
    tone = np.full(3, _differ(rng, _lightness(canvas, at), 60))
    coverage = np.zeros((canvas.size, canvas.size), np.float32)
    for k in range(int(rng.integers(1, 4))):
        start = at + rng.uniform(-0.03, 0.03, 2) * (k > 0)
        path = _walk(rng, start, length * rng.uniform(0.7, 1), 12, 0.04, heading)
        coverage = np.maximum(coverage, canvas.line(path, rng.uniform(0.006, 0.014)))
    coverage *= canvas.part
    canvas.blend(coverage * np.float32(rng.uniform(0.7, 1)), tone)
    canvas.sink(coverage, 30)
    return _grown(canvas, coverage, 0.008)


def _stain(rng: np.random.Generator, canvas: _Canvas) -> Mask:
    at = _spot(rng, canvas)
    y, x = np.mgrid[: canvas.size, : canvas.size].astype(np.float32) / np.float32(canvas.size)
    radius, stretch, angle = rng.uniform(0.05, 0.13), rng.uniform(0.6, 1), rng.uniform(0, np.pi)
    dx, dy = x - at[0], y - at[1]
    along = dx * np.cos(angle) + dy * np.sin(angle)
    distance = np.hypot(along * stretch, dy * np.cos(angle) - dx * np.sin(angle)) / radius
    edge = 1 - distance + 0.35 * _noise(rng, canvas.size, radius * canvas.size * 0.7)
    coverage: Field = np.clip(edge * rng.uniform(3, 8), 0, 1).astype(np.float32) * canvas.part
    light = _lightness(canvas, at)
    tint = np.array([[1.0, 0.7, 0.35], [0.5, 0.5, 0.55], [0.35, 0.55, 0.9], [0.9, 0.4, 0.3], [1, 1, 1]])
    colour = np.clip(_differ(rng, light, 70) * tint[rng.integers(len(tint))], 0, 255)
    canvas.blend(coverage * np.float32(rng.uniform(0.5, 0.85)), colour)
    return coverage > 0.4


def _pit(rng: np.random.Generator, canvas: _Canvas) -> Mask:
    at = _spot(rng, canvas)
    coverage = np.zeros((canvas.size, canvas.size), np.uint8)
    for k in range(int(rng.integers(1, 5))):
        centre = at + rng.normal(0, 0.035, 2) * (k > 0)
        outline = _circle(centre, rng.uniform(0.014, 0.032), 12)
        outline = centre + (outline - centre) * rng.uniform(0.75, 1.2, (12, 1))
        cv2.fillPoly(coverage, [canvas.fixed(outline)], (255,), cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(coverage, (0, 0), 0.003 * canvas.size).astype(np.float32) / 255 * canvas.part
    canvas.blend(soft * np.float32(rng.uniform(0.55, 0.9)), np.full(3, _lightness(canvas, at) * rng.uniform(0.2, 0.45)))
    canvas.sink(soft, 90)
    return _grown(canvas, soft, 0.006)


def _crack(rng: np.random.Generator, canvas: _Canvas) -> Mask:
    at = _spot(rng, canvas)
    heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.22, 0.5)
    trunk = _walk(rng, at, length, 22, 0.55, heading)
    coverage = canvas.line(trunk, rng.uniform(0.007, 0.012))
    for _ in range(int(rng.integers(1, 4))):
        fork = trunk[rng.integers(4, 18)]
        branch = _walk(rng, fork, length * rng.uniform(0.2, 0.45), 10, 0.5, heading + rng.uniform(-1.2, 1.2))
        coverage = np.maximum(coverage, canvas.line(branch - branch[0] + fork, 0.004))
    coverage *= canvas.part
    canvas.blend(coverage * np.float32(0.9), np.full(3, _lightness(canvas, at) * rng.uniform(0.08, 0.3)))
    canvas.sink(coverage, 60)
    return _grown(canvas, coverage, 0.008)


def _fibre(rng: np.random.Generator, canvas: _Canvas) -> Mask:
    at = _spot(rng, canvas)
    turns = np.cumsum(np.cumsum(rng.normal(0, 0.035, 40))) + rng.uniform(0, 2 * np.pi)
    path = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * rng.uniform(0.3, 0.6) / 40, 0)
    path = path - path.mean(0) + at
    light = _lightness(canvas, at)
    colour = np.clip(_differ(rng, light, 85) + rng.uniform(-60, 60, 3), 0, 255)
    width = rng.uniform(0.006, 0.011)
    shadow = cv2.GaussianBlur(canvas.line(path + 0.009, width), (0, 0), 0.005 * canvas.size)
    canvas.blend(np.clip(shadow * np.float32(0.6), 0, 1), np.full(3, light * 0.3))
    coverage = canvas.line(path, width)
    canvas.blend(coverage, colour)
    canvas.sink(coverage, -60)
    return _grown(canvas, coverage, 0.008)


_DEFECTS: dict[Kind, Callable[[np.random.Generator, _Canvas], Mask]] = {
    "scratch": _scratch,
    "stain": _stain,
    "pit": _pit,
    "crack": _crack,
    "fibre": _fibre,
}


def _photograph(rng: np.random.Generator, canvas: _Canvas) -> Image:
    """Light the height from one side, add a light gradient, white balance, blur, noise and gamma."""
    size = canvas.size
    height = cv2.GaussianBlur(canvas.height, (0, 0), 0.003 * size).astype(np.float32)
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.9) * size / 256
    slope = cv2.Sobel(height, cv2.CV_32F, 1, 0) * np.float32(np.cos(direction) * strength / 4)
    slope += cv2.Sobel(height, cv2.CV_32F, 0, 1) * np.float32(np.sin(direction) * strength / 4)
    image: Field = canvas.colour.astype(np.float32)
    image += slope[..., None]
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    tilt = rng.uniform(-0.18, 0.18, 2).astype(np.float32)
    light = 1 + tilt[0] * axis[None] + tilt[1] * axis[:, None]
    light -= np.float32(rng.uniform(0, 0.15)) * (axis[None] ** 2 + axis[:, None] ** 2)
    image *= light[..., None]
    image *= (rng.uniform(0.8, 1.15) * rng.uniform(0.94, 1.06, 3)).astype(np.float32)
    image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.0012, 0.0035) * size), np.float32)
    grain = np.frombuffer(rng.bytes(size * size * 2), np.uint8).reshape(size, size, 2).astype(np.float32)
    image += (grain.sum(2) - 255)[..., None] * np.float32(rng.uniform(0.005, 0.06))
    image = np.clip(image, 0, 255) / np.float32(255)
    return (cv2.pow(image, rng.uniform(0.85, 1.2)) * 255).astype(np.uint8)
