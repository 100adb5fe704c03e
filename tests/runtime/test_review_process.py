"""The review process ends with whoever needs it: killed, dropped, forked or at the program's end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.inspector import Inspector

DEMO = Path(__file__).parents[2] / "demo"


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def comes(true: Callable[[], bool], patience: float = 60) -> bool:
    """What must come comes sooner by far."""
    end = time.monotonic() + patience
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@contextmanager
def parent(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program that tells its children's ids in a line, the review process's first. None outlives the test."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as program:
        children: list[int] = []
        try:
            assert program.stdout is not None
            children = [int(number) for number in program.stdout.readline().split()]
            program.children = children  # type: ignore[attr-defined]
            yield program
        finally:
            for process in (program.pid, *children):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


# A parent that speaks to the process without us, and a fork that keeps the pipe's end open when the parent is gone.
SPEAKS = """
import json, os, subprocess, sys, time
until, said, *command = sys.argv[1:]
command = [str(os.getpid()) if word == "PARENT" else word for word in command]
child = subprocess.Popen([sys.executable, *command], stdin=-1, stdout=-1, start_new_session=True)
fork = os.fork()
if fork == 0:
    time.sleep(600)
    os._exit(0)
while until and until not in child.stdout.readline().decode():
    pass
child.stdin.write(eval(said)); child.stdin.flush()
print(child.pid, fork, flush=True)
time.sleep(600)
"""
PROCESS = ["-m", "vmad_edge.runtime.review_process", "PARENT", str(DEMO / "bundle"), "HASH", "cpu", "/nowhere"]
HOLDS_THE_LOCK = """
import ctypes, sys
from vmad_edge.runtime.review_process import end_with
end_with(int(sys.argv[1]))
print("held", flush=True)
ctypes.PyDLL(None).sleep(600)  # as a library does that takes long to load
"""
HEAD = b'{"kind": "review", "id": 1, "arrays": {"pixels": ["|u1", [100, 100, 3]]}}\n'


@pytest.mark.parametrize(
    "until,said,command",
    [
        pytest.param("", b"", PROCESS, id="while Python begins"),
        pytest.param('"loaded": false', b"", PROCESS, id="while it loads"),
        pytest.param('"loaded": true', b"", PROCESS, id="idle"),
        pytest.param('"loaded": false', HEAD[:1], PROCESS, id="after a message's first byte"),
        pytest.param('"loaded": true', HEAD[:40], PROCESS, id="in a message's head"),
        pytest.param('"loaded": true', HEAD, PROCESS, id="before its arrays"),
        pytest.param('"loaded": true', HEAD + bytes(29_999), PROCESS, id="before its last byte"),
        pytest.param("held", b"", ["-c", HOLDS_THE_LOCK, "PARENT"], id="while Python has no turn"),
    ],
)
def test_ends_with_its_parent_though_a_fork_lives_on(until: str, said: bytes, command: list[str]) -> None:
    hash = Bundle.open(DEMO / "bundle").hash
    with parent(SPEAKS, until, repr(said), *(hash if word == "HASH" else word for word in command)) as program:
        review, fork = program.children  # type: ignore[attr-defined]
        assert runs(review)
        program.kill()
        assert comes(lambda: not runs(review))
        assert runs(fork)


def test_a_parent_that_ended_before_is_noticed() -> None:
    code = "import sys; from vmad_edge.runtime.review_process import end_with; end_with(int(sys.argv[1])); print('on')"
    for given, said in ((os.getpid(), "on\n"), (os.getppid(), "")):
        done = subprocess.run([sys.executable, "-c", code, str(given)], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


OPENS = """
import os, sys, time
from vmad_edge.runtime.inspector import Inspector
inspector = Inspector.open(sys.argv[1], sys.argv[2], "cpu")
inspector.load_reviews()
while inspector.review_pid is None:
    time.sleep(0.01)
"""
FORKS = """
import atexit
from vmad_edge.runtime.errors import VmadError
part = sys.argv[3]
assert inspector.inspect(part).p_yes is not None
review = inspector.review_pid
if (fork := os.fork()) == 0:
    try:
        inspector.inspect(part)
    except VmadError as error:
        assert "opened before the process forked" in str(error)
        atexit._run_exitfuncs()
        os._exit(42)  # ONNX Runtime would wait for threads that the fork has not
assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 42
assert inspector.inspect(part).p_yes is not None and inspector.review_pid == review
"""


@pytest.mark.parametrize(
    "then", ["", "inspector.close()", "del inspector", "sys.exit()", FORKS, "os.kill(os.getpid(), 9)"]
)
def test_no_program_leaves_it_behind(tmp_path: Path, then: str) -> None:
    part = next((DEMO / "parts/defective").iterdir())
    code = OPENS + "print(inspector.review_pid, flush=True)\n" + then
    with parent(code, str(DEMO / "bundle"), str(tmp_path), str(part)) as program:
        assert program.wait(120) == (-9 if "kill" in then else 0)
        (review,) = program.children  # type: ignore[attr-defined]
        assert comes(lambda: not runs(review))


def test_a_dropped_inspector_ends_its_process_and_threads(tmp_path: Path) -> None:
    inspector = Inspector.open(DEMO / "bundle", tmp_path, "cpu")
    inspector.load_reviews()
    while (review := inspector.review_pid) is None:
        time.sleep(0.01)
    assert runs(review)
    del inspector
    gc.collect()
    assert comes(lambda: not runs(review))
    assert comes(lambda: not [each for each in threading.enumerate() if each.name.startswith("review")])
