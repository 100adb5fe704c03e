"""Reviews on their way: what they said before their time was up, and what they never do to the screen."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from examples import MANIFEST
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime import review as review_module
from vmad_edge.runtime.bundle import Bundle, Manifest, seal
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
from vmad_edge.runtime.timing import Stopwatch


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
    return np.asarray(Image.fromarray(small).resize(CAMERA[::-1], Image.Resampling.BICUBIC))


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


def test_a_full_queue_sheds_what_has_a_deadline_and_makes_wait_what_has_none(inspector: Inspector) -> None:
    stop(inspector)
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
    assert handle.wait(120).p_yes is not None  # the stopped process was replaced meanwhile


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


def test_what_cannot_be_sent_is_a_fault_and_the_next_review_is_none_the_worse(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no room")

    screened = inspector.inspect(camera_frame(0), review=False)
    with monkeypatch.context() as patch:
        patch.setattr(review_module, "_send", full)
        failed = inspector.review(screened).wait(60)
    assert failed.reason_code is Reason.REVIEW_FAULT and "MemoryError: no room" in (failed.reason or "")
    assert inspector.review(screened).wait(60).p_yes is not None


STUB = """
import json, sys, threading, time
def tell(**head): sys.stdout.write(json.dumps({**head, "arrays": {}}) + chr(10)); sys.stdout.flush()
loaded = sys.argv[1] == "hangs"
if sys.argv[1] == "lies": print("no message"); time.sleep(60)
while True: tell(kind="alive", loaded=loaded, steps=0); time.sleep(0.2)
"""


@pytest.mark.parametrize(
    "does,says",
    [
        ("hangs", "took no step for 1 s"),
        ("loads", "took no step for 2 s"),
        ("lies", "sent what cannot be read"),
    ],
)
def test_a_process_that_stands_still_or_lies_is_ended(tmp_path: Path, does: str, says: str) -> None:
    """Its reviews end with a fault, and closing waits for nothing."""
    limits = ReviewLimits(stall_s=1, loading_s=2)
    bundle = Bundle(tmp_path, "", Manifest.model_validate({**MANIFEST, "files": {}}))
    reviews = ReviewProcess(bundle, "cpu", Plans(tmp_path), limits)
    reviews._command = [sys.executable, "-c", STUB, does]
    features = Features(np.zeros((4, 8), np.float32), np.zeros((2, 4, 8), np.float32), View(0, 0, *CAMERA[::-1]))
    try:
        pending = reviews.submit(Frame(camera_frame(0), "part"), features, "?", "short", None)
        assert pending.wait(60) and says in (pending.fault or "")
    finally:
        reviews.close()


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
