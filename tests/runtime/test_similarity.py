from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from examples import clip_input
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save, save_file
from scipy import ndimage

from vmad_edge.kernels import Dtype
from vmad_edge.runtime.bundle import Similarity
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import View, clip_pixels
from vmad_edge.runtime.stages.similarity import (
    EnrolledFrame,
    NormalFeatures,
    References,
    anomaly_map,
    image_score,
    inspected_patches,
    leave_one_out_thresholds,
    token_scores,
)

RNG = np.random.default_rng(0)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def features(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("abnormal", [False, True])
def test_normal_features(abnormal: bool, tmp_path: Path) -> None:
    """Against the formula written with plain products."""
    rows = {"visual_normal": features(5, 8)} | ({"visual_abnormal": features(3, 8)} if abnormal else {})
    save_file(rows, tmp_path / "similarity.safetensors")
    patches = features(16, 8)
    found = NormalFeatures(tmp_path / "similarity.safetensors", Similarity(temperature=0.1)).compare(patches)
    cosine = {name: unit(patches) @ unit(value).T for name, value in rows.items()}
    normal = cosine["visual_normal"].max(1)
    expected = 1 - normal
    if abnormal:
        logits = np.stack([normal, cosine["visual_abnormal"].max(1)]) / 0.1
        expected = (np.exp(logits) / np.exp(logits).sum(0))[1]
    np.testing.assert_allclose(found.score, expected, atol=1e-5)
    np.testing.assert_array_equal(found.index, cosine["visual_normal"].argmax(1))


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, save({}), save({"semantic_normal": np.zeros((1, 8), np.float32)})])
def test_refuses_what_are_no_normal_features(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "similarity.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"similarity.safetensors: expected safetensors with visual_normal \[P,D\]"):
        NormalFeatures(tmp_path / "similarity.safetensors", Similarity())


@pytest.mark.parametrize("weight,abnormal", [(0.85, True), (0.3, True), (1.0, True), (0.85, False)])
def test_references_beside_normal_and_abnormal_features(weight: float, abnormal: bool, tmp_path: Path) -> None:
    """FADE's few-shot rule, written out: (1 − w) · softmax + w · 3.5 · (1 − cosine) / 2."""
    rows = {"visual_normal": features(5, 8)} | ({"visual_abnormal": features(3, 8)} if abnormal else {})
    save_file(rows, tmp_path / "similarity.safetensors")
    beside = NormalFeatures(tmp_path / "similarity.safetensors", Similarity(reference_weight=weight))
    bank, patches = features(12, 8), features(16, 8)
    found = References(bank, np.zeros(12, np.int32), (), None, beside).compare(patches)
    cosine = (unit(patches) @ unit(bank).T).max(1)
    if abnormal:
        expected = (1 - weight) * beside.compare(patches).score + weight * 3.5 * (1 - cosine) / 2
    else:
        expected = 1 - cosine
    np.testing.assert_allclose(found.score, expected, atol=1e-5)
    np.testing.assert_allclose(found.similarity, cosine, atol=1e-5)


def test_token_scores() -> None:
    tokens, normal = features(9, 8), features(1, 8)
    found = token_scores(tokens, normal, Similarity(temperature=0.1))
    cosine = (unit(tokens).astype(np.float64) @ unit(normal).astype(np.float64).T)[:, 0]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(cosine / 0.1)), atol=1e-5)
    assert (token_scores(normal, normal, Similarity()) < 0.01).all()  # the normal token itself


@pytest.mark.parametrize(
    "rule,count,expected",
    [
        ("max", 400, 399),
        ("mean_top_1_percent", 400, 397.5),  # the four highest
        ("mean_top_1_percent", 256, 254.5),  # int(2.56), as AnomalyDINO counts
        ("mean_top_1_percent", 50, 49),  # never less than one
    ],
)
def test_image_score(rule: str, count: int, expected: float) -> None:
    scores = RNG.permutation(count).astype(np.float32)
    assert image_score(scores, Similarity.model_validate({"score_rule": rule})) == expected


def test_image_score_of_nan_is_nan() -> None:
    assert np.isnan(image_score(np.array([0.1, np.nan, 0.3], np.float32), Similarity()))


@pytest.mark.parametrize("place", [0, 5, 15])
@pytest.mark.parametrize(
    "height,width,resize,pad",
    [(80, 80, "exact", False), (60, 90, "exact", False), (60, 90, "shortest_edge", False), (60, 90, "exact", True)],
)
def test_map_lies_over_what_the_encoder_saw(height: int, width: int, resize: str, pad: bool, place: int) -> None:
    """A bright square drawn where one patch looks is where the map of that patch's score is hot."""
    spec = clip_input(resize, pad, size=56)
    _, view = clip_pixels(Frame(np.zeros((height, width, 3), np.uint8), "probe"), spec)
    y, x = divmod(place, 4)
    inside = inspected_patches(view, 4, (height, width))
    score = np.zeros(16, np.float32)
    score[place] = 1
    heat = anomaly_map(score, view, Similarity(smoothing_sigma=1), 56, (height, width))
    shown = np.zeros((height, width, 3), np.uint8)
    shown[np.nan_to_num(heat) > 0.5] = 255
    seen, _ = clip_pixels(Frame(shown, "shown"), spec)
    if not inside[place]:
        pytest.skip("this patch lies on padding")
    brightness = seen[0, 0] - seen.min()
    centre = ndimage.center_of_mass(brightness)
    assert all(14 * cell - 2 <= c <= 14 * (cell + 1) + 2 for c, cell in zip(centre, (y, x), strict=True))


def test_cropped_border_is_nan() -> None:
    _, view = clip_pixels(Frame(np.zeros((60, 120, 3), np.uint8), "probe"), clip_input("shortest_edge"))
    heat = anomaly_map(np.ones(16, np.float32), view, Similarity(), 56, (60, 120))
    assert np.isnan(heat[:, :30]).all() and np.isnan(heat[:, 90:]).all()
    assert np.isfinite(heat[:, 30:90]).all()


def test_padding_is_not_inspected() -> None:
    _, view = clip_pixels(Frame(np.zeros((28, 56, 3), np.uint8), "probe"), clip_input(pad=True))
    expected = np.repeat([False, True, True, False], 4)
    np.testing.assert_array_equal(inspected_patches(view, 4, (28, 56)), expected)


def references(frames: int, patches: int = 4) -> References:
    enrolled = tuple(
        EnrolledFrame(f"f{n}", n * patches, (n + 1) * patches, (View(0, 0, 40, 20),), (20, 40), (jpeg(),), "")
        for n in range(frames)
    )
    numbers = np.tile(np.arange(patches, dtype=np.int32), frames)
    return References(features(frames * patches, 8), numbers, enrolled, None)


def jpeg() -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(target, "JPEG")
    return target.getvalue()


def test_references_compare_and_nearest() -> None:
    bank = references(3)
    found = bank.compare(bank.features[[6]] * 3)
    assert found.index[0] == 6
    assert found.score[0] == pytest.approx(0, abs=1e-6)
    nearest = bank.nearest(6, 1.0, (0, 0, 8, 8), grid=2)
    assert nearest.frame == "f1"  # row 6 is the second frame's patch 2: lower left
    assert nearest.box == (0, 10, 20, 20)
    assert nearest.picture.shape == (28, 28, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 4e-3), ("float16", 1e-3), ("int8", 1e-2)])
def test_a_reduced_bank_finds_the_same_patches(dtype: Dtype, tolerance: float) -> None:
    """Patches near enrolled ones, and what `take` leaves of the bank."""
    whole = references(5)
    reduced = References(whole.features, whole.patch, whole.frames, None, None, dtype)
    rows = np.arange(0, 20, 3)
    patches = whole.features[rows] + np.float32(0.05) * features(len(rows), 8)
    for bank in (reduced, reduced.take(rows)):
        assert bank.dtype == dtype
        found = bank.compare(patches)
        np.testing.assert_array_equal(found.index, rows if bank is reduced else np.arange(len(rows)))
        np.testing.assert_allclose(found.score, whole.compare(patches).score, rtol=0, atol=tolerance)


def test_leave_one_out() -> None:
    """Against a loop that takes each frame out of the bank."""
    bank = references(5)
    spec = Similarity(score_rule="max")
    scores = []
    for frame in bank.frames:
        own = unit(bank.features[frame.start : frame.stop])
        others = unit(np.delete(bank.features, range(frame.start, frame.stop), axis=0))
        scores.append((1 - (own @ others.T).max(1)).max())
    thresholds = leave_one_out_thresholds(bank, spec)
    assert thresholds is not None
    assert thresholds.good_below == pytest.approx(max(scores), abs=1e-5)
    assert thresholds.defect_above == pytest.approx(max(scores) + 3 * np.std(scores), abs=1e-5)
    assert leave_one_out_thresholds(references(2), spec) is None
