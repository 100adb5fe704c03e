"""Engines: one network ready to run each, dict of arrays in, dict of arrays out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from vmad_edge.kernels.cuda import DeviceArray
from vmad_edge.kernels.processors import processors
from vmad_edge.runtime.device import DeviceThread

Arrays = dict[str, NDArray[Any]]
Device = Literal["auto", "tensorrt", "cuda", "openvino", "cpu"]
"""What runs a bundle's graphs; "auto" takes the first of the others that this machine and this bundle have."""


class GiveUp:
    """Lets one thread end another's run of an engine: called, it ends the run that was given it, and every later one.

    Such a run raises whatever its library does then. As a context manager it is called at the end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._called = False
        self._ends: list[Callable[[], None]] = []

    def __call__(self) -> None:
        with self._lock:
            self._called, ends, self._ends = True, self._ends, []
        for end in ends:
            end()

    def __enter__(self) -> GiveUp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self()

    def on_call(self, end: Callable[[], None]) -> None:
        """What ends a run that begins now; called at once where it was given up already."""
        with self._lock:
            if not self._called:
                self._ends.append(end)
                return
        end()


class Stopped(Exception):
    """A review's `stop` gave this reason before there was a P(yes)."""


class Engine(Protocol):
    """What a stage needs of a network; input and output names are those of the design's artifacts."""

    provider: str
    """What runs it, for people."""

    def run(self, inputs: Arrays, give_up: GiveUp | None = None) -> Arrays:
        """On a GPU a run that is given up goes on to its end; nobody waits for it."""


class DeviceEngine(Engine, Protocol):
    """An engine that also takes and leaves float32 in a GPU's memory, called in `thread`."""

    @property
    def thread(self) -> DeviceThread: ...

    @property
    def capturable(self) -> bool:
        """Whether `queue` may be captured as part of a graph."""

    def outputs(self, inputs: Mapping[str, DeviceArray]) -> Mapping[str, DeviceArray]:
        """Memory for the outputs of these inputs."""

    def queue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """One run, on the stream of the thread's device."""


def ran_out_of_memory(message: str) -> bool:
    """Whether a library's error says so, in its words."""
    return any(words in message.lower() for words in ("out of memory", "outofmemory", "failed to allocate"))


def limited_processors() -> int | None:
    """How many threads a library may have where the process is not allowed all processors; None: its own choice."""
    allowed = processors()
    return allowed if allowed < (os.cpu_count() or 1) else None
