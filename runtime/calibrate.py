"""`vmad calibrate`: two thresholds from a line's own frames, with what they promise."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

from vmad_edge.runtime import audit
from vmad_edge.runtime.bundle import Thresholds
from vmad_edge.runtime.errors import BundleError, FrameError, VmadError
from vmad_edge.runtime.files import sha256
from vmad_edge.runtime.frame import AS_STORED, Reading
from vmad_edge.runtime.inspection import Inspection
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.release import Release, Shown
from vmad_edge.runtime.stages.fitness import Fitness, learned, measure
from vmad_edge.runtime.stages.scope import scope_limit
from vmad_edge.runtime.station import Calibration, CalibrationFrame, now


@dataclass(frozen=True)
class Targets:
    """Shares of parts, from 0 to 1."""

    escape: float = 0.01
    """Of defective parts: called GOOD. Needs labelled defects."""
    overkill: float = 0.02
    """Of good parts: called DEFECT."""
    suspects: float = 0.10
    """Of good parts: not called GOOD. Used where there are no labelled defects."""
    missed: float = 0.5
    """Of defective parts: called GOOD, at most, for their object to be released. Needs labelled defects."""
    confidence: float = 0.95
    """That a share promised for all parts, and not for these frames alone, holds."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 1:
                raise VmadError(f"expected {name} between 0 and 1, got {value:g}")


def calibrate(
    inspector: Inspector,
    good: Iterable[str],
    defects: Iterable[str] = (),
    *,
    object: str | None = None,
    targets: Targets | None = None,
    by: str | None = None,
    reading: Reading = AS_STORED,
) -> Calibration:
    """Screen the frames, set thresholds for `object` from their scores, and write them to the station.

    Frames that are unfit to be judged are left out, and the promise says so: on the line they are NOT_INSPECTED too.
    From the good ones that are left, limits of fitness are learned.
    The good frames' distances to the enrolled ones set the limit of its scope anew.
    Defects release the object if they show that at most `targets.missed` of all are missed: by default, with five
    defects and none missed, that more are seen than missed. Drawn defects show nothing: see `vmad calibrate --help`.

    Args:
        inspector: one opened with `calibrated=False`, so that an outdated calibration is not in the way.
        by: who answers for it; None takes the account and the machine.
        reading: how the frames are read.

    Raises:
        BundleError: the station knows other objects but not this one, or cannot be read.
        FrameError: a frame cannot be read or screened, is one of the enrolled references, or is given as good and
            defective.
        VmadError: too few frames for what is promised (equal ones count once); what the object is compared with is not
            what the station keeps, so that nobody else could use the thresholds.
    """
    targets = targets or Targets()
    name = inspector.bundle.manifest.object if object is None else object
    references = inspector.references(name)
    bank = _kept(inspector, name)
    enrolled = {frame.pixel_hash for frame in references.frames} if references else set()
    frames: dict[str, CalibrationFrame] = {}
    """By their pixels: what shows the same is the same frame, and says nothing more."""
    fit: dict[str, Fitness] = {}
    unfit: list[str] = []
    given = 0
    for path, is_defective in chain(zip(good, repeat(False)), zip(defects, repeat(True))):
        given += 1
        inspection = inspector.inspect(path, object=name, review=False, **reading)
        if inspection.reason_code is not None and inspection.reason_code.is_unfit:
            unfit.append(f"{path}: {inspection.reason}")
            continue
        pixel_hash, frame = _scored(inspection, path, name, is_defective, enrolled)
        first = frames.setdefault(pixel_hash, frame)
        if first.defective is not is_defective:
            raise FrameError(f"{path} is given as defective, and {first.path}, which shows the same, as good")
        if not is_defective:
            fit[pixel_hash] = measure(inspection.frame.pixels, inspection.layout.region)
    copies = given - len(unfit) - len(frames)
    said = f"; {copies} of the {given} frames given are copies of others and not counted" if copies else ""
    if unfit:
        said += f"; {len(unfit)} of the {given} frames given are unfit and not counted (the first, {unfit[0]})"
    normal = sorted(frame.score for frame in frames.values() if not frame.defective)
    defective = sorted(frame.score for frame in frames.values() if frame.defective)
    try:
        thresholds, promise = from_labels(normal, defective, targets) if defective else from_good(normal, targets)
    except VmadError as error:
        raise VmadError(f"{error}{said}") from None
    distances = (frame.scope_distance for frame in frames.values() if not frame.defective)
    if _kept(inspector, name) != bank:
        raise VmadError(f"{name!r} was enrolled anew while its frames were compared: calibrate again")
    calibration = Calibration(
        bundle=inspector.bundle.hash,
        bank=bank,
        object=name,
        thresholds=thresholds,
        scope=scope_limit([d for d in distances if d is not None]),
        promise=promise + said,
        by=by or audit.account(),
        when=now(),
        frames=tuple(frames.values()),
        fitness=learned(list(fit.values())),
    )
    inspector.station.save_calibration(calibration)
    if defective:
        inspector.station.save_release(_release(calibration, targets))
    return calibration


def _release(calibration: Calibration, targets: Targets) -> Release:
    """What its defects show, whether that is enough or not."""
    scores = [frame.score for frame in calibration.frames if frame.defective]
    missed = sum(score < calibration.thresholds.good_below for score in scores)
    shown = Shown(
        defects=len(scores),
        missed=missed,
        bound=largest_share(missed, len(scores), targets.confidence),
        confidence=targets.confidence,
        allowed=targets.missed,
        needed=defects_needed(missed, targets.missed, targets.confidence),
    )
    return Release(
        **calibration.model_dump(include={"bundle", "object", "bank", "by", "when"}),
        calibration=calibration.hash,
        released=shown.is_enough,
        shown=shown,
    )


def from_good(scores: Sequence[float], targets: Targets) -> tuple[Thresholds, str]:
    """Thresholds from independent normal parts' scores in ascending order, and what they promise.

    A score in the list is above the distribution's q-quantile with the stated confidence if enough others lie below
    it: the order statistics' tolerance bound (Wilks 1941), which supposes nothing about the distribution. Each of the
    two promises has that confidence by itself.

    Raises:
        VmadError: too few scores, or targets that contradict each other.
    """
    if targets.suspects < targets.overkill:
        raise VmadError(
            f"expected suspects (good parts not called GOOD, {targets.suspects:g}) of at least overkill (good parts "
            f"called DEFECT, {targets.overkill:g})"
        )
    good_below = _upper_bound(scores, targets.suspects, targets.confidence)
    defect_above = _upper_bound(scores, targets.overkill, targets.confidence)
    promise = (
        f"of good parts at most {targets.suspects:.2%} not called GOOD, at most {targets.overkill:.2%} called DEFECT, "
        f"each with {targets.confidence:.1%} confidence, from {len(scores)} good frames"
    )
    return Thresholds(good_below=good_below, defect_above=defect_above), promise


def from_labels(good: Sequence[float], defective: Sequence[float], targets: Targets) -> tuple[Thresholds, str]:
    """Thresholds that meet the targets on these scores (in ascending order), and what that says of all parts.

    Where the scores leave a gap in which one threshold would do, the gap is UNCERTAIN.

    Raises:
        VmadError: no good scores.
    """
    if not good:
        raise VmadError("expected at least one good frame, found none")
    allowed_escapes = math.floor(targets.escape * len(defective) + 1e-9)
    allowed_overkill = math.floor(targets.overkill * len(good) + 1e-9)
    lowest = defective[allowed_escapes]
    highest = math.nextafter(good[len(good) - 1 - allowed_overkill], math.inf)
    thresholds = Thresholds(good_below=min(lowest, highest), defect_above=max(lowest, highest))
    escaped = sum(score < thresholds.good_below for score in defective)
    killed = sum(score >= thresholds.defect_above for score in good)
    bounds = [
        largest_share(count, total, targets.confidence)
        for count, total in ((escaped, len(defective)), (killed, len(good)))
    ]
    promise = (
        f"{escaped} of {len(defective)} defective frames called GOOD (with {targets.confidence:.1%} confidence at most "
        f"{bounds[0]:.2%} of all), {killed} of {len(good)} good frames called DEFECT (at most {bounds[1]:.2%})"
    )
    return thresholds, promise


def frames_needed(share: float, confidence: float) -> int:
    """How many good frames the bound on `share` takes: the smallest n with 1 − (1 − share)ⁿ ≥ confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - share))


def defects_needed(missed: int, share: float, confidence: float) -> int:
    """How many defects, `missed` of them missed, show that at most `share` of all are: where `largest_share` is it."""
    return bisect_left(range(2**31), True, missed + 1, key=lambda n: at_most(missed, n, share) <= 1 - confidence)


def largest_share(count: int, total: int, confidence: float) -> float:
    """The one-sided upper bound of Clopper and Pearson (1934) on a share of which `count` of `total` were seen."""
    if count == total:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(count, total, middle) > 1 - confidence else (low, middle)
    return high


def at_most(count: int, total: int, share: float) -> float:
    """P(X ≤ count) of a binomial X."""
    if share <= 0:
        return 1.0
    return math.fsum(
        math.exp(
            math.lgamma(total + 1)
            - math.lgamma(k + 1)
            - math.lgamma(total - k + 1)
            + k * math.log(share)
            + (total - k) * math.log1p(-share)
        )
        for k in range(count + 1)
    )


def _upper_bound(scores: Sequence[float], share: float, confidence: float) -> float:
    """A threshold that at most `share` of all normal scores reach or exceed, with `confidence`.

    The k-th smallest score exceeds the (1 − share)-quantile where P(Bin(n, 1 − share) ≤ k − 1) ≥ confidence, which is
    P(Bin(n, share) ≤ n − k) ≤ 1 − confidence.
    """
    n, beyond = len(scores), -1
    while beyond + 1 < n and at_most(beyond + 1, n, share) <= 1 - confidence:
        beyond += 1
    if beyond < 0:
        raise VmadError(
            f"{n} good frames are too few to promise at most {share:.2%} with {confidence:.1%} confidence: "
            f"{frames_needed(share, confidence)} are needed, or a larger share, or less confidence"
        )
    return math.nextafter(scores[n - 1 - beyond], math.inf)  # a score equal to it is still below the threshold


def _kept(inspector: Inspector, object: str) -> str | None:
    """Hash of the bank that `object` is compared with; None: the bundle's normal features.

    Raises:
        VmadError: the station does not keep what it is compared with, or not any more.
    """
    references = inspector.references(object)
    if references is not None and references.hash is None:
        raise VmadError(
            f"the references of {object!r} are in this inspector alone, so thresholds for them would be nobody's: "
            "enroll them with keep=True, then calibrate"
        )
    compared, kept = references and references.hash, inspector.station.bank_hash(object)
    if compared != kept:
        now, there = (hash[:16] if hash else "none" for hash in (compared, kept))
        raise VmadError(
            f"{object!r} is compared with another reference bank ({now}) than the station has now ({there}): open the "
            "inspector anew, then calibrate"
        )
    with suppress(BundleError):  # one that cannot be read is about to be replaced
        before = inspector.station.last_calibration(object)
        if kept is None and before is not None and before.bank is not None:
            raise VmadError(
                f"{object!r} was calibrated against enrolled frames, which are gone: enroll it again; or remove its "
                "calibration, to compare it with the bundle's own features from now on"
            )
    return kept


def _scored(
    inspection: Inspection, path: str, object: str, defective: bool, enrolled: set[str]
) -> tuple[str, CalibrationFrame]:
    """The frame's pixel hash, and what is kept of it."""
    if inspection.score is None:
        raise FrameError(f"{path} cannot be calibrated with: {inspection.reason}")
    pixel_hash = inspection.frame.pixel_hash
    if pixel_hash in enrolled:
        raise FrameError(
            f"{path} is one of the enrolled references of {object!r}; calibrate with frames of other parts"
        )
    file = Path(path).absolute()
    return pixel_hash, CalibrationFrame(
        path=str(file),
        sha256=sha256(file),
        defective=defective,
        score=inspection.score,
        scope_distance=inspection.scope_distance,
    )
