"""The front door: frames in, Inspections out."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import get_args

import numpy as np
from PIL import Image

from vmad_edge.runtime.bundle import Answer, Bundle, Manifest, ReviewRule, Thresholds
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.errors import BundleError, FrameError, VmadError
from vmad_edge.runtime.frame import Colour, Frame, FrameSource, check_source
from vmad_edge.runtime.inspection import (
    Inspection,
    Reason,
    Region,
    Screening,
    Verdict,
    find_regions,
    largest_first,
    on_map,
    screened,
    settled,
)
from vmad_edge.runtime.machine import PACKAGES, describe_machine, versions
from vmad_edge.runtime.release import THIS_RUN_ALONE, UNLABELLED, Standing
from vmad_edge.runtime.review import Milestone, PendingReview, ReviewLimits, ReviewProcess
from vmad_edge.runtime.stages.fitness import FitnessLimits, UnfitError, check
from vmad_edge.runtime.stages.scope import Scope, in_words
from vmad_edge.runtime.stages.similarity import NormalFeatures, References, anomaly_map
from vmad_edge.runtime.stages.tiles import WHOLE, Layout, Tile, cut
from vmad_edge.runtime.stages.unlabelled import LEAST_STREAM, Stream
from vmad_edge.runtime.stages.vocabulary import check_model
from vmad_edge.runtime.station import Calibration, Fallback, Station
from vmad_edge.runtime.system import check_system
from vmad_edge.runtime.systems.vmad import Finding, Screen, SimilaritySource
from vmad_edge.runtime.timing import Stopwatch, seconds

_LIMITS = ReviewLimits()


class ReviewHandle:
    """A review on its way, and the Inspection that it makes of the screen's. Any thread may wait for it."""

    def __init__(self, inspection: Inspection, pending: PendingReview, manifest: Manifest) -> None:
        self._inspection = inspection
        self._manifest = manifest
        self._pending = pending

    def wait(self, timeout: float | None = None) -> Inspection:
        """The Inspection after the review, or with what it said until its deadline, or until `timeout` seconds passed.

        Raises:
            TypeError: a `timeout` that is no number.
        """
        pending = self._pending
        ended = pending.wait(pending.left(None if timeout is None else seconds("timeout", timeout)))
        late = pending.fault_code is Reason.REVIEW_LATE or not ended
        finding = pending.so_far if late else pending.finding
        reason, code = None, None
        if not ended:
            reason, code = "the review did not end in time", Reason.REVIEW_LATE
        elif pending.fault_code is not None:
            code = pending.fault_code
            reason = f"review {'failed' if code is Reason.REVIEW_FAULT else 'left out'}: {pending.fault}"
        elif finding is not None and finding.stopped is not None:
            reason, code = f"the review was stopped: {finding.stopped}", Reason.REVIEW_CANCELLED
        after = screened = self._inspection
        if finding is not None:
            after = _reviewed(screened, finding, pending.timings_ms, self._manifest)
        told = "; ".join(said for said in (screened.reason, reason) if said) or None
        after = replace(after, reason=told, reason_code=screened.reason_code or code)  # the screen's stays the first
        # Without one of its own, a review that settled the verdict is held to the screen's.
        deadline = after.deadline if pending.deadline is None and after.decided_by == "review" else pending.deadline
        if deadline is None:
            return after
        return replace(after, deadline_met=min(pending.ended_at, time.monotonic()) <= deadline)

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


@dataclass(frozen=True)
class _Known:
    """What an object's frames are compared with, and how it stands with that."""

    source: SimilaritySource
    standing: Standing
    calibration: Calibration | None = None


class Inspector:
    """Inspects frames with one bundle. Use it as a context manager; its review process also ends when it is dropped.

    Thread-safe. One thread a camera is a good beginning: a screen uses all processors by itself, so more threads gain
    little but the decoding of files. Reviews queue for the one review process. `inspect` of a suspect waits for its
    review; a line that must not wait calls `inspect(…, review=False)` and hands `review(inspection, deadline_ms=…)` to
    another thread, or asks its handle later. Nothing that a review does delays another thread's screen.
    """

    def __init__(
        self,
        bundle: Bundle,
        station: Station,
        device: Device,
        calibrated: bool = True,
        stream: int = 0,
        reviews: ReviewLimits = _LIMITS,
        fallback: Fallback | None = None,
    ) -> None:
        self.bundle = bundle
        self.station = station
        self._screen = Screen(bundle, device, station.plans)
        self._normal = _normal_features(bundle)
        self._calibrated, self._stream, self._fallback = calibrated, stream, fallback
        self._known: dict[str, _Known] = {}
        self._loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._closed = False
        self._reviews = ReviewProcess(bundle, self._screen.engines.device, station.plans, reviews)
        self._own_pid = os.getpid()
        # The threads of the reviews know those, and not the inspector: nothing keeps a dropped one alive.
        self._end_reviews = weakref.finalize(self, self._reviews.close)

    @staticmethod
    def open(
        bundle: Path | str,
        station: Path | str | None = None,
        device: Device = "auto",
        calibrated: bool = True,
        stream: int = 0,
        reviews: ReviewLimits = _LIMITS,
        fallback: Fallback | None = None,
    ) -> Inspector:
        """Verify the bundle and make its screen ready; the review's models load when they are first needed.

        Args:
            station: the device's own folder; None takes the user's data folder.
            calibrated: use the station's calibrations; False leaves the bundle's and the references' thresholds.
            stream: compare each frame with this many of its object's last frames too (see `Stream`); 0: do not.
            reviews: how many may wait, and for how long their process may stand still.
            fallback: "bundle" compares an object that the station does not know with the bundle's own features, even
                if it knows others; None takes its name for a mistake (see `Station.check_known`).

        Raises:
            VmadError: a stream of too few frames, an unknown fallback, a system that is not Linux.
            BundleError: the bundle must not be used.
            TypeError: an argument of another type.
        """
        check_system()
        if stream and stream < LEAST_STREAM:
            raise VmadError(f"stream: expected 0 or at least {LEAST_STREAM} frames, got {stream}")
        if fallback not in (None, "bundle"):
            raise VmadError(f'fallback: expected "bundle" or None, got {fallback!r}')
        opened = Bundle.open(bundle)
        if isinstance(opened.manifest, Manifest):  # else the review alone would find out, frame by frame
            with opened.opened("llm.gguf") as gguf:
                check_model(gguf, opened.manifest.language)
        kept = Station(None if station is None else Path(station), opened)
        return Inspector(opened, kept, device, calibrated, stream, reviews, fallback)

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the review process; free what the screen has on a GPU. Whatever is asked for afterwards raises."""
        self._closed = True
        self._end_reviews()
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
        frame_id: str | None = None,
        colour: Colour = "rgb",
    ) -> Inspection:
        """Screen one frame and, if it is suspect, review it.

        Never raises for what is wrong with the frame or the screen: that is NOT_INSPECTED with its reason.

        Raises:
            BundleError: the object's references or calibration in the station must not be used, there is nothing to
                compare with, or the station knows other objects but not this one (see `fallback` of `open`).
            VmadError: the inspector is closed, or a fork's; an answer mode that there is not.
            TypeError, FrameError: what is no frame at all, see `check_source`; a deadline that is no number; a name or
                question that is no text.

        Args:
            frame: an RGB array [h,w,3] uint8 (or grey, or RGBA), a PIL image, a path, an encoded image (bytes or a
                binary file), or a Frame.
            object: the part's name: chooses the reference bank and goes into the question.
            question: instead of the manifest's; `{object}` in it is replaced.
            answer: "full" sentence or "short"; None takes the manifest's.
            review: False gives the screen alone, as does a bundle that screens only; `review(inspection)` can follow.
            bit_depth, colour: of 16-bit frames, and "bgr" of OpenCV's, see `Frame.read`.
            deadline_ms: from now; any number. A screen that misses it is NOT_INSPECTED; a review that misses it is
                left out, but for what it said in time: this returns then.
            frame_id: the Inspection's `frame.id`, for frames without a path: a trigger's number, a serial.
        """
        self._must_be_open()
        _check_texts(question=question, frame_id=frame_id)
        _check_answer(answer)
        deadline = _deadline(deadline_ms)
        review = review and isinstance(self.bundle.manifest, Manifest)
        if review:
            self._reviews.start()
        inspection = self._screened(frame, self._object(object), deadline, bit_depth, colour, frame_id)
        suspect = inspection.verdict in (Verdict.DEFECT, Verdict.UNCERTAIN)
        if not (review and suspect):
            return inspection
        after = self._review(inspection, question, answer, deadline).wait()
        return after if _in_time(deadline) is not False else replace(after, deadline_met=False)

    def review(
        self,
        inspection: Inspection,
        *,
        question: str | None = None,
        answer: Answer | None = None,
        deadline_ms: float | None = None,
    ) -> ReviewHandle:
        """Start the review of a screened frame. With a full queue it waits for room, unless it has a deadline.

        Args:
            deadline_ms: from now; the review stops by itself then, and what comes later is left out. With a full
                queue it is left out at once.

        Raises:
            VmadError: the inspection has no features: it was not inspected, or reviewed already; the inspector is
                closed, or a fork's; an answer mode that there is not.
            BundleError: the bundle screens only.
            TypeError: no inspection; a deadline that is no number; a question that is no text.
        """
        self._must_be_open()
        if not isinstance(inspection, Inspection):
            raise TypeError(f"expected an Inspection, got {type(inspection).__name__}")
        _check_texts(question=question)
        _check_answer(answer)
        return self._review(inspection, question, answer, _deadline(deadline_ms))

    def _review(
        self, inspection: Inspection, question: str | None, answer: Answer | None, deadline: float | None
    ) -> ReviewHandle:
        if inspection.features is None:
            raise VmadError("expected an Inspection from inspect(…, review=False), found one without features")
        manifest = self.bundle.for_review
        asked, rule = self.question(inspection.object, question), inspection.review_rule
        mode = answer or manifest.language.answer
        seen = _tile(inspection).frame
        pending = self._reviews.submit(seen, inspection.features, asked, mode, deadline)
        if rule is not None and asked != (rule.question or self.question(inspection.object)):
            # Nobody calibrated what is said to this one.
            inspection = replace(inspection, review_rule=None)
        return ReviewHandle(inspection, pending, manifest)

    def question(self, object: str | None = None, question: str | None = None) -> str:
        """What a review of `object` is asked; `question` is instead of the manifest's.

        Raises:
            BundleError: the bundle screens only.
        """
        asked = question or self.bundle.for_review.conversation.question
        return asked.replace("{object}", self._object(object))

    def enroll(
        self,
        frames: Iterable[FrameSource],
        *,
        object: str | None = None,
        keep: bool = True,
        layout: Layout = WHOLE,
        bit_depth: int | None = None,
        colour: Colour = "rgb",
    ) -> References:
        """Make normal frames the references of `object`, in place of earlier ones.

        Args:
            keep: write them to the station; False uses them in this inspector alone.
            layout: what of each frame is inspected from now on, and in which tiles.
            bit_depth, colour: see `Frame.read`.

        Raises:
            FrameError: no frames, or one that cannot be read, shows nothing or does not fit the layout; nothing is
                changed then.
            BundleError: the station cannot be written, see `Station.save_references`.
            TypeError: one frame or folder, and not several frames; a name that is no text.
        """
        self._must_be_open()
        _check_several(frames)
        name = self._object(object)
        read = (Frame.read(frame, bit_depth, colour) for frame in frames)
        references = self._screen.enroll(read, self._normal, layout)
        standing = THIS_RUN_ALONE
        if keep:
            self.station.save_references(name, references)
            standing = self.station.standing(name, references.hash, None, self.engines.device)
        with self._lock:
            self._known[name] = _Known(self._with_stream(references), standing)
        return references

    def compare_unlabelled(
        self,
        frames: Iterable[FrameSource],
        *,
        object: str | None = None,
        bit_depth: int | None = None,
        colour: Colour = "rgb",
    ) -> None:
        """From now on compare `object`'s frames with each other: `frames` are all that will be inspected.

        Nobody said that they are normal, so there are no thresholds and the screen's verdict is UNCERTAIN. Those that
        cannot be read, or are unfit, are left out.

        Raises:
            FrameError: too few frames that can be read, see `Unlabelled`.
            TypeError: as of `enroll`.
        """
        self._must_be_open()
        _check_several(frames)
        source = self._screen.unlabelled(_readable(frames, bit_depth, colour))
        with self._lock:
            self._known[self._object(object)] = _Known(source, UNLABELLED)

    def load_reviews(self) -> None:
        """Begin to load the review's models, if the bundle has them; returns at once."""
        if isinstance(self.bundle.manifest, Manifest):
            self._reviews.start()

    def compared_with(self, object: str | None = None) -> dict[str, str | float | bool | None]:
        """What Inspections of `object` hang on, as plain values: equal where those would be equal.

        Thresholds have six digits: an enrolment made anew from the same frames may differ in the last ones.
        """
        source = self._source(self._object(object))
        beside, thresholds = _beside(source), source.thresholds
        enrolled = None
        if isinstance(beside, References):
            enrolled = "".join(f.pixel_hash for f in beside.frames) + source.layout.key
        return {
            "bundle": self.bundle.hash,
            "object": self._object(object),
            "compared_with": source.kind,
            "enrolled": None if enrolled is None else hashlib.sha256(enrolled.encode()).hexdigest(),
            "good_below": None if thresholds is None else float(f"{thresholds.good_below:.6g}"),
            "defect_above": None if thresholds is None else float(f"{thresholds.defect_above:.6g}"),
            "fitness": hashlib.sha256(source.fitness.model_dump_json().encode()).hexdigest(),
            "scope_limit": None if source.scope is None else float(f"{source.scope.limit.limit:.6g}"),
            "released": self.standing(object).released,
            "review_settles": _rule_in_words(source.review),
        }

    def references(self, object: str | None = None) -> References | None:
        """What `object` is compared with now, if that is enrolled frames; None: the bundle's normal features.

        Raises:
            VmadError: it is compared with unlabelled frames.
        """
        name = self._object(object)
        beside = _beside(self._source(name))
        if isinstance(beside, References):
            return beside
        if isinstance(beside, NormalFeatures):
            return None
        raise VmadError(f"{name!r} is compared with {beside.kind}: expected enrolled frames or the bundle's features")

    def standing(self, object: str | None = None) -> Standing:
        """Whether `object` is released as it is compared now (see `Station.standing`).

        A stream changes nothing about it: it only raises scores, so no more defects are missed. What is released or
        withdrawn after an object's first use here is not known to this inspector.
        """
        return self._compared(self._object(object)).standing

    def told(self, object: str | None = None, *, review: bool = True, question: str | None = None) -> str:
        """What `object` is compared with now, which frames are in scope, whether it is released, and what is promised.

        For people.

        Args:
            review, question: as they will be given to `inspect`.
        """
        released = "released" if self.standing(object).released else "not released"
        return "; ".join([self._basis(object), released, self.promised(object, review=review, question=question)])

    def _basis(self, object: str | None) -> str:
        source = self._compared(self._object(object)).source
        seen = [] if source.layout.is_whole else [source.layout.in_words()]
        return "; ".join([source.kind, *seen, in_words(source.scope)])

    def promised(self, object: str | None = None, *, review: bool = True, question: str | None = None) -> str:
        """What its calibration promises of `object`, or why that is void here, or that there is none, for people.

        Args: as those of `told`.
        """
        known = self._compared(self._object(object))
        if (calibration := known.calibration) is None:
            makers = question is None or self.question(object, question) == self.question(object)
            settles = _rule_in_words(known.source.review if makers else None)
            return f"not calibrated: nothing is promised, and a review settles {settles}"
        by = f"(calibrated {calibration.when} by {calibration.by})"
        void = self._other_screen(calibration)
        if void is None and calibration.review is not None:
            void = self._other_review(calibration.review, object, review, question)
        return f"promised: {calibration.promise} {by}" if void is None else f"the promise is void: {void} {by}"

    def _other_screen(self, calibration: Calibration) -> str | None:
        """Why its figures are not those of this screen; None: they are."""
        if self._stream:
            return "it is of frames that are not compared with the last ones too, as these are (a stream)"
        if calibration.device not in (None, device := self.engines.device):
            return f"it is of device {calibration.device}, this is {device}"
        return None

    def _other_review(self, rule: ReviewRule, object: str | None, review: bool, question: str | None) -> str | None:
        """Why what is promised of screen and review is not of these; None: it is."""
        if not review:
            return "it is of screen and review, this is the screen alone"
        asked = self.question(object, question)
        return None if rule.question == asked else f"its review was asked {rule.question!r}, this one {asked!r}"

    def thresholds(self, object: str | None = None) -> Thresholds | None:
        """Of `object` as it is compared now; None where there are none (unlabelled frames)."""
        return self._source(self._object(object)).thresholds

    def about(self, object: str | None = None, *, review: bool = True, question: str | None = None) -> dict[str, str]:
        """What the verdicts of `object` rest on, for people: each fact with its name.

        Args: as those of `told`.
        """
        name = self._object(object)
        thresholds, machine = self.thresholds(name), describe_machine()
        return {
            "object": name,
            "compared with": self._basis(name),
            "thresholds": "none: scores rank, and say no verdict"
            if thresholds is None
            else f"GOOD below {thresholds.good_below:.3f}, DEFECT from {thresholds.defect_above:.3f}",
            "calibration": self.promised(name, review=review, question=question),
            "release": self.standing(name).told,
            "bundle": f"{self.bundle.path}, {self.bundle.hash[:16]}",
            "machine": ", ".join(filter(None, (machine.processor, machine.accelerator, machine.system))),
            "runs with": f"{self.provider}; patches compared on {self.similarity}",
            "versions": ", ".join(f"{package} {version}" for package, version in versions(*PACKAGES).items()),
        }

    def _object(self, object: str | None) -> str:
        _check_texts(object=object)
        return self.bundle.manifest.object if object is None else object

    def _must_be_open(self) -> None:
        if self._closed:
            raise VmadError("this inspector is closed; open another one")
        if os.getpid() != self._own_pid:  # its threads, and those of the engines, are not here
            raise VmadError("this inspector was opened before the process forked; open one in each process")

    def _source(self, object: str) -> SimilaritySource:
        return self._compared(object).source

    def _compared(self, object: str) -> _Known:
        with self._lock:
            known, loading = self._known.get(object), self._loading[object]
        if known is not None:
            return known
        with loading:  # this object's alone: others go on meanwhile
            with self._lock:
                known = self._known.get(object)
            if known is None:
                known = self._loaded(object)
                with self._lock:
                    known = self._known.setdefault(object, known)  # enrolled meanwhile: that is the newer one
        return known

    def _loaded(self, object: str) -> _Known:
        if self._fallback is None:
            self.station.check_known(object, self._held())
        source = self.station.load_references(object, self._normal) or copy(self._normal)
        if source is None:
            raise BundleError(
                f"bundle {self.bundle.path} has no normal features to compare with, and {object!r} is not "
                "enrolled: `vmad enroll` normal parts, or name a folder of them with --references "
                "(`vmad evaluate`: --shots)"
            )
        bank = source.hash if isinstance(source, References) else None
        calibration = self.station.load_calibration(object, bank) if self._calibrated else None
        if calibration is not None:
            source.thresholds = calibration.thresholds
            source.review = None if self._other_screen(calibration) else calibration.review
            if calibration.fitness is not None and calibration.fitness.frames > source.fitness.frames:
                source.fitness = calibration.fitness
            if source.scope is not None and calibration.scope is not None:
                source.scope = replace(source.scope, limit=calibration.scope)
        standing = self.station.standing(object, bank, calibration, self.engines.device)
        return _Known(self._with_stream(source), standing, calibration)

    def _held(self) -> list[str]:
        """The objects that were enrolled here, kept or not."""
        with self._lock:
            known = list(self._known.items())
        return [name for name, one in known if not isinstance(_beside(one.source), NormalFeatures)]

    def _with_stream(self, source: NormalFeatures | References) -> SimilaritySource:
        return Stream(source, self.bundle.manifest.similarity, self._stream) if self._stream else source

    def _screened(
        self,
        source: FrameSource,
        object: str,
        deadline: float | None,
        bit_depth: int | None,
        colour: Colour,
        frame_id: str | None,
    ) -> Inspection:
        check_source(source, bit_depth, colour)
        watch = Stopwatch()
        known = self._compared(object)
        compared_with, standing = known.source, known.standing
        path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
        name = source.id if isinstance(source, Frame) else path or "frame"
        frame = Frame(np.zeros((0, 0, 3), np.uint8), frame_id or name, path)
        reason, code = None, None
        try:
            with watch("screen"):
                with watch("read"):
                    frame = Frame.read(source, bit_depth, colour)
                    frame = frame if frame_id is None else replace(frame, id=frame_id)
                with watch("fitness"):
                    _check(frame, compared_with)
                screening = self._screen.run(frame, compared_with, watch)
            if not np.isfinite(screening.score):
                reason, code = "the encoder or the similarity gave NaN", Reason.SCREEN_FAULT
            else:
                inspection = self._inspection(frame, object, screening, compared_with, watch)
                if (met := _in_time(deadline)) is not False:
                    return replace(inspection, released=standing.released, deadline_met=met, deadline=deadline)
                reason = f"the screen took {watch.timings_ms['screen']:.0f} ms and missed the deadline"
                code = Reason.SCREEN_LATE
        except UnfitError as error:
            reason, code = str(error), error.reason
        except FrameError as error:
            reason, code = str(error), Reason.UNREADABLE
        except Exception as error:  # whatever went wrong in the screen is a reason, never a verdict
            reason = str(error) if isinstance(error, VmadError) else f"{type(error).__name__}: {error}"
            code = Reason.SCREEN_FAULT
        return Inspection(
            frame,
            object,
            Verdict.NOT_INSPECTED,
            reason=reason,
            reason_code=code,
            released=standing.released,
            timings_ms=watch.timings_ms,
            deadline_met=_in_time(deadline),
            deadline=deadline,
        )

    def _inspection(
        self,
        frame: Frame,
        object: str,
        screening: Screening,
        source: SimilaritySource,
        watch: Stopwatch,
    ) -> Inspection:
        reason = _beyond(source.scope, screening.scope_distance)
        verdict, code = screened(screening.score, source.thresholds, reason is None)
        regions: tuple[Region, ...] = ()
        nearest = None
        references = _beside(source)
        if isinstance(references, References):
            nearest = references.nearest(*screening.worst, screening.worst_place, self.bundle.manifest.vision.grid)
        if source.thresholds is not None and verdict is not Verdict.GOOD:
            level = on_map(source.thresholds.good_below, screening.score, screening.map)
            regions = find_regions(screening.map >= level, screening.map)
        return Inspection(
            frame,
            object,
            verdict,
            reason=reason,
            reason_code=code,
            score=screening.score,
            scope_distance=screening.scope_distance,
            compared_with=source.kind,
            map=screening.map,
            layout=source.layout,
            regions=regions,
            nearest_normal=nearest,
            timings_ms=watch.timings_ms,
            features=screening.features,
            review_rule=source.review,
        )


def _check(frame: Frame, source: SimilaritySource) -> None:
    """Raises: UnfitError: the frame cannot be judged."""
    if (fault := source.layout.fault((frame.pixels.shape[0], frame.pixels.shape[1]))) is not None:
        raise UnfitError(Reason.UNFIT_SIZE, fault)
    check(frame.pixels, source.fitness, source.layout.region)


def _beside(source: SimilaritySource) -> SimilaritySource:
    return source.beside if isinstance(source, Stream) else source


def _check_texts(**given: str | None) -> None:
    for name, value in given.items():
        if not isinstance(value, str | None):
            raise TypeError(f"{name}: expected text, got {type(value).__name__}")


def _check_answer(answer: Answer | None) -> None:
    if answer not in (None, *get_args(Answer)):
        raise VmadError(f"answer: expected {' or '.join(get_args(Answer))}, got {answer!r}")


def _check_several(frames: Iterable[FrameSource]) -> None:
    """A text or a file is iterable, too: by letters and lines."""
    if not isinstance(frames, Iterable) or isinstance(
        frames, Frame | Image.Image | bytes | bytearray | memoryview | str | os.PathLike | io.IOBase
    ):
        raise TypeError(
            f"frames: expected several, such as a list of paths, got one {type(frames).__name__}; for a folder give "
            "Path(folder).iterdir()"
        )


def _readable(frames: Iterable[FrameSource], bit_depth: int | None, colour: Colour) -> Iterator[Frame]:
    for frame in frames:
        check_source(frame, bit_depth, colour)
        with suppress(FrameError):
            read = Frame.read(frame, bit_depth, colour)
            check(read.pixels, FitnessLimits())
            yield read


def _normal_features(bundle: Bundle) -> NormalFeatures | None:
    name = "similarity.safetensors"
    if name not in bundle.manifest.files:
        return None
    with bundle.opened(name) as path:
        found = NormalFeatures(path, bundle.manifest.similarity)
    if found.normal.width != bundle.manifest.vision.width:  # every frame would be a screen's fault
        raise BundleError(
            f"bundle {bundle.path}: {name}: expected features of width {bundle.manifest.vision.width}, as the encoder "
            f"gives, found {found.normal.width}. Export the bundle again."
        )
    return found


def _deadline(deadline_ms: float | None) -> float | None:
    """As a time.monotonic() value."""
    return None if deadline_ms is None else time.monotonic() + seconds("deadline_ms", deadline_ms, 1e3)


def _in_time(deadline: float | None) -> bool | None:
    """Whether it is not over yet; None without one."""
    return None if deadline is None else time.monotonic() <= deadline


def _beyond(scope: Scope | None, distance: float | None) -> str | None:
    """Why a frame is out of scope, for people; None: it is not."""
    if scope is None or distance is None or distance <= scope.limit.limit:
        return None
    return f"unlike all enrolled frames: {distance:.3f} from the nearest one, the limit is {scope.limit.limit:.3f}"


def _rule_in_words(rule: ReviewRule | None) -> str:
    """What a review settles by it."""
    if rule is None:
        return "nothing"
    limits = ("GOOD below", rule.good_below), ("DEFECT from", rule.defect_above)
    said = ", ".join(f"{name} {limit:.6g}" for name, limit in limits if limit is not None)
    return f"UNCERTAIN by P(yes): {said}" + ("" if rule.question is None else f" ({rule.question!r})")


def _reviewed(inspection: Inspection, finding: Finding, timings_ms: dict[str, float], manifest: Manifest) -> Inspection:
    """The screen's Inspection with what the review found."""
    tile, size = _tile(inspection), (inspection.frame.pixels.shape[0], inspection.frame.pixels.shape[1])
    after = replace(
        inspection,
        p_yes=finding.p_yes,
        explanation=finding.text.strip() or None,
        seg_forced=finding.seg_forced,
        timings_ms={**inspection.timings_ms, **timings_ms},
        features=None,
    )
    verdict = settled(inspection.verdict, finding.p_yes, inspection.review_rule, inspection.reason_code)
    if verdict is not inspection.verdict:
        after = replace(after, verdict=verdict, decided_by="review")
    if finding.token_scores is not None and inspection.features is not None:
        scores, view = finding.token_scores, inspection.features.view
        draw = partial(anomaly_map, scores, view, manifest.similarity, manifest.clip.size, tile.size)
        after = replace(after, draw_language_map=lambda: tile.in_frame(draw(), size))
    if finding.mask is not None and inspection.map is not None:
        mask = tile.marked(finding.mask, size)
        untouched = tuple(region for region in inspection.regions if not cut(mask, region.box).any())
        after = replace(after, mask=mask, regions=largest_first(find_regions(mask, inspection.map) + untouched))
    return after


def _tile(inspection: Inspection) -> Tile:
    """What of the frame a review sees: the tile with the highest score, where there are tiles."""
    of_screen = None if inspection.features is None else inspection.features.tile
    return of_screen or Tile.whole(inspection.frame)
