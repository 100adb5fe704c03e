"""Reviews run in a process of their own, with lower priority, so that they cannot disturb the screen.

The process is started as `python -m vmad_edge.runtime.review_process` (see there), and takes no bundle of another hash.
Messages go through its standard input and output. A message is one line of JSON, {"kind", …, "arrays": {name: [dtype,
shape]}}, then the arrays' bytes.

    to the process    review (id, question, mode, deadline, view; pixels, patches, patches_multi)   cancel (id)
    from the process  alive (loaded, steps)   broken (reason)
                      p_yes (id, p_yes)   text (id, text)   finding (id, …; token_scores, mask)   fault (id, reason)

The inspector's side has three threads. One starts the process and writes to it, one reads from it, one watches over it.
Whoever asks for a review only puts it into a queue: no lock is held while anything is written, loaded or waited for.
Whatever is raised in one of these threads, or in one of the process's, ends the process, and with it what it was sent.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from vmad_edge.runtime.bundle import Answer, Bundle
from vmad_edge.runtime.engines import Device, Stopped
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Features, Reason
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.systems.vmad import Finding, Review
from vmad_edge.runtime.timing import Stopwatch

Message = tuple[dict[str, Any], dict[str, NDArray[Any]]]
Packed = Sequence[bytes | memoryview]
"""A message as it is written."""
Milestone = Literal["P(yes)", "last word", "mask"]
_NICENESS = 10
_END_OF_TEXT = None
_HEARTBEAT_S = 1.0
_SILENCE_S = 5.0
_LONGEST_BACK_OFF_S = 30.0
_MOST_LIKELY: dict[int, str] = {
    signal.SIGKILL: "the system ends so what takes too much memory. Free some, or export a smaller --llm",
    signal.SIGTERM: "somebody ended it",
}
_DAMAGED = (
    "llama.cpp ends so, or ONNX Runtime, at a file that it cannot use, most often llm.gguf. Export the bundle again"
)
_TO_END_S = 5.0
_LONGEST_HEAD = 1 << 24
_TYPES = tuple(np.dtype(kind).str for kind in (np.uint8, np.float32))
_LARGEST_ARRAY = 1 << 30
"""Bytes: the largest frame has 450 MB."""
_WHY = {"cancelled": Reason.REVIEW_CANCELLED, "deadline": Reason.REVIEW_LATE}


@dataclass(frozen=True)
class ReviewLimits:
    """How much a review may wait, and how long its process may stand still before it is replaced."""

    queue: int = 4
    """Reviews that wait behind the running one. One more with a deadline is shed, one without waits for room."""
    stall_s: float = 120.0
    """Without a step: an encoder's run, a batch of the prompt, a token."""
    loading_s: float = 900.0
    """For loading the models."""


class PendingReview:
    """A review on its way. `text()` streams the answer; `wait` returns when it ended; `so_far` is what came yet.

    What comes after `deadline`, a time.monotonic() value, is left out.
    """

    def __init__(self, cancel: Callable[[], None], deadline: float | None = None) -> None:
        self.deadline = deadline
        self.ended_at = math.inf
        """A time.monotonic() value."""
        self.finding: Finding | None = None
        self.fault: str | None = None
        self.fault_code: Reason | None = None
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
        """Ask it to stop before its next step; it then ends with a finding that says `stopped`, or a fault."""
        self._cancel()

    def text(self) -> Iterator[str]:
        """Pieces of the answer as they are decoded, until the review ends or its time is up. For one reader."""
        with suppress(queue.Empty):
            while (piece := self._texts.get(timeout=self.left())) is not _END_OF_TEXT:
                yield piece

    def left(self, timeout: float | None = None) -> float | None:
        """Seconds to wait until the deadline, `timeout` at most; None: for as long as it takes."""
        until = [] if self.deadline is None else [max(0.0, self.deadline - time.monotonic())]
        return min([*until, *([] if timeout is None else [timeout])], default=None)

    def _fail(self, code: Reason, fault: str) -> None:
        self.fault, self.fault_code = fault, code
        self._end()

    def _end(self) -> None:
        self.ended_at = time.monotonic()
        self._texts.put(_END_OF_TEXT)
        self._ended.set()

    def _receive(self, head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        now = (time.perf_counter() - self._start) * 1e3
        if self.deadline is not None and time.monotonic() >= self.deadline:
            if head["kind"] in ("finding", "fault"):
                self._fail(Reason.REVIEW_LATE, "deadline")
        elif head["kind"] == "p_yes":
            self.reached_ms["P(yes)"] = now
            self.so_far = Finding(head["p_yes"], "", None, seg_forced=False, stopped="deadline")
        elif head["kind"] == "text":
            self.reached_ms["last word"] = now
            if self.so_far is not None:
                self.so_far = replace(self.so_far, text=self.so_far.text + head["text"])
            self._texts.put(head["text"])
        elif head["kind"] == "fault":
            self._fail(_WHY.get(head["reason"], Reason.REVIEW_FAULT), head["reason"])
        else:
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
            self._end()


@dataclass(frozen=True)
class _Job:
    number: int
    pending: PendingReview
    message: Packed

    @property
    def expired(self) -> bool:
        return self.pending.deadline is not None and time.monotonic() >= self.pending.deadline


@dataclass
class _Child:
    """One life of the process, as the inspector's side knows it."""

    process: subprocess.Popen[bytes]
    sent: dict[int, PendingReview] = field(default_factory=dict)
    heard: int = 0
    """Messages until now."""
    steps: int = 0
    """The last that it told of its own."""
    loaded: bool = False
    reason: str | None = None
    """Why it ends, where that is known."""
    ended: threading.Event = field(default_factory=threading.Event)

    def kill(self, reason: str) -> None:
        self.reason = reason
        self.process.kill()  # it holds nothing to save, and a stopped process heeds no SIGTERM

    def why(self) -> str:
        """Why it ended, for people."""
        status = self.process.returncode
        if self.reason is not None or status >= 0:
            return f"{self.reason or 'the review process ended'} (exit status {status})"
        doing = "reviewed" if self.loaded else "loaded the bundle's models"
        cause = _MOST_LIKELY.get(-status, _DAMAGED)
        return f"the review process ended with signal {-status} ({signal.strsignal(-status)}) while it {doing}: {cause}"


class ReviewProcess:
    """The inspector's side: starts the process, sends it reviews, hands its messages to their PendingReview.

    Thread-safe, and no call but `submit` of a review without a deadline waits for anything. A process that ended or
    stands still faults the reviews that it was sent; the next one starts after a pause that doubles with each failure.
    """

    def __init__(self, bundle: Bundle, device: Device, plans: Plans, limits: ReviewLimits) -> None:
        self._own_pid = os.getpid()
        arguments = [str(self._own_pid), str(bundle.path), bundle.hash, device, str(plans.folder)]
        self._command = [sys.executable, "-m", "vmad_edge.runtime.review_process", *arguments]
        self._limits = limits
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._cancels: deque[int] = deque()
        self._child: _Child | None = None
        self._wanted = self._closed = False
        self._writer: threading.Thread | None = None
        self._numbers = itertools.count(1)
        self._failures = 0

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        child = self._child
        return None if child is None else child.process.pid

    def start(self) -> None:
        """Have the models loaded, if that has not begun; returns at once."""
        with self._changed:
            self._wanted = True
            if self._writer is None:
                writer = threading.Thread(target=self._write, daemon=True, name="review writer")
                with suppress(RuntimeError, MemoryError):  # the system has no thread left: `submit` says so
                    writer.start()
                    self._writer = writer
            self._changed.notify_all()

    def submit(
        self, frame: Frame, features: Features, question: str, mode: Answer, deadline: float | None
    ) -> PendingReview:
        """Queue one review. With a full queue it is shed if it has a deadline, else this waits for room.

        Args:
            deadline: a time.monotonic() value at which it stops by itself.
        """
        self.start()
        number = next(self._numbers)
        pending = PendingReview(lambda: self._cancel(number), deadline)
        head: dict[str, Any] = {"kind": "review", "question": question, "mode": mode, "deadline": deadline}
        head |= {"id": number, "view": astuple(features.view)}
        arrays: dict[str, NDArray[Any]] = {
            "pixels": frame.pixels,
            "patches": features.patches,
            "patches_multi": features.patches_multi,
        }
        try:
            job = _Job(number, pending, _packed(head, arrays))
        except Exception as error:
            pending._fail(Reason.REVIEW_FAULT, f"the review could not be sent: {_in_words(error)}")
            return pending
        with self._changed:
            while not self._closed and self._behind() >= self._limits.queue:
                if deadline is not None:
                    pending._fail(Reason.REVIEW_SHED, f"{self._limits.queue} reviews wait already")
                    return pending
                self._changed.wait()
            if self._closed:
                pending._fail(Reason.REVIEW_CANCELLED, "the inspector was closed")
            elif self._writer is None:
                pending._fail(Reason.REVIEW_FAULT, "the system gives no thread to start the review process from")
            else:
                self._waiting.append(job)
            self._changed.notify_all()
        return pending

    def close(self) -> None:
        """End the process; reviews on their way get a fault. Does nothing in a fork of the process that opened it."""
        if os.getpid() != self._own_pid:
            return
        with self._changed:
            self._closed = True
            left = self._take_waiting(lambda job: True)
            child = self._child
            self._changed.notify_all()
        if child is not None:
            child.kill("the inspector was closed")
            with suppress(subprocess.TimeoutExpired):  # what waits for a dead disk dies with that
                child.process.wait(_TO_END_S)
        for job in left:
            job.pending._fail(Reason.REVIEW_CANCELLED, "the inspector was closed")

    # ------------------------------------------------------------------------ under the lock, and quick

    def _behind(self) -> int:
        """Reviews that wait behind the running one; those whose time is up make room."""
        for job in self._take_waiting(lambda job: job.expired):
            job.pending._fail(Reason.REVIEW_LATE, "deadline")
        sent = 0 if self._child is None else len(self._child.sent)
        return max(0, len(self._waiting) + sent - 1)

    def _take_waiting(self, which: Callable[[_Job], bool]) -> list[_Job]:
        taken = [job for job in self._waiting if which(job)]  # asked once: time goes on
        numbers = {job.number for job in taken}
        self._waiting = deque(job for job in self._waiting if job.number not in numbers)
        return taken

    # ------------------------------------------------------------------------ threads

    def _cancel(self, number: int) -> None:
        with self._changed:
            waiting = self._take_waiting(lambda job: job.number == number)
            if not waiting:
                self._cancels.append(number)
            self._changed.notify_all()
        for job in waiting:
            job.pending._fail(Reason.REVIEW_CANCELLED, "cancelled")

    def _write(self) -> None:
        """Until `close`."""
        while not self._closed:
            self._turn()

    def _turn(self) -> None:
        """Start the process or write to it; what went wrong ends it."""
        try:
            child = self._next()
            if child is None:
                self._begin()
            else:
                self._tell(child)
        except Exception as error:
            child, why = self._child, f"the review could not be sent: {_in_words(error)}"
            if child is None:
                self._ended(None, why)
            elif isinstance(error, OSError | ValueError):
                child.process.kill()  # mostly it just ended, and its reader knows better why
            else:
                child.kill(why)  # its reader faults what it was sent; half a message is no beginning for the next one

    def _next(self) -> _Child | None:
        """Waits until there is something to do: for a process, or to start one."""
        with self._changed:
            while not (self._closed or self._to_do()):
                self._changed.wait()
            return self._child

    def _tell(self, child: _Child) -> None:
        """Write to the process what there is. It has one review ahead of the running one."""
        job = None
        with self._changed:
            cancels = [number for number in self._cancels if number in child.sent]
            self._cancels.clear()
            if self._waiting and len(child.sent) < 2:
                job = self._waiting[0]
                child.sent[job.number] = job.pending
                self._waiting.popleft()
        stream = cast(IO[bytes], child.process.stdin)
        for number in cancels:
            _send(stream, _packed({"kind": "cancel", "id": number}, {}))
        if job is not None:
            _send(stream, job.message)

    def _to_do(self) -> bool:
        if self._child is None:
            return self._wanted or bool(self._waiting)
        return bool(self._cancels) or (bool(self._waiting) and len(self._child.sent) < 2)

    def _begin(self) -> None:
        """Start the process, after a pause if the last ones failed."""
        pause = min(_LONGEST_BACK_OFF_S, 0.5 * 2 ** (self._failures - 1)) if self._failures else 0.0
        until = time.monotonic() + pause
        with self._changed:
            while not self._closed and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._closed:
                return
        try:
            # Without PYTHONSAFEPATH `-m` looks for modules in the working directory first.
            own = {**os.environ, "PYTHONSAFEPATH": "1"}
            # In a session of its own: a Ctrl-C is meant for whoever waits for the review.
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own, start_new_session=True
            )
        except OSError as error:
            self._ended(None, f"the review process cannot be started ({error.strerror})")
            return
        child = _Child(process)
        with self._changed:
            self._child, self._wanted, closed = child, False, self._closed
        try:
            for work in (self._watch, self._read):
                threading.Thread(target=work, args=(child,), daemon=True, name=f"review {work.__name__[1:]}").start()
        except Exception as error:
            child.reason = f"the review process cannot be read from: {_in_words(error)}"
            self._bury(child)
        if closed:
            child.kill("the inspector was closed")

    def _read(self, child: _Child) -> None:
        try:
            while (message := _receive(cast(IO[bytes], child.process.stdout))) is not None:
                self._heard(child, *message)
        except Exception as error:  # a message that is none: whatever sent it is not to be trusted with the next one
            child.kill(f"the review process sent what cannot be read: {_in_words(error)}")
        finally:
            self._bury(child)

    def _bury(self, child: _Child) -> None:
        """End the process if it has not ended, and fault what it was sent."""
        child.process.kill()
        child.process.wait()
        child.ended.set()
        for stream in (child.process.stdin, child.process.stdout):
            with suppress(OSError, ValueError):
                cast(IO[bytes], stream).close()
        self._ended(child, child.why())

    def _heard(self, child: _Child, head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        child.heard += 1
        if head["kind"] == "alive":
            child.steps, child.loaded = head["steps"], head["loaded"]
        elif head["kind"] == "broken":
            child.reason = head["reason"]
        else:
            review = child.sent[head["id"]]
            review._receive(head, arrays)
            if head["kind"] in ("finding", "fault"):
                with self._changed:
                    del child.sent[head["id"]]
                    self._failures = 0
                    self._changed.notify_all()

    def _ended(self, child: _Child | None, reason: str) -> None:
        """After a process that closed, died, was killed or never came: all that was sent to it failed.

        What could not even be started, or broke while it loaded, fails what waits too: the next one would do the same.
        """
        with self._changed:
            left = [] if child is None else list(child.sent.values())
            if child is None or not child.loaded:
                left += [job.pending for job in self._take_waiting(lambda job: True)]
            self._child, self._wanted = None, False
            self._failures += 1
            self._changed.notify_all()
        for review in left:
            review._fail(Reason.REVIEW_CANCELLED if self._closed else Reason.REVIEW_FAULT, reason)

    def _watch(self, child: _Child) -> None:
        try:
            self._watch_over(child)
        except Exception as error:
            child.kill(f"the review process could not be watched: {_in_words(error)}")

    def _watch_over(self, child: _Child) -> None:
        """Kill a process that shows no sign of life, or takes no step.

        Its messages are signs of life; and while a library that loads leaves Python no turn to send them, its work.
        Time is counted in turns of this thread: where the whole machine stood still, nobody is to blame.
        """
        turn = 0.5
        silent = still = 0.0
        signs, steps, busy = (child.heard, _work_of(child.process.pid)), 0, True
        while not child.ended.wait(turn):
            silent = 0.0 if signs != (signs := (child.heard, _work_of(child.process.pid))) else silent + turn
            moved = child.steps != steps or busy != (busy := bool(child.sent) or not child.loaded)
            still = 0.0 if moved or not busy else still + turn
            steps = child.steps
            limit = self._limits.stall_s if child.loaded else self._limits.loading_s
            if silent >= _SILENCE_S:
                child.kill(f"the review process gave no sign of life for {_SILENCE_S:g} s and was ended")
            elif still >= limit:
                child.kill(f"the review process took no step for {limit:g} s and was ended")


def _work_of(process: int) -> list[bytes]:
    """Its page faults that read from a disk, and its processor time: a stopped or hung process has no more of them."""
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:  # it ended
        return []
    fields = stat.rpartition(b")")[2].split()  # from the third, `state`, on
    return [fields[number - 3] for number in (12, 14, 15)]  # majflt, utime, stime


def _packed(head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Packed:
    """Before the first byte is written: whatever can go wrong with a message itself goes wrong here.

    Raises:
        ValueError: a head that the other side would refuse.
    """
    described = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    line = json.dumps({**head, "arrays": described}).encode() + b"\n"
    if len(line) > _LONGEST_HEAD:
        raise ValueError(f"expected at most {_LONGEST_HEAD} bytes beside the arrays, got {len(line)}")
    return [line, *(np.ascontiguousarray(array).data for array in arrays.values())]


def _send(stream: IO[bytes], message: Packed) -> None:
    for part in message:
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> Message | None:
    """The next message, or None when the other side closed.

    Raises:
        Exception: whatever comes of bytes that are no message. Nothing larger than the limits is allocated.
    """
    line = stream.readline(_LONGEST_HEAD)
    if not line.endswith(b"\n"):
        if len(line) == _LONGEST_HEAD:
            raise ValueError(f"expected a line of at most {_LONGEST_HEAD} bytes")
        return None
    head = json.loads(line)
    arrays = {}
    for name, (dtype, shape) in head.pop("arrays").items():
        size = _size(dtype, shape)
        data = stream.read(size)
        if len(data) != size:
            return None
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return head, arrays


def _size(dtype: Any, shape: Any) -> int:
    """Bytes of an array that a message announces.

    Raises:
        TypeError, ValueError: no array, or a larger one, that a message has.
    """
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise ValueError(f"expected an array of {' or '.join(_TYPES)}, got {dtype!r}")
    if len(shape) > 3 or not all(type(length) is int and 0 <= length <= _LARGEST_ARRAY for length in shape):
        raise ValueError(f"expected a shape of at most three lengths, got {shape}")
    size: int = math.prod(shape) * np.dtype(dtype).itemsize
    if size > _LARGEST_ARRAY:
        raise ValueError(f"expected an array of at most {_LARGEST_ARRAY} bytes, got {dtype} of {shape}")
    return size


class Server:
    """The process's side: it listens and shows that it lives from the start, loads the models, then reviews in turn."""

    def __init__(self) -> None:
        # Standard output carries messages alone; whatever a library prints goes to standard error.
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._sending = threading.Lock()
        self._work: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._steps, self._loaded = 0, False

    def serve(self, bundle: Path, hash: str, device: Device, plans: Plans) -> None:
        """Until the inspector closes or something breaks; the process ends then."""
        os.nice(_NICENESS)
        for work in (self._listen, self._live):
            threading.Thread(target=self._to_the_end, args=(work,), daemon=True).start()
        self._to_the_end(lambda: self._reviews(bundle, hash, device, plans))

    def _to_the_end(self, work: Callable[[], None]) -> None:
        """Do `work`. The process ends with it: nobody would listen, show life or review any more."""
        try:
            work()
        except BaseException as error:
            self._send({"kind": "broken", "reason": _in_words(error)})
        finally:
            os._exit(0)  # what still runs would keep Python from its end

    def _reviews(self, bundle: Path, hash: str, device: Device, plans: Plans) -> None:
        review = Review(Bundle.open(bundle, hash), device, plans)
        self._loaded = True
        self._show_life()
        while True:
            head, arrays = self._work.get()
            try:
                self._review(review, head, arrays)
            except Stopped as stopped:
                self._send({"kind": "fault", "id": head["id"], "reason": str(stopped)})
            except Exception as error:  # a fault in one review must not end the next ones
                self._send({"kind": "fault", "id": head["id"], "reason": _in_words(error)})
            self._cancelled.discard(head["id"])

    def _listen(self) -> None:
        while (message := _receive(sys.stdin.buffer)) is not None:
            if message[0]["kind"] == "cancel":
                self._cancelled.add(message[0]["id"])
            else:
                self._work.put(message)

    def _live(self) -> None:
        while True:
            self._show_life()
            time.sleep(_HEARTBEAT_S)

    def _show_life(self) -> None:
        self._send({"kind": "alive", "loaded": self._loaded, "steps": self._steps})

    def _send(self, head: dict[str, Any], arrays: dict[str, NDArray[Any]] | None = None) -> None:
        message = _packed(head, arrays or {})
        with self._sending:
            try:
                _send(self._out, message)
            except BaseException:
                os._exit(1)  # nobody reads, or half a message was written: none can follow it

    def _review(self, review: Review, head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        number, deadline = head["id"], head["deadline"]

        def stop() -> str | None:
            if number in self._cancelled:
                return "cancelled"
            return "deadline" if deadline is not None and time.monotonic() >= deadline else None

        def step() -> None:
            self._steps += 1

        step()
        if reason := stop():
            raise Stopped(reason)
        watch = Stopwatch()
        with watch("review"):
            finding = review.run(
                Frame(arrays["pixels"], str(number)),
                Features(arrays["patches"], arrays["patches_multi"], View(*head["view"])),
                head["question"],
                head["mode"],
                lambda p_yes: self._send({"kind": "p_yes", "id": number, "p_yes": p_yes}),
                lambda text: self._send({"kind": "text", "id": number, "text": text}),
                stop,
                watch,
                step,
            )
        said = {name: getattr(finding, name) for name in ("p_yes", "text", "seg_forced", "stopped")}
        found: dict[str, NDArray[Any]] = {"token_scores": cast(NDArray[np.float32], finding.token_scores)}
        if finding.mask is not None:
            found["mask"] = finding.mask.view(np.uint8)
        self._send({"kind": "finding", "id": number, **said, "timings_ms": watch.timings_ms}, found)


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, VmadError) else f"{type(error).__name__}: {error}"
