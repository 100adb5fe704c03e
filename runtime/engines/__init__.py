"""Engines: one network ready to run each, dict of arrays in, dict of arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from vmad_edge.kernels.cuda import DeviceArray
from vmad_edge.runtime.device import DeviceThread

Arrays = dict[str, NDArray[Any]]
Device = Literal["auto", "tensorrt", "cuda", "openvino", "cpu"]
"""What runs a bundle's graphs; "auto" takes the first of the others that this machine and this bundle have."""


class Engine(Protocol):
    """What a stage needs of a network; input and output names are those of the design's artifacts."""

    provider: str
    """What runs it, for people."""

    def run(self, inputs: Arrays) -> Arrays: ...


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
