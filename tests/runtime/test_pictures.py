"""What a person sees of a map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vmad_edge.runtime.bundle import Thresholds
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Inspection, NearestNormal, Region, Verdict, find_regions, on_map
from vmad_edge.runtime.pictures import NUMBERED, Scale, heat, heated, places, sheet, thumbnail, write_map

THRESHOLDS = Thresholds(good_below=0.2, defect_above=0.5)
GREY = np.full((1, 9, 3), 100, np.uint8)


def bump(peak: float, shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A map with one smooth peak."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (peak * np.exp(-((x - 40) ** 2 + (y - 20) ** 2) / 90)).astype(np.float32)


def inspection(score: float, heat_map: np.ndarray) -> Inspection:
    pixels = np.full((*heat_map.shape, 3), 128, np.uint8)
    return Inspection(Frame(pixels, "x"), "part", Verdict.UNCERTAIN, score=score, map=heat_map)


def test_colours_begin_where_uncertain_does_and_change_where_defect_does() -> None:
    values = np.array([[-1, 0, 0.19, 0.2, 0.49, 0.5, 0.75, 7, np.nan]], np.float32)
    shown = heat(GREY, values, Scale(0.2, 0.5, 0.75))[0].astype(int)
    np.testing.assert_array_equal(shown[:3], GREY[0, :3])  # the photograph
    red, green, blue = shown.T
    assert (green[3:5] > blue[3:5] + 25).all() and (red[3:5] > 150).all()  # amber
    assert (green[5:8] < 90).all() and (red[5:8] > 150).all()  # red, magenta
    assert blue[6] > blue[5] + 60
    np.testing.assert_array_equal(shown[7], shown[6])  # no deeper
    assert red[8] == green[8] == blue[8] != 100  # nobody looked
    lightness = cv2.cvtColor(shown[None].astype(np.uint8), cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    assert lightness[3:5].min() > lightness[5:8].max() + 35  # told apart without hue


def test_what_was_not_inspected_is_hatched() -> None:
    shown = heat(np.zeros((64, 64, 3), np.uint8), np.full((64, 64), np.nan, np.float32), Scale(0.2, 0.5, 0.75))
    values, counts = np.unique(shown, return_counts=True)
    assert list(values) == [64, 200] and counts.min() > 0.15 * counts.sum()


@pytest.mark.parametrize("peak", [0.05, 0.3, 0.9])
@pytest.mark.parametrize(
    "score,amber,red", [(0.19, False, False), (0.2, True, False), (0.49, True, False), (0.5, True, True)]
)
def test_the_worst_place_looks_as_the_verdict_says(peak: float, score: float, amber: bool, red: bool) -> None:
    """However far smoothing pressed the map."""
    shown = heated(inspection(score, bump(peak)), np.full((48, 64, 3), 128, np.uint8), THRESHOLDS).astype(int)
    worst = shown[20, 40]
    assert bool((worst != 128).any()) is amber
    assert bool(worst[1] < 90) is red


@pytest.mark.parametrize("score", [0.2, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("peak", [0.05, 0.3, 0.9])
def test_regions_are_what_is_coloured(peak: float, score: float) -> None:
    heat_map = bump(peak)
    shown = heated(inspection(score, heat_map), np.full((48, 64, 3), 128, np.uint8), THRESHOLDS)
    coloured = (shown != 128).any(axis=2)
    (region,) = find_regions(heat_map >= on_map(THRESHOLDS.good_below, score, heat_map), heat_map)
    assert region.area == coloured.sum() > 0


def test_without_thresholds_the_highest_tenth_has_one_hue() -> None:
    values = np.random.default_rng(0).random((50, 50)).astype(np.float32)
    shown = heated(inspection(0.4, values), np.full((50, 50, 3), 128, np.uint8), None).astype(int)
    coloured = (shown != 128).any(axis=2)
    np.testing.assert_array_equal(coloured, values >= np.quantile(values, 0.9))
    red, _, blue = shown[coloured].T
    assert (blue > red).all()  # neither verdict's hue


@pytest.mark.parametrize("size", [(48, 64), (8, 800), (800, 8), (2000, 1500)])
@pytest.mark.parametrize("corner", [True, False])
def test_pictures_of_any_frame(size: tuple[int, int], corner: bool) -> None:
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    step_x, step_y = max(1, width // 8), max(1, height // 8)
    place = (0, 0, step_x, step_y) if corner else (width - step_x, height - step_y, width, height)
    nearest = NearestNormal("reference.png", (0, 0, 4, 4), 0.9, jpeg, (0, 7) if corner else (3, 3), 8, place)
    regions = tuple(Region((x, 0, x + 1, 1), 1, 0.4, (x, 0.0)) for x in range(min(width, NUMBERED + 3)))
    made = Inspection(
        Frame(pixels, "x"), "part", Verdict.DEFECT, score=0.5, map=np.zeros(size, np.float32), regions=regions
    )
    made = replace(made, nearest_normal=nearest, mask=np.ones(size, bool))
    small, beside, whole = thumbnail(made, THRESHOLDS), places(made), sheet(made, THRESHOLDS, "words " * 99)
    assert small is not None and max(small.shape) == 320
    assert whole is not None and max(whole.shape) < 3000
    assert beside is not None and beside.shape[1] <= 2 * 200 + 8


def test_a_frame_that_could_not_be_read_has_no_picture() -> None:
    nothing = Inspection(Frame(np.zeros((0, 0, 3), np.uint8), "x"), "part", Verdict.NOT_INSPECTED)
    assert (thumbnail(nothing, None), places(nothing), sheet(nothing, None, "")) == (None, None, None)


def test_places_show_both_patches_in_boxes_amid_as_much_around_them() -> None:
    """The frame's right half is white, as is the normal one's; both patches lie on the edge."""
    frame = np.zeros((160, 160, 3), np.uint8)
    frame[:, 80:] = 255
    jpeg = cv2.imencode(".png", cv2.resize(frame, (32, 32), interpolation=cv2.INTER_NEAREST))[1].tobytes()
    nearest = NearestNormal("reference.png", (80, 80, 90, 90), 0.9, jpeg, (8, 8), 16, (80, 80, 90, 90))
    shown = places(replace(inspection(0.5, bump(0.5)), frame=Frame(frame, "x"), nearest_normal=nearest))
    assert shown is not None and shown.shape == (200, 408, 3)
    left, right = shown[:, :200].astype(int), shown[:, 208:].astype(int)
    assert abs(left - right).mean() < 5
    edge = int(np.argmax(left[5, :, 0] > 128))
    assert edge == pytest.approx(200 * 3 / 7, abs=2)  # three patches before it, four from there on


def test_a_map_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(37, 53)).astype(np.float32)
    values[0, :4] = np.nan, np.inf, -0.0, 1e-42
    write_map(tmp_path / "map.tiff", values)
    with Image.open(tmp_path / "map.tiff") as read:
        assert read.mode == "F" and read.tag_v2[259] == 1  # not compressed: readers differ in what they unpack
        assert np.asarray(read).tobytes() == values.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["map.tiff"]
