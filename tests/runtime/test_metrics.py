from __future__ import annotations

import anomalib_aupro
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from vmad_edge.runtime import metrics
from vmad_edge.runtime.metrics import Measured, Scores, measure, pixel_scores

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


def f1_max(positive: NDArray[np.bool_], score: NDArray[np.floating]) -> float:
    precision, recall, _ = precision_recall_curve(positive, score)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def aupro(maps: list[Map], masks: list[Mask], limit: float = 0.3) -> float:
    """From the definition: at every threshold the mean overlap of all regions, against the false positive rate."""
    regions = []
    for heat, mask in zip(maps, masks, strict=True):
        labels, count = label(mask, np.ones((3, 3)))
        regions += [heat[labels == number] for number in range(1, count + 1)]
    normal = np.concatenate([heat[~mask] for heat, mask in zip(maps, masks, strict=True)])
    thresholds = np.unique(np.concatenate([heat.ravel() for heat in maps]))[::-1]
    fpr = [0.0, *(float(np.mean(normal >= t)) for t in thresholds)]
    pro = [0.0, *(float(np.mean([np.mean(region >= t) for region in regions])) for t in thresholds)]
    area = 0.0
    for i in range(len(thresholds)):
        x0, x1, y0, y1 = fpr[i], fpr[i + 1], pro[i], pro[i + 1]
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (limit - x0) * (y0 + y1) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def images(levels: int, seed: int = 0) -> tuple[list[Map], list[Mask]]:
    """Four maps of different sizes, two with regions (touching corners, one pixel), of `levels` distinct values."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for number, size in enumerate([(20, 30), (25, 21), (18, 18), (30, 20)]):
        mask = np.zeros(size, bool)
        if number % 2:
            mask[2:6, 3:9] = mask[6:8, 9:11] = mask[15, 15] = True
        heat = rng.normal(size=size) + 1.2 * mask
        maps.append((np.round(heat * levels) / levels).astype(np.float32))
        masks.append(mask)
    return maps, masks


@pytest.mark.parametrize("chunk", [1 << 22, 64], ids=["one range", "many ranges"])
@pytest.mark.parametrize("levels", [10**6, 3, 0.2], ids=["hardly a tie", "many ties", "almost all tied"])
def test_pixels_as_in_scikit_learn_and_by_definition(levels: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    maps, masks = images(levels)
    parts, counts = zip(*(pixel_scores(heat, mask) for heat, mask in zip(maps, masks, strict=True)), strict=True)
    measured = measure(parts, sum(counts))
    score = np.concatenate([heat.ravel() for heat in maps])
    positive = np.concatenate([mask.ravel() for mask in masks])
    assert sum(counts) == 4
    assert measured.auroc == pytest.approx(roc_auc_score(positive, score), abs=1e-9)
    assert measured.ap == pytest.approx(average_precision_score(positive, score), abs=1e-9)
    assert measured.f1_max == pytest.approx(f1_max(positive, score), abs=1e-9)
    assert measured.aupro == pytest.approx(aupro(maps, masks), abs=1e-9)
    for curve, end in ((measured.roc, 1.0), (measured.pro, 0.3)):
        x, y = np.array(curve).T
        assert (np.diff(x) >= 0).all() and (np.diff(y) >= -1e-12).all()
        assert x[0] == y[0] == 0 and x[-1] == pytest.approx(end)
        assert len(curve) < 3 * metrics._POINTS + score.size // chunk


def test_a_million_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", 1 << 17)
    rng = np.random.default_rng(1)
    maps = rng.beta(2, 9, (8, 400, 400)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[::2, 100:180, 50:200] = True
    maps[masks] *= 1.5
    parts, counts = zip(*map(pixel_scores, maps, masks), strict=True)
    measured = measure(parts, sum(counts))
    sizes = [
        sum(len(part.normal[metrics._between(part.normal, low, high)]) for part in parts)
        for high, low in metrics._ranges(parts)
    ]
    assert max(sizes) < 2 * metrics._CHUNK and sum(sizes) == (~masks).sum()  # memory stays bounded
    assert measured.auroc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert measured.ap == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-9)


@pytest.mark.skipif(not anomalib_aupro.installed(), reason="anomalib's AUPRO is not installed")
@pytest.mark.parametrize("levels", [10**6, 3], ids=["hardly a tie", "many ties"])
def test_aupro_as_in_anomalib(levels: int) -> None:
    rng = np.random.default_rng(3)
    maps, masks = rng.normal(size=(6, 50, 60)), np.zeros((6, 50, 60), bool)
    for place in (0, 1, 4):
        masks[place, 3 : 8 + place, 5:25] = masks[place, 30:38, 40 : 45 + 3 * place] = True
    maps = (np.round((maps + masks) * levels) / levels).astype(np.float32)
    parts, counts = zip(*map(pixel_scores, maps, masks), strict=True)
    theirs = anomalib_aupro.load()(fpr_limit=0.3)
    theirs.update(torch.from_numpy(maps), torch.from_numpy(masks))
    assert measure(parts, sum(counts)).aupro == pytest.approx(float(theirs.compute()), abs=1e-5)  # theirs is float32


def test_image_scores() -> None:
    rng = np.random.default_rng(2)
    good, bad = np.sort(rng.normal(size=40).round(1)), np.sort(rng.normal(0.8, 1, size=30).round(1))
    measured = measure([Scores(good, bad)])
    positive, score = np.arange(70) >= 40, np.concatenate([good, bad])
    assert measured.aupro is None
    assert measured.auroc == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
    assert measured.ap == pytest.approx(average_precision_score(positive, score), abs=1e-12)
    assert measured.f1_max == pytest.approx(f1_max(positive, score), abs=1e-12)


@pytest.mark.parametrize("good,bad", [([], [1.0]), ([1.0], []), ([], [])])
def test_nothing_to_tell_apart(good: list[float], bad: list[float]) -> None:
    assert measure([Scores(np.array(good), np.array(bad))]) == Measured()


def test_what_was_not_inspected_is_never_found() -> None:
    heat = np.full((4, 4), 0.5, np.float32)
    heat[0] = np.nan
    mask = np.zeros((4, 4), bool)
    mask[0] = True  # the whole defect lies on the border that was cropped away
    part, regions = pixel_scores(heat, mask)
    measured = measure([part], regions)
    assert measured.auroc == 0 and measured.aupro == 0


def test_a_frame_that_is_marked_whole_has_one_region() -> None:
    heat = np.random.default_rng(0).random((48, 64), np.float32)
    scores, regions = pixel_scores(heat, np.ones((48, 64), np.bool_))
    assert regions == 1 and len(scores.normal) == 0
    np.testing.assert_array_equal(scores.share, np.full(48 * 64, 1 / (48 * 64)))
