"""Neither we nor a library of ours opens an internet socket, or leaves anything in the home folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_arrows import ROOT, imported

INSPECT = """
import sys
from vmad_edge.runtime.inspector import Inspector
with Inspector.open("demo/bundle", sys.argv[2], device=sys.argv[1]) as inspector:
    result = inspector.inspect("demo/parts/defective/casting_crack.jpg")
    assert result.p_yes is not None and result.reason is None, result.reason
"""
TO_THE_INTERNET = re.compile(r"\bAF_INET6?\b")


def with_home(home: Path, command: list[str]) -> None:
    """Runs it where HOME is all that it is told of folders, from the checkout's root."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "ORT_"))}
    subprocess.run(command, check=True, cwd=ROOT, env={**kept, "HOME": str(home)}, timeout=300)


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_an_inspection_leaves_nothing_at_home_and_opens_no_socket(device: str, tmp_path: Path) -> None:
    home, trace = tmp_path / "home", tmp_path / "trace"
    command = [sys.executable, "-c", INSPECT, device, str(tmp_path / "station")]
    # Without seccomp-bpf every system call stops for strace: OpenVINO's threads then starve the review's heartbeat.
    strace = ["strace", "-f", "--seccomp-bpf"]
    traced = [*strace, "-qq", "--signal=none", "-e", "trace=network", "-o", str(trace)]
    traceable = shutil.which("strace") and subprocess.run([*strace, "-o", os.devnull, "true"]).returncode == 0
    with_home(home, [*traced, *command] if traceable else command)
    assert not list(home.rglob("*"))
    if not traceable:
        pytest.skip("sockets were not watched: apt-get install strace")
    assert not [line for line in trace.read_text().splitlines() if TO_THE_INTERNET.search(line)]


def test_strace_would_have_shown_it(tmp_path: Path) -> None:
    if not shutil.which("strace"):
        pytest.skip("apt-get install strace")
    call = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    trace = tmp_path / "trace"
    subprocess.run(["strace", "-f", "-e", "trace=network", "-o", trace, sys.executable, "-c", call], check=True)
    assert TO_THE_INTERNET.search(trace.read_text())


@pytest.mark.parametrize("first", ["runtime.engines.onnxruntime", "runtime.engines.openvino", "export.precision"])
def test_whatever_is_imported_first_turns_it_off(first: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with_home(home, [sys.executable, "-c", f"import vmad_edge.{first}"])
    assert not list(home.rglob("*"))


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_one_file_imports_it(library: str) -> None:
    """Its package has then turned the library's telemetry off."""
    wings = [path for wing in ("kernels", "runtime", "export", "benchmarks") for path in (ROOT / wing).rglob("*.py")]
    found = [path for path in wings if any(name.split(".")[0] == library for name in imported(path.read_text()))]
    assert found == [ROOT / f"runtime/engines/{library}.py"]


def test_checkpoints_are_not_looked_for_elsewhere() -> None:
    code = (
        "import vmad_edge.export, huggingface_hub.constants as c\n"
        "assert c.HF_HUB_OFFLINE and c.HF_HUB_DISABLE_TELEMETRY"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
