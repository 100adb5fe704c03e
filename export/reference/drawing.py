"""What parts are drawn with: a canvas of colour and height, noise, outlines and tones.

Lengths are in units of the frame's side unless they say pixels; colours are planes [3,S,S] while drawing: that is fast.
Whatever is random follows from the generator that is passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Coverage: TypeAlias = NDArray[np.uint8]
"""[S,S], 0…255: how much of a pixel is covered."""
Points: TypeAlias = NDArray[np.float64]
"""[n,2], x and y."""
Colour: TypeAlias = NDArray[np.float64]
"""[3], 0…255."""
Field: TypeAlias = NDArray[np.floating[Any]]
"""Float32 in fact; [S,S], or [3,S,S] for colours."""
Rng: TypeAlias = np.random.Generator

BRUSH = 0.012
"""The margin around a defect that a person's brush leaves."""


class Canvas:
    """Colour, height and extent of what is drawn so far."""

    def __init__(self, rng: Rng, size: int) -> None:
        self.size = size
        self.colour: Field = np.zeros((3, size, size), np.float32)
        self.height: Field = np.zeros((size, size), np.float32)
        self.part = np.zeros((size, size), np.uint8)
        """1 where a defect may lie."""
        self.ground: Field = self.colour
        """[3,S,S]: what comes to light where a piece is missing."""
        self.rim: Points = np.zeros((0, 2))
        """Where a piece may break out."""
        self.kinds = np.zeros((size, size), np.uint8)
        light = rng.uniform(0, 2 * np.pi)
        self.light = np.array([np.cos(light), np.sin(light)])
        """The way the light goes, along the frame."""

    def fixed(self, points: Points) -> NDArray[np.int32]:
        """Points as OpenCV's fixed point with 4 fractional bits."""
        return np.round(points * self.size * 16 - 8).astype(np.int32)[:, None]

    def cover(self, *outlines: Points) -> Coverage:
        """Inside these outlines, which do not overlap."""
        out = np.zeros((self.size, self.size), np.uint8)
        cv2.fillPoly(out, [self.fixed(outline) for outline in outlines], (255,), cv2.LINE_AA, 4)
        return out

    def line(self, *paths: Points, width: float, closed: bool = False) -> Coverage:
        out = np.zeros((self.size, self.size), np.uint8)
        thickness = max(1, round(width * self.size))
        cv2.polylines(out, [self.fixed(path) for path in paths], closed, (255,), thickness, cv2.LINE_AA, 4)
        return out

    def paint(self, coverage: Coverage, colour: Colour | Field, opacity: float = 1.0, lift: float = 0.0) -> None:
        """Lay a colour [3] or a picture [3,S,S] over what is there, and raise it by `lift`."""
        x, y, w, h = cv2.boundingRect(coverage)
        box = np.s_[..., y : y + h, x : x + w]
        alpha = coverage[box] * np.float32(opacity / 255)
        new = colour[box] if colour.ndim == 3 else colour.astype(np.float32)[:, None, None]
        self.colour[box] += alpha * (new - self.colour[box])
        if lift:
            self.height[box] += np.float32(lift / opacity) * alpha

    def shade(self, amount: Field) -> None:
        """Brighten the part by `amount` [S,S]."""
        self.colour += amount * self.part

    def mark(self, coverage: Coverage, label: int) -> None:
        """Note a defect of this label as a person's brush paints it."""
        r = max(1, round(BRUSH * self.size))
        brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1))
        self.kinds[cv2.dilate((coverage > 64).view(np.uint8), brush) > 0] = label


@dataclass(frozen=True)
class Pose:
    """From an object's own units to the frame's."""

    angle: float
    scale: float
    shift: Points

    def __call__(self, points: Points) -> Points:
        return np.asarray(turn(points, self.angle) * self.scale + self.shift)


def between(rng: Rng, low: float, high: float) -> float:
    """Log-uniform: most draws are small."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def noise(rng: Rng, size: int, cell: float, octaves: int = 1) -> Field:
    """Smooth noise [size,size], about −1…1, whose coarsest features are `cell` wide, each octave half of that."""
    n = max(2, round(1 / cell))
    out: Field = rng.uniform(-1, 1, (n, n)).astype(np.float32)
    for octave in range(1, octaves):
        n = min(2 * n, size)
        out = np.asarray(cv2.resize(out, (n, n), interpolation=cv2.INTER_LINEAR), np.float32)
        out += rng.random((n, n), np.float32) * np.float32(2 * 0.6**octave) - np.float32(0.6**octave)
    return np.asarray(cv2.resize(out, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)


def grain(rng: Rng, size: int) -> Field:
    """White noise [size,size] of standard deviation 1 (the sum of two uniform bytes)."""
    raw = np.frombuffer(rng.bytes(2 * size * size), np.uint8).reshape(2, size, size)
    return np.asarray(np.add(raw[0], raw[1], dtype=np.float32) * np.float32(1 / 104.5) - np.float32(255 / 104.5))


@lru_cache(maxsize=4)
def grid(size: int) -> tuple[Field, Field]:
    """x and y [size,size] of the frame's pixels, about its centre."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5)
    x, y = np.meshgrid(axis, axis)
    return x, y


def turned_grid(size: int, angle: float) -> tuple[Field, Field]:
    x, y = grid(size)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * c + y * s, y * c - x * s


def streaks(rng: Rng, across: Field, width: float) -> Field:
    """Stripes of random tone, about −1…1, `width` wide where `across` is the coordinate across them."""
    n = round(2 / width) + 2
    profile = rng.uniform(-1, 1, n).astype(np.float32)
    return np.asarray(profile[np.clip((across + 1) * np.float32(1 / width), 0, n - 1).astype(np.int32)])


def turn(points: Points, angle: float) -> Points:
    c, s = np.cos(angle), np.sin(angle)
    turned: Points = points @ np.array([[c, s], [-s, c]])
    return turned


def circle(centre: Points, radius: float, n: int = 28) -> Points:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return centre + radius * np.stack([np.cos(t), np.sin(t)], 1)


def rounded_box(half_width: float, half_height: float, corner: float) -> Points:
    """Rectangle with round corners about the origin."""
    t = np.linspace(0, np.pi / 2, 6)
    arc = corner * np.stack([np.cos(t), np.sin(t)], 1)
    quarter = np.array([half_width - corner, half_height - corner])
    corners = [turn(arc, k * np.pi / 2) + quarter * sign for k, sign in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1)))]
    return np.concatenate(corners)


def blob(rng: Rng, centre: Points, radius: float, rough: float, n: int = 36) -> Points:
    """A closed wobbly outline; `rough` is the standard deviation of its radius as a share."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    waves = np.arange(1, 6)
    swing = rng.normal(0, rough / np.sqrt(waves)) * np.sqrt(0.9)
    r = 1 + (swing[:, None] * np.sin(waves[:, None] * t + rng.uniform(0, 2 * np.pi, (5, 1)))).sum(0)
    return np.asarray(centre + radius * np.clip(r, 0.3, 2)[:, None] * np.stack([np.cos(t), np.sin(t)], 1))


def lattice(columns: int, rows: int, width: float, height: float) -> Points:
    """Centres of a grid's cells about the origin."""
    x = ((np.arange(columns) + 0.5) / columns - 0.5) * width
    y = ((np.arange(rows) + 0.5) / rows - 0.5) * height
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def tone(rng: Rng, low: float, high: float, tint: float) -> Colour:
    """A colour of lightness low…high whose channels differ by about `tint`."""
    return np.clip(rng.uniform(low, high) + rng.uniform(-tint, tint, 3), 4, 250)


def against(rng: Rng, other: Colour, low: float, high: float, tint: float, by: float = 30) -> Colour:
    """A tone that can be told from another."""
    while True:
        colour = tone(rng, low, high, tint)
        if abs(colour.mean() - other.mean()) > by:
            return colour
