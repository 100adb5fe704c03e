"""How many processors this process may keep busy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath


def processors(root: Path = Path("/")) -> int:
    """The processors allowed by affinity and by the CPU quotas of the process's control groups, at least 1.

    A quota of 1.5 processors counts as 2. Of nested groups the tightest counts. A quota that cannot be read is none.

    Args:
        root: where /proc and /sys/fs/cgroup are looked for.
    """
    # Linux has affinity; what else can compile the kernels may not.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_whole_quotas(root)]))


@cache
def _whole_quotas(root: Path) -> tuple[int, ...]:
    """Rounded up. Read once: kernels ask at every call."""
    return tuple(map(math.ceil, _quotas(root)))


def _quotas(root: Path) -> Iterator[float]:
    """Processors, of each quota that holds for the process."""
    for version, folder in _groups(root):
        with suppress(OSError, ValueError, ArithmeticError):  # the files are absent where no quota can be set
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of the process's CPU groups and of all groups around them that can be seen."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    own: dict[int, str] = {}  # the group's path, by version
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own[2] = path
        elif "cpu" in controllers.split(","):
            own[1] = path
    for line in mounts:
        place, _, kind = line.partition(" - ")
        top, point = place.split()[3:5]
        system, *_, options = kind.split()
        version = {"cgroup": 1, "cgroup2": 2}.get(system)
        if version is None or version not in own or (version == 1 and "cpu" not in options.split(",")):
            continue
        folder = root / point.lstrip("/")
        yield version, folder
        # A container may see its own group alone, mounted as the top, under the path that the host knows.
        with suppress(ValueError):
            for part in PurePosixPath(own[version]).relative_to(top).parts:
                if part == "..":
                    break  # the group is outside of what can be seen
                folder /= part
                yield version, folder
