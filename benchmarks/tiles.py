"""Small spots and scratches on frames of 4096×4096 pixels: found with and without tiles, and what that costs.

python benchmarks/tiles.py BUNDLE ../shared/data/cookies > benchmarks/results/tiles.md

The photographs have 576×768 pixels: they are enlarged to 3072×4096 (Lanczos), with the tray mirrored at both sides, so
they are softer than a camera of that size would be; the defects are drawn into the large frame, sharp. They are blue,
which no cookie is, and lie on the cookie. Each photograph is a part of its own, in a fixture: a shot of it is moved by
up to 16 pixels, up to 3% darker or brighter, with noise of 2 of 255. Some shots are enrolled, others inspected as they
are and with each defect. Found: not GOOD, and the map's peak lies on the defect, or within a patch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Inspection, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import RunInProgress, busy_elsewhere
from vmad_edge.runtime.pictures import fit, heated, joined, jpeg
from vmad_edge.runtime.stages.tiles import Box, Layout, Tiles

Pixels = NDArray[np.uint8]
SIDE = 4096
SIZES = (8, 16, 32, 64)
KINDS = ("spot", "scratch")
BLUE = (40, 70, 190)
SEED = 22
PANEL = 512


def large(path: str) -> Pixels:
    """The photograph, [4096,4096,3]."""
    small = Frame.read(path).pixels
    width = small.shape[1] * SIDE // small.shape[0]
    shown = cv2.resize(small, (width, SIDE), interpolation=cv2.INTER_LANCZOS4)
    left = (SIDE - width) // 2
    bordered = cv2.copyMakeBorder(shown, 0, 0, left, SIDE - width - left, cv2.BORDER_REFLECT_101)
    return np.asarray(bordered, np.uint8)


def shot(whole: Pixels, rng: np.random.Generator) -> Pixels:
    """Of a part in a fixture, once more."""
    dx, dy = rng.uniform(-16, 16, 2)
    noise = np.empty(whole.shape, np.int16)
    cv2.setRNGSeed(int(rng.integers(2**31)))
    cv2.randn(noise, 0, 2)
    moved = cv2.warpAffine(whole, np.array([[1, 0, dx], [0, 1, dy]]), (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(np.clip(moved * np.float32(rng.uniform(0.97, 1.03)) + noise, 0, 255), np.uint8)


def with_defect(whole: Pixels, kind: str, size: int, rng: np.random.Generator) -> tuple[Pixels, Box]:
    """A spot `size` across, or a scratch as long and an eighth as wide, but 2 px at least; and its box."""
    x, y = (round(SIDE * share) for share in rng.uniform(0.42, 0.58, 2))
    drawn = whole.copy()
    if kind == "spot":
        cv2.circle(drawn, (x, y), size // 2, BLUE, -1, cv2.LINE_AA)
        return drawn, (x - size // 2, y - size // 2, x + size // 2 + 1, y + size // 2 + 1)
    angle = rng.uniform(0, np.pi)
    dx, dy = round(size / 2 * np.cos(angle)), round(size / 2 * np.sin(angle))
    thick = max(2, size // 8)
    cv2.line(drawn, (x - dx, y - dy), (x + dx, y + dy), BLUE, thick, cv2.LINE_AA)
    half = thick // 2
    return drawn, (x - abs(dx) - half, y - abs(dy) - half, x + abs(dx) + half + 1, y + abs(dy) + half + 1)


@dataclass(frozen=True)
class Found:
    """One frame with a defect."""

    kind: str
    size: int
    suspect: bool
    """Not GOOD."""
    hit: bool
    """The map's peak lies on it, or within a patch."""


@dataclass(frozen=True)
class Measured:
    count: int
    tiles: int
    patch: float
    """Pixels of the frame that a patch is wide."""
    good: list[Inspection]
    defects: list[Found]
    shown: Pixels
    """The first part with a spot, under its map."""


def measured(args: argparse.Namespace, count: int, console: Console) -> Measured:
    """Of each part, enroll shots, then inspect others, good and with each defect."""
    layout = Layout(tiles=Tiles(count=count))
    rng = np.random.default_rng(SEED)  # the same shots and defects for each count
    good, defects, shown = [], [], np.zeros((1, 1, 3), np.uint8)
    parts = [large(path) for path in list_images([str(args.cookies / "test/good")])[: args.parts]]
    with tempfile.TemporaryDirectory() as station, Inspector.open(args.bundle, station, "cpu") as inspector:
        for part, whole in enumerate(track(parts, f"{count} tiles", console=console)):
            bank = inspector.enroll((shot(whole, rng) for _ in range(args.enrolled)), layout=layout)
            view = bank.frames[0].views[0]
            patch = (view.right - view.left) / inspector.bundle.manifest.vision.grid
            again = (inspector.inspect(shot(whole, rng), review=False) for _ in range(args.good))
            good.extend(inspection.without_arrays() for inspection in again)
            for kind in KINDS:
                for size in SIZES:
                    pixels, box = with_defect(shot(whole, rng), kind, size, rng)
                    inspection = inspector.inspect(pixels, review=False)
                    defects.append(_found(inspection, kind, size, box, patch))
                    if (part, kind, size) == (0, "spot", args.size):
                        shown = heated(inspection, fit(pixels, PANEL), bank.thresholds)
    return Measured(count, len(bank.frames[0].views), patch, good, defects, shown)


def _found(inspection: Inspection, kind: str, size: int, box: Box, patch: float) -> Found:
    assert inspection.map is not None, inspection.reason
    y, x = np.unravel_index(np.nanargmax(inspection.map), inspection.map.shape)
    left, top, right, bottom = box
    hit = left - patch <= x < right + patch and top - patch <= y < bottom + patch
    return Found(kind, size, inspection.verdict is not Verdict.GOOD, hit)


def _finds(found: list[Measured]) -> Iterator[str]:
    yield f"| tiles along a side (in all) | a patch is | good: not GOOD | {' | '.join(_names())} |"
    yield f"|---|---:|---:|{'---:|' * len(_names())}"
    for one in found:
        cells = []
        for kind in KINDS:
            for size in SIZES:
                these = [defect for defect in one.defects if (defect.kind, defect.size) == (kind, size)]
                cells.append(f"{sum(d.suspect and d.hit for d in these)} of {len(these)}")
        false = sum(inspection.verdict is not Verdict.GOOD for inspection in one.good)
        name = "the whole frame" if one.count == 1 else f"{one.count} ({one.tiles})"
        yield f"| {name} | {one.patch:.0f} px | {false} of {len(one.good)} | {' | '.join(cells)} |"


def _names() -> list[str]:
    return [f"{kind} {size} px" for kind in KINDS for size in SIZES]


STAGES = ("fitness", "preprocess", "clip_encoder", "similarity", "map", "screen")


def _costs(found: list[Measured]) -> Iterator[str]:
    yield f"| ms a frame, median | {' | '.join(STAGES)} |"
    yield f"|---|{'---:|' * len(STAGES)}"
    for one in found:
        times = [np.median([inspection.timings_ms[stage] for inspection in one.good]) for stage in STAGES]
        name = "the whole frame" if one.count == 1 else f"{one.tiles} tiles"
        yield f"| {name} | {' | '.join(f'{ms:.0f}' for ms in times)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("cookies", type=Path, help="in MVTec AD's layout")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--parts", type=int, default=3, help="photographs, each a part of its own")
    parser.add_argument("--enrolled", type=int, default=6, help="shots of a part to enroll")
    parser.add_argument("--good", type=int, default=6, help="good shots of a part to inspect")
    parser.add_argument("--picture", type=Path, help="write the maps of a spot, side by side, as JPEG")
    parser.add_argument("--size", type=int, choices=SIZES, default=32, help="of the spot in the picture")
    args = parser.parse_args()
    run, console = RunInProgress(), Console(stderr=True)
    found = [measured(args, count, console) for count in args.tiles]
    ended = run.end([])
    print("# Tiles: small defects on large frames\n")
    print(f"`{ended.command}`, {ended.date}, {ended.machine.processor}, {ended.machine.cores} cores\n")
    print(f"{(__doc__ or '').rpartition('.md')[2].strip()}\n")
    print(
        f"{args.parts} parts, {args.enrolled} shots of each enrolled, leave-one-frame-out thresholds, bundle "
        f"{args.bundle.name}; overlap {Tiles().overlap:.0%}.\n"
    )
    print("\n".join(_finds(found)), end="\n\n")
    print("\n".join(_costs(found)))
    if (busy := busy_elsewhere(ended)) is not None:
        print(f"\n{busy[0].upper()}{busy[1:]}.")
    if args.picture is not None:
        write_whole(args.picture, jpeg(joined([one.shown for one in found])))


if __name__ == "__main__":
    main()
