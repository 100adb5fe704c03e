"""Patch similarity among frames of which nobody said that they are normal: MuSc's interval (arXiv 2401.16753)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

import numpy as np

from vmad_edge.kernels import ReferenceBank, interval_mean, segmented_max_cosine
from vmad_edge.runtime.bundle import ReviewRule, Similarity, Thresholds
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.stages.fitness import FitnessLimits
from vmad_edge.runtime.stages.scope import Scope
from vmad_edge.runtime.stages.similarity import Floats, NormalFeatures, PatchScores, References, image_score
from vmad_edge.runtime.stages.tiles import WHOLE

INTERVAL = 0.3
"""Share of the other frames, the nearest ones, whose mean distance is a patch's score: MuSc's choice."""
LEAST_FRAMES = 5
"""So that the interval holds a frame."""
LEAST_STREAM = 10
"""From how many scores of the line's frames on the usual one is known. [ASSUME]"""
_SAME = 1e-4
"""Cosine distances below this are rounding: √(2 − 2 cosine) has lost them."""
_HALF = np.float32(0.5)


class Unlabelled:
    """A folder against itself: every frame that is compared is one of these, and is left out of its own comparison.

    There are no thresholds: a defect that most frames share is usual among them, so no score says GOOD. Of frames of
    which nobody said that any is normal a review settles nothing.

    Args:
        frames: [N,D] float32 each, at least LEAST_FRAMES of them.

    Raises:
        FrameError: fewer.
    """

    kind = "unlabelled frames"
    layout = WHOLE

    def __init__(self, frames: Iterable[Floats]) -> None:
        self.thresholds: Thresholds | None = None
        self.review: ReviewRule | None = None
        self.fitness = FitnessLimits()
        self.scope: Scope | None = None
        self._ring = _Ring()
        for patches in frames:
            self._ring.append(patches)
        if len(self._ring) < LEAST_FRAMES:
            raise FrameError(
                f"expected at least {LEAST_FRAMES} frames to compare with each other, found {len(self._ring)}"
            )

    def compare(self, patches: Floats) -> PatchScores:
        """`patches` [N,D] → the mean of their least distances to the other frames, 0 … 2."""
        cosine = self._ring.cosines(patches)
        own = int(cosine.sum(axis=0).argmax())  # nothing is nearer to a frame than itself
        score = interval_mean(np.delete(cosine, own, axis=1), INTERVAL)
        return PatchScores(score, np.full(len(score), -1), 1 - _HALF * score * score)


class Stream:
    """The line's own last frames beside normal features or references, each frame joining them once it was compared.

    A patch that is unusual among those frames scores at least what the other source's threshold of GOOD is, so that
    the line finds what that source does not know. A patch that is usual among them scores what that source says: a
    defect that repeats stays one. What is usual: the median of the last frames' scores and three standard deviations,
    estimated from the median of their differences from it. [ASSUME] Where there are no thresholds a patch scores the
    higher of both cosine distances.

    Thread-safe.

    Args:
        frames: how many to remember, at least LEAST_STREAM. They count from the LEAST_FRAMES-th on; with thresholds,
            LEAST_STREAM later.
    """

    def __init__(self, beside: NormalFeatures | References, spec: Similarity, frames: int) -> None:
        self.beside, self.thresholds, self.fitness = beside, beside.thresholds, beside.fitness
        self.review, self.scope, self.layout = beside.review, beside.scope, beside.layout
        self.kind = f"{beside.kind} and stream"
        self._spec, self._frames = spec, frames
        self._ring = _Ring()
        self._scores: deque[float] = deque(maxlen=frames)
        self._lock = threading.Lock()

    def compare(self, patches: Floats) -> PatchScores:
        """`patches` [N,D] → the higher of both sources' scores [N], and the other source's nearest rows."""
        found = self.beside.compare(patches)
        if not np.isfinite(patches).all():
            return found
        with self._lock:
            score = self._score(patches)
            self._ring.append(patches)
            if len(self._ring) > self._frames:
                self._ring.evict()
        return PatchScores(np.maximum(found.score, score), found.index, found.similarity)

    def _score(self, patches: Floats) -> Floats:
        nothing = np.zeros(len(patches), np.float32)
        if len(self._ring) < LEAST_FRAMES - 1:
            return nothing
        distance = interval_mean(self._ring.cosines(patches), INTERVAL)
        score = _HALF * distance * distance  # 1 − the cosine at that distance
        if self.thresholds is None:
            return score
        earlier = np.array(self._scores)
        self._scores.append(image_score(score, self._spec))
        if len(earlier) < LEAST_STREAM:
            return nothing
        median = np.median(earlier)
        deviation = 1.4826 * np.median(np.abs(earlier - median))  # of normally distributed scores
        return np.asarray(score * (self.thresholds.good_below / max(median + 3 * deviation, _SAME)), np.float32)


class _Ring:
    """The last frames' patches, a segment each."""

    def __init__(self) -> None:
        self._bank: ReferenceBank | None = None
        self._lengths: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, patches: Floats) -> None:
        if self._bank is None:
            self._bank = ReferenceBank(patches.shape[1])
        self._bank.extend(patches)
        self._lengths.append(len(patches))

    def evict(self) -> None:
        """Forget the oldest frame."""
        assert self._bank is not None
        self._bank.evict(self._lengths.popleft())

    def cosines(self, patches: Floats) -> Floats:
        """`patches` [N,D] → [N,frames], the largest cosine to each frame."""
        assert self._bank is not None
        return segmented_max_cosine(patches, self._bank, np.cumsum([0, *self._lengths]))
