"""Per-stage wall-clock times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """`with watch("stage"): …` adds the block's milliseconds to `timings_ms["stage"]`."""

    def __init__(self) -> None:
        self.timings_ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings_ms[stage] = (time.perf_counter() - start) * 1e3

    def add(self, timings_ms: dict[str, float]) -> None:
        self.timings_ms.update(timings_ms)
