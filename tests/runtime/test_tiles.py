"""Regions of interest, ignore masks and tiles: geometry against NumPy, inspections against one tile at a time."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from vmad_edge.runtime.bundle import Bundle, seal
from vmad_edge.runtime.calibrate import calibrate
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.errors import FrameError, VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Features, Inspection, Reason, Region, Verdict
from vmad_edge.runtime.inspector import Inspector, _reviewed
from vmad_edge.runtime.stages.preprocess import View, clip_pixels
from vmad_edge.runtime.stages.similarity import References, inspected_patches, patch_box, spread
from vmad_edge.runtime.stages.tiles import WHOLE, Layout, Tile, Tiles, merged
from vmad_edge.runtime.systems.vmad import Finding

FILL = (122, 116, 104)
GRID, CLIP = 4, 56
"""Of the tiny bundle."""


def image(seed: int, height: int = 240, width: int = 320) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def blank(height: int, width: int) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), "blank")


@pytest.fixture
def inspector(tiny_bundle: Path, tmp_path: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, tmp_path / "station", "cpu") as opened:
        yield opened


# ------------------------------------------------------------------------------------------------------ geometry

SIZES = [(4096, 4096), (3000, 4096), (4096, 700), (240, 321), (97, 89), (8, 800)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count,overlap", [(1, 0.25), (2, 0.1), (4, 0.25), (7, 0.5), (10, 0.3)])
def test_tiles_cover_every_pixel(size: tuple[int, int], count: int, overlap: float) -> None:
    height, width = size
    tiles = Layout(tiles=Tiles(count=count, overlap=overlap)).cut(blank(height, width), FILL)
    covered = np.zeros(size, int)
    for tile in tiles:
        left, top, right, bottom = tile.box
        assert tile.size == (bottom - top, right - left) and min(left, top) >= 0 and right <= width and bottom <= height
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1 or (overlap == 0.5 and count > 1)
    spans = {(tile.box[0], tile.box[2]) if width >= height else (tile.box[1], tile.box[3]) for tile in tiles}
    ordered = sorted(spans)
    assert len(ordered) == count
    for (start, stop), (following, _) in pairwise(ordered):
        assert stop - following >= overlap * (stop - start) - 1
    if count > 1 and min(size) > max(size) / count * 2:
        assert {tile.size[0] - tile.size[1] for tile in tiles} == {0}  # square: a centre crop takes nothing


@pytest.mark.parametrize("count,overlap", [(2, 0.1), (4, 0.25), (7, 0.5)])
def test_what_tiles_agree_on_stays(count: int, overlap: float) -> None:
    """A constant, and a slope, cut into tiles and merged."""
    tiles = Layout(tiles=Tiles(count=count, overlap=overlap)).cut(blank(300, 400), FILL)
    slope = np.add.outer(np.arange(300), 2 * np.arange(400)).astype(np.float32) / 1000
    for whole in (np.full((300, 400), 0.7, np.float32), slope):
        parts = ((tile, whole[tile.box[1] : tile.box[3], tile.box[0] : tile.box[2]]) for tile in tiles)
        np.testing.assert_allclose(merged(parts, (300, 400)), whole, rtol=1e-5)


def test_between_two_tiles_there_is_no_step() -> None:
    """One says 0 and the other 1: from the one to the other straight, as NumPy interpolates."""
    tiles = Layout(tiles=Tiles(count=2, overlap=0.25)).cut(blank(30, 700), FILL)
    heat = merged(((t, np.full(t.size, n, np.float32)) for n, t in enumerate(tiles)), (30, 700))
    (_, _, stop, _), (start, _, _, _) = (tile.box for tile in tiles)
    np.testing.assert_allclose(heat[15], np.interp(np.arange(700), (start - 1, stop), (0, 1)), atol=1e-6)
    assert np.ptp(heat, axis=0).max() < 1e-6


def test_what_one_tile_has_not_seen_another_says() -> None:
    tiles = Layout(tiles=Tiles(count=2, overlap=0.5)).cut(blank(30, 90), FILL)
    values = [np.full(tile.size, 1 + n, np.float32) for n, tile in enumerate(tiles)]
    values[0][:, 40:] = np.nan
    heat = merged(zip(tiles, values, strict=True), (30, 90))
    assert np.isfinite(heat).all() and (heat[:, 40:] == 2).all()
    values[1][:] = np.nan
    assert np.isnan(merged(zip(tiles, values, strict=True), (30, 90))[:, 40:]).all()


def test_nearest_inspected_patches_speak_for_those_ignored() -> None:
    """Against a search through all of them."""
    rng = np.random.default_rng(0)
    score, inspected = rng.random(64).astype(np.float32), rng.random(64) < 0.3
    y, x = np.divmod(np.arange(64), 8)
    distance = np.hypot(y[:, None] - y, x[:, None] - x)[:, inspected]
    found = spread(score, inspected)
    for row, value in enumerate(found):
        nearest = np.isclose(distance[row], distance[row].min(), atol=0.1)
        assert value in score[inspected][nearest]
    np.testing.assert_array_equal(found[inspected], score[inspected])
    assert np.isnan(spread(score, np.zeros(64, np.bool_))).all()


# --------------------------------------------------------------------------------------------- what does not fit

MASK = np.zeros((240, 320), np.bool_)
MASK[:120, :160] = True

LAYOUTS: dict[str, tuple[Callable[[], object], str]] = {
    "nothing inside": (lambda: Layout((10, 10, 10, 40)), r"at least 8 wide and high, got 10,10,10,40"),
    "left of the frame": (lambda: Layout((-1, 0, 40, 40)), "from 0,0 on"),
    "three numbers": (lambda: Layout((1, 2, 30)), "got 1,2,30"),  # type: ignore[arg-type]
    "parts of pixels": (lambda: Layout((0.5, 0, 40, 40)), "whole pixels, .*got 0.5,0,40,40"),  # type: ignore[arg-type]
    "beyond the mask": (lambda: Layout((0, 0, 321, 240), MASK), r"mask has 320×240 pixels; .*0,0,321,240 reaches"),
    "all ignored": (lambda: Layout((0, 0, 100, 100), MASK), "leaves nothing to inspect"),
    "nothing ignored": (lambda: Layout(None, ~np.ones((9, 9), np.bool_)), "ignores nothing: expected white where not"),
    "a grey mask": (lambda: Layout(None, np.zeros((9, 9), np.uint8)), r"of bool.*got \[9, 9\] uint8"),  # type: ignore[arg-type]
    "a coloured mask": (lambda: Layout(None, np.zeros((9, 9, 3), np.bool_)), r"got \[9, 9, 3\] bool"),
    "no tile": (lambda: Tiles(count=0), "expected 1 to 32 tiles along the longer side, got 0"),
    "too many tiles": (lambda: Tiles(count=33), "got 33"),
    "tiles that are one another": (lambda: Tiles(count=2, overlap=1), "overlap of 0.1 to 0.5 of a tile, got 1"),
    "tiles side by side": (lambda: Tiles(count=2, overlap=0), "got 0"),
    "no number": (lambda: Tiles(count=2, overlap=float("nan")), "got nan"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_is_no_layout(kind: str) -> None:
    make, says = LAYOUTS[kind]
    with pytest.raises((VmadError, ValidationError), match=says):
        make()


@pytest.mark.parametrize(
    "layout,size,says",
    [
        (Layout((0, 0, 320, 240)), (240, 300), "300×240 pixels; the region of interest 0,0,320,240 reaches beyond"),
        (Layout(None, MASK), (240, 300), "300×240 pixels; the ignore mask has 320×240"),
        (Layout(tiles=Tiles(count=32)), (90, 100), "32 tiles along the longer side would have 5 each"),
        (Layout((0, 0, 320, 240), MASK, Tiles(count=9)), (240, 320), None),
        (WHOLE, (8, 8), None),
    ],
)
def test_frames_that_do_not_fit(layout: Layout, size: tuple[int, int], says: str | None, inspector: Inspector) -> None:
    fault = layout.fault(size)
    assert fault is None if says is None else fault is not None and says in fault
    if says is not None and fault is not None:
        inspector.enroll([image(n) for n in range(2)], layout=layout)
        found = inspector.inspect(image(3, *size), review=False)
        assert (found.verdict, found.reason_code) == (Verdict.NOT_INSPECTED, Reason.UNFIT_SIZE)
        assert found.reason == fault
        with pytest.raises(FrameError, match=r"cannot be enrolled: .*pixels"):
            inspector.enroll([image(3, *size)], layout=layout)


# -------------------------------------------------------------------------------------------------- inspections


EDGE = np.zeros((240, 320), np.bool_)
EDGE[:, :9] = True


def framed(seed: int) -> NDArray[np.uint8]:
    """Painted over at the edge already, as the mask does it."""
    return np.where(EDGE[:, :, None], np.array(FILL, np.uint8), image(seed))


@pytest.mark.parametrize("layout", [Layout((0, 0, 320, 240)), Layout(None, EDGE)])
def test_a_layout_that_leaves_nothing_out_changes_nothing(layout: Layout, inspector: Inspector) -> None:
    found = []
    for name, chosen in (("whole", WHOLE), ("laid out", layout)):
        references = inspector.enroll([framed(n) for n in range(4)], object=name, layout=chosen)
        found.append((inspector.inspect(framed(9), object=name, review=False), references))
    (whole, references), (laid_out, again) = found
    assert whole.score == laid_out.score and references.thresholds == again.thresholds
    np.testing.assert_array_equal(references.features, again.features)
    assert whole.map is not None and laid_out.map is not None
    np.testing.assert_allclose(laid_out.map[~EDGE], whole.map[~EDGE], rtol=1e-6)
    assert whole.nearest_normal is not None and whole.nearest_normal == laid_out.nearest_normal


def columns(width: int) -> NDArray[np.bool_]:
    """[240,width]: thin ones through the centres of all columns of patches but the first."""
    mask = np.zeros((240, width), np.bool_)
    for centre in range(22, width, 15):
        mask[:, centre - 1 : centre + 2] = True
    return mask


@pytest.mark.parametrize(
    "ignored,view",
    [
        (columns(240), View(0, 0, 240, 240)),
        (MASK, View(40, 0, 280, 240)),
        (MASK, View(0, -40, 320, 280)),
        (np.add.outer(np.arange(97), np.arange(89)) > 60, View(0, 4, 89, 93)),
        (np.random.default_rng(0).random((9, 9)) < 0.5, View(0, 0, 9, 9)),  # patches smaller than a pixel
        (np.random.default_rng(1).random((60, 50)) < 0.9, View(-5, 0, 55, 60)),
    ],
)
def test_a_patch_is_left_out_only_if_all_of_it_is_ignored(ignored: NDArray[np.bool_], view: View) -> None:
    """Against each pixel's own patch, of those whose centre is on the frame."""
    grid, size = 16, (ignored.shape[0], ignored.shape[1])
    found, on_frame = (inspected_patches(view, grid, size, mask).reshape(grid, grid) for mask in (ignored, None))
    assert not (found & ~on_frame).any()
    y, x = np.nonzero(~ignored)
    row = np.floor((y + 0.5 - view.top) * grid / (view.bottom - view.top)).astype(int)
    column = np.floor((x + 0.5 - view.left) * grid / (view.right - view.left)).astype(int)
    shown = (row >= 0) & (row < grid) & (column >= 0) & (column < grid)
    seen = np.zeros((grid, grid), np.bool_)
    seen[row[shown], column[shown]] = True
    assert not (seen & on_frame & ~found).any()
    for number in np.flatnonzero(found):  # with what it has of pixels at its edges
        left, top, right, bottom = patch_box(int(number), view, grid, size)
        assert not ignored[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1].all()
    if ignored.shape == (240, 240):
        assert found.all()  # 7.8% cannot blind 15 of 16
    if ignored is MASK and view.top == 0:  # of 15 pixels, from 40 on
        expected = np.ones((grid, grid), np.bool_)
        expected[:8, :8] = False
        np.testing.assert_array_equal(found, expected)


def test_a_band_beside_the_mask_is_seen(inspector: Inspector) -> None:
    """Of the patches 80…160 the mask hides all but 15 columns, their centres too."""
    mask = np.zeros((240, 320), np.bool_)
    mask[:, :145] = True
    bank = inspector.enroll([image(n) for n in range(4)], layout=Layout(None, mask))
    bank.beside = None  # its rows alone
    broken = image(0).copy()
    broken[70:110, 145:159] = (255, 0, 0)
    good, bad = (inspector.inspect(pixels, review=False) for pixels in (image(0), broken))
    assert good.score is not None and bad.score is not None and bad.score > good.score + 0.01
    assert bad.nearest_normal is not None and bad.nearest_normal.place == (80, 60, 160, 120)
    assert bad.map is not None and good.map is not None
    assert np.nanargmax(bad.map - good.map) % 320 < 190
    np.testing.assert_array_equal(np.isfinite(bad.map), ~mask)


LAID_OUT = {
    "region": Layout((40, 30, 300, 200)),
    "mask": Layout(None, MASK),
    "tiles": Layout(tiles=Tiles(count=3)),
    "all": Layout((40, 30, 300, 220), MASK, Tiles(count=3, overlap=0.3)),
}


@pytest.mark.parametrize("kind", ["region", "mask", "all"])
def test_what_is_not_inspected_changes_nothing(kind: str, inspector: Inspector) -> None:
    layout = LAID_OUT[kind]
    inspector.enroll([image(n) for n in range(4)], layout=layout)
    left, top, right, bottom = layout.region or (0, 0, 320, 240)
    inside = np.zeros((240, 320), np.bool_)
    inside[top:bottom, left:right] = True
    inside &= ~(MASK if layout.ignored is not None else np.zeros_like(MASK))
    other = np.where(inside[:, :, None], image(9), image(9) // 2 + 60)
    first, second = (inspector.inspect(pixels, review=False) for pixels in (image(9), other))
    assert first.map is not None and first.verdict is not Verdict.NOT_INSPECTED, first.reason
    np.testing.assert_array_equal(np.isfinite(first.map), inside)
    assert first.score == second.score and first.scope_distance == second.scope_distance
    np.testing.assert_array_equal(first.map, second.map)
    assert all(inside[round(y), round(x)] for x, y in (region.centroid for region in first.regions))


@pytest.mark.parametrize("kind", LAID_OUT)
def test_a_frame_scores_as_its_worst_tile_by_itself(kind: str, inspector: Inspector) -> None:
    """Each tile encoded alone and compared with all enrolled rows by NumPy."""
    layout, spec = LAID_OUT[kind], inspector.bundle.manifest.similarity
    bank = inspector.enroll([image(n) for n in range(4)], layout=layout)
    bank.beside = None  # its rows alone
    found = inspector.inspect(image(9), review=False)

    def of_tiles(pixels: NDArray[np.uint8], rows: NDArray[Any]) -> list[float]:
        scores = []
        for tile in layout.cut(Frame(pixels, "frame"), FILL):
            shown, view = clip_pixels(tile.frame, inspector.bundle.manifest.clip)
            (patches,) = inspector._screen._clip_encoder.run({"clip_pixels": shown})["patches"]
            seen = np.zeros(GRID**2, np.bool_)
            for patch in range(GRID**2):
                x0, y0, x1, y1 = patch_box(patch, view, GRID, tile.size)
                seen[patch] = tile.ignored is None or not tile.ignored[y0:y1, x0:x1].all()
            cosine = unit(patches[seen]) @ unit(rows).T
            distance = 1 - cosine.max(axis=1)
            scores.append(float(distance.max()))
        return scores

    assert spec.score_rule == "max" or GRID**2 < 200  # then one patch is the top 1%
    assert found.score == pytest.approx(max(of_tiles(image(9), bank.features)), abs=1e-5)
    assert found.features is not None and found.features.tile is not None
    tiles = [tile.box for tile in layout.cut(Frame(image(9), "frame"), FILL)]
    assert tiles.index(found.features.tile.box) == int(np.argmax(of_tiles(image(9), bank.features)))
    assert found.features.patches_multi.shape[1] == GRID**2
    left, top, right, bottom = found.features.tile.box
    assert found.nearest_normal is not None
    x0, y0, x1, y1 = found.nearest_normal.place
    assert left <= x0 < x1 <= right and top <= y0 < y1 <= bottom


def unit(rows: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_enrolled_frames_are_left_out_with_all_their_tiles(inspector: Inspector) -> None:
    """Against a loop in NumPy; of a frame's tiles the worst counts."""
    bank = inspector.enroll([image(n) for n in range(5)], layout=LAID_OUT["tiles"])
    assert len(bank.frames) == 5 and bank.scope is not None and len(bank.scope.descriptors) == 5
    scores = []
    for frame in bank.frames:
        assert len(frame.views) == len(frame.jpegs) == 9
        own = bank.features[frame.start : frame.stop]
        others = np.delete(bank.features, range(frame.start, frame.stop), axis=0)
        scores.append(bank.fused(own, 1 - (unit(own) @ unit(others).T).max(axis=1).astype(np.float32)).max())
    assert bank.thresholds is not None and bank.thresholds.good_below == pytest.approx(max(scores), abs=1e-5)


def test_the_nearest_normal_place_is_one_of_the_whole_frame(inspector: Inspector) -> None:
    """A tile of an enrolled frame, found again in it."""
    frames = [image(n) for n in range(3)]
    bank = inspector.enroll(frames, layout=LAID_OUT["all"])
    for row in (0, 17, len(bank.features) - 1):
        nearest = bank.nearest(row, 1.0, (0, 0, 8, 8), GRID)
        left, top, right, bottom = nearest.box
        assert 40 <= left < right <= 300 and 30 <= top < bottom <= 220 and not MASK[top:bottom, left:right].all()
        frame = frames[next(n for n, f in enumerate(bank.frames) if f.start <= row < f.stop)]
        y, x = nearest.cell
        scale = CLIP // GRID
        whole = np.asarray(Image.open(io.BytesIO(nearest.jpeg)))
        picture = whole[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
        shown = frame[top:bottom, left:right]
        if not MASK[top:bottom, left:right].any():
            np.testing.assert_allclose(picture.mean((0, 1)), shown.mean((0, 1)), atol=12)


# ------------------------------------------------------------------------------------------------------- reviews


def planted() -> tuple[Inspection, Tile]:
    tile = Layout((40, 30, 300, 220), MASK, Tiles(count=3)).cut(Frame(image(0), "frame"), FILL)[0]
    patches, view = np.zeros((3, 16, 8), np.float32), View(0, 0, *tile.size[::-1])
    features = Features(patches[0], patches[1:], view, tile)
    heat = np.zeros((240, 320), np.float32)
    return Inspection(Frame(image(0), "frame"), "part", Verdict.UNCERTAIN, map=heat, features=features), tile


def test_a_mask_comes_back_where_it_lies(inspector: Inspector) -> None:
    inspection, tile = planted()
    mask = np.zeros(tile.size, np.bool_)
    mask[-13:-3, -30:-10] = True
    mask[0, 0] = True  # ignored
    scores = np.linspace(0, 1, 16, dtype=np.float32)
    finding = Finding(0.9, "Yes.", mask, seg_forced=False, stopped=None, token_scores=scores)
    after = _reviewed(inspection, finding, {}, inspector.bundle.for_review)
    _, _, right, bottom = tile.box
    assert after.regions[0].box == (right - 30, bottom - 13, right - 10, bottom - 3) and len(after.regions) == 1
    assert after.mask is not None and after.mask.sum() == 10 * 20
    assert after.language_map is not None and after.language_map.shape == (240, 320)
    left, top, _, _ = tile.box
    seen = np.zeros((240, 320), np.bool_)
    seen[top:bottom, left:right] = True
    np.testing.assert_array_equal(np.isfinite(after.language_map), seen & ~MASK)


@pytest.mark.parametrize("marked", ["nothing", "a block", "the tile"])
def test_regions_that_the_mask_does_not_touch_stay(marked: str, inspector: Inspector) -> None:
    """One of another tile, one in the review's, and one there that the block reaches into."""
    inspection, tile = planted()
    left, _, right, bottom = tile.box
    beyond = Region((280, 200, 299, 219), 300, 0.4, (290, 210))
    beside = Region((left + 1, bottom - 9, left + 9, bottom - 1), 60, 0.9, (left + 5, bottom - 5))
    reached = Region((right - 19, bottom - 16, right - 9, bottom - 8), 70, 0.3, (right - 14, bottom - 12))
    mask = np.full(tile.size, marked == "the tile")
    if marked == "a block":
        mask[-10:, -10:] = True
    finding = Finding(0.9, "Yes.", mask, seg_forced=False, stopped=None)
    screened = replace(inspection, regions=(beyond, reached, beside))
    after = _reviewed(screened, finding, {}, inspector.bundle.for_review)
    kept = {"nothing": {beyond, beside, reached}, "a block": {beyond, beside}, "the tile": {beyond}}[marked]
    assert set(after.regions) & set(screened.regions) == kept
    assert len(after.regions) == len(kept) + (marked != "nothing")
    assert [region.area for region in after.regions] == sorted((r.area for r in after.regions), reverse=True)


def test_reviews_of_one_tile_of_many_settle_nothing(inspector: Inspector, tmp_path: Path) -> None:
    """Nobody asks them when the object is calibrated, so they have no rule; of whole frames they are asked."""
    paths = [str(tmp_path / f"{n}.png") for n in range(20, 28)]
    for number, path in enumerate(paths):
        Image.fromarray(image(20 + number)).save(path)
    for name, layout in (("tiled", LAID_OUT["tiles"]), ("whole", WHOLE)):
        inspector.enroll([image(n) for n in range(4)], object=name, layout=layout)
        made = calibrate(inspector, paths[:4], paths[4:], object=name)
        assert all((frame.p_yes is None) is (name == "tiled") for frame in made.frames)
        assert made.review is None or name == "whole"


def test_a_review_sees_the_worst_tile(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector.enroll([image(n) for n in range(4)], layout=LAID_OUT["all"])
    screened = inspector.inspect(image(9), review=False)
    assert screened.features is not None and screened.features.tile is not None
    sent: list[tuple[Frame, Features]] = []
    submit = inspector._reviews.submit

    def spy(frame: Frame, features: Features, *rest: Any) -> Any:
        sent.append((frame, features))
        return submit(frame, features, *rest)

    monkeypatch.setattr(inspector._reviews, "submit", spy)
    after = inspector.review(screened).wait()
    assert after.reason is None and after.p_yes is not None
    ((frame, features),) = sent
    left, top, right, bottom = screened.features.tile.box
    expected = image(9)[top:bottom, left:right].copy()
    hidden = MASK[top:bottom, left:right]
    np.testing.assert_array_equal(frame.pixels[~hidden], expected[~hidden])
    assert features.patches.shape == (GRID**2, screened.features.patches.shape[1])
    assert after.mask is None or (after.mask.shape == (240, 320) and not after.mask[MASK].any())


# ------------------------------------------------------------------------------------------------------ stations


@pytest.mark.parametrize("kind", LAID_OUT)
def test_a_layout_is_kept_with_the_bank(kind: str, inspector: Inspector, tiny_bundle: Path, tmp_path: Path) -> None:
    layout = LAID_OUT[kind]
    made = inspector.enroll([image(n) for n in range(4)], layout=layout)
    first = inspector.inspect(image(9), review=False)
    with Inspector.open(tiny_bundle, tmp_path / "station", "cpu") as later:
        again = later.inspect(image(9), review=False)
        kept = later.references()
        assert kept is not None and kept.layout.key == layout.key and kept.frames == made.frames
        assert layout.in_words() in later.told()
        assert later.compared_with() == inspector.compared_with()
    assert first.score == again.score and first.regions == again.regions
    inspector.enroll([image(n) for n in range(4)], keep=False)
    assert first.layout is layout and later.compared_with() != inspector.compared_with()


def test_streams_see_tiles_too(tiny_bundle: Path, tmp_path: Path) -> None:
    with Inspector.open(tiny_bundle, tmp_path, "cpu", stream=10) as inspector:
        inspector.enroll([image(n) for n in range(4)], layout=LAID_OUT["all"])
        scores = [inspector.inspect(image(n), review=False) for n in range(20, 26)]
    assert all(found.score is not None and found.compared_with == "references and stream" for found in scores)


def test_frames_beyond_what_a_camera_has(inspector: Inspector) -> None:
    wide = np.tile(image(0, 100, 900), (1, 10, 1))
    bank = inspector.enroll([wide], layout=Layout(tiles=Tiles(count=32, overlap=0.1)))
    found = inspector.inspect(wide, review=False)
    assert isinstance(bank, References) and len(bank.frames[0].views) == 32
    assert found.map is not None and found.map.shape == (100, 9000) and np.isfinite(found.map).all()


def test_a_mask_that_leaves_only_what_is_cropped(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "cropping")
    manifest = Bundle.open(folder).manifest
    seal(folder, manifest.model_copy(update={"clip": manifest.clip.model_copy(update={"resize": "shortest_edge"})}))
    mask = np.ones((240, 320), np.bool_)
    mask[:, :20] = False
    with (
        Inspector.open(folder, tmp_path, "cpu") as inspector,
        pytest.raises(FrameError, match="leaves no patch to inspect"),
    ):
        inspector.enroll([image(0)], layout=Layout(None, mask))


# ------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    for seed in range(4):
        Image.fromarray(image(seed)).save(tmp_path / f"good/{seed}.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(MASK[1:]).save(tmp_path / "small.png")
    Image.fromarray(np.ones_like(MASK)).save(tmp_path / "all.png")
    Image.merge("LA", [Image.new("L", (320, 240)), Image.fromarray(MASK).convert("L")]).save(tmp_path / "alpha.png")
    return tmp_path


def test_enrolled_by_command(tiny_bundle: Path, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--station", str(parts / "station"), "--device", "cpu", "--json"]
    layout = ["--roi", "40,30,300,220", "--ignore", str(parts / "mask.png"), "--tiles", "3", "--overlap", "0.3"]
    assert main(["enroll", str(tiny_bundle), str(parts / "good"), *layout, *common]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["inspected"] == LAID_OUT["all"].in_words() and told["frames"] == 4
    assert main(["info", str(tiny_bundle), *common]) == 0
    assert json.loads(capsys.readouterr().out)["inspected"] == {"part": told["inspected"]}
    main(["inspect", str(tiny_bundle), str(parts / "good/0.png"), "--no-review", *common[:4]])
    assert "region of interest 40,30,300,220" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "given,says",
    [
        (["--roi", "1,2,3"], "--roi: expected LEFT,TOP,RIGHT,BOTTOM in pixels, as in 100,50,900,650, got '1,2,3'"),
        (["--roi", "0,0,4000,10"], "320×240 pixels; the region of interest 0,0,4000,10 reaches beyond"),
        (["--ignore", "small.png"], "expected a mask of 240×320 pixels, found 239×320"),
        (["--ignore", "all.png"], "leaves nothing to inspect: expected black where to look"),
        (["--ignore", "alpha.png"], "ignores nothing: expected white where not to look"),
        (["--ignore", "none.png"], "none.png: not a readable mask"),
        (["--tiles", "99"], "--tiles: expected 1 to 32 tiles along the longer side, got 99"),
        (["--tiles", "4", "--overlap", "1"], "--overlap: expected an overlap of 0.1 to 0.5 of a tile, got 1"),
        (["--overlap", "0.2"], "expected --tiles N beside it"),
    ],
)
def test_commands_that_cannot_be(
    given: list[str],
    says: str,
    tiny_bundle: Path,
    parts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(parts)
    command = ["enroll", str(tiny_bundle), "good", "--station", "station", "--device", "cpu", *given]
    assert main(command) == 2
    assert says in capsys.readouterr().err and not list(parts.glob("station/*/banks"))
