"""Several frames on their way at once, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from vmad_edge.runtime.run import Stop, in_order

WAIT = 60


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_results_come_in_order_through_all_stages(count: int) -> None:
    def slow_first(number: int) -> int:
        if number % 2 == 0:
            threading.Event().wait(0.005)
        return number

    stages = [(slow_first, 3), (lambda number: number * 10, 1), (lambda number: number + 1, 2)]
    assert list(in_order(range(count), stages, 4, Stop())) == [number * 10 + 1 for number in range(count)]


def test_stages_are_busy_at_once() -> None:
    """The first stage can only end with item 1 while the second is at item 0."""
    second = threading.Event()

    def first(number: int) -> int:
        assert number != 1 or second.wait(WAIT)
        return number

    def last(number: int) -> int:
        second.set()
        return number

    assert list(in_order(range(3), [(first, 1), (last, 1)], 2, Stop())) == [0, 1, 2]


def test_no_more_than_ahead_are_begun() -> None:
    begun: list[int] = []
    with closing(in_order(iter(range(100)), [(begun.append, 2)], 3, Stop())) as results:
        next(results)
        next(results)
        assert len(begun) <= 5


def test_an_error_comes_in_its_place() -> None:
    def work(number: int) -> float:
        return 1 / (2 - number)

    results = in_order(range(9), [(work, 2)], 3, Stop())
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


SIGNALLED = """
import os, signal, sys, threading
from vmad_edge.runtime.run import Stop, in_order

number = signal.Signals(int(sys.argv[1]))
before, never = signal.getsignal(number), threading.Event()

def last(item):
    if item == 2:
        os.kill(os.getpid(), number)
        never.wait(60)
    return item

with Stop() as stop:
    found = list(in_order(range(100), [(lambda item: item, 2), (last, 1)], 4, stop))
assert stop.signal is number and found in ([0], [0, 1]), (stop.signal, found)
assert signal.getsignal(number) is before
os._exit(0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_two_results(number: signal.Signals) -> None:
    """Though a later stage would wait for ever, as for a review that hangs."""
    subprocess.run([sys.executable, "-c", SIGNALLED, str(int(number))], check=True, timeout=WAIT)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
