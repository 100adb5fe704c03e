"""What a measurement was taken on: machine, versions, date, command."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vmad_edge.kernels.processors import processors
from vmad_edge.runtime.bundle import Record
from vmad_edge.runtime.engines.gpu import gpu
from vmad_edge.runtime.errors import VmadError

PACKAGES = (
    "vmad-edge",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "llama-cpp-python",
    "numpy",
    "opencv-python-headless",
    "pillow",
)
_SIMD = {"avx512f": "AVX-512", "avx2": "AVX2", "sve2": "SVE2", "asimd": "NEON"}
"""By /proc/cpuinfo's names; the first that is there is told."""


class Clock(Record):
    """MHz. `jetson_clocks` makes lowest and highest equal."""

    now: float
    lowest: float
    highest: float


class Machine(Record):
    """What the system does not tell is None."""

    processor: str
    cores: int
    """Those that this process may use."""
    memory_gib: float | None
    system: str
    accelerator: str | None
    power_mode: str | None
    """A Jetson's, as nvpmodel names it."""
    clocks: dict[str, Clock] | None


class Run(Record):
    """Of one measurement: what was run, when, and on what. `RunInProgress` makes it."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    others: float | None
    """Share of all cores' time that other processes took meanwhile: near 0 on a quiet machine."""


class RunInProgress:
    """Begins when it is made, before anything is loaded."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._start, self._busy, self._own = time.perf_counter(), _busy_seconds(root), _own_seconds()

    def end(self, packages: Sequence[str] = ()) -> Run:
        """As of now, its child processes ended.

        Args:
            packages: whose versions matter beside the runtime's own.
        """
        busy, others = _busy_seconds(self._root), None
        if busy is not None and self._busy is not None:
            possible = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
            share = (busy - self._busy - (_own_seconds() - self._own)) / possible
            others = round(min(max(share, 0.0), 1.0), 3)
        return Run(
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            date=time.strftime("%Y-%m-%d"),
            machine=describe_machine(self._root),
            versions=versions(*PACKAGES, *packages),
            others=others,
        )


def lacks_vnni(root: Path = Path("/")) -> bool:
    """An x86 processor that adds products of bytes in 16 bits, where they may saturate; or that tells nothing."""
    return platform.machine() in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni"} & _flags(root)


def busy_elsewhere(run: Run) -> str | None:
    """A warning for people; None if the machine was as good as quiet, or does not tell."""
    if run.others is None or run.others < 0.05:
        return None
    return f"other processes took {run.others:.0%} of the processors' time meanwhile: times are upper bounds"


def describe_machine(root: Path = Path("/")) -> Machine:
    """What the files of /proc and /sys (under `root`), nvpmodel and the NVIDIA driver tell."""
    return Machine(
        processor=_processor(root),
        cores=processors(root),
        memory_gib=_memory_gib(root),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        accelerator=_accelerator(),
        power_mode=_power_mode(),
        clocks=dict(_clocks(root)) or None,
    )


def peak_mib(process: int | None) -> float | None:
    """A process's peak resident memory in MiB; None where the system does not tell."""
    kib = _field(Path(f"/proc/{process}/status"), "VmHWM")
    return None if kib is None else round(int(kib.split()[0]) / 1024, 1)


def _busy_seconds(root: Path) -> float | None:
    """Of all cores since the system started, what a hypervisor took included."""
    ticks = (_text(root / "proc/stat").partition("\n")[0].split() + ["0"] * 9)[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, ticks)
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") if busy else None


def _own_seconds() -> float:
    """Of this process, and of its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def versions(*packages: str) -> dict[str, str]:
    """Python's, and of those `packages` that are installed."""
    there = {package: found for package in packages if (found := _version(package))}
    return {"python": platform.python_version(), **there}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor(root: Path) -> str:
    cpuinfo = root / "proc/cpuinfo"
    # ARM's cpuinfo has no names; a board's device tree has.
    board = _text(root / "proc/device-tree/model").rstrip("\0")
    name = board or _field(cpuinfo, "model name") or platform.processor() or platform.machine()
    flags = _flags(root)
    return ", ".join([name, *[simd for flag, simd in _SIMD.items() if flag in flags][:1]])


def _flags(root: Path) -> set[str]:
    cpuinfo = root / "proc/cpuinfo"
    return set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())


def _memory_gib(root: Path) -> float | None:
    kib = _field(root / "proc/meminfo", "MemTotal")
    return None if kib is None else round(int(kib.split()[0]) / 2**20, 1)


def _clocks(root: Path) -> Iterator[tuple[str, Clock]]:
    """The processor's and, on a Jetson, the GPU's and the memory's."""
    for names, files, per_mhz in (
        ("sys/devices/system/cpu/cpufreq/policy*", "scaling_{}_freq", 1e3),
        ("sys/class/devfreq/*", "{}_freq", 1e6),
    ):
        for folder in sorted(root.glob(names)):
            values = [_text(folder / files.format(which)).strip() for which in ("cur", "min", "max")]
            if all(value.isdecimal() for value in values):
                now, lowest, highest = (int(value) / per_mhz for value in values)
                yield folder.name, Clock(now=now, lowest=lowest, highest=highest)


def _field(path: Path, name: str) -> str | None:
    """The first `name: value` of a /proc file."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _accelerator() -> str | None:
    try:
        found = gpu()
    except VmadError:
        return None
    return f"{found}, driver {found.driver}"


def _power_mode() -> str | None:
    """nvpmodel prints "NV Power Mode: MAXN", then the mode's number."""
    if shutil.which("nvpmodel") is None:
        return None
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].partition(": ")[2].strip() or None
