"""Reviews on their way: what they said before their time was up, and what they never do to the screen."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from examples import MANIFEST
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime import review as review_module
from vmad_edge.runtime.bundle import MAKERS_RULE, Bundle, Manifest, seal
from vmad_edge.runtime.engines import GiveUp
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.engines.openvino import OpenVinoEngine
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Features, Inspection, Reason, Verdict
from vmad_edge.runtime.inspector import Inspector, ReviewHandle
from vmad_edge.runtime.review import PendingReview, ReviewLimits, ReviewProcess
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.systems.vmad import Review
from vmad_edge.runtime.timing import FAR_S, Stopwatch, seconds

DEMO = Path(__file__).parents[2] / "demo"


def test_review_out_of_time_returns_what_it_has() -> None:
    frame = Frame(np.zeros((8, 8, 3), np.uint8), "part.png")
    pending = PendingReview(lambda: None)
    manifest = Manifest.model_validate({**MANIFEST, "files": {}})
    handle = ReviewHandle(Inspection(frame, "part", Verdict.DEFECT, score=0.5), pending, manifest)
    assert handle.wait(0).p_yes is None
    pending._receive({"kind": "p_yes", "id": 1, "p_yes": 0.25}, {})
    pending._receive({"kind": "text", "id": 1, "text": "No. The"}, {})
    pending._receive({"kind": "text", "id": 1, "text": " part"}, {})
    late = handle.wait(0)
    assert (late.p_yes, late.explanation, late.reason) == (0.25, "No. The part", "the review did not end in time")
    assert late.verdict is Verdict.DEFECT and late.mask is None  # a review never turns DEFECT into GOOD


# ---------------------------------------------------------------------------- the fast lane owes the slow one nothing

CAMERA = (1080, 1440)
"""Height and width of a frame whose bytes fill any pipe."""


def camera_frame(seed: int) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize(CAMERA[::-1], Image.Resampling.NEAREST))


@pytest.fixture
def inspector(tiny_bundle: Path, tmp_path: Path) -> Iterator[Inspector]:
    """Its review process has loaded its models."""
    with Inspector.open(tiny_bundle, tmp_path / "station", "cpu") as opened:
        assert opened.inspect(camera_frame(0)).p_yes is not None
        yield opened


def stop(inspector: Inspector) -> int:
    pid = inspector.review_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_a_stopped_review_process_delays_no_screen(inspector: Inspector) -> None:
    pid = stop(inspector)
    with ThreadPoolExecutor() as pool:
        suspects = [pool.submit(inspector.inspect, camera_frame(seed), deadline_ms=3000) for seed in range(3)]
        screens = [inspector.inspect(camera_frame(seed), review=False, deadline_ms=3000) for seed in range(5)]
        assert all(screen.deadline_met for screen in screens)
        late = [suspect.result(60) for suspect in suspects]
    assert {inspection.reason_code for inspection in late} == {Reason.REVIEW_LATE}
    assert all(inspection.verdict is Verdict.UNCERTAIN and inspection.deadline_met is False for inspection in late)
    assert (inspector.review_pid, state(pid)) == (pid, "T")  # it was stopped all the while


def state(pid: int) -> str:
    """T: stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_full_queue_sheds_what_has_a_deadline_and_makes_wait_what_has_none(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review_module, "_SILENCE_S", 600)  # the next test's
    pid = stop(inspector)
    screened = inspector.inspect(camera_frame(0), review=False)
    handles = [inspector.review(screened, deadline_ms=60_000) for _ in range(7)]
    shed = [handle.wait(0).reason_code is Reason.REVIEW_SHED for handle in handles]
    assert shed == [False] * 5 + [True] * 2  # one is being reviewed, four wait
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(inspector.review, screened)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        handles[4].cancel()
        assert handles[4].wait(60).reason_code is Reason.REVIEW_CANCELLED
        handle = waiting.result(60)
    os.kill(pid, signal.SIGCONT)
    assert handle.wait(120).p_yes is not None


def test_a_process_without_a_sign_of_life_is_replaced(inspector: Inspector) -> None:
    pid = stop(inspector)
    failed = inspector.review(inspector.inspect(camera_frame(1), review=False)).wait(60)
    assert failed.reason_code is Reason.REVIEW_FAULT and "no sign of life" in (failed.reason or "")
    assert failed.verdict is Verdict.UNCERTAIN
    assert inspector.inspect(camera_frame(1)).p_yes is not None
    assert inspector.review_pid != pid


def test_a_ctrl_c_of_the_terminal_is_not_the_review_processs(inspector: Inspector) -> None:
    pid = inspector.review_pid
    assert pid is not None and os.getpgid(pid) != os.getpgrp()


# ---------------------------------------------------------------------------- helper threads and what they may raise

# A review process that is not ours: it knows the messages alone.
STUB = """
import json, math, os, signal, sys, time
def tell(*arrays, **head):
    named = {name: (kind, shape) for name, kind, shape, _ in arrays}
    out = sys.stdout.buffer
    out.write(json.dumps({**head, "arrays": named}).encode() + bytes([10]))
    out.write(b"".join(data for *_, data in arrays))
    out.flush()
does = sys.argv[1]
tell(kind="alive", loaded=does != "loads", steps=0)
if does == "stops": os.kill(os.getpid(), signal.SIGSTOP)
if does == "hangs": time.sleep(600)
if does == "computes":
    end = time.monotonic() + 4
    while time.monotonic() < end: pass
while does in ("stands", "loads"):
    tell(kind="alive", loaded=does != "loads", steps=0)
    time.sleep(0.2)
while line := sys.stdin.buffer.readline():
    head = json.loads(line)
    for kind, shape in head["arrays"].values():
        sys.stdin.buffer.read(math.prod(shape) * int(kind[-1]))
    if does == "lies":
        sys.stdout.buffer.write(eval(sys.argv[2]))
        sys.stdout.buffer.flush()
        time.sleep(600)
    said = dict(p_yes=0.25, text="No.", seg_forced=False, stopped=None, timings_ms={})
    tell(("token_scores", "<f4", [4], bytes(16)), kind="finding", id=head["id"], **said)
"""

Stub = Callable[..., ReviewProcess]


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    """Opens a ReviewProcess whose process does what its argument says."""
    opened = []
    bundle = Bundle(tmp_path, "", Manifest.model_validate({**MANIFEST, "files": {}}))

    def open(*does: str, limits: ReviewLimits = ReviewLimits()) -> ReviewProcess:  # noqa: B008
        opened.append(ReviewProcess(bundle, "cpu", Plans(tmp_path), limits))
        opened[-1]._command = [sys.executable, "-c", STUB, *does]
        return opened[-1]

    yield open
    for reviews in opened:
        reviews.close()


def ask(reviews: ReviewProcess) -> PendingReview:
    features = Features(np.zeros((4, 8), np.float32), np.zeros((2, 4, 8), np.float32), View(0, 0, *CAMERA[::-1]))
    return reviews.submit(Frame(camera_frame(0), "part"), features, "?", "short", None)


def planted(*_: object, **__: object) -> NoReturn:
    raise MemoryError("planted")


class NoThread(threading.Thread):
    """The system gives none of its `name`."""

    refused = ""

    def start(self) -> None:
        if self.name == self.refused:
            raise RuntimeError("can't start new thread")
        super().start()


@pytest.mark.parametrize(
    "where,says",
    [
        ("json.loads", "sent what cannot be read: MemoryError: planted"),
        ("PendingReview._receive", "sent what cannot be read: MemoryError: planted"),
        ("json.dumps", "could not be sent: MemoryError: planted"),
        ("_send", "could not be sent: MemoryError: planted"),
        ("subprocess.Popen", "could not be sent: MemoryError: planted"),
        ("ReviewProcess._tell", "could not be sent: MemoryError: planted"),
        ("_work_of", "could not be watched: MemoryError: planted"),
        ("review writer", "gives no thread"),
        ("review read", "cannot be read from: RuntimeError: can't start new thread"),
        ("review watch", "cannot be read from: RuntimeError: can't start new thread"),
    ],
)
def test_what_a_helper_thread_raises_is_a_fault_and_the_next_review_is_none_the_worse(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, where: str, says: str
) -> None:
    reviews = stub("answers")
    with monkeypatch.context() as patch:
        if " " in where:
            patch.setattr(NoThread, "refused", where)
            patch.setattr(threading, "Thread", NoThread)
        else:
            patch.setattr(f"vmad_edge.runtime.review.{where}", planted)
        failed = ask(reviews)
        assert failed.wait(60)
        assert (failed.finding, failed.fault_code) == (None, Reason.REVIEW_FAULT)
        assert says in (failed.fault or "")
        assert list(failed.text()) == []
    well = ask(reviews)
    assert well.wait(60) and well.finding is not None, well.fault


TERABYTES = 1 << 42


@pytest.mark.parametrize(
    "sent,says",
    [
        (b"no message\n", "JSONDecodeError"),
        ('b"[" * 100_000 + bytes([10])', "RecursionError"),
        (b"[]\n", "TypeError"),
        (b"{}\n", "KeyError: 'arrays'"),
        (b'{"arrays": []}\n', "AttributeError"),
        (b'{"arrays": {}}\n', "KeyError: 'kind'"),
        (b'{"kind": "finding", "id": 99, "arrays": {}}\n', "KeyError: 99"),
        (b'{"kind": "finding", "id": [], "arrays": {}}\n', "TypeError"),
        (b'{"kind": "p_yes", "id": 1, "arrays": {}}\n', "KeyError: 'p_yes'"),
        (b'{"kind": "finding", "id": 1, "timings_ms": {}, "arrays": {}}\n', "KeyError"),
        *(
            (f'{{"arrays": {{"mask": {json.dumps(announced)}}}}}\n'.encode(), says)
            for announced, says in [
                (["|u1", [-1, 5]], "at most three lengths"),
                (["|u1", [-1, -5]], "at most three lengths"),
                (["|u1", [1.0]], "at most three lengths"),
                (["|u1", [True]], "at most three lengths"),
                (["|u1", [1] * 65], "at most three lengths"),
                (["|u1", 5], "TypeError"),
                (["|u1", [TERABYTES]], "at most three lengths"),
                (["<f4", [1 << 15, 1 << 15, 1 << 12]], "at most 1073741824 bytes"),
                (["|u1", [0, 1 << 30, 1 << 30, 1 << 30]], "at most three lengths"),
                (["|O", [5]], "expected an array of"),
                (["|S4398046511104", [1]], "expected an array of"),
                (["f4,f4", [1]], "expected an array of"),
                ([[["a", "f4"]], [1]], "expected an array of"),
                ([None, [1]], "expected an array of"),
                ("f4", "expected an array of"),
            ]
        ),
        ('b"x" * (1 << 24)', "a line of at most 16777216 bytes"),
    ],
    ids=lambda given: str(given)[:60],
)
def test_bytes_that_are_no_message_end_the_process(stub: Stub, sent: bytes | str, says: str) -> None:
    """`sent`, or what it says in Python."""
    source = sent if isinstance(sent, str) else repr(sent)
    failed = ask(stub("lies", source))
    assert failed.wait(60) and "sent what cannot be read" in (failed.fault or "") and says in (failed.fault or "")


# In the process: what is planted, and what the inspector hears of it.
@pytest.mark.parametrize(
    "where",
    ["review._receive", "review.Server._show_life", "review.Review", "review.Bundle.open", "review.Server._reviews"],
)
def test_what_a_thread_of_the_process_raises_ends_it(stub: Stub, where: str) -> None:
    reviews = stub()
    reviews._command[1:] = ["-c", PLANTED, where, str(DEMO / "bundle")]
    failed = ask(reviews)
    assert failed.wait(120) and "MemoryError: planted" in (failed.fault or "")


PLANTED = """
import sys
from pathlib import Path
from vmad_edge.runtime import review
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.engines.plans import Plans
folder = Path(sys.argv[2])
hash = Bundle.open(folder).hash
def planted(*_): raise MemoryError("planted")
where = sys.argv[1].split(".")
setattr(getattr(review, where[1]) if where[2:] else review, where[-1], planted)
review.Server().serve(folder, hash, "cpu", Plans(folder))
"""


def test_what_a_review_raises_is_its_fault_alone(stub: Stub) -> None:
    """The process lives on."""
    reviews = stub()
    reviews._command[1:] = ["-c", PLANTED, "review.Review.run", str(DEMO / "bundle")]
    for _ in range(2):
        failed = ask(reviews)
        assert failed.wait(120) and failed.fault == "MemoryError: planted"
        pid = reviews.pid
    assert pid == reviews.pid is not None


@pytest.mark.parametrize(
    "does,says",
    [
        ("stands", "took no step for 1 s"),
        ("loads", "took no step for 2 s"),
        ("stops", "no sign of life for 1.5 s"),
        ("hangs", "no sign of life for 1.5 s"),
        ("computes", None),
    ],
)
def test_a_process_that_stands_still_is_ended_and_one_that_computes_is_not(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, does: str, says: str | None
) -> None:
    """A library that loads may leave Python no turn to say that it lives."""
    monkeypatch.setattr(review_module, "_SILENCE_S", 1.5)
    stall_s = 1 if does == "stands" else 60
    pending = ask(stub(does, limits=ReviewLimits(stall_s=stall_s, loading_s=2)))
    assert pending.wait(120)
    assert (pending.finding is not None) if says is None else (says in (pending.fault or "")), pending.fault


# ---------------------------------------------------------------------------- deadlines


def finding(p_yes: float = 0.25) -> dict[str, Any]:
    said = {"p_yes": p_yes, "text": "No.", "seg_forced": False, "stopped": None, "timings_ms": {}}
    return {"kind": "finding", "id": 1, **said}


P_YES = {"kind": "p_yes", "id": 1, "p_yes": 0.25}
FAULT = {"kind": "fault", "id": 1, "reason": "no"}
SCORES = {"token_scores": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    "screen,own,screens,told,asked,verdict,met,code",
    [
        pytest.param("UNCERTAIN", 1, None, {0.9: finding()}, 5, "GOOD", True, None, id="in time, and asked for late"),
        pytest.param("UNCERTAIN", 1, None, {1.1: finding()}, 5, "UNCERTAIN", False, Reason.REVIEW_LATE, id="late"),
        pytest.param("DEFECT", 1, None, {1.1: finding()}, 5, "DEFECT", False, Reason.REVIEW_LATE, id="late, DEFECT"),
        pytest.param("UNCERTAIN", 1, None, {}, 1.1, "UNCERTAIN", False, Reason.REVIEW_LATE, id="never"),
        pytest.param("UNCERTAIN", 1, None, {}, 0.5, "UNCERTAIN", True, Reason.REVIEW_LATE, id="not yet"),
        pytest.param("UNCERTAIN", 1, None, {0.5: P_YES}, 1.1, "GOOD", False, Reason.REVIEW_LATE, id="the first word"),
        pytest.param("UNCERTAIN", 1, None, {1.1: P_YES}, 1.2, "UNCERTAIN", False, Reason.REVIEW_LATE, id="no word"),
        pytest.param("UNCERTAIN", 1, None, {0.1: FAULT}, 5, "UNCERTAIN", True, Reason.REVIEW_FAULT, id="a fault"),
        pytest.param("UNCERTAIN", 1, None, {1.1: FAULT}, 5, "UNCERTAIN", False, Reason.REVIEW_LATE, id="a late fault"),
        pytest.param(
            "UNCERTAIN", None, 0.4, {4.5: finding()}, 5, "GOOD", False, None, id="after the screen's deadline"
        ),
        pytest.param(
            "UNCERTAIN", None, 0.4, {0.3: finding()}, 5, "GOOD", True, None, id="before the screen's deadline"
        ),
        pytest.param("DEFECT", None, 0.4, {4.5: finding()}, 5, "DEFECT", True, None, id="the screen's verdict stood"),
        pytest.param("UNCERTAIN", 5, 0.4, {4.5: finding()}, 5, "GOOD", True, None, id="a deadline of its own"),
        pytest.param("UNCERTAIN", None, None, {4.5: finding()}, 5, "GOOD", None, None, id="no deadline"),
    ],
)
def test_a_deadline_is_met_by_what_was_there_in_time(
    monkeypatch: pytest.MonkeyPatch,
    screen: str,
    own: float | None,
    screens: float | None,
    told: dict[float, dict[str, Any]],
    asked: float,
    verdict: str,
    met: bool | None,
    code: Reason | None,
) -> None:
    """At these times of the clock."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(PendingReview, "left", lambda *_: 0)
    pending = PendingReview(lambda: None, own)
    in_time = None if screens is None else True
    frame = Frame(np.zeros((8, 8, 3), np.uint8), "part")
    screened = Inspection(
        frame,
        "part",
        Verdict(screen),
        score=0.5,
        deadline=screens,
        deadline_met=in_time,
        review_rule=MAKERS_RULE,
    )
    for clock[0], message in told.items():
        pending._receive(message, SCORES)
    clock[0] = asked
    found = ReviewHandle(screened, pending, Manifest.model_validate({**MANIFEST, "files": {}})).wait()
    assert (found.verdict.value, found.deadline_met, found.reason_code) == (verdict, met, code)


def test_a_review_is_waited_for_until_its_deadline_and_no_longer(stub: Stub) -> None:
    reviews = stub("stands")
    frame = Frame(camera_frame(0), "part")
    features = Features(np.zeros((4, 8), np.float32), np.zeros((2, 4, 8), np.float32), View(0, 0, *CAMERA[::-1]))
    pending = reviews.submit(frame, features, "?", "short", time.monotonic() + 0.3)
    handle = ReviewHandle(
        Inspection(frame, "part", Verdict.UNCERTAIN), pending, Manifest.model_validate({**MANIFEST, "files": {}})
    )
    assert list(handle.text()) == []
    found = handle.wait()
    assert (found.reason_code, found.deadline_met) == (Reason.REVIEW_LATE, False)
    assert not pending.wait(0)


def test_a_review_whose_time_is_up_in_between_is_not_lost(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = stub("stands")
    asked = [ask(reviews) for _ in range(4)]
    times = itertools.cycle([False, True])
    monkeypatch.setattr(review_module._Job, "expired", property(lambda job: next(times)))
    with reviews._changed:
        reviews._behind()
        on_their_way = [job.pending for job in reviews._waiting]
        on_their_way += [] if reviews._child is None else reviews._child.sent.values()
    assert all(review in on_their_way or review.wait(0) for review in asked)


@pytest.mark.parametrize(
    "given,expected",
    [
        *[(0, 0.0), (-1, 0.0), (1.5, 0.0015), (np.float32(2), 0.002), (np.int64(3), 0.003), (np.float16(4), 0.004)],
        *[(5e-324, 0.0), (-5e-324, 0.0), (1e308, FAR_S), (math.inf, FAR_S), (-math.inf, 0.0), (math.nan, 0.0)],
        *[(10**400, FAR_S), (-(10**400), 0.0), (Fraction(1, 2), 0.0005), (Fraction(10**400), FAR_S)],
        *[(np.float32("nan"), 0.0), (np.float64("inf"), FAR_S)],
        *[(given, None) for given in (True, np.True_, "400", b"4", 1j, [1], np.zeros(1), {}, Decimal(1))],
    ],
)
def test_any_number_is_a_time(given: Any, expected: float | None) -> None:
    if expected is not None:
        assert seconds("timeout", given, 1e3) == pytest.approx(expected, rel=1e-12)
    else:
        with pytest.raises(TypeError, match="timeout: expected a number, got"):
            seconds("timeout", given, 1e3)


def test_a_review_is_of_the_bundle_that_screened(tiny_bundle: Path, tmp_path: Path) -> None:
    """A folder that is replaced before the review's process opens it."""
    folder, frame = tmp_path / "bundle", camera_frame(0)
    shutil.copytree(tiny_bundle, folder)
    with Inspector.open(folder, tmp_path / "station", "cpu") as inspector:
        manifest = inspector.bundle.for_review
        template = manifest.conversation.template.replace("USER", "YOU")
        other = manifest.conversation.model_copy(update={"template": template})
        seal(folder, manifest.model_copy(update={"conversation": other}))
        refused = inspector.inspect(frame)
        assert (refused.verdict, refused.p_yes, refused.reason_code) == (Verdict.UNCERTAIN, None, Reason.REVIEW_FAULT)
        assert f"another bundle by now: expected {inspector.bundle.hash[:16]}…" in (refused.reason or "")
        seal(folder, manifest)
        assert inspector.inspect(frame).p_yes is not None


# ---------------------------------------------------------------------------- SAM's encoder is given up


@pytest.fixture
def slow_graph(tmp_path: Path) -> Path:
    """Many products of 1024×1024: about a minute of one core."""
    steps = 2000
    weights = onnx.numpy_helper.from_array(np.eye(1024, dtype=np.float32), "w")
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", "w"], [f"x{i + 1}"]) for i in range(steps)]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1024, 1024]) for name in ("x0", f"x{steps}")
    ]
    graph = onnx.helper.make_graph(nodes, "slow", ends[:1], ends[1:], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "slow.onnx")
    return tmp_path / "slow.onnx"


@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_run_that_is_given_up_ends(slow_graph: Path, engine: type[OnnxRuntimeEngine], when: str) -> None:
    opened, give_up, begun = engine(slow_graph), GiveUp(), threading.Event()
    give_up.on_call(begun.set)
    if when == "before":
        give_up()
    inputs = {"x0": np.random.default_rng(0).random((1024, 1024), np.float32)}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(opened.run, inputs, give_up)
        if when == "during":
            with pytest.raises(TimeoutError):
                running.result(0.3)
            give_up()
        with pytest.raises(Exception, match=r"(?i)terminat|cancel"):
            running.result(600)
    assert begun.is_set()


class SlowSam:
    """Runs until it is given up."""

    def __init__(self) -> None:
        self.ended = 0

    def __call__(self, frame: Frame, give_up: GiveUp) -> NDArray[np.float32]:
        gone = threading.Event()
        give_up.on_call(gone.set)
        assert gone.wait(120)
        self.ended += 1
        raise RuntimeError("given up")


@pytest.mark.parametrize(
    "p_yes,reason,stopped", [(0.1, None, None), (0.9, "deadline", "deadline"), (0.9, "cancelled", "cancelled")]
)
def test_sam_is_given_up_where_no_mask_will_come(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, p_yes: float, reason: str | None, stopped: str | None
) -> None:
    """After a No, a deadline, a cancel; and the next review finds it free."""
    review, sam = Review(bundle, "cpu"), SlowSam()
    review._sam_encoder = sam
    monkeypatch.setattr(review._language, "_p_yes", lambda: p_yes)
    manifest = bundle.for_review
    grid, width = manifest.vision.grid, manifest.vision.width
    patches = np.random.default_rng(0).random((1 + len(manifest.vision.levels), grid * grid, width), np.float32)
    features = Features(patches[0], patches[1:], View(0, 0, *CAMERA[::-1]))
    frame, answered = Frame(camera_frame(0), "part"), threading.Event()
    for turn in (1, 2):
        answered.clear()
        watch = Stopwatch()
        found = review.run(
            frame,
            features,
            "Is it broken?",
            "short",
            lambda _: answered.set(),
            lambda _: None,
            lambda: reason if answered.is_set() else None,
            watch,
        )
        assert (found.mask, found.stopped) == (None, stopped)
        assert "sam_encoder" not in watch.timings_ms
        review._beside.submit(lambda: None).result(60)
        assert sam.ended == turn
    review.close()
