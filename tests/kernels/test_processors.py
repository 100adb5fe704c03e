"""How many processors a process may use: its affinity, and the quotas of its control groups."""

from __future__ import annotations

import os

import pytest

from vmad_edge.kernels.processors import processors

V2 = ("0::{path}", "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate")
V1 = (
    "5:cpuset:/elsewhere\n4:cpu,cpuacct:{path}",
    "31 30 0:27 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
)
CPU = "sys/fs/cgroup/cpu,cpuacct"


def v2(**quotas):
    return {f"sys/fs/cgroup/{group.replace('_', '/')}/cpu.max": quota for group, quota in quotas.items()}


def v1(folder, quota, period="100000"):
    return {f"{CPU}/{folder}/cpu.cfs_quota_us": quota, f"{CPU}/{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("system", "path", "top", "files", "expected"),
    [
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2, id="v2, a container's own top"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2, id="v2, rounds up"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1, id="v2, never below 1"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "50000 10000\n"}, 5, id="v2, another period"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8, id="v2, more than affinity"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8, id="v2, no quota"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "what?\n"}, 8, id="v2, not readable"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "100000 0\n"}, 8, id="v2, a period of nothing"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": f"1{'0' * 400} 1\n"}, 8, id="v2, beyond any float"),
        pytest.param(V2, "/", "/", {"sys/fs/cgroup/cpu.max": "-5 1\n"}, 1, id="v2, less than nothing"),
        pytest.param(V2, "/", "/", {}, 8, id="v2, the host's top has no file"),
        pytest.param(V2, "/a/b", "/", v2(a="max 100000", a_b="300000 100000"), 3, id="v2, nested, the inner"),
        pytest.param(V2, "/a/b", "/", v2(a="200000 100000", a_b="max 100000"), 2, id="v2, nested, the outer"),
        pytest.param(V2, "/a/b", "/", v2(a="200000 100000", a_b="400000 100000"), 2, id="v2, nested, the tightest"),
        pytest.param(V2, "/a", "/", v2(a="600000 100000", other="100000 100000"), 6, id="v2, another's group"),
        pytest.param(V2, "/../b", "/", {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3, id="v2, outside of the view"),
        pytest.param(V1, "/", "/", v1("", "250000\n"), 3, id="v1"),
        pytest.param(V1, "/", "/", v1("", "-1\n"), 8, id="v1, no quota"),
        pytest.param(V1, "/", "/", v1("", "40000", "20000"), 2, id="v1, another period"),
        pytest.param(V1, "/a/b", "/", v1("a", "100000") | v1("a/b", "-1"), 1, id="v1, nested"),
        pytest.param(V1, "/docker/1f", "/docker/1f", v1("", "400000"), 4, id="v1, mounted as the top"),
        pytest.param(V1, "/docker/1f/in", "/docker/1f", v1("in", "400000"), 4, id="v1, below the top"),
    ],
)
def test_quotas(tmp_path, monkeypatch, system, path, top, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    groups, mounts = (text.format(path=path, top=top) + "\n" for text in system)
    proc = {"proc/self/cgroup": groups, "proc/self/mountinfo": "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts}
    for name, content in {**proc, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert processors(tmp_path) == expected


def test_affinity_alone(tmp_path, monkeypatch):
    """Nothing in /proc: containers may hide it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6})
    assert processors(tmp_path) == 3


def test_no_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors(tmp_path) == os.cpu_count()
