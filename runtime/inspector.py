"""The front door: frames in, Inspections out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vmad_edge.runtime.bundle import Answer, Bundle, Manifest, Thresholds
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.errors import BundleError, FrameError, VmadError
from vmad_edge.runtime.frame import Frame, FrameSource
from vmad_edge.runtime.inspection import Inspection, Region, Screening, Verdict, find_regions
from vmad_edge.runtime.review import Milestone, PendingReview, ReviewProcess
from vmad_edge.runtime.stages.language import check_vocabulary
from vmad_edge.runtime.stages.similarity import NormalFeatures, References, anomaly_map
from vmad_edge.runtime.stages.unlabelled import LEAST_STREAM, Stream
from vmad_edge.runtime.station import Station
from vmad_edge.runtime.systems.vmad import Finding, Screen, SimilaritySource
from vmad_edge.runtime.timing import Stopwatch


class ReviewHandle:
    """A review on its way, and the Inspection that it makes of the screen's."""

    def __init__(self, inspection: Inspection, pending: PendingReview, manifest: Manifest) -> None:
        self._inspection = inspection
        self._manifest = manifest
        self._pending = pending

    def wait(self, timeout: float | None = None) -> Inspection:
        """The Inspection after the review; after `timeout` seconds without its end, with what it said until then."""
        ended = self._pending.wait(timeout)
        finding = self._pending.finding if ended else self._pending.so_far
        reason = None
        if not ended:
            reason = "the review did not end in time"
        elif finding is None:
            reason = f"review failed: {self._pending.fault}"
        elif finding.stopped is not None:
            reason = f"the review was stopped: {finding.stopped}"
        after = replace(self._inspection, reason=reason)
        return after if finding is None else _reviewed(after, finding, self._pending.timings_ms, self._manifest)

    @property
    def reached_ms(self) -> dict[Milestone, float]:
        """When P(yes), the last word until now and the mask came, since the review was asked for."""
        return self._pending.reached_ms

    def cancel(self) -> None:
        """Stop before the next decode step; `wait` then returns what there is."""
        self._pending.cancel()

    def text(self) -> Iterator[str]:
        """Pieces of the answer as they are decoded, until the review ends. For one reader."""
        return self._pending.text()


class Inspector:
    """Inspects frames with one bundle. Use it as a context manager.

    Thread-safe: several threads may inspect at once; their reviews queue for the one review process.
    """

    def __init__(
        self, bundle: Bundle, station: Station, device: Device, calibrated: bool = True, stream: int = 0
    ) -> None:
        self.bundle = bundle
        self.station = station
        self._screen = Screen(bundle, device, station.plans)
        self._normal = _normal_features(bundle)
        self._calibrated, self._stream = calibrated, stream
        self._sources: dict[str, SimilaritySource] = {}
        self._lock = threading.Lock()
        self._reviews = ReviewProcess(bundle.path, self._screen.engines.device, station.plans)

    @staticmethod
    def open(
        bundle: Path | str,
        station: Path | str | None = None,
        device: Device = "auto",
        calibrated: bool = True,
        stream: int = 0,
    ) -> Inspector:
        """Verify the bundle and make its screen ready; the review's models load when they are first needed.

        Args:
            station: the device's own folder; None takes the user's data folder.
            calibrated: use the station's calibrations; False leaves the bundle's and the references' thresholds.
            stream: compare each frame with this many of its object's last frames too (see `Stream`); 0: do not.

        Raises:
            VmadError: a stream of too few frames.
            BundleError: the bundle must not be used.
        """
        if stream and stream < LEAST_STREAM:
            raise VmadError(f"stream: expected 0 or at least {LEAST_STREAM} frames, got {stream}")
        opened = Bundle.open(bundle)
        if isinstance(opened.manifest, Manifest):  # else the review alone would find out, frame by frame
            check_vocabulary(opened.file("llm.gguf"), opened.manifest.language)
        return Inspector(
            opened, Station(None if station is None else Path(station), opened), device, calibrated, stream
        )

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the review process; free what the screen has on a GPU."""
        self._reviews.close()
        self._screen.close()

    @property
    def engines(self) -> Engines:
        """What runs the graphs, and why."""
        return self._screen.engines

    @property
    def review_pid(self) -> int | None:
        """The review process's id; None before the first review."""
        return self._reviews.pid

    @property
    def provider(self) -> str:
        """What runs the screen's encoder."""
        return self._screen.provider

    @property
    def similarity(self) -> str:
        """What compares patches, and why nothing better."""
        return self._screen.similarity

    def inspect(
        self,
        frame: FrameSource,
        *,
        object: str | None = None,
        question: str | None = None,
        answer: Answer | None = None,
        review: bool = True,
        deadline_ms: float | None = None,
        bit_depth: int | None = None,
    ) -> Inspection:
        """Screen one frame and, if it is suspect, review it.

        Never raises for what is wrong with the frame or the screen: that is NOT_INSPECTED with its reason.

        Raises:
            BundleError: the object's references or calibration in the station must not be used, or there is nothing to
                compare with.

        Args:
            frame: an RGB array [h,w,3] uint8 (or grey, or RGBA), a path, an encoded image, or a Frame.
            object: the part's name: chooses the reference bank and goes into the question.
            question: instead of the manifest's; `{object}` in it is replaced.
            answer: "full" sentence or "short"; None takes the manifest's.
            review: False gives the screen alone, as does a bundle that screens only; `review(inspection)` can follow.
            bit_depth: of 16-bit frames, see `Frame.read`.
            deadline_ms: from now. A screen that misses it is NOT_INSPECTED; a review that misses it is left out.
        """
        deadline = None if deadline_ms is None else time.monotonic() + deadline_ms / 1e3
        review = review and isinstance(self.bundle.manifest, Manifest)
        if review:
            self._reviews.start()
        inspection = self._screened(frame, self._object(object), deadline, bit_depth)
        suspect = inspection.verdict in (Verdict.DEFECT, Verdict.UNCERTAIN)
        if not (review and suspect):
            return inspection
        handle = self.review(inspection, question=question, answer=answer, deadline=deadline)
        return handle.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def inspect_batch(self, frames: Iterable[FrameSource], **options: Any) -> Iterator[Inspection]:
        """`inspect` for each frame, in order, one at a time in memory. Options are those of `inspect`."""
        return (self.inspect(frame, **options) for frame in frames)

    def review(
        self,
        inspection: Inspection,
        *,
        question: str | None = None,
        answer: Answer | None = None,
        deadline: float | None = None,
    ) -> ReviewHandle:
        """Start the review of a screened frame.

        Args:
            deadline: a time.monotonic() value at which the review stops by itself.

        Raises:
            VmadError: the inspection has no features: it was not inspected, or reviewed already.
            BundleError: the bundle screens only.
        """
        if inspection.features is None:
            raise VmadError("expected an Inspection from inspect(…, review=False), found one without features")
        manifest = self.bundle.for_review
        asked = (question or manifest.conversation.question).replace("{object}", inspection.object)
        mode = answer or manifest.language.answer
        pending = self._reviews.submit(inspection.frame, inspection.features, asked, mode, deadline)
        return ReviewHandle(inspection, pending, manifest)

    def enroll(
        self,
        frames: Iterable[FrameSource],
        *,
        object: str | None = None,
        keep: bool = True,
        bit_depth: int | None = None,
    ) -> References:
        """Make normal frames the references of `object`, in place of earlier ones.

        Args:
            keep: write them to the station; False uses them in this inspector alone.
            bit_depth: of 16-bit frames, see `Frame.read`.

        Raises:
            FrameError: no frames, or one that cannot be read; nothing is changed then.
        """
        name = self._object(object)
        references = self._screen.enroll((Frame.read(frame, bit_depth) for frame in frames), self._normal)
        if keep:
            self.station.save_references(name, references)
        with self._lock:
            self._sources[name] = self._with_stream(references)
        return references

    def compare_unlabelled(
        self, frames: Iterable[FrameSource], *, object: str | None = None, bit_depth: int | None = None
    ) -> None:
        """From now on compare `object`'s frames with each other: `frames` are all that will be inspected.

        Nobody said that they are normal, so there are no thresholds and the screen's verdict is UNCERTAIN. Those that
        cannot be read are left out.

        Raises:
            FrameError: too few frames that can be read, see `Unlabelled`.
        """
        source = self._screen.unlabelled(_readable(frames, bit_depth))
        with self._lock:
            self._sources[self._object(object)] = source

    def thresholds(self, object: str | None = None) -> Thresholds | None:
        """Of `object` as it is compared now; None where there are none (unlabelled frames)."""
        return self._source(self._object(object)).thresholds

    def heat_top(self, object: str | None = None) -> float:
        """The map value to draw in the hottest colour: against references twice where DEFECT begins, else 1."""
        source = self._source(self._object(object))
        by_references = isinstance(_beside(source), References)
        return 2 * source.thresholds.defect_above if by_references and source.thresholds else 1.0

    def _object(self, object: str | None) -> str:
        return self.bundle.manifest.object if object is None else object

    def _source(self, object: str) -> SimilaritySource:
        with self._lock:
            if object not in self._sources:
                source = self.station.load_references(object, self._normal) or copy(self._normal)
                if source is None:
                    raise BundleError(
                        f"bundle {self.bundle.path} has no normal features to compare with, and {object!r} is not "
                        "enrolled: `vmad enroll` normal parts, or name a folder of them with --references"
                    )
                calibration = self.station.load_calibration(object) if self._calibrated else None
                if calibration is not None:
                    source.thresholds = calibration.thresholds
                self._sources[object] = self._with_stream(source)
            return self._sources[object]

    def _with_stream(self, source: NormalFeatures | References) -> SimilaritySource:
        return Stream(source, self.bundle.manifest.similarity, self._stream) if self._stream else source

    def _screened(self, source: FrameSource, object: str, deadline: float | None, bit_depth: int | None) -> Inspection:
        watch = Stopwatch()
        compared_with = self._source(object)
        try:
            with watch("screen"):
                with watch("read"):
                    frame = Frame.read(source, bit_depth)
                screening = self._screen.run(frame, compared_with, watch)
        except Exception as error:  # whatever went wrong in the screen is a reason, never a verdict
            path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
            name = source.id if isinstance(source, Frame) else path or "frame"
            nothing = Frame(np.zeros((0, 0, 3), np.uint8), name, path)
            reason = str(error) if isinstance(error, VmadError) else f"{type(error).__name__}: {error}"
            return Inspection(nothing, object, Verdict.NOT_INSPECTED, reason=reason)
        met = None if deadline is None else time.monotonic() <= deadline
        fault = None
        if not np.isfinite(screening.score):
            fault = "the encoder or the similarity gave NaN"
        elif met is False:
            fault = f"the screen took {watch.timings_ms['screen']:.0f} ms and missed the deadline"
        if fault is not None:
            return Inspection(
                frame,
                object,
                Verdict.NOT_INSPECTED,
                reason=fault,
                timings_ms=watch.timings_ms,
                deadline_met=met,
            )
        return self._inspection(frame, object, screening, compared_with, watch, met)

    def _inspection(
        self,
        frame: Frame,
        object: str,
        screening: Screening,
        source: SimilaritySource,
        watch: Stopwatch,
        deadline_met: bool | None,
    ) -> Inspection:
        verdict = verdict_of(screening.score, source.thresholds)
        regions: tuple[Region, ...] = ()
        nearest = None
        references = _beside(source)
        if isinstance(references, References):
            nearest = references.nearest(*screening.worst, self.bundle.manifest.vision.grid)
        if source.thresholds is not None and verdict is not Verdict.GOOD:
            # Smoothing can press a lone patch's peak below the threshold; its place is a region all the same.
            level = min(source.thresholds.good_below, 0.9 * float(np.nanmax(screening.map)))
            regions = find_regions(screening.map >= level, screening.map)
        return Inspection(
            frame,
            object,
            verdict,
            score=screening.score,
            compared_with=source.kind,
            map=screening.map,
            regions=regions,
            nearest_normal=nearest,
            timings_ms=watch.timings_ms,
            deadline_met=deadline_met,
            features=screening.features,
        )


def _beside(source: SimilaritySource) -> SimilaritySource:
    return source.beside if isinstance(source, Stream) else source


def _readable(frames: Iterable[FrameSource], bit_depth: int | None) -> Iterator[Frame]:
    for frame in frames:
        with suppress(FrameError):
            yield Frame.read(frame, bit_depth)


def _normal_features(bundle: Bundle) -> NormalFeatures | None:
    name = "similarity.safetensors"
    return NormalFeatures(bundle.file(name), bundle.manifest.similarity) if name in bundle.manifest.files else None


def verdict_of(score: float, thresholds: Thresholds | None) -> Verdict:
    if thresholds is None:
        return Verdict.UNCERTAIN
    if score < thresholds.good_below:
        return Verdict.GOOD
    return Verdict.DEFECT if score >= thresholds.defect_above else Verdict.UNCERTAIN


def _reviewed(inspection: Inspection, finding: Finding, timings_ms: dict[str, float], manifest: Manifest) -> Inspection:
    """The screen's Inspection with what the review found: it may settle UNCERTAIN, never turn DEFECT into GOOD."""
    after = replace(
        inspection,
        p_yes=finding.p_yes,
        explanation=finding.text.strip() or None,
        seg_forced=finding.seg_forced,
        timings_ms={**inspection.timings_ms, **timings_ms},
        features=None,
    )
    if inspection.verdict is Verdict.UNCERTAIN:
        settled = Verdict.DEFECT if finding.p_yes >= 0.5 else Verdict.GOOD
        after = replace(after, verdict=settled, decided_by="review")
    if finding.token_scores is not None and inspection.features is not None:
        size = inspection.frame.pixels.shape[0], inspection.frame.pixels.shape[1]
        scores, view = finding.token_scores, inspection.features.view
        language_map = anomaly_map(scores, view, manifest.similarity, manifest.clip.size, size)
        after = replace(after, language_map=language_map)
    if finding.mask is not None and inspection.map is not None:
        regions = find_regions(finding.mask, inspection.map) or inspection.regions
        after = replace(after, mask=finding.mask, regions=regions)
    return after
