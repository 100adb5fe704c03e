"""One frame's way through a bundle of random weights: what holds whatever the weights are."""

from __future__ import annotations

import io
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import CALIBRATION
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime import inspector as inspector_module
from vmad_edge.runtime.bundle import Bundle, BundleError, ReviewRule, Thresholds, seal
from vmad_edge.runtime.errors import FrameError, VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Reason, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.stages.scope import ScopeLimit
from vmad_edge.runtime.stages.similarity import NormalFeatures, References

PART = Path(__file__).parents[2] / "demo/parts/defective/blister_dent.jpg"


def image(seed: int, height: int = 60, width: int = 80) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def with_thresholds(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, as if its maker had found thresholds; every frame lies between them."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("with_thresholds") / "bundle")
    manifest = Bundle.open(folder).manifest
    thresholds = Thresholds(good_below=0, defect_above=2)
    similarity = manifest.similarity.model_copy(update={"thresholds": thresholds})
    seal(folder, manifest.model_copy(update={"similarity": similarity}))
    return folder


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
    assert {"read", "fitness", "preprocess", "clip_encoder", "similarity", "map", "screen"} == set(result.timings_ms)


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
    assert (result.verdict, result.decided_by) == (Verdict.UNCERTAIN, "screen")  # nobody said what P(yes) means
    assert (result.mask is not None) == (result.p_yes >= 0.5)
    assert result.mask is None or result.mask.shape == (60, 80)
    assert {"ltc_projector", "prefill", "decode", "review"} <= set(result.timings_ms)


def test_whose_reviews_settle(with_thresholds: Path, tmp_path: Path) -> None:
    """The maker's, of objects that nobody enrolled or calibrated; a calibrated rule, of its question on its chain."""
    station = tmp_path / "station"

    def settles(inspector: Inspector, object: str, **asked: Any) -> bool:
        screened = inspector.inspect(image(1), object=object, review=False)
        assert screened.verdict is Verdict.UNCERTAIN and screened.reason is None
        after = inspector.review(screened, **asked).wait()
        assert after.p_yes is not None and (after.decided_by == "review") == (after.verdict is not Verdict.UNCERTAIN)
        assert after.decided_by == "screen" or after.verdict is (Verdict.DEFECT if after.p_yes >= 0.5 else Verdict.GOOD)
        return after.decided_by == "review"

    with Inspector.open(with_thresholds, station, "cpu", fallback="bundle") as inspector:
        assert settles(inspector, "nut") and not settles(inspector, "nut", question="Is it whole?")
        assert "a review settles nothing" in inspector.told("nut", question="Is it whole?")
        inspector.enroll([image(seed) for seed in range(3)], object="washer", keep=False)
        inspector.enroll([image(seed) for seed in range(3)], object="screw")
        between = Thresholds(good_below=0, defect_above=2)
        for name in ("washer", "screw"):
            references = inspector.references(name)
            assert references is not None
            references.thresholds, references.scope = between, None
            assert not settles(inspector, name)
        assert "not calibrated: nothing is promised, and a review settles nothing" in inspector.told("screw")
        inspector.compare_unlabelled([image(seed) for seed in range(6)], object="bolt")
        assert not settles(inspector, "bolt")
        bank, asked = inspector.station.bank_hash("screw"), inspector.question("screw")
        rule = ReviewRule(good_below=0.5, defect_above=0.5, question=asked)
        made = CALIBRATION.model_copy(
            update={
                "bundle": inspector.bundle.hash,
                "bank": bank,
                "object": "screw",
                "thresholds": between,
                "review": rule,
                "scope": ScopeLimit(limit=2),
                "device": "cpu",
                "promise": "of screen and review: all",
            }
        )
        inspector.station.save_calibration(made)
    with Inspector.open(with_thresholds, station, "cpu") as inspector:
        assert settles(inspector, "screw") and not settles(inspector, "screw", question="Is it round?")
        assert settles(inspector, "screw", answer="short")
        assert "promised: of screen and review: all (calibrated" in inspector.told("screw")
        alone, other = inspector.told("screw", review=False), inspector.told("screw", question="Is it round?")
        assert "the promise is void: it is of screen and review, this is the screen alone" in alone
        assert f"the promise is void: its review was asked {asked!r}, this one 'Is it round?'" in other
    with Inspector.open(with_thresholds, station, "cpu", stream=10) as inspector:
        assert not settles(inspector, "screw")
        assert "the promise is void" in inspector.told("screw") and "(a stream)" in inspector.told("screw")
    with Inspector.open(with_thresholds, station, "cpu") as inspector:
        inspector.station.save_calibration(made.model_copy(update={"device": "tensorrt"}))
        assert not settles(inspector, "screw")
        assert "the promise is void: it is of device tensorrt, this is cpu" in inspector.told("screw")
        inspector.enroll([image(seed) for seed in range(3)], object="screw", keep=False)
        assert "not calibrated" in inspector.told("screw")


@pytest.mark.parametrize(
    "question,says", [("why? " * 5000, "the prompt is too long"), ("Is there a <seg>?", "special token")]
)
def test_question_that_cannot_be_asked(inspector: Inspector, question: str, says: str) -> None:
    result = inspector.inspect(image(0), question=question)
    assert result.verdict is Verdict.UNCERTAIN
    assert "review failed" in (result.reason or "") and says in (result.reason or "")
    assert inspector.inspect(image(0)).p_yes is not None  # the next review is none the worse


@pytest.mark.parametrize("given", [{"object": 7}, {"object": b"part"}, {"question": 5}, {"frame_id": 7}])
def test_what_is_no_text_raises(inspector: Inspector, given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(given))}: expected text, got (int|bytes)"):
        inspector.inspect(image(0), **given)


@pytest.mark.parametrize("frames", ["parts", b"parts", Path("parts"), Image.new("L", (16, 16)), io.BytesIO(), 5, None])
def test_several_frames_are_wanted_not_one(inspector: Inspector, frames: Any) -> None:
    """A text would be read letter by letter."""
    with pytest.raises(TypeError, match="frames: expected several"):
        inspector.enroll(frames, keep=False)
    with pytest.raises(TypeError, match="frames: expected several"):
        inspector.compare_unlabelled(frames)


def test_a_review_is_of_an_inspection(inspector: Inspector) -> None:
    for thing in (None, 5, image(0)):
        with pytest.raises(TypeError, match="expected an Inspection"):
            inspector.review(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ["long", 3, {1}])
def test_an_answer_mode_that_there_is_not_raises_at_once(inspector: Inspector, answer: Any) -> None:
    with pytest.raises(VmadError, match="expected full or short"):
        inspector.inspect(image(0), answer=answer)
    assert inspector.inspect(image(0)).p_yes is not None


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
    assert second.wait(60).reason_code in (Reason.REVIEW_CANCELLED, None)


def test_review_process_that_dies_is_replaced(inspector: Inspector) -> None:
    inspector.inspect(image(0))
    pid = inspector.review_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # so that the review is surely pending
    handle = inspector.review(inspector.inspect(image(0), review=False))
    os.kill(pid, signal.SIGKILL)
    failed = handle.wait(60)
    assert failed.verdict is Verdict.UNCERTAIN
    assert "review failed: the review process ended with signal 9 (Killed) while it " in (failed.reason or "")
    assert inspector.inspect(image(0)).p_yes is not None


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


def test_a_verdict_that_comes_late_is_none(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder ended in time, and the deadline passed after it."""
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(*arguments: Any) -> Any:
        clock[0] += 1
        return work(*arguments)

    work = inspector_module.screened
    monkeypatch.setattr(inspector_module, "screened", slow)
    result = inspector.inspect(PART, review=False, deadline_ms=500)
    assert (result.verdict, result.deadline_met) == (Verdict.NOT_INSPECTED, False)
    assert result.reason_code is Reason.SCREEN_LATE and result.score is None
    assert inspector.inspect(PART, review=False, deadline_ms=1500).deadline_met is True


@pytest.mark.parametrize("deadline_ms,met", [(None, None), (60_000, True), (0, False)])
def test_what_is_not_inspected_has_its_deadline_too(
    inspector: Inspector, deadline_ms: float | None, met: bool | None
) -> None:
    assert inspector.inspect(b"no image", deadline_ms=deadline_ms).deadline_met is met


@pytest.mark.parametrize("given", ["400", True, b"4", [1], 1j])
def test_a_time_that_is_no_number_raises_at_once(inspector: Inspector, given: Any) -> None:
    screened = inspector.inspect(PART, review=False)
    handle = inspector.review(screened)
    for name, ask in (
        ("deadline_ms", lambda: inspector.inspect(PART, deadline_ms=given)),
        ("deadline_ms", lambda: inspector.review(screened, deadline_ms=given)),
        ("timeout", lambda: handle.wait(given)),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a number, got"):
            ask()


@pytest.mark.parametrize(
    "timeout", [0, -1, float("-inf"), float("nan"), 5e-324, np.float32(0), pytest.param(-(10**400), id="-10**400")]
)
def test_a_wait_that_is_over_returns_what_there_is(inspector: Inspector, timeout: float) -> None:
    handle = inspector.review(inspector.inspect(PART, review=False))
    assert handle.wait(timeout).reason_code in (Reason.REVIEW_LATE, None)
    assert handle.wait(10**400).p_yes is not None  # as long as it takes


@pytest.mark.parametrize("deadline_ms", [float("nan"), float("-inf"), -1.0, 0.0, 5e-324, np.float32(-1)])
def test_a_deadline_that_has_passed_is_missed(inspector: Inspector, deadline_ms: float) -> None:
    assert inspector.inspect(image(0), deadline_ms=deadline_ms).reason_code is Reason.SCREEN_LATE


@pytest.mark.parametrize("deadline_ms", [float("inf"), 1e308, 1e9, np.float32(1e9), np.int64(10**9)])
def test_a_deadline_far_off_is_met(inspector: Inspector, deadline_ms: float) -> None:
    result = inspector.inspect(image(0), deadline_ms=deadline_ms)
    assert result.deadline_met is True and result.p_yes is not None


def test_frames_have_the_given_id(inspector: Inspector) -> None:
    result = inspector.inspect(image(0), review=False, frame_id="trigger 17")
    assert result.to_json()["frame_id"] == result.frame.id == "trigger 17"
    assert inspector.inspect(b"broken", frame_id="trigger 18").frame.id == "trigger 18"


def test_a_closed_inspector_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    with Inspector.open(tiny_bundle, tmp_path, "cpu") as inspector:
        screened = inspector.inspect(image(0), review=False)
    asked: list[Callable[[], object]] = [
        lambda: inspector.inspect(image(0)),
        lambda: inspector.review(screened),
        lambda: inspector.enroll([image(0)]),
        lambda: inspector.compare_unlabelled([image(0)]),
    ]
    for ask in asked:
        with pytest.raises(VmadError, match="closed"):
            ask()


def test_a_bank_that_loads_delays_no_other_object(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    load = inspector.station.load_references

    def slow(object: str, beside: NormalFeatures | None) -> References | None:
        if object == "large":
            begun.set()
            assert go_on.wait(60)
        return load(object, beside)

    monkeypatch.setattr(inspector.station, "load_references", slow)
    with ThreadPoolExecutor() as pool:
        large = [pool.submit(inspector.inspect, image(0), object="large", review=False) for _ in range(2)]
        assert begun.wait(60)
        assert inspector.inspect(image(1), object="small", review=False).score is not None
        assert not any(waiting.done() for waiting in large)
        go_on.set()
        assert len({waiting.result(60).score for waiting in large}) == 1


def test_pictures_for_people_are_made_when_somebody_looks(inspector: Inspector) -> None:
    inspector.enroll([image(seed) for seed in range(4)])
    source = inspector._known[inspector.bundle.manifest.object].source
    assert isinstance(source, References)
    source.frames = tuple(replace(frame, jpegs=(b"no picture",)) for frame in source.frames)
    result = inspector.inspect(image(9), review=False)
    assert result.nearest_normal is not None  # nothing decoded it yet
    with pytest.raises(OSError):
        _ = result.nearest_normal.picture


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Inspector.open(tmp_path)


@pytest.mark.parametrize(
    "given,says",
    [
        ("Screw", r"for 'Screw' with this bundle .*There are: 'screw', 'nut'\. Did you mean 'screw'\?"),
        ("screw ", "Did you mean 'screw'"),
        (" SCREW", "Did you mean 'screw'"),
        ("scerw", "Did you mean 'screw'"),
        ("nuts", r"There are: 'nut', 'screw'\. Did you mean 'nut'"),
        ("Ｎut", "Did you mean 'nut'"),
        ("", r"for '' with this bundle .*There are: .*'nut'.*\. With --fallback"),
        ("bottle", r"There are: '(nut', 'screw|screw', 'nut)'\. With --fallback"),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_an_unknown_name_among_known_ones_is_refused(
    kept: bool, given: str, says: str, inspector: Inspector, tiny_bundle: Path, tmp_path: Path
) -> None:
    known = [image(seed) for seed in range(3)]
    for name in ("nut", "screw"):
        inspector.enroll(known, object=name, keep=kept)
    with pytest.raises(BundleError, match=says):
        inspector.inspect(image(9), object=given, review=False)
    with pytest.raises(BundleError, match=says):
        inspector.about(given)
    for name in (None, inspector.bundle.manifest.object):  # the bundle knows its own
        assert inspector.inspect(image(9), object=name, review=False).compared_with == "normal features"
    assert inspector.inspect(image(9), object="screw", review=False).compared_with == "references"
    with Inspector.open(tiny_bundle, tmp_path / "station", "cpu", fallback="bundle") as allowed:
        for name in ("nut", "screw"):
            allowed.enroll(known, object=name, keep=kept)
        assert allowed.inspect(image(9), object=given, review=False).compared_with == "normal features"


def test_any_name_will_do_where_none_is_known(inspector: Inspector) -> None:
    assert inspector.inspect(image(9), object="nut", review=False).compared_with == "normal features"


def test_an_unknown_fallback_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(VmadError, match="fallback: expected \"bundle\" or None, got 'none'"):
        Inspector.open(tiny_bundle, tmp_path, "cpu", fallback="none")  # type: ignore[arg-type]


def test_relative_paths_are_taken_where_they_were_given(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a service that changes its folder: the bundle for the review's process, the station, the enrolled frames."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here / "parts", elsewhere):
        folder.mkdir(parents=True)
    shutil.copytree(tiny_bundle, here / "bundle")
    for seed in range(3):
        Image.fromarray(image(seed)).save(here / f"parts/{seed}.png")
    monkeypatch.chdir(here)
    with Inspector.open("bundle", "station", "cpu") as inspector:
        inspector.enroll([f"parts/{seed}.png" for seed in range(3)], object="screw")
        monkeypatch.chdir(elsewhere)
        assert inspector.inspect(image(9), object="screw").p_yes is not None
        inspector.enroll([image(seed) for seed in range(3)], object="nut")
        bank = inspector.station.load_references("screw")
    assert list(elsewhere.iterdir()) == []
    assert bank is not None and [frame.path for frame in bank.frames] == [
        str(here / f"parts/{n}.png") for n in range(3)
    ]
    assert [frame.id for frame in bank.frames] == [f"parts/{n}.png" for n in range(3)]
    with Inspector.open(here / "bundle", here / "station", "cpu") as again:
        assert again.station.enrolled() == ["nut", "screw"]


def test_equal_frames_are_enrolled_once(inspector: Inspector, tmp_path: Path) -> None:
    """A frame beside its copy would be no leave-one-out: DEFECT would begin at what is as good as equal."""
    once = inspector.enroll([image(seed) for seed in range(3)], keep=False)
    Image.fromarray(image(1)).save(tmp_path / "copy.bmp")
    twice = inspector.enroll([*(image(seed) for seed in (0, 1, 2, 0, 1, 2)), tmp_path / "copy.bmp"], keep=False)
    assert twice.thresholds == once.thresholds is not None
    np.testing.assert_array_equal(twice.features, once.features)
    assert inspector.enroll([image(0)] * 9, keep=False).thresholds is None
