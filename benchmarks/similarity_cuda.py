"""Patch similarity on a GPU against the matrix product that it contains, in one run.

    pip install '.[gpu]' faiss-cuda torch
    python benchmarks/similarity.py --device cuda --sizes 256x2560 576x115200 1369x273800 --save

Each contender is captured as a CUDA graph, launched in rounds that take turns; figures are medians. torch's product is
cuBLAS. faiss allocates as it searches, so it runs without a graph; faiss-cpu in its place leaves it out. The roofline
is the longer of the operations at the data sheet's peak and the bytes at its bandwidth, where the GPU is in
runtime/hardware.py. `aim` is 0.9 of the product alone at the two large sizes, `must` 0.6; 256×2560 shall take 15 µs at
most.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch
from cuda_arithmetic import floor
from numpy.typing import NDArray
from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vmad_edge.kernels import cuda
from vmad_edge.runtime.device import Device
from vmad_edge.runtime.hardware import HARDWARE
from vmad_edge.runtime.machine import RunInProgress

WIDTH = 1024
SHEETS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA Thor": "thor",
}
"""By the driver's names, of GPUs that those tell apart (it calls every Orin the same)."""
Contenders = dict[str, Callable[[], object]]


def measure(sizes: Sequence[str], rounds: int, keep: bool) -> None:
    """Prints a table; `keep` writes results/similarity_cuda.json."""
    run, device = RunInProgress(), Device()
    microseconds = {}
    for size in sizes:
        q, m = map(int, size.split("x"))
        microseconds[size] = measured(contenders(device, q, m), rounds, size) | rooflines(device.name, q, m)
    table = Table("", *sizes, title=f"µs, D={WIDTH}, {device.name}, kernels for {cuda.targets()}")
    for name in microseconds[sizes[0]]:
        table.add_row(name, *(f"{taken[name]:.1f}" for taken in microseconds.values()))
    console, reached = Console(), bars(microseconds)
    console.print(table)
    for name, bar in reached.items():
        console.print(f"{name}: {bar}")
    if keep:
        figures = {"gpu": device.name, "kernels": cuda.targets(), "microseconds": microseconds, "bars": reached}
        save("similarity_cuda", run.end(["torch", "faiss-cuda", "pycuda", "cuda-bindings"]), figures)


def bars(microseconds: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What is aimed at, of the sizes that were measured, and what float16 reached."""
    found = {}
    for size, taken in microseconds.items():
        ours = min(us for name, us in taken.items() if name.startswith("max_cosine, float16"))
        if size in ("576x115200", "1369x273800"):
            share = taken["product alone, float16 (cuBLAS)"] / ours
            found[f"{size}: product alone / max_cosine"] = {"reached": round(share, 3), "aim": 0.9, "must": 0.6}
        elif size == "256x2560":
            found[f"{size}: µs in a graph"] = {"reached": round(ours, 2), "must": 15.0}
    return found


def contenders(device: Device, q: int, m: int) -> Contenders:
    """Each launches a graph; the last of them waits."""
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((count, WIDTH), np.float32).astype(np.float16) for count in (q, m)]
    query = device.upload(features[0])
    score, index = device.zeros((q,), np.float32), device.zeros((q,), np.int64)
    dtypes: tuple[cuda.Dtype, ...] = ("float16", "int8")
    paths: tuple[cuda.Path, ...] = ("fused", "split")
    runs: Contenders = {}
    for dtype in dtypes:
        scale = device.zeros((m,), np.float32) if dtype == "int8" else None
        bank = cuda.DeviceBank(device.zeros((m, cuda.row_bytes(WIDTH, dtype)), np.uint8), scale, WIDTH, dtype)
        cuda.normalise(device.upload(features[1]), bank, stream=device.stream)
        for path in paths:
            workspace = device.zeros((cuda.max_cosine_workspace(q, bank, path=path),), np.uint8)
            options: dict[str, Any] = {"path": path, "stream": device.stream}
            queue = partial(cuda.max_cosine, query, bank, score, index, workspace, **options)
            runs[f"max_cosine, {dtype}, {path}"] = Captured(device.capture(queue).launch, queue).launch

    stream = torch.cuda.ExternalStream(device.stream)
    torch.cuda.set_stream(stream)  # for good: a replay goes to the stream that is current then
    left, right = (torch.from_numpy(rows).cuda() for rows in features)
    product = torch.empty((q, m), dtype=torch.float16, device="cuda")
    for name, work in (
        ("product alone, float16 (cuBLAS)", lambda: torch.matmul(left, right.T, out=product)),
        ("product + max, float16 (torch)", lambda: torch.matmul(left, right.T, out=product).max(dim=1)),
    ):
        work()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            work()
        runs[name] = Captured(captured.replay, work).launch
    if hasattr(faiss, "GpuIndexFlatIP"):
        runs["GpuIndexFlatIP, float16 (faiss), no graph"] = searched(stream, *features)
    runs["wait"] = device.wait
    return runs


def searched(stream: torch.cuda.Stream, query: NDArray[np.float16], rows: NDArray[np.float16]) -> Callable[[], object]:
    import faiss.contrib.torch_utils  # lets search take tensors where they lie, on torch's current stream

    resources, config = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    index = faiss.GpuIndexFlatIP(resources, WIDTH, config)
    index.add(rows.astype(np.float32))
    asked = torch.from_numpy(query).float().cuda()

    def search(keep: object = resources) -> None:
        with torch.cuda.stream(stream):
            index.search(asked, 1)

    return search


def rooflines(gpu: str, q: int, m: int) -> dict[str, float]:
    """Microseconds; nothing for a GPU without a data sheet here."""
    if gpu not in SHEETS:
        return {}
    sheet, found = HARDWARE[SHEETS[gpu]], {}
    for dtype, size in (("float16", 2), ("int8", 1)):
        operations, moved = 2 * q * m * WIDTH, (q * 4 + m * size) * WIDTH + q * 12
        found[f"roofline, {dtype} (data sheet)"] = 1e6 * floor(sheet, operations, moved, size)
    return found


@dataclass(frozen=True)
class Captured:
    replay: Callable[[], None]
    queue: Callable[[], object]
    """Holds the memory that the graph uses."""

    def launch(self) -> None:
        self.replay()


def measured(runs: Contenders, rounds: int, label: str) -> dict[str, float]:
    """Microseconds a launch: medians over rounds of as many launches as take about 20 ms."""
    wait = runs.pop("wait")

    def seconds(launch: Callable[[], object], launches: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(launches):
            launch()
        wait()
        return time.perf_counter() - start

    launches = {}
    for name, launch in runs.items():
        seconds(launch, 3)
        launches[name] = max(1, round(0.02 / (seconds(launch, 20) / 20)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), label):
        for name, launch in runs.items():
            taken[name].append(seconds(launch, launches[name]) / launches[name])
    return {name: 1e6 * statistics.median(each) for name, each in taken.items()}
