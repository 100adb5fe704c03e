"""What answer mode `short` costs: the two modes on the same unseen drawn parts, in one run, in turns.

    python benchmarks/answer_modes.py demo/bundle --parts 200

P(yes), and so what a review decides, is read off the same prefill in both modes; what can differ is the mask.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmad_edge.export.reference.evaluate import unseen
from vmad_edge.runtime.benchmark import Spread
from vmad_edge.runtime.bundle import Answer, Bundle
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.stages.similarity import NormalFeatures
from vmad_edge.runtime.systems.vmad import Finding, Review, Screen
from vmad_edge.runtime.timing import Stopwatch

MODES: tuple[Answer, ...] = get_args(Answer)


def iou(a: NDArray[np.bool_] | None, b: NDArray[np.bool_] | None) -> float:
    """Of two masks; an absent mask is an empty one."""
    if a is None or b is None:
        return float(a is b)
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--parts", type=int, default=200)
    args = parser.parse_args()
    run = RunInProgress()
    bundle = Bundle.open(args.bundle)
    normal = NormalFeatures(bundle.file("similarity.safetensors"), bundle.manifest.similarity)
    screen, review = Screen(bundle, "cpu"), Review(bundle, "cpu")
    parts = unseen(args.parts, first=50_000)
    found: dict[Answer, list[Finding]] = {mode: [] for mode in MODES}
    times: dict[Answer, list[float]] = {mode: [] for mode in MODES}
    for number, part in enumerate(track(parts, "reviewing", transient=True)):
        frame = Frame(part.image, str(number))
        features = screen.run(frame, normal, Stopwatch()).features
        question = bundle.manifest.conversation.question.replace("{object}", part.object)
        for mode in MODES[:: 1 if number % 2 else -1]:
            watch = Stopwatch()
            with watch("review"):
                finding = review.run(
                    frame, features, question, mode, lambda p: None, lambda text: None, lambda: None, watch
                )
            found[mode].append(finding)
            times[mode].append(watch.timings_ms["review"])
    review.close()
    full, short = found["full"], found["short"]
    defective = [i for i, part in enumerate(parts) if part.kind is not None]
    truth = {mode: statistics.fmean(iou(found[mode][i].mask, parts[i].mask) for i in defective) for mode in MODES}
    both = [iou(a.mask, b.mask) for a, b in zip(full, short, strict=True) if a.mask is not None]
    figures = {
        "parts": len(parts),
        "modes": {
            mode: {"review": Spread.of(times[mode]).model_dump(), "mask_iou_with_truth": truth[mode]} for mode in MODES
        },
        "same_decision": sum((a.p_yes >= 0.5) == (b.p_yes >= 0.5) for a, b in zip(full, short, strict=True)),
        "mask_iou_of_the_two": statistics.fmean(both) if both else None,
        "parts_with_a_mask": len(both),
        "seg_forced": sum(a.seg_forced for a in full),
    }
    table = Table("", *MODES)
    table.add_row("ms a review, median", *(f"{statistics.median(times[mode]):.0f}" for mode in MODES))
    table.add_row("mask IoU with the truth, defective parts", *(f"{truth[mode]:.3f}" for mode in MODES))
    Console().print(table)
    for name in ("same_decision", "mask_iou_of_the_two", "parts_with_a_mask", "seg_forced"):
        print(f"{name.replace('_', ' ')}: {figures[name]}")
    save("answer_modes", run.end(), figures)


if __name__ == "__main__":
    main()
