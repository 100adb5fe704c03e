"""Which frames of other products are out of scope, and which of the enrolled one: cookies, magnetic tiles, drawn parts.

python benchmarks/scope.py demo/bundle ../shared/data > benchmarks/results/scope.md

A drawn product is one part of the reference model's, photographed again and again: turned up to 5°, moved, nearer or
farther by up to 5%, lighter or darker by up to 15%, with noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from vmad_edge.export.reference.parts import FAMILIES, KINDS, draw
from vmad_edge.kernels import max_cosine
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.stages.preprocess import clip_pixels
from vmad_edge.runtime.stages.scope import LEAST, MARGIN, SPREAD, Scope, descriptor
from vmad_edge.runtime.stages.similarity import inspected_patches

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]
Kind = Literal["cls", "mean", "both"]
SEED = 2_000_003
PHOTOGRAPHED = ("cookies", "magnetic tile")


@dataclass(frozen=True)
class Product:
    """Frames of one product: to enroll, and to test with."""

    name: str
    enrolled: list[Frame]
    good: list[Frame]
    defective: list[Frame]


def photographed(folder: Path, most: int | None = None) -> Product:
    """From a folder in MVTec AD's layout; `most` frames of each kind, evenly spread."""
    paths = {split: list_images([str(folder / split)]) for split in ("train/good", "test/good", "test")}
    bad = [path for path in paths["test"] if Path(path).parent.name != "good"]
    chosen = (some if most is None else some[:: -(-len(some) // most)] for some in (*list(paths.values())[:2], bad))
    return Product(folder.name.replace("_", " "), *([Frame.read(path) for path in some] for some in chosen))


def drawn(family: str, enrolled: int = 20, good: int = 30, of_each_defect: int = 4) -> Product:
    """One part of the family. Defects whose drawing made another part of it are left out."""
    number = list(FAMILIES).index(family)
    rng = np.random.default_rng([SEED, number])
    part = draw(np.random.default_rng([SEED, number, 0]), family)
    bad = (draw(np.random.default_rng([SEED, number, 0]), family, [kind]) for kind in KINDS)
    same = [other.image for other in bad if _differs(part.image, other.image, other.mask) < 5]
    again = lambda image, count: [Frame(_photograph(image, rng), "drawn") for _ in range(count)]  # noqa: E731
    defective = [frame for image in same for frame in again(image, of_each_defect)]
    return Product(f"drawn {family}", again(part.image, enrolled), again(part.image, good), defective)


def _differs(one: Image, other: Image, mask: NDArray[np.bool_]) -> float:
    """Mean difference off the defect and what is around it, in grey levels."""
    off = cv2.dilate(mask.astype(np.uint8), np.ones((25, 25), np.uint8)) == 0
    return float(np.abs(one.astype(int) - other)[off].mean()) if off.any() else 255.0


def _photograph(image: Image, rng: np.random.Generator) -> Image:
    height, width = image.shape[:2]
    move = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-5, 5), rng.uniform(0.95, 1.05))
    move[:, 2] += rng.uniform(-0.04, 0.04, 2) * width
    moved = cv2.warpAffine(image, move, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    lit = moved * rng.uniform(0.85, 1.15) + rng.normal(0, 3, image.shape)
    return np.clip(lit, 0, 255).astype(np.uint8)


class Describe:
    """Frames to descriptors [n,D] of each kind."""

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._encoder = Engines.choose(bundle, "cpu").open("clip_encoder")

    def __call__(self, frames: Iterable[Frame]) -> dict[Kind, Floats]:
        cls, mean = (np.stack(some) for some in zip(*map(self._of, frames), strict=True))
        both = np.concatenate([some / np.linalg.norm(some, axis=1, keepdims=True) for some in (cls, mean)], axis=1)
        return {"cls": cls, "mean": mean, "both": both}

    def _of(self, frame: Frame) -> tuple[Floats, Floats]:
        pixels, view = clip_pixels(frame, self._manifest.clip)
        found = self._encoder.run({"clip_pixels": pixels})
        rows = inspected_patches(view, self._manifest.vision.grid, (frame.pixels.shape[0], frame.pixels.shape[1]))
        return found["cls"][0], descriptor(found["patches"][0][rows])


@dataclass(frozen=True)
class Described:
    enrolled: dict[Kind, Floats]
    good: dict[Kind, Floats]
    defective: dict[Kind, Floats]

    def all(self, kind: Kind) -> Floats:
        return np.concatenate([some[kind] for some in (self.enrolled, self.good, self.defective)])


def described(describe: Describe, product: Product) -> Described:
    return Described(*map(describe, (product.enrolled, product.good, product.defective)))


def out(scope: Scope, descriptors: Floats) -> float:
    """Which share is out of scope."""
    return float(np.mean(distances(descriptors, scope.descriptors) > scope.limit.limit))


def distances(descriptors: Floats, enrolled: Floats) -> Floats:
    return np.asarray(1 - max_cosine(descriptors, enrolled)[0], np.float32)


def learned(enrolled: Floats) -> Scope:
    scope = Scope.learned(enrolled)
    assert scope is not None
    return scope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path, help="the folder that cookies and magnetic_tile lie in")
    args = parser.parse_args()
    run = RunInProgress()
    describe = Describe(Bundle.open(args.bundle))
    products = [*(photographed(args.data / name.replace(" ", "_")) for name in PHOTOGRAPHED), *map(drawn, FAMILIES)]
    found = {product.name: described(describe, product) for product in products}
    ended = run.end([])
    print("# Scope: frames of another product\n")
    print(f"`{ended.command}`, {ended.date}, {ended.machine.processor}, {ended.machine.cores} cores\n")
    print(f"{(__doc__ or '').rpartition('.md')[2].strip()}\nOthers are all frames of all other products.\n")
    for table in (_products(found), _varied(describe, found), _few(found), _descriptors(found), _cost()):
        print("\n".join(table), end="\n\n")


def _products(found: dict[str, Described]) -> Iterator[str]:
    yield "| enrolled, frames | limit | good: out of scope | farthest | defective | farthest | others | nearest |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, own in found.items():
        scope = learned(own.enrolled["mean"])
        others = np.concatenate([theirs.all("mean") for other, theirs in found.items() if other != name])
        cells = []
        for frames, edge in ((own.good["mean"], np.max), (own.defective["mean"], np.max), (others, np.min)):
            cells.append(f"{100 * out(scope, frames):.1f}% of {len(frames)}")
            cells.append(f"{edge(distances(frames, scope.descriptors)):.3f}")
        yield f"| {name}, {len(own.enrolled['mean'])} | {scope.limit.limit:.3f} | {' | '.join(cells)} |"


def _varied(describe: Describe, found: dict[str, Described]) -> Iterator[str]:
    """The limit of the method: what was enrolled shows everything, so nothing is unlike it."""
    rng = np.random.default_rng(SEED)
    parts = describe(Frame(draw(rng, family).image, "drawn") for _ in range(40) for family in FAMILIES)["mean"]
    scope = learned(parts[::2])
    others = ", ".join(f"{100 * out(scope, found[name].all('mean')):.1f}% of {name}" for name in PHOTOGRAPHED)
    yield f"Enrolled {len(parts[::2])} drawn parts of nine families, no two alike (limit {scope.limit.limit:.3f}): out"
    yield f"of scope are {others}, {100 * out(scope, parts[1::2]):.1f}% of as many others of these families."


def _few(found: dict[str, Described]) -> Iterator[str]:
    yield "| frames enrolled, mean of 30 draws | good | defective | others |"
    yield "|---|---:|---:|---:|"
    rng = np.random.default_rng(SEED)
    for name in ("cookies", "magnetic tile", "drawn gear"):
        own = found[name]
        others = np.concatenate([theirs.all("mean") for other, theirs in found.items() if other != name])
        for count in (2, 3, 5, 10, 20):
            shares = []
            for _ in range(30):
                rows = rng.choice(len(own.enrolled["mean"]), count, replace=False)
                scope = learned(own.enrolled["mean"][rows])
                shares.append([out(scope, some) for some in (own.good["mean"], own.defective["mean"], others)])
            yield f"| {name}, {count} | {' | '.join(f'{100 * share:.1f}%' for share in np.mean(shares, axis=0))} |"


def _descriptors(found: dict[str, Described]) -> Iterator[str]:
    """What each descriptor could do with the margin that it needs, whatever was chosen."""
    yield (
        f"| descriptor | margin for ≤ 1% false everywhere (mean, chosen: {MARGIN:g}, at least {LEAST}) | "
        "least share of others out of scope then |"
    )
    yield "|---|---:|---:|"
    kinds: tuple[Kind, ...] = ("cls", "mean", "both")
    for kind in kinds:
        unit = {name: _spread(own.enrolled[kind]) for name, own in found.items()}

        def ratios(name: str, frames: Floats) -> Floats:
            return distances(frames, found[name].enrolled[kind]) / unit[name]  # noqa: B023

        margin = max(float(np.quantile(ratios(name, own.good[kind]), 0.99)) for name, own in found.items())
        others = [
            (float(np.mean(ratios(name, theirs.all(kind)) > margin)), f"{other} beside {name}")
            for name in found
            for other, theirs in found.items()
            if other != name
        ]
        share, which = min(others)
        yield f"| {kind} | {margin:.2f} | {100 * share:.1f}% ({which}) |"


def _spread(enrolled: Floats) -> float:
    """What the margin multiplies, see `scope_limit`."""
    others = 1 - max_cosine(enrolled, enrolled, k=2)[0]
    return float(min(others.max(), SPREAD * np.median(others)))


def _cost() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for frames, patches, width in ((20, 256, 192), (300, 256, 192), (300, 576, 1024)):
        scope = learned(rng.normal(size=(frames, width)).astype(np.float32))
        shown = rng.normal(size=(patches, width)).astype(np.float32)
        yield (
            f"- {frames} frames enrolled, {patches} patches of width {width}: "
            f"{_median_ms(lambda: scope.distance(shown)):.3f} ms a frame."  # noqa: B023
        )


def _median_ms(act: Callable[[], object], repeats: int = 300) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) * 1e3


if __name__ == "__main__":
    main()
