"""The runtime against the same chain in plain transformers and torch (lisa.py), in turns, in one process.

    python benchmarks/chain.py demo/checkpoint demo/bundle demo/parts [--fp16 BUNDLE] [--int8 BUNDLE]

Every turn all take the same frame, first screen, then review, and another one begins. What comes out is compared with
torch's at f32. Peak memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmad_edge.runtime.benchmark import WHOLE, Spread, Times, take_turns
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress, peak_mib

BARS = {"screen": 1.2, "review": 2.0}
"""How many times faster than torch at f32 the runtime with f32 graphs has to be."""
REDUCED_BAR = 3.0
"""The same of the screen, for the best of the rows in REDUCED."""
BASE, OURS = "torch f32", "vmad-edge f32"
REDUCED: dict[str, tuple[str, Device]] = {
    "vmad-edge bf16": ("fp16", "openvino"),
    "vmad-edge int8": ("int8", "cpu"),
    "vmad-edge int8 + bf16": ("int8", "openvino"),
}
"""The precision that the bundle was exported in, and what runs it."""
NAMES = (BASE, "torch bf16", OURS, *REDUCED)


@dataclass(frozen=True)
class Result:
    score: float
    p_yes: float
    text: str
    mask: NDArray[np.bool_] | None


class Contender:
    """Screens and reviews a frame; keeps its latest result of each frame by the frame's id."""

    def __init__(
        self,
        screen: Callable[[Frame], tuple[float, Any]],
        review: Callable[[Frame, Any], tuple[float, str, NDArray[np.bool_] | None]],
        provider: str,
    ) -> None:
        self._screen, self._review, self.provider = screen, review, provider
        self.results: dict[str, Result] = {}

    def run(self, frame: Frame) -> Times:
        start = time.perf_counter()
        score, features = self._screen(frame)
        screened = time.perf_counter()
        found = self._review(frame, features)
        ended = time.perf_counter()
        self.results[frame.id] = Result(score, *found)
        return {
            "screen": (screened - start) * 1e3,
            "review": (ended - screened) * 1e3,
            WHOLE: (ended - start) * 1e3,
        }


def contender(
    name: str, checkpoint: Path, bundle: Path, reduced: dict[str, Path | None], question: str
) -> Contender | None:
    """None: no bundle of that precision was given, or this machine does not have it."""
    if name.startswith("torch"):
        return _theirs(checkpoint, name.removeprefix("torch "), question)
    if name == OURS:
        return _ours(bundle, "cpu", question)
    precision, device = REDUCED[name]
    path = reduced[precision]
    if path is None or (device == "openvino" and not find_spec("openvino")):
        return None
    ours = _ours(path, device, question)
    return ours if device == "cpu" or "bf16" in ours.provider else None


def _theirs(checkpoint: Path, dtype: str, question: str) -> Contender:
    import torch  # not into the processes that measure our memory
    from lisa import LisaChain

    from vmad_edge.export.checkpoint import Checkpoint

    chain = LisaChain(Checkpoint.open(checkpoint), {"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
    return Contender(
        chain.screen, lambda frame, features: chain.review(frame, features, question), f"torch {torch.__version__}"
    )


def _ours(path: Path, device: Device, question: str) -> Contender:
    from vmad_edge.runtime.stages.similarity import NormalFeatures
    from vmad_edge.runtime.systems.vmad import Review, Screen
    from vmad_edge.runtime.timing import Stopwatch

    bundle = Bundle.open(path)
    normal = NormalFeatures(bundle.file("similarity.safetensors"), bundle.manifest.similarity)
    screen, review = Screen(bundle, device), Review(bundle, device)

    def screened(frame: Frame) -> tuple[float, Any]:
        found = screen.run(frame, normal, Stopwatch())
        return found.score, found.features

    def reviewed(frame: Frame, features: Any) -> tuple[float, str, NDArray[np.bool_] | None]:
        ignore: Callable[[Any], None] = lambda _: None  # noqa: E731
        found = review.run(frame, features, question, "full", ignore, ignore, lambda: None, Stopwatch())
        return found.p_yes, found.text, found.mask

    return Contender(screened, reviewed, f"{screen.provider}; {bundle.for_review.language.quantization} in llama.cpp")


def agreement(found: dict[str, Result], base: dict[str, Result]) -> dict[str, float]:
    """How far a contender's results are from torch's at f32, over the frames."""
    from answer_modes import iou  # imports torch

    pairs = [(found[id], base[id]) for id in base]
    return {
        "score_max_error": max(abs(a.score - b.score) for a, b in pairs),
        "p_yes_max_error": max(abs(a.p_yes - b.p_yes) for a, b in pairs),
        "mask_iou_mean": statistics.fmean(iou(a.mask, b.mask) for a, b in pairs),
        "mask_iou_min": min(iou(a.mask, b.mask) for a, b in pairs),
        "same_text": statistics.fmean(a.text == b.text for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("frames", nargs="+")
    parser.add_argument(
        "--fp16", type=Path, metavar="BUNDLE", help="exported with --precision fp16: OpenVINO computes it in bf16"
    )
    parser.add_argument("--int8", type=Path, metavar="BUNDLE", help="exported with --precision int8")
    parser.add_argument("--turns", type=int, default=60, help="that count; default: %(default)s")
    parser.add_argument("--result", default="chain", help="name in results/; default: %(default)s")
    parser.add_argument("--alone", choices=NAMES, help="this one alone on each frame once, and print its peak MiB")
    args = parser.parse_args()
    run = RunInProgress()
    frames = [Frame.read(path) for path in list_images(args.frames)]
    conversation = Bundle.open(args.bundle).for_review.conversation
    question = conversation.question.replace("{object}", conversation.object)
    reduced = {"fp16": args.fp16, "int8": args.int8}
    if args.alone is not None:
        alone = cast(Contender, contender(args.alone, args.checkpoint, args.bundle, reduced, question))
        for frame in frames:
            alone.run(frame)
        print(peak_mib(os.getpid()))
        return

    made = {name: contender(name, args.checkpoint, args.bundle, reduced, question) for name in NAMES}
    there = {name: found for name, found in made.items() if found is not None}
    # A frame is a FrameSource; each thing gets one of these.
    things = {name: cast(Any, found.run) for name, found in there.items()}
    take_turns(things, frames, 2, lambda turns, _: track(turns, "warming up", transient=True))
    turns = max(args.turns, len(frames))
    times = take_turns(things, frames, turns, lambda turns, _: track(turns, "measuring", transient=True))
    found = {name: (each.provider, each.results) for name, each in there.items()}
    for held in (made, there, things):
        held.clear()
    gc.collect()  # large models do not fit twice
    base = found[BASE][1]
    rows: dict[str, dict[str, Any] | None] = dict.fromkeys(NAMES)
    for name, (provider, results) in found.items():
        lanes = {lane: [turn[lane] for turn in times[name]] for lane in BARS}
        rows[name] = {
            "with": provider,
            **{lane: Spread.of(lanes[lane]).model_dump() for lane in BARS},
            # Turn by turn, so that what else the machine did in a turn falls on both.
            "times_faster_than_torch_f32": {
                lane: statistics.median(theirs[lane] / ms for theirs, ms in zip(times[BASE], lanes[lane], strict=True))
                for lane in BARS
            },
            "peak_mib": _alone(name),
            "agreement": agreement(results, base),
        }
    faster = {name: row["times_faster_than_torch_f32"] for name, row in rows.items() if row is not None}
    bars = {lane: _bar(bar, faster[OURS][lane]) for lane, bar in BARS.items()}
    if best := max((faster[name]["screen"] for name in REDUCED if name in faster), default=None):
        bars["screen at bf16 or int8"] = _bar(REDUCED_BAR, best)
    figures = {"frames": len(frames), "turns": turns, "rows": rows, "bars": bars}
    save(args.result, run.end(["torch", "transformers"]), figures)
    _show(rows, bars)


def _bar(bar: float, reached: float) -> dict[str, Any]:
    return {"bar": bar, "reached": reached, "holds": reached >= bar}


def _alone(name: str) -> float | None:
    """Peak MiB of a process that runs `name` alone."""
    done = subprocess.run([sys.executable, *sys.argv, "--alone", name], capture_output=True, text=True, check=True)
    peak = done.stdout.split()[-1]
    return None if peak == "None" else float(peak)


def _show(rows: dict[str, dict[str, Any] | None], bars: dict[str, dict[str, Any]]) -> None:
    table = Table("", "screen p50, ms", "×", "review p50, ms", "×", "peak MiB", "P(yes)", "IoU", "same text", box=None)
    for name, row in rows.items():
        if row is None:
            table.add_row(name, *("–" for _ in range(8)))
            continue
        faster, agrees = row["times_faster_than_torch_f32"], row["agreement"]
        table.add_row(
            name,
            *(cell for lane in BARS for cell in (f"{row[lane]['p50']:.1f}", f"{faster[lane]:.2f}")),
            f"{row['peak_mib'] or 0:.0f}",
            f"±{agrees['p_yes_max_error']:.4f}",
            f"{agrees['mask_iou_mean']:.3f}",
            f"{agrees['same_text']:.0%}",
        )
    Console(width=120).print(table)
    for lane, bar in bars.items():
        print(f"{lane}: {bar['reached']:.2f} × torch f32, bar {bar['bar']} × {'holds' if bar['holds'] else 'MISSED'}")


if __name__ == "__main__":
    main()
