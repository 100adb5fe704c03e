from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from examples import MANIFEST
from plain_parts import plain_part
from scipy.stats import beta, binom, norm
from sklearn.model_selection import PredefinedSplit

from vmad_edge.runtime import calibrate as calibrate_module
from vmad_edge.runtime.bundle import Bundle, Manifest, Thresholds, seal
from vmad_edge.runtime.calibrate import (
    Targets,
    at_most,
    calibrate,
    cross_validated,
    fitted,
    frames_needed,
    from_good,
    from_labels,
    largest_share,
)
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.errors import BundleError, FrameError, VmadError
from vmad_edge.runtime.files import sha256
from vmad_edge.runtime.inspection import Inspection, Verdict, verdict_of
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.station import Calibration, CalibrationFrame, Station


@pytest.mark.parametrize(
    "count,total,share", [(0, 10, 0.1), (3, 40, 0.02), (40, 40, 0.5), (7, 2000, 0.005), (2, 5, 0.0)]
)
def test_binomial(count: int, total: int, share: float) -> None:
    assert at_most(count, total, share) == pytest.approx(binom.cdf(count, total, share), rel=1e-9)


@pytest.mark.parametrize("count,total", [(0, 30), (1, 30), (29, 30), (5, 700)])
def test_clopper_pearson(count: int, total: int) -> None:
    assert largest_share(count, total, 0.95) == pytest.approx(beta.ppf(0.95, count + 1, total - count), abs=1e-8)


def test_everything_seen_bounds_nothing() -> None:
    assert largest_share(3, 3, 0.95) == 1


def frame(
    score: float, defective: bool = False, p_yes: float | None = None, distance: float | None = None
) -> CalibrationFrame:
    return CalibrationFrame(
        path="a.png", sha256="00", defective=defective, score=score, p_yes=p_yes, scope_distance=distance
    )


def good_of(scores: Iterable[float]) -> list[CalibrationFrame]:
    return [frame(score) for score in scores]


def labelled(good: Iterable[float], defective: Iterable[float]) -> list[CalibrationFrame]:
    return [*good_of(good), *(frame(score, defective=True) for score in defective)]


def hashed(frames: Iterable[CalibrationFrame]) -> dict[str, CalibrationFrame]:
    return {hashlib.sha256(str(number).encode()).hexdigest(): frame for number, frame in enumerate(frames)}


def test_frames_needed_are_enough_and_one_less_is_not() -> None:
    targets = Targets(overkill=0.02, suspects=0.02)
    needed = frames_needed(0.02, 0.95)
    assert needed == 149  # 0.98¹⁴⁹ = 0.0493, 0.98¹⁴⁸ = 0.0503
    frames = good_of(np.linspace(0, 1, needed).tolist())
    rules, _ = from_good(frames, targets)
    assert rules.thresholds.good_below > frames[-1].score > 0.999  # the highest score itself
    with pytest.raises(VmadError, match=r"148 good frames are too few .* 149 are needed"):
        from_good(frames[1:], targets)


def test_the_promise_holds_as_often_as_it_says() -> None:
    """1000 draws of 100 scores: the true share above each threshold exceeds its bound in at most 10% of them."""
    rng, targets = np.random.default_rng(0), Targets(overkill=0.05, suspects=0.15, confidence=0.9)
    broken = np.zeros(2)
    for _ in range(1000):
        thresholds = from_good(good_of(rng.uniform(size=100).tolist()), targets)[0].thresholds
        broken += 1 - thresholds.defect_above > 0.05, 1 - thresholds.good_below > 0.15
    # Not needlessly careful either: one score higher would break it in less than 4%.
    assert (broken / 1000 < 0.1 + 3 * 0.0095).all() and (broken / 1000 > 0.03).all()


def test_good_frames_alone_promise_nothing_of_a_review() -> None:
    rules, promise = from_good([frame(score, p_yes=score) for score in np.linspace(0, 1, 200).tolist()], Targets())
    assert (
        rules.review is None and promise.startswith("of the screen alone") and "of defective parts nothing" in promise
    )


@pytest.mark.parametrize("strangers", [0, 1, 2])
def test_what_lies_apart_does_not_widen_the_scope(strangers: int) -> None:
    """Of twenty good frames two do not; a limit of 0.06 is the least there is."""
    near = [frame(0.1 + n / 1000, distance=0.01 + n / 10_000) for n in range(20 - strangers)]
    rules, promise = from_good([*near, *[frame(0.9, distance=0.5)] * strangers], LOOSE)
    assert rules.scope is not None and rules.scope.limit == 0.06
    assert rules.thresholds.defect_above < 0.2  # they set nothing else either
    assert (f"{strangers} of 20 good frames out of scope" in promise) == (strangers > 0)


@pytest.mark.parametrize(
    "good,defective,escape,overkill,expected",
    [
        # the gap between the two kinds is UNCERTAIN
        pytest.param([0.1, 0.2], [0.8, 0.9], 0.01, 0.02, (0.2, 0.8), id="apart"),
        # no escape allowed: GOOD ends at the lowest defect; no overkill: DEFECT begins above the highest good one
        pytest.param([0.1, 0.2, 0.7], [0.4, 0.9], 0.01, 0.02, (0.4, 0.7), id="overlapping"),
        pytest.param([0.1, 0.2, 0.7], [0.4, 0.6, 0.9], 0.34, 0.02, (0.6, 0.7), id="one escape in three allowed"),
        pytest.param([0.1, 0.5, 0.7], [0.4, 0.9], 0.01, 0.34, (0.4, 0.5), id="one overkill in three allowed"),
    ],
)
def test_labels(
    good: list[float], defective: list[float], escape: float, overkill: float, expected: tuple[float, float]
) -> None:
    thresholds = fitted(labelled(good, defective), Targets(escape=escape, overkill=overkill), None).thresholds
    assert (thresholds.good_below, thresholds.defect_above) == pytest.approx(expected)
    assert np.mean(np.array(defective) < thresholds.good_below) <= escape
    assert np.mean(np.array(good) >= thresholds.defect_above) <= overkill


@pytest.mark.parametrize("strangers", [0, 3, 9, 10], ids="{} defects out of scope".format)
def test_what_is_out_of_scope_sets_no_threshold_and_shows_no_defect(strangers: int) -> None:
    """Another product is UNCERTAIN whatever is wrong with it: that says nothing of this one's defects."""
    good = [frame(0.1 + n / 100, distance=0.01) for n in range(10)]
    stranger = frame(0.9, distance=0.5)
    defective = [frame(0.5 + n / 100, True, distance=0.5 if n < strangers else 0.02) for n in range(10)]
    frames = hashed([*good, stranger, *defective])
    if strangers > 8:
        with pytest.raises(VmadError, match=f"found 10 and {10 - strangers}, and {strangers + 1} out of scope"):
            from_labels(frames, Targets())
        return
    rules, judged, promise = from_labels(frames, Targets())
    assert rules.thresholds.good_below == pytest.approx(0.19)
    assert rules.thresholds.defect_above == pytest.approx(0.5 + strangers / 100)
    assert rules.verdict(stranger) is Verdict.UNCERTAIN
    assert (f"; {strangers} defective frames are out of scope" in promise) is (strangers > 0)
    made = Calibration.model_construct(frames=tuple(judged.values()), scope=rules.scope)
    assert made.escaped == (0, 10 - strangers)


def test_no_frame_is_judged_by_what_it_set() -> None:
    """Folds of scikit-learn's, and a frame's place in them by its pixels alone."""
    rng = np.random.default_rng(0)
    frames = hashed(labelled(rng.uniform(size=23).tolist(), rng.uniform(size=7).tolist()))
    ranks = {kind: sorted(key for key in frames if frames[key].defective is kind) for kind in (False, True)}
    fold = [ranks[frames[key].defective].index(key) % 5 for key in frames]
    expected: list[Verdict | None] = [None] * len(frames)
    values = list(frames.values())
    for others, held_out in PredefinedSplit(fold).split():
        thresholds = fitted([values[n] for n in others], Targets(), None).thresholds
        for n in held_out:
            expected[n] = verdict_of(values[n].score, thresholds)
    judged = cross_validated(frames, lambda others: fitted(others, Targets(), None))
    assert [frame.verdict for frame in judged.values()] == expected and list(judged) == list(frames)
    backwards = cross_validated(dict(reversed(frames.items())), lambda others: fitted(others, Targets(), None))
    assert backwards == judged


def test_what_is_reported_is_what_comes() -> None:
    """200 draws of 20 good and 20 defective scores that overlap: none escapes the thresholds that it set itself, but of
    the parts to come as many do as was reported, and a little less, as all frames set those that are kept."""
    rng, reported, seen, true = np.random.default_rng(0), [], [], []
    for _ in range(200):
        good, defective = rng.normal(4, 1, 20).tolist(), rng.normal(5, 1, 20).tolist()
        frames = hashed(labelled(good, defective))
        rules, judged, _ = from_labels(frames, Targets())
        reported.append(np.mean([frame.verdict is Verdict.GOOD for frame in judged.values() if frame.defective]))
        seen.append(np.mean(np.array(defective) < rules.thresholds.good_below))
        true.append(norm.cdf(rules.thresholds.good_below, 5, 1))
    assert np.mean(seen) == 0
    assert np.mean(true) == pytest.approx(1 / 21, abs=0.01) and np.mean(true) <= np.mean(reported) < 1 / 17 + 0.01


def reviewed(good: Iterable[float], defective: Iterable[float]) -> dict[str, CalibrationFrame]:
    """All of them UNCERTAIN: of each P(yes); and on each side of their scores one frame that the screen settles."""
    rng = np.random.default_rng(1)
    known = [frame(0.1), frame(0.11), frame(0.9, defective=True), frame(0.91, defective=True)]
    edges = [frame(0.7 - n / 100, p_yes=p_yes) for n, p_yes in enumerate([0.5, 0.5])]
    edges += [frame(0.3 + n / 100, defective=True, p_yes=p_yes) for n, p_yes in enumerate([0.5, 0.5])]
    between = [frame(rng.uniform(0.35, 0.65), kind, p) for kind, ps in ((False, good), (True, defective)) for p in ps]
    return hashed([*known, *edges, *between])


ASKED = "Is the part broken?"


@pytest.mark.parametrize(
    "good,defective,below,above",
    [
        pytest.param([0.1] * 20, [0.9] * 20, True, True, id="apart"),
        pytest.param([0.1] * 20, [0.9] * 15 + [0.1] * 5, False, True, id="No is said of defects too"),
        pytest.param([0.1] * 15 + [0.9] * 5, [0.9] * 20, True, False, id="Yes is said of good ones too"),
        pytest.param([0.4] * 20, [0.4] * 20, False, False, id="says nothing"),
        pytest.param([0.9] * 20, [0.1] * 20, False, False, id="says the contrary"),
        pytest.param([0.1] * 2, [0.9] * 2, False, False, id="too few"),
    ],
)
def test_a_review_settles_where_it_tells_apart(
    good: list[float], defective: list[float], below: bool, above: bool
) -> None:
    frames = reviewed(good, defective)
    rules, judged, promise = from_labels(frames, Targets(), ASKED)
    assert ((rules.review and rules.review.good_below) is not None) == below
    assert ((rules.review and rules.review.defect_above) is not None) == above
    settles = below or above
    assert promise.startswith(
        "of screen and review: " if settles else "of the screen alone, as a review settles nothing"
    )
    assert ("too few to say" in promise) == (len(good) == 2)
    assert rules.review is None or rules.review.question == ASKED
    found = [(frame.defective, rules.verdict(frame)) for frame in judged.values()]
    assert (True, Verdict.GOOD) not in found and (False, Verdict.DEFECT) not in found
    alone = from_labels(frames, Targets())[0]
    assert alone.thresholds == rules.thresholds and alone.review is None
    if not settles:  # no fold's either: the promise is of what runs
        assert judged == from_labels(frames, Targets())[1]
    counts = Counter((frame.defective, frame.verdict) for frame in judged.values())
    assert f"{counts[True, Verdict.GOOD]} of {len(defective) + 4} defective frames called GOOD" in promise
    bound = beta.ppf(0.95, counts[False, Verdict.DEFECT] + 1, len(good) + 4 - counts[False, Verdict.DEFECT])
    assert f"good frames called DEFECT (with 95.0% confidence at most {bound:.2%} of all)" in promise


@pytest.mark.parametrize("count", range(2, 9))
def test_how_many_tell_apart(count: int) -> None:
    """None wrong of `count` each: by the bounds of both shares, which scipy knows."""
    frames = [frame(0.5, kind, float(kind)) for kind in (False, True) for _ in range(count)]
    wrong = beta.ppf(0.95, 1, count)
    rules = fitted([*frames, frame(0.6), frame(0.4, defective=True)], Targets(), ASKED)
    assert (rules.review is not None) == (1 - wrong > wrong) == (count >= 5)


def test_random_answers_settle_nothing_as_often_as_the_confidence_says() -> None:
    """P(yes) of chance: at 95% confidence of each of two shares a side settles in at most a tenth of 300 draws."""
    rng, sides = np.random.default_rng(0), 0
    for _ in range(300):
        frames = [frame(0.5, kind, rng.uniform()) for kind in (False, True) for _ in range(15)]
        rule = fitted([*frames, frame(0.6), frame(0.4, defective=True)], Targets(), ASKED).review
        sides += 0 if rule is None else (rule.good_below is not None) + (rule.defect_above is not None)
    assert sides / 600 <= 0.1


@pytest.mark.parametrize("good,defective", [(1, 5), (5, 1), (0, 3)])
def test_refuses_too_few_to_judge_one_by_the_others(good: int, defective: int) -> None:
    with pytest.raises(VmadError, match=f"at least two good and two defective .*, found {good} and {defective}"):
        from_labels(hashed(labelled([0.1] * good, [0.9] * defective)), Targets())


@pytest.mark.parametrize("wrong", [{"escape": 0.0}, {"overkill": 1.0}, {"confidence": 95.0}])
def test_refuses_targets(wrong: dict[str, float]) -> None:
    with pytest.raises(VmadError, match=f"expected {next(iter(wrong))}"):
        Targets(**wrong)


def test_refuses_more_overkill_than_suspects() -> None:
    with pytest.raises(VmadError, match="expected suspects"):
        from_good(good_of([0.1] * 1000), Targets(overkill=0.2, suspects=0.1))


def bundle(hash: str = "ab" * 32) -> Bundle:
    return Bundle(Path("bundle"), hash, Manifest.model_validate({**MANIFEST, "files": {}}))


def calibration(**changes: object) -> Calibration:
    fields = {
        "bundle": "ab" * 32,
        "bank": None,
        "object": "M3 screw",
        "thresholds": Thresholds(good_below=0.1, defect_above=0.2),
        "promise": "none",
        "by": "somebody",
        "when": "2026-01-01T00:00:00+0000",
        "frames": (CalibrationFrame(path="a.png", sha256="00", defective=False, score=0.05),),
    }
    return Calibration.model_validate({**fields, **changes})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    assert station.load_calibration("M3 screw", None) is None and station.calibrated() == {}
    station.save_calibration(calibration())
    assert Station(tmp_path, bundle()).load_calibration("M3 screw", None) == calibration()
    assert station.load_calibration("m3 screw", None) is None
    assert list(station.calibrated().values()) == [calibration()]


def test_escapes_are_counted_on_frames_that_set_no_threshold() -> None:
    def judged(defective: bool, verdict: Verdict | None) -> CalibrationFrame:
        return frame(0.05, defective).model_copy(update={"verdict": verdict})

    verdicts = [Verdict.GOOD, Verdict.GOOD, Verdict.DEFECT, Verdict.UNCERTAIN]
    frames = [judged(True, verdict) for verdict in verdicts] + [judged(False, Verdict.GOOD)]
    assert calibration(frames=frames).escaped == (2, 4)
    older = [judged(True, None)] * 30
    assert calibration(frames=older).escaped == (0, 0)


def test_an_older_one_is_read_and_lets_a_review_settle_nothing(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    path = station.save_calibration(calibration())
    newer = {"review", "device"}, {"p_yes", "verdict"}

    def without(content: bytes) -> bytes:
        fields = json.loads(content)
        frames = [{name: value for name, value in frame.items() if name not in newer[1]} for frame in fields["frames"]]
        return json.dumps({name: fields[name] for name in fields if name not in newer[0]} | {"frames": frames}).encode()

    rewrite(path, without)
    assert station.load_calibration("M3 screw", None) == calibration()
    assert calibration().review is None


@pytest.mark.parametrize(
    "damage,says",
    [
        pytest.param(lambda f: f.write_bytes(f.read_bytes()[:-1]), "was changed", id="changed"),
        pytest.param(lambda f: f.write_bytes(f.read_bytes()[65:]), "was changed", id="no hash"),
        pytest.param(lambda f: rewrite(f, lambda json: b"{}"), "not a complete", id="not a calibration, hash right"),
        pytest.param(lambda f: replaced(f, b"0.1", b"1e999"), "good_below", id="a threshold without end"),
        pytest.param(lambda f: replaced(f, b"0.1", b"NaN"), "good_below", id="no threshold"),
        pytest.param(lambda f: replaced(f, b"0.1", b"0.3"), "exceeds defect_above", id="thresholds in another order"),
        pytest.param(lambda f: replaced(f, b"0.05", b"-1e999"), "score", id="a score without end"),
        pytest.param(
            lambda f: replaced(f, b'"schema_version": 2', b'"schema_version": 3'),
            "newer vmad-edge",
            id="a later schema",
        ),
        pytest.param(
            lambda f: replaced(f, b'"schema_version": 2', b'"schema_version": 1'),
            "Calibrate 'M3 screw' again",
            id="an earlier schema, which had no number",
        ),
    ],
)
def test_refuses_a_damaged_one(damage: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    damage(station.save_calibration(calibration()))
    with pytest.raises(BundleError, match=says) as raised:
        station.load_calibration("M3 screw", None)
    for inside in ("pydantic", "Errno", "validation error", "\n"):  # of a library
        assert inside not in str(raised.value)
    assert says in str(next(iter(station.calibrated().values())))


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"bundle": "cd" * 32}, r"'M3 screw' \(2026-01-01.*, by somebody\) .* another bundle \(cdcd.*, now abab"),
        ({"bank": "ef" * 32}, r"'M3 screw' .* another reference bank \(efef.*, now none\)"),
    ],
)
def test_refuses_an_outdated_one_by_name(changes: dict[str, str], says: str, tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    station.save_calibration(calibration(**changes))
    with pytest.raises(BundleError, match=says):
        station.load_calibration("M3 screw", None)


def test_refuses_that_of_another_object(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    path = station.save_calibration(calibration(object="nut"))
    path.rename(path.with_stem("bolt"))
    with pytest.raises(BundleError, match="is the calibration of 'nut'"):
        station.load_calibration("bolt", None)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """enrolled/, good/ and alike/: textures alike; defects/: others."""
    folder, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for name, count, deviation in (("enrolled", 3, 4), ("good", 5, 4), ("defects", 3, 20), ("alike", 12, 4)):
        (folder / name).mkdir()
        for number in range(count):
            image = plain_part(rng, deviation, 64, 64).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"{number}.png"), image)
    return folder


def files(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.iterdir())]


LOOSE = Targets(overkill=0.5, suspects=0.5, confidence=0.9)


@pytest.fixture
def inspector(tiny_bundle: Path, tmp_path: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, tmp_path / "station", calibrated=False) as opened:
        yield opened


def test_inspections_use_it_until_the_bank_is_another(
    inspector: Inspector, tiny_bundle: Path, parts: Path, tmp_path: Path
) -> None:
    frame = parts / "good/0.png"
    inspector.enroll(files(parts / "enrolled"), object="tile")
    screened = inspector.inspect(frame, object="tile", review=False)
    score = screened.score
    made = calibrate(inspector, files(parts / "good"), object="tile", targets=LOOSE, by="me")
    assert made.frames[0] == CalibrationFrame(
        path=str(frame),
        sha256=sha256(frame),
        defective=False,
        score=score,
        scope_distance=screened.scope_distance,
    )
    assert made.by == "me" and made.bank == inspector.station.bank_hash("tile") is not None

    # Thresholds around this frame's score, which neither the bundle nor the references would give.
    for below, above, verdict in (
        (score + 1e-4, 9, Verdict.GOOD),
        (0, score, Verdict.DEFECT),
        (0, 9, Verdict.UNCERTAIN),
    ):
        thresholds = Thresholds(good_below=below, defect_above=above)
        inspector.station.save_calibration(made.model_copy(update={"thresholds": thresholds}))
        with Inspector.open(tiny_bundle, tmp_path / "station") as calibrated:
            assert calibrated.inspect(frame, object="tile", review=False).verdict is verdict
        with Inspector.open(tiny_bundle, tmp_path / "station", fallback="bundle") as calibrated:
            other = calibrated.inspect(frame, object="other", review=False)  # no calibration, no bank of its own
            assert other.verdict is Verdict.UNCERTAIN and other.compared_with == "normal features"

    inspector.enroll(files(parts / "enrolled")[:2], object="tile")
    with (
        Inspector.open(tiny_bundle, tmp_path / "station") as calibrated,
        pytest.raises(BundleError, match=r"calibration of 'tile' .* another reference bank"),
    ):
        calibrated.inspect(frame, object="tile", review=False)


def test_a_lost_bank_is_not_replaced_by_the_bundles_features(
    inspector: Inspector, tiny_bundle: Path, parts: Path, tmp_path: Path
) -> None:
    inspector.enroll(files(parts / "enrolled"), object="tile")
    calibrate(inspector, files(parts / "good"), object="tile", targets=LOOSE)
    next((inspector.station.path / "banks").glob("*.bank")).unlink()
    with (
        Inspector.open(tiny_bundle, tmp_path / "station") as calibrated,
        pytest.raises(BundleError, match=r"bank of 'tile' is gone .* enroll its frames again"),
    ):
        calibrated.inspect(parts / "good/0.png", object="tile", review=False)
    with (
        Inspector.open(tiny_bundle, tmp_path / "station", calibrated=False) as anew,
        pytest.raises(BundleError, match=r"bank of 'tile' is gone .* enroll its frames again"),
    ):
        calibrate(anew, files(parts / "good"), object="tile", targets=LOOSE)


def test_normal_features_are_calibrated_for_one_object_alone(
    inspector: Inspector, tiny_bundle: Path, parts: Path, tmp_path: Path
) -> None:
    calibrate(inspector, files(parts / "good"), files(parts / "defects"), object="tile")
    with Inspector.open(tiny_bundle, tmp_path / "station") as calibrated:
        verdicts = [calibrated.inspect(f, object="tile", review=False).verdict for f in files(parts / "defects")]
        assert Verdict.GOOD not in verdicts
    with Inspector.open(tiny_bundle, tmp_path / "station", fallback="bundle") as calibrated:
        other = calibrated.inspect(parts / "defects/0.png", object="other", review=False)
        assert other.verdict is Verdict.UNCERTAIN


def test_refuses_frames_that_promise_nothing(inspector: Inspector, parts: Path, tmp_path: Path) -> None:
    inspector.enroll(files(parts / "enrolled"), object="tile")
    with pytest.raises(FrameError, match=r"0\.png is one of the enrolled references of 'tile'"):
        calibrate(inspector, files(parts / "enrolled"), object="tile", targets=LOOSE)
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(FrameError, match=r"broken.png cannot be calibrated with: .*not a readable image"):
        calibrate(inspector, [*files(parts / "good"), str(tmp_path / "broken.png")], object="tile", targets=LOOSE)
    with pytest.raises(VmadError, match="5 good frames are too few"):
        calibrate(inspector, files(parts / "good"), object="tile")
    assert inspector.station.calibrated() == {}


def test_enrolled_frames_are_known_by_their_pixels(tiny_bundle: Path, parts: Path, tmp_path: Path) -> None:
    """In another file, of another format, of which a coreset kept hardly a patch."""
    manifest = Bundle.open(tiny_bundle).manifest
    similarity = manifest.similarity.model_copy(update={"coreset": 0.05})
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    seal(folder, manifest.model_copy(update={"similarity": similarity}))
    other = tmp_path / "other.bmp"
    cv2.imwrite(str(other), cv2.imread(str(parts / "enrolled/1.png")))
    with Inspector.open(folder, tmp_path / "station", calibrated=False) as inspector:
        assert len(inspector.enroll(files(parts / "enrolled"), object="tile").features) == 2
        with pytest.raises(FrameError, match=r"other\.bmp is one of the enrolled references of 'tile'"):
            calibrate(inspector, [*files(parts / "good"), str(other)], object="tile", targets=LOOSE)
        calibrate(inspector, files(parts / "good"), object="tile", targets=LOOSE)


def test_equal_frames_count_once(inspector: Inspector, parts: Path, tmp_path: Path) -> None:
    """Copies, whatever their files are, are no independent parts."""
    good = files(parts / "good")
    copies = [shutil.copy(good[0], tmp_path / f"plate ({number}).png") for number in range(150)]
    cv2.imwrite(str(tmp_path / "plate.bmp"), cv2.imread(good[1]))
    given = [*good, *map(str, copies[:30]), str(tmp_path / "plate.bmp"), good[2]]
    with pytest.raises(VmadError, match=r"^1 good frames are too few .*; 149 of the 150 frames given are copies"):
        calibrate(inspector, map(str, copies), object="tile", targets=LOOSE)
    with pytest.raises(VmadError, match=r"^5 good frames are too few .*; 32 of the 37 frames given are copies"):
        calibrate(inspector, given, object="tile")
    assert inspector.station.calibrated() == {}
    made = calibrate(inspector, given, object="tile", targets=LOOSE)
    assert [frame.path for frame in made.frames] == good
    assert "from 5 good frames;" in made.promise
    assert made.promise.endswith("; 32 of the 37 frames given are copies of others and not counted")
    alone = calibrate(inspector, good, object="tile", targets=LOOSE)
    assert alone.thresholds == made.thresholds and made.promise.startswith(f"{alone.promise};")

    defects = files(parts / "defects")
    made = calibrate(inspector, given, [*defects, defects[0]], object="tile", review=False)
    assert "of 3 defective frames" in made.promise and "33 of the 41 frames given are copies" in made.promise
    with pytest.raises(FrameError, match=r"plate \(3\)\.png is given as defective, and .*good/0\.png, .* as good"):
        calibrate(inspector, good, [*defects, str(copies[3])], object="tile")


def test_reviews_are_calibrated_too(
    inspector: Inspector, tiny_bundle: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P(yes) of every frame is kept; where it tells apart what the screen does not, a review settles by it."""
    good, defects = files(parts / "good"), files(parts / "alike")
    made = calibrate(inspector, good, defects, object="tile")
    assert all(frame.p_yes == pytest.approx(p_yes_of(inspector, frame.path)) for frame in made.frames[:2])
    assert made.escaped[1] == len(defects) and made.device == inspector.engines.device
    alone = calibrate(inspector, good, defects, object="tile", review=False)
    assert {frame.p_yes for frame in alone.frames} == {None} and alone.review is None
    assert alone.thresholds == made.thresholds and alone.promise.startswith("of the screen alone: ")

    def knows(_: Inspector, screened: Inspection, path: str) -> Inspection:
        return replace(screened, p_yes=0.9 if "alike" in path else 0.1)

    monkeypatch.setattr(calibrate_module, "_reviewed", knows)
    made = calibrate(inspector, good, defects, object="tile")
    assert made.review is not None and made.review.question == inspector.question("tile")
    assert made.promise.startswith("of screen and review: ")
    with Inspector.open(tiny_bundle, tmp_path / "station") as calibrated:
        assert calibrated.inspect(good[0], object="tile", review=False).review_rule == made.review
        assert made.promise in calibrated.told("tile")
        assert "is void: it is of screen and review" in calibrated.told("tile", review=False)


def p_yes_of(inspector: Inspector, path: str) -> float | None:
    return inspector.review(inspector.inspect(path, object="tile", review=False)).wait().p_yes


def test_refuses_references_that_nobody_keeps(inspector: Inspector, parts: Path, tmp_path: Path) -> None:
    def refused(says: str, good: Iterable[str]) -> None:
        with pytest.raises(VmadError, match=says):
            calibrate(inspector, good, object="tile", targets=LOOSE)
        assert inspector.station.calibrated() == {}

    inspector.enroll(files(parts / "enrolled"), object="tile", keep=False)
    refused("'tile' are in this inspector alone.*keep=True", files(parts / "good"))
    inspector.compare_unlabelled(files(parts / "good"), object="tile")
    refused("'tile' is compared with unlabelled frames", files(parts / "good"))
    inspector.enroll(files(parts / "enrolled"), object="tile")
    references = inspector.references("tile")

    def others_enroll(between: Callable[[], object]) -> Iterator[str]:
        yield from files(parts / "good")
        between()

    assert references is not None
    other = references.take(np.arange(len(references.features) - 1))
    refused(
        "compared with another reference bank .* than the station has now",
        others_enroll(lambda: inspector.station.save_references("tile", other)),
    )
    inspector.enroll(files(parts / "enrolled"), object="tile")
    refused(
        "'tile' was enrolled anew while",
        others_enroll(lambda: inspector.enroll(files(parts / "enrolled")[:2], object="tile")),
    )
    made = calibrate(inspector, files(parts / "good"), object="tile", targets=LOOSE)
    compared = inspector.references("tile")
    assert compared is not None and made.bank == compared.hash == inspector.station.bank_hash("tile")
    path = inspector.station.path / "banks/tile.bank"
    assert hashlib.sha256(path.read_bytes()[65:]).hexdigest() == made.bank


def test_recorded_paths_are_absolute(inspector: Inspector, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parts)
    made = calibrate(inspector, [f"good/{number}.png" for number in range(5)], object="tile", targets=LOOSE)
    assert [frame.path for frame in made.frames] == files(parts / "good")


def test_an_unknown_object_among_known_ones(
    tiny_bundle: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", str(tiny_bundle), "--station", str(tmp_path), "--good", str(parts / "good")]
    command += ["--overkill", "0.5", "--suspects", "0.5", "--object"]
    assert main([*command, "tile"]) == 0  # the station knows nothing yet: this one is compared with normal features
    capsys.readouterr()
    assert main([*command, "Tile"]) == 2
    assert "There are: 'tile'. Did you mean 'tile'?" in capsys.readouterr().err
    assert main([*command, "plate", "--fallback", "bundle"]) == 0
    assert main([*command, "plate"]) == 0  # it is known now


def test_the_command_and_info(
    tiny_bundle: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(tiny_bundle), "--station", str(tmp_path), "--json"]
    good = ["--good", str(parts / "good"), "--object", "tile"]
    assert main(["calibrate", *common, *good]) == 2
    assert "29 are needed" in capsys.readouterr().err
    assert main(["calibrate", *common, *good, "--overkill", "0.5", "--suspects", "0.5", "--by", "me"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["frames"] == 5 and made["by"] == "me" and "from 5 good frames" in made["promise"]
    assert main(["info", *common]) == 0
    assert json.loads(capsys.readouterr().out)["calibrated"]["tile"]["thresholds"] == made["thresholds"]
    assert main(["calibrate", *common, *good, "--defects", str(parts / "defects"), "--escape", "0.34"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["frames"] == 8 and "of 3 defective frames called GOOD" in made["promise"]
    assert made["thresholds"]["good_below"] <= made["thresholds"]["defect_above"]
    inspect = [
        "inspect",
        str(tiny_bundle),
        str(parts / "defects/0.png"),
        *common[1:],
        "--object",
        "tile",
        "--no-review",
    ]
    assert main(inspect) in (1, 3)
    capsys.readouterr()
    assert main(["enroll", str(tiny_bundle), str(parts / "enrolled"), *common[1:], "--object", "tile"]) == 0
    assert "another reference bank" in " ".join(capsys.readouterr().err.split())
    assert main(["info", *common]) == 0
    assert "another reference bank" in json.loads(capsys.readouterr().out)["calibrated"]["tile"]["refused"]
    assert main(inspect) == 2  # not with thresholds that promise something else: one line says what to do
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Calibrate 'tile' again, or remove" in said


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Another content, with the hash that it has."""
    content = change(path.read_bytes()[65:])
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def replaced(path: Path, old: bytes, new: bytes) -> None:
    rewrite(path, lambda content: content.replace(old, new, 1))
