"""Per-stage wall-clock times, and times that a caller gives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

FAR_S = 1e9
"""Seconds, 31 years: what is farther off is as far."""


def seconds(name: str, given: float, per_second: float = 1.0) -> float:
    """A time from now that a caller gave, between 0 and `FAR_S`; what is no number (NaN) has passed.

    Args:
        name: of the argument, for the error.
        given: any real number, of Python or NumPy, in a unit of which `per_second` make one second.

    Raises:
        TypeError: no number.
    """
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name}: expected a number, got {given!r}")
    try:
        number = float(given) / per_second  # added to a NumPy float32, a clock would lose its milliseconds
    except OverflowError:
        number = FAR_S if given > 0 else 0.0
    return 0.0 if math.isnan(number) else min(max(0.0, number), FAR_S)


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
            self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + (time.perf_counter() - start) * 1e3

    def add(self, timings_ms: dict[str, float]) -> None:
        self.timings_ms.update(timings_ms)
