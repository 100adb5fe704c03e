"""Reviews run in a process of their own, with lower priority, so that they cannot disturb the screen.

The process is started as `python -m vmad_edge.runtime.review BUNDLE DEVICE PLANS`; messages go through its standard
input and output. A message is one line of JSON, {"kind", …, "arrays": {name: [dtype, shape]}}, then the arrays' bytes.

    to the process    review (id, question, mode, deadline, view; pixels, patches, patches_multi)   cancel (id)
    from the process  p_yes (id, p_yes)   text (id, text)   finding (id, …; token_scores, mask)   fault (id, reason)
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from vmad_edge.runtime.bundle import Answer, Bundle
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Features
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.systems.vmad import Finding, Review
from vmad_edge.runtime.timing import Stopwatch

Message = tuple[dict[str, Any], dict[str, NDArray[Any]]]
Milestone = Literal["P(yes)", "last word", "mask"]
_NICENESS = 10
_END_OF_TEXT = None


class PendingReview:
    """A review on its way. `text()` streams the answer; `wait` returns when it ended; `so_far` is what came yet."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.finding: Finding | None = None
        self.fault: str | None = None
        self.so_far: Finding | None = None
        self.timings_ms: dict[str, float] = {}
        self.reached_ms: dict[Milestone, float] = {}
        """When each came here, since the review was handed in."""
        self._start = time.perf_counter()
        self._cancel = cancel
        self._ended = threading.Event()
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the review ended (with a `finding` or a `fault`) within `timeout` seconds."""
        return self._ended.wait(timeout)

    def cancel(self) -> None:
        """Ask it to stop before its next decode step; its finding then says `stopped`."""
        self._cancel()

    def text(self) -> Iterator[str]:
        """Pieces of the answer as they are decoded, until the review ends. For one reader."""
        while (piece := self._texts.get()) is not _END_OF_TEXT:
            yield piece

    def _receive(self, head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        now = (time.perf_counter() - self._start) * 1e3
        if head["kind"] == "p_yes":
            self.reached_ms["P(yes)"] = now
            self.so_far = Finding(head["p_yes"], "", None, seg_forced=False, stopped="deadline")
            return
        if head["kind"] == "text":
            self.reached_ms["last word"] = now
            if self.so_far is not None:
                self.so_far = replace(self.so_far, text=self.so_far.text + head["text"])
            self._texts.put(head["text"])
            return
        if head["kind"] == "finding":
            mask = arrays.get("mask")
            if mask is not None:
                self.reached_ms["mask"] = now
            self.timings_ms = head["timings_ms"]
            self.finding = Finding(
                head["p_yes"],
                head["text"],
                None if mask is None else mask.astype(bool),
                head["seg_forced"],
                head["stopped"],
                arrays["token_scores"],
            )
        else:
            self.fault = head["reason"]
        self._texts.put(_END_OF_TEXT)
        self._ended.set()


class ReviewProcess:
    """The inspector's side: starts the process, sends it reviews, hands its messages to their PendingReview.

    Thread-safe. A process that died faults its pending reviews; the next review starts a new one.
    """

    def __init__(self, bundle: Path, device: Device, plans: Plans) -> None:
        self._command = [sys.executable, "-m", "vmad_edge.runtime.review", str(bundle), device, str(plans.folder)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: dict[int, PendingReview] = {}
        self._next_id = 0

    def start(self) -> None:
        """Start loading the models, if that has not begun; returns at once."""
        with self._lock:
            self._running()

    def submit(
        self, frame: Frame, features: Features, question: str, mode: Answer, deadline: float | None
    ) -> PendingReview:
        """Queue one review. `deadline` is a time.monotonic() value at which it stops by itself."""
        with self._lock:
            process = self._running()
            number = self._next_id = self._next_id + 1
            pending = self._pending[number] = PendingReview(lambda: self._send_cancel(number))
            head = {"kind": "review", "id": number, "question": question, "mode": mode, "deadline": deadline}
            head["view"] = astuple(features.view)
            arrays: dict[str, NDArray[Any]] = {
                "pixels": frame.pixels,
                "patches": features.patches,
                "patches_multi": features.patches_multi,
            }
            with suppress(OSError):  # it just died: the listener faults everything pending
                _send(cast(IO[bytes], process.stdin), head, arrays)
        return pending

    @property
    def pid(self) -> int | None:
        """None before the first start."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process; pending reviews get a fault."""
        if self._process is not None:
            self._process.kill()  # it holds nothing to save, and a stopped process heeds no SIGTERM
            self._process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._pending = {}
            threading.Thread(target=self._listen, args=(self._process, self._pending), daemon=True).start()
        return self._process

    def _listen(self, process: subprocess.Popen[bytes], pending: dict[int, PendingReview]) -> None:
        reason = "the review process ended"
        while (message := _receive(cast(IO[bytes], process.stdout))) is not None:
            head, arrays = message
            if head["kind"] == "broken":
                reason = head["reason"]
                break
            with self._lock:
                ended = head["kind"] in ("finding", "fault")
                review = pending.pop(head["id"]) if ended else pending[head["id"]]
            review._receive(head, arrays)
        process.wait()
        with self._lock:
            left = list(pending.values())
            pending.clear()
        for review in left:
            review._receive({"kind": "fault", "reason": f"{reason} (exit status {process.returncode})"}, {})

    def _send_cancel(self, number: int) -> None:
        with self._lock, suppress(OSError):
            if number in self._pending and self._process is not None:
                _send(cast(IO[bytes], self._process.stdin), {"kind": "cancel", "id": number}, {})


def _send(stream: IO[bytes], head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    described = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    stream.write(json.dumps({**head, "arrays": described}).encode() + b"\n")
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Message | None:
    """The next message, or None when the other side closed."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    head = json.loads(line)
    arrays = {}
    for name, (dtype, shape) in head.pop("arrays").items():
        array = np.frombuffer(stream.read(math.prod(shape) * np.dtype(dtype).itemsize), dtype)
        if array.size != math.prod(shape):
            return None
        arrays[name] = array.reshape(shape)
    return head, arrays


def _serve(bundle: Path, device: Device, plans: Plans) -> None:
    """The process's side: load the models, then review one message after the other until the input closes."""
    # Standard output carries messages alone; whatever a library prints goes to standard error.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.nice(_NICENESS)
    try:
        review = Review(Bundle.open(bundle), device, plans)
    except VmadError as error:
        _send(out, {"kind": "broken", "reason": str(error)}, {})
        return
    work: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    cancelled: set[int] = set()

    def listen() -> None:
        while (message := _receive(sys.stdin.buffer)) is not None:
            if message[0]["kind"] == "cancel":
                cancelled.add(message[0]["id"])
            else:
                work.put(message)
        os._exit(0)  # the inspector is gone: nobody waits for what runs now

    threading.Thread(target=listen, daemon=True).start()
    while True:
        head, arrays = cast(Message, work.get())
        number, deadline = head["id"], head["deadline"]

        def stop(number: int = number, deadline: float | None = deadline) -> str | None:
            if number in cancelled:
                return "cancelled"
            return "deadline" if deadline is not None and time.monotonic() >= deadline else None

        def tell(kind: str, value: float | str, number: int = number) -> None:
            _send(out, {"kind": kind, "id": number, kind: value}, {})

        try:
            finding, timings = _review(review, head, arrays, tell, stop)
            fields = asdict(finding)
            arrays = {"token_scores": fields.pop("token_scores")}
            if (mask := fields.pop("mask")) is not None:
                arrays["mask"] = mask.astype(np.uint8)
            del fields["mask_logits"]
            _send(out, {"kind": "finding", "id": number, **fields, "timings_ms": timings}, arrays)
        except Exception as error:  # a fault in one review must not end the next ones
            _send(out, {"kind": "fault", "id": number, "reason": f"{type(error).__name__}: {error}"}, {})
        cancelled.discard(number)


def _review(
    review: Review,
    head: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    tell: Callable[[str, float | str], None],
    stop: Callable[[], str | None],
) -> tuple[Finding, dict[str, float]]:
    watch = Stopwatch()
    features = Features(arrays["patches"], arrays["patches_multi"], View(*head["view"]))
    frame = Frame(arrays["pixels"], str(head["id"]))
    with watch("review"):
        finding = review.run(
            frame,
            features,
            head["question"],
            head["mode"],
            lambda p_yes: tell("p_yes", p_yes),
            lambda text: tell("text", text),
            stop,
            watch,
        )
    return finding, watch.timings_ms


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), cast(Device, sys.argv[2]), Plans(Path(sys.argv[3])))
