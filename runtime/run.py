"""What a long run needs: several frames on their way at once, in order, and an end that loses nothing."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 0.1
"""Seconds until a signal is noticed while nothing comes."""

Stage = tuple[Callable[[Any], Any], int]
"""A function of one argument, and how many threads may be in it."""


class Stop:
    """Inside of its `with` block the first SIGINT or SIGTERM only sets `signal`; a second one ends the process.

    So nothing is torn in the middle of a write. For the main thread.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # `nohup`, `&`
        self._before = {number: signal.signal(number, self._heed) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heed(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for heeded in self._before:
            signal.signal(heeded, signal.SIG_DFL)


def in_order(items: Iterable[Any], stages: Sequence[Stage], ahead: int, stop: Stop) -> Generator[Any, None, None]:
    """Every item after all `stages`, in the order of `items`, while up to `ahead` more are on their way.

    Each stage has threads of its own, and all but the last are at work on later items. A stage of one thread sees the
    items in order. Ends early when `stop` has its signal. What a stage raises is raised here, in the item's place.

    At an early end nothing is begun any more, and the first stage's threads are waited for; a later stage's thread may
    still wait for something: what its result would have been is dropped.
    """
    pools = [ThreadPoolExecutor(threads, "vmad-run") for _, threads in stages]
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            if stop.signal is not None:
                return
            waiting.append(_through(item, stages, pools))
            if len(waiting) > ahead:
                if not _ended(waiting[0], stop):
                    return
                yield waiting.popleft().result()
        while waiting and _ended(waiting[0], stop):
            yield waiting.popleft().result()
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        pools[0].shutdown()


def _through(item: Any, stages: Sequence[Stage], pools: Sequence[ThreadPoolExecutor]) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(item)
    for (work, _), pool in zip(stages, pools, strict=True):
        future = pool.submit(lambda before, work: work(before.result()), future, work)
    return future


def _ended(future: Future[Any], stop: Stop) -> bool:
    """Whether it ended before a signal came."""
    while not wait((future,), _PATIENCE).done:
        if stop.signal is not None:
            return False
    return stop.signal is None
