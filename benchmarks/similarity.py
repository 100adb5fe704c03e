"""Patch similarity against the matrix products that it contains and against what one would use instead, in one run.

    pip install faiss-cpu torch
    OMP_NUM_THREADS=2 python benchmarks/similarity.py

Everybody obeys OMP_NUM_THREADS. The contenders take turns; each figure is the median of its turns, in GFLOP/s of the
product's 2·Q·M·D operations. Memory is what a call adds at its peak to what was there. Then what the demo's screen
gains with 200 frames enrolled, and MuSc as a whole.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import similarity_cuda
import torch
from numpy.typing import NDArray
from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmad_edge.kernels import Dtype, ReferenceBank, max_cosine, mutual_score, paths
from vmad_edge.kernels.processors import processors
from vmad_edge.runtime.machine import RunInProgress, busy_elsewhere

SIZES = ("256x256", "256x2560", "576x18432", "576x115200")
BARS_AT = "576x18432"
SCREEN, SCREEN_WIDTH = "256x51200", 192
"""The demo's patches of a frame against those of 200 enrolled frames."""
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16", "int8")
Contenders = dict[str, Callable[[], object]]
Figures = dict[str, Any]
Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=SIZES, metavar="QxM")
    parser.add_argument("--width", type=int, default=1024, help="D (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="turns that count (default: %(default)s)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's processor time: on a busy machine, with one thread, fairer than the clock",
    )
    parser.add_argument("--frames", type=int, default=200, help="of MuSc; 0 leaves it out (default: %(default)s)")
    parser.add_argument("--patches", type=int, default=576, help="a frame (default: %(default)s)")
    parser.add_argument("--levels", type=int, default=4, help="of features (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: see similarity_cuda.py")
    parser.add_argument(
        "--save", action="store_true", help="write results/similarity.json and musc.json, or similarity_cuda.json"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        similarity_cuda.measure(arguments.sizes, arguments.repeats, arguments.save)
        return

    run = RunInProgress()
    threads = int(os.environ.get("OMP_NUM_THREADS") or processors())
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    sizes = {size: measured(size, arguments.width, arguments.repeats, clock) for size in arguments.sizes}
    figures: Figures = {
        "threads": threads,
        "path": os.environ.get("VMAD_PATH") or paths()[-1],
        "width": arguments.width,
        "repeats": arguments.repeats,
        "time": "of the process" if arguments.cpu_time else "of the clock",
        "sizes": sizes,
        "bars": bars(sizes[BARS_AT]["gflops"]) if BARS_AT in sizes else None,
        "screen_ms": screen(arguments.repeats, clock),
    }
    scored = None
    if arguments.frames:
        scored = musc(arguments.frames, arguments.patches, arguments.width, arguments.levels, clock)
    ended = run.end(("torch", "faiss-cpu"))
    show(figures)
    if scored:
        Console().print(scored)
    if warning := busy_elsewhere(ended):
        Console().print(warning)
    if arguments.save:
        save("similarity", ended, figures)
        if scored:
            save("musc", ended, scored)


def unit_rows(count: int, width: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def contenders(query: NDArray[np.float32], rows: NDArray[np.float32]) -> Contenders:
    def ours(dtype: Dtype) -> Callable[[], object]:
        bank = ReferenceBank.from_array(rows, dtype)
        return lambda: max_cosine(query, bank)

    def searched() -> Callable[[], object]:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        return lambda: index.search(query, 1)

    a, b = torch.from_numpy(query), torch.from_numpy(rows)
    a16, b16 = a.bfloat16(), b.bfloat16()
    return {
        **{f"ours, {dtype}": ours(dtype) for dtype in DTYPES},
        "ours, array": lambda: max_cosine(query, rows),
        "NumPy product + max": lambda: (query @ rows.T).max(axis=1),
        "faiss IndexFlatIP": searched(),
        "torch f32 product + amax": lambda: (a @ b.T).amax(1),
        "torch bf16 product + amax": lambda: (a16 @ b16.T).amax(1),
        "NumPy product alone": lambda: query @ rows.T,
        "torch f32 product alone": lambda: a @ b.T,
        "torch bf16 product alone": lambda: a16 @ b16.T,
    }


def measured(size: str, width: int, repeats: int, clock: Clock) -> Figures:
    q, m = map(int, size.split("x"))
    query, rows = unit_rows(q, width, 0), unit_rows(m, width, 1)
    runs = contenders(query, rows)
    seconds = medians(runs, repeats, size, clock)
    return {
        "gflops": {name: round(2e-9 * q * m * width / s, 1) for name, s in seconds.items()},
        "peak_mib": {name: peak(run) for name, run in runs.items()},
        "accuracy": {dtype: accuracy(query[:64], rows, dtype) for dtype in DTYPES},
    }


def screen(repeats: int, clock: Clock) -> dict[str, float]:
    q, m = map(int, SCREEN.split("x"))
    runs = contenders(unit_rows(q, SCREEN_WIDTH, 0), unit_rows(m, SCREEN_WIDTH, 1))
    whole = {name: run for name, run in runs.items() if not name.endswith("alone")}
    return {name: round(1e3 * s, 2) for name, s in medians(whole, repeats, "screen", clock).items()}


def medians(runs: Contenders, repeats: int, label: str, clock: Clock) -> dict[str, float]:
    """Seconds, after one turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(repeats + 1), label):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                taken[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def peak(run: Callable[[], object]) -> float:
    """MiB of resident memory that a call adds at its peak, its result included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def accuracy(query: NDArray[np.float32], rows: NDArray[np.float32], dtype: Dtype) -> Figures:
    """Against float64: the best cosines, and how often the same row has it."""
    exact = query.astype(np.float64) @ rows.astype(np.float64).T
    score, index = max_cosine(query, ReferenceBank.from_array(rows, dtype))
    return {
        "max_error": float(f"{np.abs(score - exact.max(axis=1)).max():.2e}"),
        "same_argmax": round(float((index == exact.argmax(axis=1)).mean()), 4),
    }


def bars(gflops: dict[str, float]) -> Figures:
    """What was promised at Q×M = BARS_AT, and what this run reached."""
    ours, faiss_ = gflops["ours, float32"], gflops["faiss IndexFlatIP"]
    bare = max(gflops["NumPy product alone"], gflops["torch f32 product alone"])
    reduced = max(gflops[f"ours, {dtype}"] for dtype in DTYPES[1:])
    amx = paths()[-1] == "amx"
    found = {
        "float32 / best bare f32 product": (ours / bare, 0.9),
        "float32 / faiss": (ours / faiss_, 1.3),
        "best reduced dtype / faiss": (reduced / faiss_, 8 if amx else 3),
        "best reduced dtype / bare bf16 product": (
            reduced / gflops["torch bf16 product alone"],
            0.8 if amx else None,
        ),
    }
    return {name: {"reached": round(reached, 2), "bar": bar} for name, (reached, bar) in found.items()}


def musc(frames: int, patches: int, width: int, levels: int, clock: Clock) -> Figures:
    """One repeat over all levels of random features in which one frame in five has a patch of its own."""
    rng = np.random.default_rng(2)
    shared = rng.standard_normal((patches, width), np.float32)
    found: Figures = {"frames": frames, "patches": patches, "levels": levels, "seconds": {}, "peak_mib": {}}
    features = shared + 0.5 * rng.standard_normal((frames, patches, width), np.float32)
    features[::5, 0] = rng.standard_normal((len(features[::5]), width), np.float32)
    scores: dict[str, NDArray[Any]] = {}
    for name, score in {"ours": mutual_score, "torch, as published": published}.items():

        def run(name: str = name, score: Callable[..., NDArray[Any]] = score) -> None:
            for _ in track(range(levels), f"MuSc, {name}"):
                scores[name] = score(features)

        start = clock()
        found["peak_mib"][name] = peak(run)
        found["seconds"][name] = round(clock() - start, 2)
    subset = range(0, frames, max(1, frames // 3))
    exact = np.stack([published_frame(torch.from_numpy(features).double(), i) for i in subset])
    found["max_error"] = {
        name: float(f"{np.abs(score[list(subset)] - exact).max():.2e}") for name, score in scores.items()
    }
    return found


def published(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """MuSc's scoring module (xrli-U/MuSc), written plainly."""
    return np.stack([published_frame(torch.from_numpy(features), i) for i in range(len(features))])


def published_frame(features: torch.Tensor, i: int, interval: float = 0.3) -> NDArray[Any]:
    unit = torch.nn.functional.normalize(features, dim=2)
    frames, patches, width = unit.shape
    others = torch.cat([unit[:i], unit[i + 1 :]])
    distance = torch.cdist(unit[i], others.reshape(-1, width)).reshape(patches, frames - 1, patches)
    nearest = distance.min(2).values
    return nearest.topk(int(interval * (frames - 1)), largest=False).values.mean(1).numpy()


def show(figures: Figures) -> None:
    console = Console()
    table = Table("", title=f"GFLOP/s (MiB), D={figures['width']}, {figures['threads']} threads, {figures['path']}")
    for size in figures["sizes"]:
        table.add_column(size, justify="right")
    columns = list(figures["sizes"].values())
    for name in columns[0]["gflops"] if columns else ():
        table.add_row(name, *(f"{c['gflops'][name]:.0f} ({c['peak_mib'][name]:.0f})" for c in columns))
    for dtype in DTYPES if columns else ():
        values = (c["accuracy"][dtype] for c in columns)
        table.add_row(f"{dtype}: error, same row", *(f"{v['max_error']:.0e}, {v['same_argmax']:.2f}" for v in values))
    console.print(table)
    for name, bar in (figures["bars"] or {}).items():
        console.print(f"{name}: {bar['reached']:.2f} (bar: {bar['bar'] or 'none'})", highlight=False)
    console.print("The demo's patch similarity with 200 frames enrolled, ms:", figures["screen_ms"])


if __name__ == "__main__":
    main()
