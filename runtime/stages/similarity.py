"""Patch similarity at run time (DSSL): patches against normal features or a reference bank → map and score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vmad_edge.kernels import ReferenceBank, max_cosine
from vmad_edge.runtime.bundle import Similarity
from vmad_edge.runtime.stages.preprocess import View

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PatchScores:
    """`score` [N]: 0 normal … 1 (or, against a bank, up to 2) abnormal. `index` [N]: the nearest row compared with."""

    score: Floats
    index: NDArray[np.int64]


class NormalFeatures:
    """The bundle's global normal (and, where there are any, abnormal) features.

    With both, a patch scores softmax([s_normal, s_abnormal] / temperature)[1], s the largest cosine to each set;
    with normal ones alone, 1 − s_normal. [ASSUME: VMAD publishes no formula; this is WinCLIP's text rule on
    visual features.]
    """

    def __init__(self, path: Path, spec: Similarity) -> None:
        features = load_file(path)
        self._temperature = spec.temperature
        self._normal = ReferenceBank.from_array(features["visual_normal"])
        abnormal = features.get("visual_abnormal")
        self._abnormal = None if abnormal is None else ReferenceBank.from_array(abnormal)

    def compare(self, patches: Floats) -> PatchScores:
        """`patches` [N,D] → scores [N]."""
        normal, index = max_cosine(patches, self._normal)
        if self._abnormal is None:
            return PatchScores(1 - normal, index)
        abnormal, _ = max_cosine(patches, self._abnormal)
        return PatchScores(1 / (1 + np.exp((normal - abnormal) / self._temperature)), index)


def compare_with_bank(patches: Floats, bank: ReferenceBank) -> PatchScores:
    """1 − the largest cosine to the bank (AnomalyDINO, PatchCore's 1-NN). `patches` [N,D]."""
    score, index = max_cosine(patches, bank)
    return PatchScores(1 - score, index)


def inspected_patches(view: View, grid: int, frame_size: tuple[int, int]) -> NDArray[np.bool_]:
    """[N]: whether a patch's centre lies on the frame and not on padding. `frame_size` is (height, width)."""
    centres = (np.arange(grid) + 0.5) / grid
    x = view.left + centres * (view.right - view.left)
    y = view.top + centres * (view.bottom - view.top)
    inside_y, inside_x = (y > 0) & (y < frame_size[0]), (x > 0) & (x < frame_size[1])
    return np.asarray(inside_y[:, None] & inside_x[None, :]).reshape(-1)


def image_score(score: Floats, spec: Similarity) -> float:
    """The frame's score from its inspected patches' scores [n], by the manifest's rule. NaN if any patch is NaN."""
    count = 1 if spec.score_rule == "max" else max(1, len(score) // 100)
    return float(np.sort(score)[-count:].mean())


def anomaly_map(
    score: Floats, view: View, spec: Similarity, clip_size: int, frame_size: tuple[int, int]
) -> NDArray[np.float32]:
    """Patch scores [N] → map [h,w] in the frame's pixels; NaN where the frame was not inspected (cropped away).

    Bilinear to `clip_pixels`' size, Gaussian, then back through the preprocessing's geometry.
    """
    grid = round(len(score) ** 0.5)
    fine = cv2.resize(score.reshape(grid, grid), (clip_size, clip_size), interpolation=cv2.INTER_LINEAR)
    if spec.smoothing_sigma:
        fine = cv2.GaussianBlur(fine, (0, 0), spec.smoothing_sigma, borderType=cv2.BORDER_REPLICATE)
    height, width = frame_size
    # Pixel centres of the frame, in pixels of `clip_pixels`.
    x = (np.arange(width, dtype=np.float32) + 0.5 - view.left) * (clip_size / (view.right - view.left)) - 0.5
    y = (np.arange(height, dtype=np.float32) + 0.5 - view.top) * (clip_size / (view.bottom - view.top)) - 0.5
    warped = cv2.remap(
        fine,
        np.broadcast_to(x, frame_size).copy(),
        np.broadcast_to(y[:, None], frame_size).copy(),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    warped[:, (x < -0.5) | (x > clip_size - 0.5)] = np.nan
    warped[(y < -0.5) | (y > clip_size - 0.5), :] = np.nan
    return np.asarray(warped, np.float32)
