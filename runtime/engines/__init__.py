"""Engines: one network ready to run each, dict of arrays in, dict of arrays out."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Device = Literal["auto", "tensorrt", "cuda", "openvino", "cpu"]
"""What runs a bundle's graphs; "auto" takes the first of the others that this machine and this bundle have."""


class Engine(Protocol):
    """What a stage needs of a network; input and output names are those of the design's artifacts."""

    provider: str
    """What runs it, for people."""

    def run(self, inputs: Arrays) -> Arrays: ...


def ran_out_of_memory(message: str) -> bool:
    """Whether a library's error says so, in its words."""
    return any(words in message.lower() for words in ("out of memory", "outofmemory", "failed to allocate"))
