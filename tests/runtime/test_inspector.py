"""One frame's way through a bundle of random weights: what holds whatever the weights are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.bundle import BundleError
from vmad_edge.runtime.errors import FrameError, VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Verdict
from vmad_edge.runtime.inspector import Inspector


def image(seed: int, height: int = 60, width: int = 80) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def inspector(tiny_bundle: Path, tmp_path: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, tmp_path / "station", "cpu") as opened:
        yield opened


def test_screen_alone(inspector: Inspector) -> None:
    result = inspector.inspect(image(0), review=False, deadline_ms=60_000)
    assert result.verdict is Verdict.UNCERTAIN  # the tiny bundle has no thresholds
    assert result.compared_with == "normal features"
    assert result.score is not None and np.isfinite(result.score)
    assert result.map is not None and result.map.shape == (60, 80) and np.isfinite(result.map).all()
    assert result.deadline_met is True
    assert result.p_yes is None and result.mask is None and result.explanation is None
    assert {"read", "preprocess", "clip_encoder", "similarity", "map", "screen"} == set(result.timings_ms)


def test_sources_give_the_same(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "part.png"
    Image.fromarray(image(0)).save(path)
    results = [
        inspector.inspect(source, review=False)
        for source in (image(0), path, str(path), path.read_bytes(), Frame.read(path))
    ]
    assert len({result.score for result in results}) == 1
    assert results[1].to_json()["path"] == str(path)


def test_review(inspector: Inspector) -> None:
    result = inspector.inspect(image(0), object="screw", answer="full")
    assert result.language_map is not None and result.language_map.shape == (60, 80)
    assert (result.language_map > 0).all() and (result.language_map < 1).all() and np.ptp(result.language_map) > 0
    assert result.p_yes is not None and result.reason is None
    assert result.decided_by == "review"  # it was UNCERTAIN
    assert result.verdict is (Verdict.DEFECT if result.p_yes >= 0.5 else Verdict.GOOD)
    assert (result.mask is not None) == (result.p_yes >= 0.5)
    assert result.mask is None or result.mask.shape == (60, 80)
    assert {"ltc_projector", "prefill", "decode", "review"} <= set(result.timings_ms)


@pytest.mark.parametrize(
    "question,says", [("why? " * 5000, "the prompt is too long"), ("Is there a <seg>?", "special token")]
)
def test_question_that_cannot_be_asked(inspector: Inspector, question: str, says: str) -> None:
    result = inspector.inspect(image(0), question=question)
    assert result.verdict is Verdict.UNCERTAIN
    assert "review failed" in (result.reason or "") and says in (result.reason or "")
    assert inspector.inspect(image(0)).p_yes is not None  # the next review is none the worse


def test_review_streams_its_text(inspector: Inspector) -> None:
    screened = inspector.inspect(image(0), review=False)
    handle = inspector.review(screened, answer="full")
    streamed = "".join(handle.text())
    assert streamed == (handle.wait().explanation or "")


def test_review_needs_a_screened_frame(inspector: Inspector) -> None:
    with pytest.raises(VmadError, match="without features"):
        inspector.review(inspector.inspect(b"not an image"))


def test_cancelled_review_keeps_the_screens_verdict(inspector: Inspector) -> None:
    inspector.inspect(image(1))  # the models are loaded now
    first = inspector.review(inspector.inspect(image(0), review=False), answer="full")
    second = inspector.review(inspector.inspect(image(0), review=False), answer="full")
    second.cancel()  # while the first is being reviewed, or soon after
    assert first.wait(60).p_yes is not None
    assert second.wait(60).reason in ("the review was stopped: cancelled", None)


def test_review_process_that_dies_is_replaced(inspector: Inspector) -> None:
    inspector.inspect(image(0))
    process = inspector._reviews._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)  # so that the review is surely pending
    handle = inspector.review(inspector.inspect(image(0), review=False))
    process.kill()
    failed = handle.wait(60)
    assert failed.verdict is Verdict.UNCERTAIN
    assert failed.reason == "review failed: the review process ended (exit status -9)"
    assert inspector.inspect(image(0)).p_yes is not None


def test_late_review_is_left_out(inspector: Inspector) -> None:
    inspector.inspect(image(0))
    process = inspector._reviews._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    result = inspector.inspect(image(0), deadline_ms=1500)
    assert time.monotonic() - start < 30
    assert result.verdict is Verdict.UNCERTAIN and result.deadline_met is True
    assert result.reason == "the review did not end in time"


@pytest.mark.parametrize("source", [b"no image", "missing.png", np.zeros((3, 3), np.uint8), np.zeros((8, 900), "u1")])
def test_bad_frame_is_not_inspected(inspector: Inspector, source: NDArray[np.uint8] | bytes | str) -> None:
    result = inspector.inspect(source)
    assert result.verdict is Verdict.NOT_INSPECTED
    assert result.reason and result.score is None and result.map is None


@pytest.mark.parametrize(
    "source,options,error",
    [
        *[(None, {}, TypeError), ([1, 2], {}, TypeError), (image(0), {"bit_depth": "12"}, TypeError)],
        *[(np.zeros((9, 9)), {}, FrameError), (np.zeros((9, 9), np.int64), {}, FrameError)],
        *[(np.zeros((9, 9), np.uint16), {}, FrameError), (np.zeros((9, 9, 2), np.uint8), {}, FrameError)],
        *[(image(0), {"bit_depth": 8}, FrameError), (image(0), {"colour": "grb"}, FrameError)],
    ],
)
def test_what_is_no_frame_raises_at_once(inspector: Inspector, source: Any, options: Any, error: type) -> None:
    with pytest.raises(error):
        inspector.inspect(source, **options)
    with pytest.raises(error):
        inspector.compare_unlabelled([image(0), source], object="other", **options)


def test_late_screen_is_not_inspected(inspector: Inspector) -> None:
    result = inspector.inspect(image(0), deadline_ms=0.001)
    assert result.verdict is Verdict.NOT_INSPECTED and result.deadline_met is False
    assert "missed the deadline" in (result.reason or "") and result.score is None


@pytest.mark.parametrize("fault", ["nan", "exception"])
def test_fault_in_the_screen_is_not_inspected(
    inspector: Inspector, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = inspector._screen._clip_encoder.run

    def broken(inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        if fault == "exception":
            raise RuntimeError("device lost")
        return {name: value * np.float32("nan") for name, value in run(inputs).items()}

    monkeypatch.setattr(inspector._screen._clip_encoder, "run", broken)
    result = inspector.inspect(image(0))
    assert result.verdict is Verdict.NOT_INSPECTED
    assert {"nan": "NaN", "exception": "device lost"}[fault] in (result.reason or "")


def test_enrolled_references_are_found_again(tiny_bundle: Path, tmp_path: Path) -> None:
    with Inspector.open(tiny_bundle, tmp_path, "cpu") as inspector:
        inspector.enroll([image(seed) for seed in range(4)], object="screw")
        unknown = inspector.inspect(image(9), object="nut", review=False)
        assert unknown.compared_with == "normal features"
    with Inspector.open(tiny_bundle, tmp_path, "cpu") as inspector:
        known = inspector.inspect(image(2), object="screw", review=False)
        other = inspector.inspect(image(9), object="screw", review=False)
    assert known.compared_with == "references"
    assert known.verdict is Verdict.GOOD
    assert known.nearest_normal is not None and known.nearest_normal.similarity == pytest.approx(1, abs=1e-5)
    assert other.score is not None and known.score is not None and other.score > known.score + 1e-3


def test_enrolling_nothing_or_a_broken_image_changes_nothing(inspector: Inspector) -> None:
    inspector.enroll([image(seed) for seed in range(3)])
    before = inspector.inspect(image(1), review=False).score
    for frames in ([], [image(5), b"broken"]):
        with pytest.raises(FrameError):
            inspector.enroll(frames)
    assert inspector.inspect(image(1), review=False).score == before


def test_a_few_frames_give_no_thresholds(inspector: Inspector) -> None:
    assert inspector.enroll([image(0), image(1)], keep=False).thresholds is None
    assert inspector.inspect(image(0), review=False).verdict is Verdict.UNCERTAIN
    assert not inspector.station.path.exists()


def test_batch_is_inspected_one_at_a_time(inspector: Inspector) -> None:
    asked: list[int] = []

    def frames() -> Iterator[NDArray[np.uint8]]:
        for seed in range(3):
            asked.append(seed)
            yield image(seed)

    results = inspector.inspect_batch(frames(), review=False)
    first = next(results)
    assert asked == [0] and first.score is not None
    assert len(list(results)) == 2


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Inspector.open(tmp_path)
