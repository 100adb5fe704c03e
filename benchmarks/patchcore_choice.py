"""Which levels and size find made-up defects best, on enrolled frames alone: what benchmarks/patchcore.py was set by.

    python tests/efficientnet_lite0.py features_256.onnx 256        # and other sizes
    python benchmarks/patchcore_choice.py ../shared/data/magnetic_tile features_*.onnx --shots 200

A quarter of the enrolled frames is held out, and inspected as it is and with a defect: a blob of 0.2 to 25% of the
frame, out of smooth noise (as DRAEM's masks are, Zavrtanik et al. 2021), over which another frame, a shade, a blur or
another place of the same frame is blended.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from patchcore import clip_input
from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmad_edge.export.features import export_features
from vmad_edge.runtime.bundle import Similarity, Weights
from vmad_edge.runtime.dataset import read_dataset
from vmad_edge.runtime.evaluate import drawn
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.metrics import Scores, measure, pixel_scores

LEVELS = (("reduction_3", "reduction_4"), ("reduction_4", "reduction_5"), ("reduction_3", "reduction_4", "reduction_5"))
Picture = NDArray[np.uint8]


def with_defect(frame: Picture, other: Picture, rng: np.random.Generator) -> tuple[Picture, NDArray[np.bool_]]:
    """The frame [h,w,3] with one defect, and where [h,w]. `other` is any other frame."""
    size = frame.shape[1], frame.shape[0]
    noise = cv2.resize(rng.normal(size=[int(rng.integers(3, 9))] * 2), size, interpolation=cv2.INTER_CUBIC)
    share = np.exp(rng.uniform(np.log(0.002), np.log(0.25)))
    _, labels, stats, _ = cv2.connectedComponentsWithStats((noise > np.quantile(noise, 1 - share)).astype(np.uint8))
    mask = labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    shade = rng.choice([rng.uniform(0.6, 0.9), rng.uniform(1.1, 1.4)])
    places = (int(rng.integers(size[1])), int(rng.integers(size[0])))
    filling = (
        cv2.resize(other, size),
        frame * shade,
        cv2.GaussianBlur(frame, (0, 0), rng.uniform(2, 6)),
        np.roll(frame[::-1], places, (0, 1)),
    )[rng.integers(4)]
    alpha = rng.uniform(0.4, 1) * mask[..., None]
    return np.clip(frame * (1 - alpha) + filling * alpha, 0, 255).astype(np.uint8), mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="one category")
    parser.add_argument("graphs", type=Path, nargs="+", help="features.onnx, of different sizes")
    parser.add_argument("--shots", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run, rng = RunInProgress(), np.random.default_rng(args.seed)
    (category,) = read_dataset(args.dataset)
    enrolled = drawn(category, args.shots, args.seed)
    held_out, bank = enrolled[::4], [path for place, path in enumerate(enrolled) if place % 4]
    good = [Frame.read(path).pixels for path in held_out]
    others = [Frame.read(bank[place]).pixels for place in rng.integers(len(bank), size=len(good))]
    bad = [with_defect(frame, other, rng) for frame, other in zip(good, others, strict=True)]
    masks = [np.zeros(frame.shape[:2], bool) for frame in good] + [mask for _, mask in bad]
    table = Table(category.name, "image AUROC", "pixel AUROC")
    rows = []
    for graph, levels in ((graph, levels) for graph in args.graphs for levels in LEVELS):
        with tempfile.TemporaryDirectory() as folder:
            bundle, clip = Path(folder) / "bundle", clip_input(graph)
            similarity = Similarity(score_rule="max", coreset=0.02)
            weights = Weights(origin="EfficientNet-lite0", licence="not stated")
            export_features(graph, bundle, levels, clip=clip, similarity=similarity, weights=weights)
            with Inspector.open(bundle, folder, "cpu") as inspector:
                inspector.enroll(bank, keep=False)
                frames = [*good, *(frame for frame, _ in bad)]
                found = [inspector.inspect(frame) for frame in track(frames, f"{clip.size} px", transient=True)]
        scores = np.array([inspection.score for inspection in found])
        parts, regions = zip(*(pixel_scores(f.map, mask) for f, mask in zip(found, masks, strict=True)), strict=True)
        image = measure([Scores(np.sort(scores[: len(good)]), np.sort(scores[len(good) :]))]).auroc
        pixel = measure(parts, sum(regions)).auroc
        rows.append({"size": clip.size, "levels": levels, "image_auroc": image, "pixel_auroc": pixel})
        table.add_row(f"{clip.size} px, {' + '.join(levels)}", f"{image:.3f}", f"{pixel:.3f}")
    Console(width=120).print(table)
    save(f"patchcore_choice_{category.name}", run.end(), {"dataset": category.name, "rows": rows})


if __name__ == "__main__":
    main()
