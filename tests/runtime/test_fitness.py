"""Fit to be judged: faults made in good frames, measured against photographs where they are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from plain_parts import plain_part
from pydantic import ValidationError

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.calibrate import Targets, calibrate
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Reason, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.stages.fitness import FitnessLimits, learned, measure, unfit
from vmad_edge.runtime.station import Station

Pixels = NDArray[np.uint8]
ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
ANYTHING = FitnessLimits()
SIDE = 256
RNG = np.random.default_rng(0)


def read(*folder: str | Path) -> list[Pixels]:
    return [Frame.read(path).pixels for path in list_images([str(Path(*folder))])]


def part(seed: int = 0, height: int = SIDE, width: int = SIDE) -> Pixels:
    frame = plain_part(np.random.default_rng(seed), 3, height, width)
    return np.asarray(cv2.GaussianBlur(frame, (5, 5), 1).clip(0, 255), np.uint8)


def with_rows(frame: Pixels, level: int, share: float, last: bool = True) -> Pixels:
    whole, missing = frame.copy(), round(share * len(frame))
    whole[slice(len(frame) - missing, None) if last else slice(0, missing)] = level
    return whole


def blurred(frame: Pixels, radius: float) -> Pixels:
    """As a lens out of focus does, by the share of the longer side that a point becomes wide in each direction."""
    reach = max(1, round(radius * max(frame.shape[:2])))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1)).astype(np.float64)
    return np.asarray(cv2.filter2D(frame, -1, disc / disc.sum(), borderType=cv2.BORDER_REFLECT), np.uint8)


def level(value: int | tuple[int, int, int]) -> Pixels:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


NOTHING = {
    "black": (level(0), Reason.UNFIT_DARK),
    "lens cap": (RNG.integers(0, 4, (SIDE, SIDE, 3), np.uint8), Reason.UNFIT_DARK),
    "a sixteenth of its levels": (part() // 16, Reason.UNFIT_DARK),
    "white": (level(255), Reason.UNFIT_BRIGHT),
    "nearly white": (RNG.integers(252, 256, (SIDE, SIDE, 3), np.uint8), Reason.UNFIT_BRIGHT),
    "grey": (level(128), Reason.UNFIT_CONSTANT),
    "red": (level((255, 0, 0)), Reason.UNFIT_CONSTANT),
    "a ramp": (np.tile(np.arange(SIDE, dtype=np.uint8)[None, :, None], (SIDE, 1, 3)), Reason.UNFIT_CONSTANT),
    "bars": (np.repeat(RNG.integers(0, 256, (1, 8, 3), np.uint8).repeat(32, 1), SIDE, 0), Reason.UNFIT_CONSTANT),
    "noise": (RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8), Reason.UNFIT_CONSTANT),
    "grey noise": (RNG.normal(128, 2, (SIDE, SIDE, 1)).repeat(3, 2).astype(np.uint8), Reason.UNFIT_CONSTANT),
    "half black": (with_rows(part(), 0, 0.5), Reason.UNFIT_TORN),
    "half white": (with_rows(part(), 255, 0.5), Reason.UNFIT_TORN),
    "half grey": (with_rows(part(), 128, 0.5), Reason.UNFIT_TORN),
    "its beginning is missing": (with_rows(part(), 0, 0.3, last=False), Reason.UNFIT_TORN),
    "columns are missing": (with_rows(part(), 0, 0.3).transpose(1, 0, 2).copy(), Reason.UNFIT_TORN),
    "last tenth black": (with_rows(part(), 0, 0.1), Reason.UNFIT_TORN),
    "a part without an edge": (blurred(part(), 0.15), Reason.UNFIT_BLURRED),
    "8×8 black": (np.zeros((8, 8, 3), np.uint8), Reason.UNFIT_DARK),
    "a line scan, black": (np.zeros((8, 3000, 3), np.uint8), Reason.UNFIT_DARK),
}


@pytest.mark.parametrize("fault", NOTHING)
def test_no_camera_shows_a_part_so(fault: str) -> None:
    pixels, reason = NOTHING[fault]
    found = unfit(measure(pixels), ANYTHING)
    assert found is not None and found[0] is reason and "of any frame" in found[1]


def on(ground: int, radius: int, level: int = 200) -> Pixels:
    frame = np.full((SIDE, SIDE, 3), ground, np.uint8)
    return np.asarray(cv2.circle(frame, (100, 140), radius, (level,) * 3, -1, cv2.LINE_AA), np.uint8)


def letterbox() -> Pixels:
    return with_rows(with_rows(part(), 0, 0.2), 0, 0.2, last=False)


USUAL = {
    "a part": part(),
    "on black without noise": on(0, 40),
    "dark field: a thin ring on black": np.asarray(
        cv2.circle(np.zeros((SIDE, SIDE, 3), np.uint8), (128, 128), 90, (90,) * 3, 2, cv2.LINE_AA), np.uint8
    ),
    "back light: black on white": on(255, 60, 0),
    "a small part on a flat ground": on(128, 8),
    "a frame's own black border above and below": letterbox(),
    "fine texture": RNG.integers(0, 256, (SIDE // 4, SIDE // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1),
    "8×8": np.asarray(cv2.resize(part(), (8, 8), interpolation=cv2.INTER_AREA), np.uint8),
    "a line scan": part(0, 16, 3000),
}


@pytest.mark.parametrize("kind", USUAL)
def test_the_defaults_refuse_nothing_that_a_camera_may_show(kind: str) -> None:
    assert unfit(measure(USUAL[kind]), ANYTHING) is None


def test_the_demos_parts_are_fit_by_the_defaults() -> None:
    frames = [*read(ROOT / "demo/parts/good"), *read(ROOT / "demo/parts/defective")]
    assert len(frames) == 18 and [unfit(measure(pixels), ANYTHING) for pixels in frames] == [None] * 18


def test_numbers_are_what_they_say() -> None:
    """Against NumPy's own over all pixels; 200 rows and columns are all looked at."""
    pixels = np.asarray(cv2.resize(read(ROOT / "demo/parts/good")[2], (200, 200)), np.uint8)
    pixels[:13] = pixels[:, :7] = 0
    pixels[150:, 180:] = (255, 9, 9)
    grey, found = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), measure(pixels)
    assert found.size == (200, 200) and found.mean == pytest.approx(grey.mean())
    assert found.white == pytest.approx((pixels >= 254).any(axis=2).mean())
    assert found.black == pytest.approx((pixels <= 2).all(axis=2).mean())
    assert found.coloured == pytest.approx(50 * 20 / 200**2)
    assert found.darkest == np.quantile(grey, 0.001, method="inverted_cdf")
    assert found.brightest == np.quantile(grey, 0.999, method="inverted_cdf")
    assert (found.flat_rows, found.flat_columns) == (13 / 200, 7 / 200)
    spans = [np.ptp(grey, axis=axis).astype(float) for axis in (0, 1)]
    assert found.contrast == min(np.percentile(span, 99) for span in spans)


@pytest.mark.parametrize("radius", [0.01, 0.02, 0.04])
def test_sharpness_falls_with_defocus_and_not_with_the_light(radius: float) -> None:
    frame = read(ROOT / "demo/parts/good")[0]
    sharp, soft, dim = (measure(pixels) for pixels in (frame, blurred(frame, radius), frame // 2))
    assert soft.edges < 0.95 * sharp.edges and soft.detail < 0.8 * sharp.detail
    assert dim.edges == pytest.approx(sharp.edges, rel=0.1) and dim.detail == pytest.approx(sharp.detail, rel=0.2)


def test_learned_limits_are_wide_for_few_frames_and_narrow_for_many() -> None:
    frames = [measure(part(seed)) for seed in range(40)]
    few, some, many = (learned(frames[:count]) for count in (1, 5, 40))
    for name in ("mean", "contrast", "edges", "detail"):
        lower = [getattr(limits, name)[0] for limits in (few, some, many)]
        assert lower == sorted(lower) and lower[0] < lower[2] < min(getattr(frame, name) for frame in frames)
    for name in ("mean", "white", "flat_rows", "seam"):
        upper = [getattr(limits, name)[1] for limits in (few, some, many)]
        assert upper == sorted(upper, reverse=True) and upper[2] > max(getattr(frame, name) for frame in frames)
    assert few.size is None and few.grey is None and some.size == (SIDE, SIDE) and some.frames == 5
    assert all(unfit(frame, limits) is None for frame in frames for limits in (few, some, many))


def test_one_frame_in_a_hundred_does_not_widen_them() -> None:
    frames = [measure(part(seed, 64, 64)) for seed in range(150)]
    dark = measure(part(0, 64, 64) // 3)
    assert learned([*frames, dark]).mean[0] == pytest.approx(learned(frames).mean[0], abs=2)
    assert learned([*frames[:50], dark]).mean[0] < 30


def test_learned_limits_find_what_the_good_frames_never_have() -> None:
    limits = learned([measure(part(seed)) for seed in range(10)])
    tear = np.concatenate([part(20)[:128], np.roll(part(20)[128:], 100, axis=1)])
    for pixels, reason in (
        (part(20) // 2, Reason.UNFIT_DARK),
        (np.minimum(part(20), 127) * 2, Reason.UNFIT_BRIGHT),
        (blurred(part(20), 0.03), Reason.UNFIT_BLURRED),
        (tear, Reason.UNFIT_TORN),
        (part(20, SIDE, SIDE + 8), Reason.UNFIT_SIZE),
    ):
        assert unfit(measure(pixels), ANYTHING) is None
        found = unfit(measure(np.ascontiguousarray(pixels)), limits)
        assert found is not None and found[0] is reason and "10 good frames" in found[1]


def test_colour_is_asked_of_the_whole_frame() -> None:
    grey, coloured = part().copy(), part().copy()
    grey[:] = grey[..., :1]
    coloured[..., 0] //= 2
    limits = {kind: learned([measure(pixels)] * 3) for kind, pixels in (("grey", grey), ("coloured", coloured))}
    assert (limits["grey"].grey, limits["coloured"].grey) == (True, False)
    stained = grey.copy()
    stained[100:140, 90:150] = (200, 60, 60)
    assert unfit(measure(stained), limits["grey"]) is None  # a defect, not another camera
    for kind, pixels in (("grey", coloured), ("coloured", grey)):
        found = unfit(measure(pixels), limits[kind])
        assert found is not None and found[0] is Reason.UNFIT_SIZE


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (9, 3)},
        {"mean": (0, 256)},
        {"white": (0, float("nan"))},
        {"seam": (-0.1, 1)},
        {"edges": (0, "inf")},
        {"frames": -1},
        {"size": (0, 5)},
        {"unknown": (0, 1)},
    ],
)
def test_limits_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FitnessLimits.model_validate({**FitnessLimits().model_dump(), **wrong})


SETS = [
    pytest.param(name, marks=pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"no {DATA / name}"))
    for name in ("cookies", "magnetic_tile")
]
SEEN: dict[str, Callable[[Pixels], Pixels]] = {
    "lens cap": lambda frame: frame // 5,
    "lamp off": lambda frame: (frame * 0.03 ** (1 / 2.2)).astype(np.uint8),
    "an eighth is missing": lambda frame: with_rows(frame, 128, 1 / 8),
    "last tenth black": lambda frame: with_rows(frame, 0, 0.1),
    "defocus": lambda frame: blurred(frame, 0.04),
    "saturation": lambda frame: np.minimum(frame * (255 / np.quantile(frame.max(axis=2), 0.4)), 255).astype(np.uint8),
    "noise alone": lambda frame: (np.zeros_like(frame) + RNG.normal(110, 8, (*frame.shape[:2], 1))).astype(np.uint8),
}


@pytest.mark.parametrize("name", SETS)
def test_photographs(name: str) -> None:
    limits = learned([measure(pixels) for pixels in read(DATA / name / "train/good")])
    good = read(DATA / name / "test/good")
    refused = [found for pixels in good if (found := unfit(measure(pixels), limits))]
    assert len(refused) <= 0.01 * len(good), refused
    assert [unfit(measure(pixels), ANYTHING) for pixels in good] == [None] * len(good)
    few = good[:: max(1, len(good) // 25)]
    for fault, make in SEEN.items():
        found = [unfit(measure(make(pixels)), limits) is not None for pixels in few]
        assert np.mean(found) >= 0.95, fault


@pytest.fixture
def inspector(tiny_bundle: Path, tmp_path: Path) -> Any:
    with Inspector.open(tiny_bundle, tmp_path / "station", "cpu") as opened:
        yield opened


@pytest.mark.parametrize("fault", ["black", "noise", "half black"])
def test_an_unfit_frame_is_not_inspected(fault: str, inspector: Inspector) -> None:
    pixels, reason = NOTHING[fault]
    found = inspector.inspect(pixels, deadline_ms=60_000)
    assert (found.verdict, found.reason_code) == (Verdict.NOT_INSPECTED, reason)
    assert found.reason and "look at" in found.reason and found.score is None and found.features is None
    assert "fitness" in found.timings_ms and "clip_encoder" not in found.timings_ms and found.deadline_met


def test_enrolled_limits_stay_with_the_bank(inspector: Inspector, tiny_bundle: Path, tmp_path: Path) -> None:
    inspector.enroll([part(seed) for seed in range(4)], object="plate")
    dark = part(9) // 2
    assert inspector.inspect(dark, review=False).reason_code is None  # the bundle's own object: anything goes
    assert inspector.inspect(dark, object="plate").reason_code is Reason.UNFIT_DARK
    with Inspector.open(tiny_bundle, tmp_path / "station", "cpu", stream=10) as again:
        found = again.inspect(dark, object="plate")
        assert found.reason_code is Reason.UNFIT_DARK and "4 good frames" in (found.reason or "")
        assert again.compared_with("plate")["fitness"] == inspector.compared_with("plate")["fitness"]


def test_nothing_is_enrolled_with_an_unfit_frame(inspector: Inspector) -> None:
    with pytest.raises(FrameError, match=r"^lid off is unfit to be enrolled: too dark: .* of any frame, at least 16"):
        inspector.enroll([part(), Frame(level(0), "lid off")], object="plate")
    assert inspector.station.enrolled() == []


def test_calibration_leaves_unfit_frames_out_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    for number, pixels in enumerate([level(0), *(part(seed) for seed in range(7)), part(7) // 2]):
        cv2.imwrite(str(tmp_path / f"good/{number}.png"), pixels)
    loose = Targets(overkill=0.5, suspects=0.5, confidence=0.9)
    paths = list_images([str(tmp_path / "good")])
    with Inspector.open(bundle.path, tmp_path / "station", "cpu", calibrated=False) as inspector:
        found = calibrate(inspector, paths[:-1], object="plate", targets=loose)
        assert len(found.frames) == 7 and found.fitness is not None and found.fitness.frames == 7
        assert f"1 of the 8 frames given are unfit and not counted (the first, {paths[0]}: too dark" in found.promise
    assert Station(tmp_path / "station", bundle).load_calibration("plate", found.bank) == found
    with Inspector.open(bundle.path, tmp_path / "station", "cpu") as inspector:
        assert inspector.inspect(paths[-1], object="plate").reason_code is Reason.UNFIT_DARK
        inspector.enroll([part(seed) for seed in range(20, 23)], object="plate")
        assert inspector._source("plate").fitness.frames == 3


def test_every_number_has_a_limit() -> None:
    assert set(asdict(measure(part()))) - {"coloured"} == set(FitnessLimits.model_fields) - {"frames", "grey"}
