"""Which faults of camera, lamp and cable the fitness check finds, and what it refuses of frames without them.

    python benchmarks/fitness.py ../shared/data

Limits are learned from train/good of cookies and magnetic_tile, and from 20 frames of each of the demo's six good
parts, moved, turned and lit a little otherwise. Good frames to test, up to 24 of a set, get every fault in five
strengths; from which of them on a person sees it was judged by eye, beside good frames of the same set, and is written
down below. The result: results/fitness.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from record import RESULTS

from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.stages.fitness import FitnessLimits, learned, measure, unfit

Pixels = NDArray[np.uint8]
Rng = np.random.Generator
PARTS = Path(__file__).parents[1] / "demo/parts/good"
_FAULTY = 24
"""Frames of a set that get the faults."""
_NOISE = 1.5
"""Deviation of the sensor's own noise, which a fault of lamp or lens leaves as it is."""


def _eight_bits(values: NDArray[np.floating]) -> Pixels:
    return np.asarray(values.round().clip(0, 255), np.uint8)


def _with_noise(values: NDArray[np.floating], like: Pixels, deviation: float, rng: Rng) -> Pixels:
    """The same in each channel of a grey camera's frame."""
    is_grey = bool((like[..., 0] == like[..., 1]).all() and (like[..., 1] == like[..., 2]).all())
    return _eight_bits(values + rng.normal(0, deviation, (*like.shape[:2], 1 if is_grey else 3)))


def lens_cap(pixels: Pixels, left: float, rng: Rng) -> Pixels:
    """`left` of the grey levels are left."""
    return _with_noise(pixels * left, pixels, _NOISE, rng)


def lamp_off(pixels: Pixels, light: float, rng: Rng) -> Pixels:
    """`light` of the light is left, seen through a display's gamma."""
    return _with_noise(pixels * light ** (1 / 2.2), pixels, _NOISE, rng)


def half_transfer(pixels: Pixels, missing: float, rng: Rng) -> Pixels:
    """The last `missing` of the rows are black, grey or white."""
    whole = pixels.copy()
    whole[round(len(whole) * (1 - missing)) :] = rng.choice([0, 128, 255])
    return whole


def last_rows_black(pixels: Pixels, missing: float, rng: Rng) -> Pixels:
    whole = pixels.copy()
    whole[round(len(whole) * (1 - missing)) :] = 0
    return whole


def defocus(pixels: Pixels, radius: float, rng: Rng) -> Pixels:
    """A disc's blur; `radius` as a share of the longer side."""
    reach = radius * max(pixels.shape[:2])
    n = int(np.ceil(reach))
    y, x = np.mgrid[-n : n + 1, -n : n + 1]
    disc = np.clip(reach + 0.5 - np.hypot(x, y), 0, 1)
    blurred = cv2.filter2D(pixels, -1, disc / disc.sum(), borderType=cv2.BORDER_REFLECT)
    return _with_noise(blurred.astype(np.float64), pixels, _NOISE, rng)


def saturation(pixels: Pixels, share: float, rng: Rng) -> Pixels:
    """Brighter until `share` of the pixels have a channel that is full."""
    level = float(np.quantile(pixels.max(axis=2), 1 - share))
    return _eight_bits(pixels * (255 / max(level, 1.0)))


def noise_alone(pixels: Pixels, deviation: float, rng: Rng) -> Pixels:
    return _with_noise(np.broadcast_to(pixels.mean((0, 1)), pixels.shape), pixels, deviation, rng)


def shifted_rows(pixels: Pixels, by: float, rng: Rng) -> Pixels:
    """From a row in the middle half on, all are moved aside by a share of the width."""
    height, width = pixels.shape[:2]
    row = int(rng.integers(height // 4, 3 * height // 4))
    return np.concatenate([pixels[:row], np.roll(pixels[row:], round(width * by), axis=1)])


@dataclass(frozen=True)
class Fault:
    make: Callable[[Pixels, float, Rng], Pixels]
    unit: str
    strengths: tuple[float, float, float, float, float]
    seen: dict[str, int]
    """By set: number of the first strength at which a person sees it."""


SETS = ("cookies", "magnetic_tile", "drawn")
FAULTS = {
    "lens cap": Fault(lens_cap, "grey levels left", (0.2, 0.1, 0.05, 0.02, 0), dict.fromkeys(SETS, 0)),
    "lamp off": Fault(
        lamp_off, "light left", (0.5, 0.25, 0.125, 0.0625, 0.03), {"cookies": 1, "magnetic_tile": 3, "drawn": 1}
    ),
    "half transfer": Fault(half_transfer, "rows missing", (0.125, 0.25, 0.5, 0.75, 0.875), dict.fromkeys(SETS, 0)),
    "last tenth black": Fault(last_rows_black, "rows black", (0.0125, 0.025, 0.05, 0.075, 0.1), dict.fromkeys(SETS, 1)),
    "heavy defocus": Fault(
        defocus, "disc's radius", (0.005, 0.01, 0.02, 0.04, 0.08), {"cookies": 1, "magnetic_tile": 2, "drawn": 1}
    ),
    "saturation": Fault(saturation, "pixels full", (0.1, 0.2, 0.4, 0.6, 0.8), dict.fromkeys(SETS, 2)),
    "noise alone": Fault(noise_alone, "deviation", (2, 8, 32, 64, 128), dict.fromkeys(SETS, 0)),
    "shifted rows": Fault(shifted_rows, "of the width", (0.01, 0.03, 0.1, 0.2, 0.4), dict.fromkeys(SETS, 1)),
}


@dataclass(frozen=True)
class Frames:
    good: list[Pixels]
    """To learn from."""
    test: list[Pixels]
    defective: list[Pixels]


def photographs(folder: Path) -> Frames:
    """A data set in MVTec AD's layout."""
    kinds = sorted(path for path in (folder / "test").iterdir() if path.name != "good")
    return Frames(
        _read([folder / "train/good"]), _read([folder / "test/good"]), [p for kind in kinds for p in _read([kind])]
    )


def drawn(part: Pixels) -> Frames:
    """40 frames of one part under a camera: up to 2% of the width aside, 3 degrees turned, 5% darker or brighter."""
    height, width = part.shape[:2]
    frames = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        turned = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-3, 3), 1)
        turned[:, 2] += rng.uniform(-0.02, 0.02, 2) * width
        moved = cv2.warpAffine(part, turned, (width, height), borderMode=cv2.BORDER_REFLECT)
        frames.append(_with_noise(moved * rng.uniform(0.95, 1.05), part, _NOISE, rng))
    return Frames(frames[:20], frames[20:], [])


def _read(folders: Sequence[Path]) -> list[Pixels]:
    return [Frame.read(path).pixels for path in list_images([str(folder) for folder in folders])]


def refused(frames: Sequence[Pixels], limits: FitnessLimits) -> int:
    return sum(unfit(measure(pixels), limits) is not None for pixels in frames)


def with_fault(frames: Sequence[Pixels], fault: Fault, strength: float, most: int) -> list[Pixels]:
    """Up to `most` of the frames, spread evenly."""
    few = frames[:: math.ceil(len(frames) / most)]
    return [fault.make(pixels, strength, np.random.default_rng(number)) for number, pixels in enumerate(few)]


def milliseconds(runs: int = 200) -> tuple[float, float]:
    """Least and median of measuring a megapixel on one core."""
    frame = np.asarray(cv2.resize(_read([PARTS])[0], (1152, 912)), np.uint8)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        unfit(measure(frame), FitnessLimits())
        times.append((time.perf_counter() - start) * 1e3)
    cv2.setNumThreads(threads)
    return min(times), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cookies/ and magnetic_tile/")
    args = parser.parse_args()
    run = RunInProgress()
    sets = {name: [photographs(args.data / name)] for name in ("cookies", "magnetic_tile")}
    sets["drawn"] = [drawn(part) for part in _read([PARTS])]
    limits = {name: [learned([measure(p) for p in frames.good]) for frames in sets[name]] for name in sets}
    anything = FitnessLimits()
    least, median = milliseconds()
    lines = ["| set | learned from | good frames unfit | defective frames unfit | … by the defaults, of all |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, parts in sets.items():
        cells = []
        for side in ("test", "defective"):
            given = [getattr(frames, side) for frames in parts]
            found = sum(refused(frames, limit) for frames, limit in zip(given, limits[name], strict=True))
            cells.append(f"{found} of {sum(map(len, given))}")
        everything = [pixels for frames in parts for pixels in (*frames.good, *frames.test, *frames.defective)]
        cells.append(f"{refused(everything, anything)} of {len(everything)}")
        lines.append(f"| {name} | {sum(len(frames.good) for frames in parts)} | {' | '.join(cells)} |")
    lines += ["", "| fault | set | strength: caught, by learned limits (by the defaults) | |", "|---|---|---|---:|"]
    for title, fault in FAULTS.items():
        for name, parts in sets.items():
            row, from_seen = [], []
            for number, strength in enumerate(fault.strengths):
                made = [with_fault(frames.test, fault, strength, _FAULTY // len(parts)) for frames in parts]
                count = sum(map(len, made))
                by_learned = sum(refused(frames, limit) for frames, limit in zip(made, limits[name], strict=True))
                by_default = sum(refused(frames, anything) for frames in made)
                share = by_learned / count
                if number >= fault.seen[name]:
                    from_seen.append(share)
                told = f"{strength:g}: {share:.0%} ({by_default / count:.0%})"
                row.append(f"**{told}**" if number >= fault.seen[name] else told)
            lines.append(f"| {title}, {fault.unit} | {name} | {', '.join(row)} | {min(from_seen):.1%} |")
        print(f"{title}: done", flush=True)
    machine = run.end()
    page = [
        "# Fit to be judged",
        "",
        (__doc__ or "").partition("\n\n")[0],
        "`python benchmarks/fitness.py ../shared/data`",
        "",
        f"{machine.date}, {machine.machine.processor}, {machine.machine.cores} cores, "
        f"others busy {machine.others:.1f} cores",
        "",
        "Bold: a person sees it, beside good frames of the set. The last column: the least of those, by learned "
        "limits. Drawn: six parts, 20 frames to learn from and 20 to test of each.",
        "",
        *lines,
        "",
        f"A megapixel takes {least:.2f} ms at least, {median:.2f} ms in the median, on one core.",
    ]
    write_whole(RESULTS / "fitness.md", "\n".join(page) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
