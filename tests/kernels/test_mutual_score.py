"""mutual_score against the published procedure in float64, one pair of frames at a time."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from vmad_edge.kernels import mutual_score


def published(features, interval):
    """MuSc's scoring module (xrli-U/MuSc) as its paper describes it: all distances, without shortcuts."""
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    scores = []
    for i, own in enumerate(unit):
        nearest = np.stack([cdist(own, other).min(axis=1) for j, other in enumerate(unit) if j != i])
        count = int(interval * len(nearest))
        scores.append(np.sort(nearest, axis=0)[:count].mean(axis=0))
    return np.array(scores)


def draw(frames, patches, width, seed=0):
    """Frames that share their patches up to a little noise; one in five has patches of its own."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((patches, width))
    features = shared + 0.1 * rng.standard_normal((frames, patches, width))
    features[::5, :2] = rng.standard_normal((len(features[::5]), min(2, patches), width))
    return features.astype(np.float32)


@pytest.mark.parametrize(
    ("frames", "patches", "width", "interval"),
    [
        pytest.param(5, 9, 16, 0.3, id="the fewest frames: their nearest one alone"),
        pytest.param(12, 30, 64, 0.3, id="three of eleven"),
        pytest.param(11, 30, 64, 1.0, id="all others"),
        pytest.param(6, 1, 8, 0.5, id="one patch a frame"),
        pytest.param(7, 1200, 32, 0.3, id="fewer frames at once than there are"),
        pytest.param(8, 40, 512, 0.3, id="width 512"),
    ],
)
def test_published_scores(frames, patches, width, interval):
    features = draw(frames, patches, width)
    score = mutual_score(features, interval)
    assert score.dtype == np.float32 and score.shape == (frames, patches)
    np.testing.assert_allclose(score, published(features, interval), rtol=0, atol=1e-3)


def test_frames_alike_are_at_distance_zero():
    """√(2 − 2 cosine) loses digits here: 1e-3 is what float32 leaves."""
    features = np.repeat(draw(1, 50, 768), 6, axis=0)
    np.testing.assert_allclose(mutual_score(features), 0, atol=1e-3)


def test_a_frame_does_not_find_itself():
    features = np.random.default_rng(0).standard_normal((6, 4, 256)).astype(np.float32)
    assert mutual_score(features).min() > 1  # unlike frames; itself would be at 0


def test_nan_patches_and_frames():
    features = draw(12, 5, 16)
    features[3, 2] = np.nan  # scores NaN, and is never the nearest
    features[7] = np.nan  # so does a whole frame, and it is among nobody's nearest
    score = mutual_score(features)
    assert np.isnan(score[7]).all() and np.isnan(score[3, 2])
    others = np.delete(np.delete(score, 7, axis=0), 3, axis=0)
    assert np.isfinite(others).all()
    far = features.copy()
    far[3, 2] = far[7] = -features[0, 0]  # opposite to everything
    expected = np.delete(np.delete(published(far, 0.3), 7, axis=0), 3, axis=0)
    np.testing.assert_allclose(others[:, 2:], expected[:, 2:], rtol=0, atol=1e-3)


X = np.ones((5, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mutual_score(X[:4]), ValueError, "expected at least 5 frames for an interval of 0.3, got 4"),
        (lambda: mutual_score(X[:0]), ValueError, "expected at least 5 frames .* got 0"),
        (lambda: mutual_score(X, 0.2), ValueError, "expected at least 6 frames for an interval of 0.2, got 5"),
        (lambda: mutual_score(X, 0), ValueError, "interval: expected a share above 0 and at most 1, got 0"),
        (lambda: mutual_score(X, 1.1), ValueError, "interval: .* got 1.1"),
        (lambda: mutual_score(X, float("nan")), ValueError, "interval: .* got nan"),
        (lambda: mutual_score(X[0]), ValueError, r"expected shape \[frames, patches, width\], got \[2, 3\]"),
        (lambda: mutual_score(X[:, :0]), ValueError, r"expected shape .* got \[5, 0, 3\]"),
        (lambda: mutual_score(X.astype(int)), TypeError, "features: expected .* got int64"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
