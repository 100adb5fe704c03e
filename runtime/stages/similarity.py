"""Patch similarity at run time (DSSL): patches against normal features or a reference bank → map and score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from vmad_edge.kernels import Dtype, ReferenceBank, max_cosine, segmented_max_cosine
from vmad_edge.runtime.bundle import ReviewRule, Similarity, Thresholds, makers_rule
from vmad_edge.runtime.errors import BundleError, FrameError
from vmad_edge.runtime.files import open_file
from vmad_edge.runtime.inspection import NearestNormal
from vmad_edge.runtime.stages.fitness import FitnessLimits
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.scope import Scope
from vmad_edge.runtime.stages.tiles import WHOLE, Box, Layout

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PatchScores:
    """`score` [N]: 0 normal … 1 (against frames: up to 2) abnormal. `index` [N]: the nearest row; −1: a source without.

    `similarity` [N]: the cosine to it.
    """

    score: Floats
    index: NDArray[np.int64]
    similarity: Floats


class NormalFeatures:
    """The bundle's global normal (and, where there are any, abnormal) features.

    With both, a patch scores softmax([s_normal, s_abnormal] / temperature)[1], s the largest cosine to each set;
    with normal ones alone, 1 − s_normal. [ASSUME: VMAD publishes no formula; this is WinCLIP's text rule on
    visual features.]
    """

    kind = "normal features"
    scope: Scope | None = None
    """They are of all parts, so none is out of their scope."""
    layout = WHOLE

    def __init__(self, path: Path, spec: Similarity) -> None:
        try:
            with open_file(path) as file:
                features = load(file.read())
            self.normal = ReferenceBank.from_array(features["visual_normal"])
            abnormal = features.get("visual_abnormal")
            self.abnormal = None if abnormal is None else ReferenceBank.from_array(abnormal)
            if self.abnormal is not None and self.abnormal.width != self.normal.width:
                raise ValueError("widths differ")
        except (OSError, KeyError, TypeError, ValueError, SafetensorError):
            raise BundleError(
                f"{path}: expected safetensors with visual_normal [P,D] (and visual_abnormal [P',D]), found something "
                "else. Export the bundle again."
            ) from None
        self.thresholds = spec.thresholds
        self.review = makers_rule(spec.thresholds)
        self.fitness = FitnessLimits()
        self.spec = spec

    def compare(self, patches: Floats) -> PatchScores:
        """`patches` [N,D] → scores [N]."""
        normal, index = max_cosine(patches, self.normal)
        if self.abnormal is None:
            return PatchScores(1 - normal, index, normal)
        abnormal, _ = max_cosine(patches, self.abnormal)
        return PatchScores(1 / (1 + np.exp((normal - abnormal) / self.spec.temperature)), index, normal)

    def fused(self, patches: Floats, distance: Floats) -> Floats:
        """FADE's few-shot rule: `distance` [N] of `patches` [N,D] to references, and their score by these features.

        (1 − w) · score + w · gain · distance, not clipped to 1 as FADE's map is: what is beyond still has an order.
        Without abnormal features the distance alone.
        """
        if self.abnormal is None:
            return distance
        weight = self.spec.reference_weight
        fused = (1 - weight) * self.compare(patches).score + weight * self.spec.reference_gain * distance
        return np.asarray(fused, np.float32)


@dataclass(frozen=True)
class EnrolledFrame:
    """Where the bank's rows `start`…`stop` came from."""

    id: str
    start: int
    stop: int
    views: tuple[View, ...]
    """Of each tile, in the frame's pixels."""
    size: tuple[int, int]
    """(height, width)."""
    jpegs: tuple[bytes, ...]
    """Each tile's `clip_pixels` as a picture, to show a person."""
    pixel_hash: str
    """The frame's; see `Frame`."""
    path: str | None = None
    """Its file, absolute; None if it came from none."""


class References:
    """Patch features of enrolled normal frames, and what is needed to show a person the nearest one.

    Args:
        features: [M,D] float32, the inspected patches of every frame, one frame after the other.
        patch: [M] each row's patch number in its frame: tile by tile, and row-major in the grid of each.
        beside: the bundle's features, whose score is fused with the distance to the bank.
        dtype: of the bank that is made of the features.
        fitness: of the frames that are compared with them.
        scope: of the same frames; None: one frame, or enrolled before there was one. No frame is out of scope then.
        layout: what of the frames was enrolled, and is inspected of others.

    `hash`: SHA-256 of the bank in the station that they were read from or written to; None: nobody keeps them.
    `review`: what a review may settle; None until somebody calibrated that.
    """

    kind = "references"
    hash: str | None = None
    review: ReviewRule | None = None

    def __init__(
        self,
        features: Floats,
        patch: NDArray[np.int32],
        frames: tuple[EnrolledFrame, ...],
        thresholds: Thresholds | None,
        beside: NormalFeatures | None = None,
        dtype: Dtype = "float32",
        fitness: FitnessLimits | None = None,
        scope: Scope | None = None,
        layout: Layout = WHOLE,
    ) -> None:
        self.features, self.patch, self.frames, self.thresholds = features, patch, frames, thresholds
        self.beside, self.dtype, self.fitness, self.scope = beside, dtype, fitness or FitnessLimits(), scope
        self.layout = layout
        self.bank = ReferenceBank.from_array(features, dtype)

    def compare(self, patches: Floats) -> PatchScores:
        """`patches` [N,D] → 1 − the largest cosine to the bank (PatchCore, AnomalyDINO), fused with what is beside."""
        similarity, index = max_cosine(patches, self.bank)
        return PatchScores(self.fused(patches, 1 - similarity), index, similarity)

    def fused(self, patches: Floats, distance: Floats) -> Floats:
        """`distance` [N] to normal parts, with what the features beside say of the same patches."""
        return distance if self.beside is None else self.beside.fused(patches, distance)

    def take(self, rows: NDArray[np.int64]) -> References:
        """Only these rows, which ascend; the frames stay, even those that none is left of."""
        frames = tuple(
            replace(frame, start=int(start), stop=int(stop))
            for frame, (start, stop) in zip(
                self.frames, np.searchsorted(rows, [(f.start, f.stop) for f in self.frames]), strict=True
            )
        )
        return References(
            self.features[rows],
            self.patch[rows],
            frames,
            self.thresholds,
            self.beside,
            self.dtype,
            self.fitness,
            self.scope,
            self.layout,
        )

    def nearest(self, row: int, similarity: float, place: Box, grid: int) -> NearestNormal:
        """The place of bank row `row`, for the patch at `place` of the inspected frame."""
        frame = next(f for f in self.frames if f.start <= row < f.stop)
        tile, patch = divmod(int(self.patch[row]), grid * grid)
        box = patch_box(patch, frame.views[tile], grid, frame.size)
        return NearestNormal(frame.id, box, similarity, frame.jpegs[tile], divmod(patch, grid), grid, place)


def patch_box(patch: int, view: View, grid: int, frame_size: tuple[int, int]) -> Box:
    """Where patch number `patch` lies in the frame's pixels. `frame_size` is (height, width)."""
    y, x = divmod(patch, grid)
    step_x, step_y = (view.right - view.left) / grid, (view.bottom - view.top) / grid
    return (
        max(0, round(view.left + x * step_x)),
        max(0, round(view.top + y * step_y)),
        min(frame_size[1], round(view.left + (x + 1) * step_x)),
        min(frame_size[0], round(view.top + (y + 1) * step_y)),
    )


def token_scores(visual_tokens: Floats, semantic_normal: Floats, spec: Similarity) -> Floats:
    """DSSL's similarity in the LLM's space: `visual_tokens` [K,H] and the normal semantic token [1,H] → [K], 0 … 1.

    The sigmoid of −cosine / temperature. [ASSUME: VMAD publishes no formula; the reference model is trained with it.]
    """
    cosine, _ = max_cosine(visual_tokens, semantic_normal)
    return np.asarray(1 / (1 + np.exp(cosine / spec.temperature)), np.float32)


def coreset(features: Floats, share: float) -> NDArray[np.int64]:
    """Rows, in ascending order, of the `share` of `features` [M,D] that PatchCore (Roth et al. 2022) would keep.

    Greedy k-center: from the first row on, always the row that is least similar (cosine) to the nearest one chosen.
    Rows of zeros, or with NaN, are left out. Holds two more copies of the features.

    Raises:
        FrameError: no row is left.
    """
    length = np.linalg.norm(features, axis=1)
    rows = np.flatnonzero(np.isfinite(length) & (length > 0))
    if not len(rows):
        raise FrameError("expected features to enroll, found nothing but zeros and NaN")
    kept = features[rows]
    bank, each = ReferenceBank.from_array(kept), np.arange(len(rows) + 1)
    chosen = np.zeros(min(len(rows), max(1, round(share * len(features)))), np.int64)
    nearest = np.full(len(rows), -np.inf, np.float32)
    for place in range(1, len(chosen)):
        last = chosen[place - 1]
        np.maximum(nearest, segmented_max_cosine(kept[last : last + 1], bank, each)[0], out=nearest)
        nearest[last] = np.inf
        chosen[place] = np.argmin(nearest)
    return rows[np.sort(chosen)]


def leave_one_out_thresholds(
    references: References,
    spec: Similarity,
    kept: NDArray[np.int64] | None = None,
    most: int = 50,
    *,
    tile: int | None = None,
) -> Thresholds | None:
    """Thresholds from the enrolled frames' own scores, each against the bank without itself.

    GOOD lies below the highest such score; DEFECT begins three standard deviations of them above it. [ASSUME]
    At most `most` frames, evenly spread, are scored. None with fewer than three frames.

    Args:
        kept: the rows, ascending, that will be the bank; None: all.
        tile: patches that each tile has; None: there is but one.
    """
    frames, tile = references.frames, tile or 1 + int(references.patch.max())
    kept = np.arange(len(references.features)) if kept is None else kept
    bank = references.features[kept]
    owner, first = np.unique(np.searchsorted([frame.stop for frame in frames], kept, "right"), return_index=True)
    if len(frames) < 3 or len(owner) < 2:  # a bank of one frame's rows leaves nothing to compare that frame with
        return None
    offsets = np.append(first, len(kept))
    scores = []
    for number in np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)):
        rows = slice(frames[number].start, frames[number].stop)
        own = references.features[rows]
        per_frame = segmented_max_cosine(own, bank, offsets)
        per_frame[:, owner == number] = -np.inf
        found = references.fused(own, 1 - per_frame.max(axis=1))
        scores.append(max(tile_scores(found, references.patch[rows] // tile, spec).values()))
    highest = max(scores)
    return Thresholds(good_below=highest, defect_above=highest + 3 * float(np.std(scores)))


def inspected_patches(
    view: View, grid: int, frame_size: tuple[int, int], ignored: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """[N]: whether a patch's centre lies on the frame, not on padding, and not all of its pixels are ignored.

    Args:
        frame_size: (height, width).
        ignored: [h,w] of the frame's pixels; None: none.
    """
    centres = (np.arange(grid) + 0.5) / grid
    x = view.left + centres * (view.right - view.left)
    y = view.top + centres * (view.bottom - view.top)
    inside_y, inside_x = (y > 0) & (y < frame_size[0]), (x > 0) & (x < frame_size[1])
    inside = np.asarray(inside_y[:, None] & inside_x[None, :])
    if ignored is not None:
        free = cv2.integral((~ignored).astype(np.uint8))  # [h+1,w+1]: such pixels above and to the left
        top, bottom = _edges(view.top, view.bottom, grid, frame_size[0])
        left, right = _edges(view.left, view.right, grid, frame_size[1])
        band = free[bottom] - free[top]
        inside &= band[:, right] > band[:, left]
    return inside.reshape(-1)


def _edges(start: float, stop: float, grid: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[grid] each: the first pixel that a patch has part of, and the one after its last, along one side of a view."""
    edges = np.linspace(start, stop, grid + 1)
    first, last = (np.clip(edge, 0, length).astype(np.int64) for edge in (edges[:-1], np.ceil(edges[1:])))
    return first, last


def image_score(score: Floats, spec: Similarity) -> float:
    """The frame's score from its inspected patches' scores [n], by the manifest's rule. NaN if any patch is NaN."""
    count = 1 if spec.score_rule == "max" else max(1, len(score) // 100)
    return float(np.sort(score)[-count:].mean())


def tile_scores(score: Floats, tile: NDArray[np.integer[Any]], spec: Similarity) -> dict[int, float]:
    """By tile the `image_score` of its inspected patches, from `score` [n] and the tile [n], ascending, of each.

    A frame's score is the highest of them: among all patches of all tiles a small defect's few would be none.
    """
    numbers, first = np.unique(tile, return_index=True)
    parts = np.split(score, first[1:])
    return {int(number): image_score(part, spec) for number, part in zip(numbers, parts, strict=True)}


def spread(score: Floats, inspected: NDArray[np.bool_]) -> Floats:
    """`score` [N], with that of the nearest inspected patch in place of those that are not: what they would say of
    ignored pixels must not show in a map. NaN where there is none.
    """
    if not inspected.any():
        return np.full_like(score, np.nan)
    grid = round(len(score) ** 0.5)
    hidden = (~inspected).astype(np.uint8).reshape(grid, grid)
    _, label = cv2.distanceTransformWithLabels(hidden, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    by_label = np.zeros(int(label.max()) + 1, np.float32)
    by_label[label.reshape(-1)[inspected]] = score[inspected]
    return np.asarray(by_label[label.reshape(-1)], np.float32)


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
