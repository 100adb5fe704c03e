"""Patch similarity against the matrix product that it contains, in one run on the same threads.

    OMP_NUM_THREADS=2 python benchmarks/similarity.py

Ours and NumPy's BLAS both obey OMP_NUM_THREADS. The contenders take turns; each figure is the median of its turns, in
GFLOP/s of the product's 2·Q·M·D operations.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmad_edge.kernels import ReferenceBank, max_cosine

SIZES = ("256x256", "256x2560", "576x18432", "576x115200")


def unit_rows(count: int, width: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def contenders(query: NDArray[np.float32], rows: NDArray[np.float32]) -> dict[str, Callable[[], object]]:
    bank = ReferenceBank.from_array(rows)
    return {
        "max_cosine, ReferenceBank": lambda: max_cosine(query, bank),
        "max_cosine, array": lambda: max_cosine(query, rows),
        "NumPy product + max + argmax": lambda: ((c := query @ rows.T).max(axis=1), c.argmax(axis=1)),
        "NumPy product alone": lambda: query @ rows.T,
    }


def medians(runs: dict[str, Callable[[], object]], repeats: int, label: str) -> dict[str, float]:
    """Seconds, after one turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(repeats + 1), label):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="QxM")
    parser.add_argument("--width", type=int, default=1024, help="D (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="turns that count (default: %(default)s)")
    arguments = parser.parse_args()

    threads = os.environ.get("OMP_NUM_THREADS", f"{len(os.sched_getaffinity(0))} (all)")
    table = Table("", title=f"GFLOP/s, D={arguments.width}, threads: {threads}")
    columns = []
    for size in arguments.sizes:
        q, m = map(int, size.split("x"))
        query, rows = unit_rows(q, arguments.width, 0), unit_rows(m, arguments.width, 1)
        seconds = medians(contenders(query, rows), arguments.repeats, size)
        columns.append({name: 2e-9 * q * m * arguments.width / s for name, s in seconds.items()})
        table.add_column(size, justify="right")
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.1f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
