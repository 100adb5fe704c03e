"""Engines: one network ready to run each, dict of arrays in, dict of arrays out."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Engine(Protocol):
    """What a stage needs of a network; input and output names are those of the design's artifacts."""

    def run(self, inputs: Arrays) -> Arrays: ...
