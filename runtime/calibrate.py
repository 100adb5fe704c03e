"""`vmad calibrate`: an object's thresholds from a line's own frames, and what they promise.

Good frames alone bound what happens to good parts, by order statistics, for any distribution. They say nothing of
defects, so nobody knows whether a review tells them apart: the screen decides alone.

With defects, the score gets two thresholds and P(yes) two more, for what the screen leaves UNCERTAIN. What is reported
is cross-validated: each frame is judged by thresholds, a review's rule and a scope that the frames of the other folds
set. So the figures are of this way to set thresholds; those that are kept, set by all frames, are a little better.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path

from vmad_edge.runtime import audit
from vmad_edge.runtime.bundle import Manifest, ReviewRule, Thresholds
from vmad_edge.runtime.errors import BundleError, FrameError, VmadError
from vmad_edge.runtime.files import sha256
from vmad_edge.runtime.frame import AS_STORED, Reading
from vmad_edge.runtime.inspection import Inspection, Verdict, screened, settled, verdict_of
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.release import Release, Shown
from vmad_edge.runtime.stages.fitness import Fitness, learned, measure
from vmad_edge.runtime.stages.scope import ScopeLimit, scope_limit
from vmad_edge.runtime.station import Calibration, CalibrationFrame, now

FOLDS = 5


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
        if self.confidence < 0.5 or self.missed > 0.5:
            raise VmadError(
                f"expected confidence of at least 0.5, and missed of at most 0.5, got {self.confidence:g} and "
                f"{self.missed:g}: else an object could be released of whose defects most are missed"
            )


@dataclass(frozen=True)
class Rules:
    """What frames set, and others are judged by."""

    thresholds: Thresholds
    review: ReviewRule | None
    scope: ScopeLimit | None

    def verdict(self, frame: CalibrationFrame) -> Verdict:
        """As the inspector's."""
        verdict, reason = screened(frame.score, self.thresholds, frame.is_within(self.scope))
        return verdict if frame.p_yes is None else settled(verdict, frame.p_yes, self.review, reason)


def calibrate(
    inspector: Inspector,
    good: Iterable[str],
    defects: Sequence[str] = (),
    *,
    object: str | None = None,
    targets: Targets | None = None,
    review: bool = True,
    by: str | None = None,
    reading: Reading = AS_STORED,
    progress: Callable[[Iterable[str], str], Iterable[str]] = lambda paths, _: paths,
) -> Calibration:
    """Inspect the frames, set what `object` is judged by from them, and write it to the station.

    Frames that are unfit to be judged, by the limits of what they are compared with, are left out, and the promise says
    so. From the good ones that are left, limits of fitness are learned, which may be wider.
    The good frames' distances to the enrolled ones set the limit of its scope anew.
    Defects release the object if they show that at most `targets.missed` of all are missed: by default, with five
    defects and none missed, that more are seen than missed. Drawn defects show nothing: see `vmad calibrate --help`.

    Args:
        inspector: one opened with `calibrated=False`, so that an outdated calibration is not in the way.
        review: with defects and a bundle that reviews, ask it about every frame, so that it may settle what the screen
            leaves UNCERTAIN; False promises of the screen alone, and no review settles anything. So of an object with
            tiles.
        by: who answers for it; None takes the account and the machine.
        reading: how the frames are read.
        progress: gives the paths on, one by one, with a description to show.

    Raises:
        BundleError: the station knows other objects but not this one, or cannot be read.
        FrameError: a frame cannot be read, screened or reviewed, is one of the enrolled references, or is given as good
            and defective.
        VmadError: too few frames for what is promised (equal ones count once); what the object is compared with is not
            what the station keeps, so that nobody else could use the thresholds.
    """
    targets = targets or Targets()
    name = inspector.bundle.manifest.object if object is None else object
    references = inspector.references(name)
    bank = _kept(inspector, name)
    enrolled = {frame.pixel_hash for frame in references.frames} if references else set()
    tiled = references is not None and references.layout.tiles.count > 1  # a review sees one tile of many
    reviews = review and bool(defects) and isinstance(inspector.bundle.manifest, Manifest) and not tiled
    frames: dict[str, CalibrationFrame] = {}
    """By their pixels: what shows the same is the same frame, and says nothing more."""
    fit: dict[str, Fitness] = {}
    unfit: list[str] = []
    given = 0
    labelled = zip(progress(good, "good frames"), repeat(False)), zip(progress(defects, "defects"), repeat(True))
    for path, is_defective in chain(*labelled):
        given += 1
        inspection = inspector.inspect(path, object=name, review=False, **reading)
        if inspection.reason_code is not None and inspection.reason_code.is_unfit:
            unfit.append(f"{path}: {inspection.reason}")
            continue
        if reviews and inspection.features is not None:
            inspection = _reviewed(inspector, inspection, path)
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
    try:
        if any(frame.defective for frame in frames.values()):
            question = inspector.question(name) if reviews else None
            rules, frames, promise = from_labels(frames, targets, question)
        else:
            rules, promise = from_good(list(frames.values()), targets)
    except VmadError as error:
        raise VmadError(f"{error}{said}") from None
    if _kept(inspector, name) != bank:
        raise VmadError(f"{name!r} was enrolled anew while its frames were compared: calibrate again")
    calibration = Calibration(
        bundle=inspector.bundle.hash,
        bank=bank,
        object=name,
        thresholds=rules.thresholds,
        review=rules.review,
        scope=rules.scope,
        promise=promise + said,
        by=by or audit.account(),
        when=now(),
        frames=tuple(frames.values()),
        fitness=learned(list(fit.values())),
        device=inspector.engines.device,
    )
    last = None
    with suppress(BundleError):  # one that cannot be read is about to be replaced
        last = inspector.station.load_release(name)
    inspector.station.save_calibration(calibration)
    if calibration.escaped[1] and not (last is not None and last.is_withdrawal):  # a person took it back
        inspector.station.save_release(_release(calibration, targets))
    return calibration


def _release(calibration: Calibration, targets: Targets) -> Release:
    """What its defects show, whether that is enough or not."""
    missed, defects = calibration.escaped
    shown = Shown(
        defects=defects,
        missed=missed,
        bound=largest_share(missed, defects, targets.confidence),
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


def from_good(frames: Sequence[CalibrationFrame], targets: Targets) -> tuple[Rules, str]:
    """What independent normal parts' frames set, and what that promises.

    A score in the list is above the distribution's q-quantile with the stated confidence if enough others lie below
    it: the order statistics' tolerance bound (Wilks 1941), which supposes nothing about the distribution, and holds
    for the frames that set it. Each of the two promises has that confidence by itself.

    Raises:
        VmadError: too few frames in scope, or targets that contradict each other.
    """
    if targets.suspects < targets.overkill:
        raise VmadError(
            f"expected suspects (good parts not called GOOD, {targets.suspects:g}) of at least overkill (good parts "
            f"called DEFECT, {targets.overkill:g})"
        )
    scope = _scope(frames)
    scores = sorted(frame.score for frame in frames if frame.is_within(scope))
    good_below = _upper_bound(scores, targets.suspects, targets.confidence)
    defect_above = _upper_bound(scores, targets.overkill, targets.confidence)
    promise = (
        f"of the screen alone: of good parts in scope at most {targets.suspects:.2%} not called GOOD, at most "
        f"{targets.overkill:.2%} called DEFECT, each with {targets.confidence:.1%} confidence, from {len(scores)} good "
        "frames; of defective parts nothing"
    )
    if beyond := len(frames) - len(scores):
        promise += f"; {beyond} of {len(frames)} good frames out of scope"
    thresholds = Thresholds(good_below=good_below, defect_above=defect_above)
    return Rules(thresholds, None, scope), promise


def from_labels(
    frames: Mapping[str, CalibrationFrame], targets: Targets, question: str | None = None
) -> tuple[Rules, dict[str, CalibrationFrame], str]:
    """What labelled frames set, the frames with their cross-validated verdicts, and what that promises.

    Args:
        frames: by their pixel hashes, which alone say in which fold a frame is.
        question: that the frames were reviewed with; None: the screen decides alone.

    Raises:
        VmadError: fewer than two good or two defective frames in scope: one could not be judged by the others.
    """
    scope = _scope(frames.values())
    within = [frame.defective for frame in frames.values() if frame.is_within(scope)]
    if within.count(False) < 2 or within.count(True) < 2:
        raise VmadError(
            "expected at least two good and two defective frames like those enrolled, so that each is judged by "
            f"thresholds that others set, found {within.count(False)} and {within.count(True)}, and "
            f"{len(frames) - len(within)} out of scope"
        )
    rules = fitted(list(frames.values()), targets, question)
    decides = None if rules.review is None else question
    judged = cross_validated(frames, lambda others: fitted(others, targets, decides))
    chain = "of screen and review" if decides else "of the screen alone"
    if question and not decides:
        chain += f", as a review settles nothing ({_why_none(list(frames.values()), rules, targets)})"
    promise = f"{chain}: {_counts(judged.values(), targets)}"
    if beyond := sum(frame.defective and not frame.is_within(scope) for frame in frames.values()):
        promise += f"; {beyond} defective frames are out of scope, so they show nothing of this object's defects"
    return rules, judged, promise


def fitted(frames: Sequence[CalibrationFrame], targets: Targets, question: str | None) -> Rules:
    """Thresholds that meet the targets on these labelled frames, and a review's rule that does not break them.

    What is out of scope is UNCERTAIN whatever its score, so it sets no threshold of it.
    """
    scope = _scope(frames)
    good, defective = _of((frame for frame in frames if frame.is_within(scope)), lambda frame: frame.score)
    escapes = math.floor(targets.escape * len(defective) + 1e-9)
    overkill = math.floor(targets.overkill * len(good) + 1e-9)
    below, above = _apart(good, defective, escapes, overkill)
    rules = Rules(Thresholds(good_below=below, defect_above=above), None, scope)
    if question is None:
        return rules
    escapes -= sum(score < below for score in defective)
    overkill -= sum(score >= above for score in good)
    return replace(rules, review=_rule(_uncertain(frames, rules), escapes, overkill, targets.confidence, question))


def cross_validated(
    frames: Mapping[str, CalibrationFrame], fit: Callable[[Sequence[CalibrationFrame]], Rules]
) -> dict[str, CalibrationFrame]:
    """The frames, each with the verdict by what the other folds' frames set.

    Good and defective frames are dealt to the folds in the order of their pixel hashes: to the same ones whatever
    their files are called. Fewer than FOLDS of a kind are left out one by one.
    """
    fold = {
        pixel_hash: number % FOLDS
        for kind in (False, True)
        for number, pixel_hash in enumerate(sorted(key for key, frame in frames.items() if frame.defective is kind))
    }
    judged = dict(frames)  # in their order
    for number in range(FOLDS):
        rules = fit([frame for key, frame in frames.items() if fold[key] != number])
        for key, frame in frames.items():
            if fold[key] == number:
                judged[key] = frame.model_copy(update={"verdict": rules.verdict(frame)})
    return judged


def _of(
    frames: Iterable[CalibrationFrame], value: Callable[[CalibrationFrame], float]
) -> tuple[list[float], list[float]]:
    """The good and the defective frames' values, ascending."""
    found = [(frame.defective, value(frame)) for frame in frames]
    return sorted(value for kind, value in found if not kind), sorted(value for kind, value in found if kind)


def _apart(good: Sequence[float], defective: Sequence[float], escapes: int, overkill: int) -> tuple[float, float]:
    """GOOD lies below the first, DEFECT begins at the second: of these values as many escape, or are killed, at most.

    Where the values leave a gap in which one threshold would do, the gap is UNCERTAIN.
    """
    highest = math.nextafter(good[max(0, len(good) - 1 - overkill)], math.inf)
    lowest = defective[min(escapes, len(defective) - 1)] if defective else highest
    return min(lowest, highest), max(lowest, highest)


def _uncertain(frames: Iterable[CalibrationFrame], rules: Rules) -> list[CalibrationFrame]:
    """Those in scope that a review may settle."""
    within = (frame for frame in frames if frame.p_yes is not None and frame.is_within(rules.scope))
    return [frame for frame in within if verdict_of(frame.score, rules.thresholds) is Verdict.UNCERTAIN]


def _rule(
    frames: Sequence[CalibrationFrame], escapes: int, overkill: int, confidence: float, question: str
) -> ReviewRule | None:
    """By `frames`, which the screen leaves UNCERTAIN. Each side settles only where P(yes) tells the kinds apart.

    That is: of the kind that the side is for, a larger share lies there than of the other one, by the bounds of both
    shares. None: neither side does.
    """
    good, defective = _of(frames, lambda frame: frame.p_yes or 0.0)
    if not good or not defective:
        return None
    below, above = _apart(good, defective, escapes, overkill)

    def tells(right: int, of_right: int, wrong: int, of_wrong: int) -> bool:
        return 1 - largest_share(of_right - right, of_right, confidence) > largest_share(wrong, of_wrong, confidence)

    is_good = [sum(p < below for p in kind) for kind in (good, defective)]
    is_defect = [sum(p >= above for p in kind) for kind in (defective, good)]
    good_below = below if tells(is_good[0], len(good), is_good[1], len(defective)) else None
    defect_above = above if tells(is_defect[0], len(defective), is_defect[1], len(good)) else None
    if good_below is None and defect_above is None:
        return None
    return ReviewRule(good_below=good_below, defect_above=defect_above, question=question)


def _why_none(frames: Sequence[CalibrationFrame], rules: Rules, targets: Targets) -> str:
    good, defective = _of(_uncertain(frames, rules), lambda frame: frame.p_yes or 0.0)
    of = f"the {len(good)} good and {len(defective)} defective frames that the screen leaves UNCERTAIN"
    least = 1 - largest_share(0, len(good), targets.confidence)
    if not good or not defective or least <= largest_share(0, len(defective), targets.confidence):
        return f"{of} are too few to say whether its P(yes) tells them apart"
    return f"its P(yes) does not tell apart {of}"


def _counts(judged: Iterable[CalibrationFrame], targets: Targets) -> str:
    """What became of frames that set no threshold themselves."""
    verdicts = [(frame.defective, frame.verdict) for frame in judged]
    shares = []
    for defective, verdict in ((True, Verdict.GOOD), (False, Verdict.DEFECT)):
        total = sum(kind is defective for kind, _ in verdicts)
        count = verdicts.count((defective, verdict))
        bound = largest_share(count, total, targets.confidence)
        shares.append(
            f"{count} of {total} {'defective' if defective else 'good'} frames called {verdict.value} "
            f"(with {targets.confidence:.1%} confidence at most {bound:.2%} of all)"
        )
    left = sum(verdict is Verdict.UNCERTAIN for _, verdict in verdicts)
    folds = min(FOLDS, max(Counter(kind for kind, _ in verdicts).values()))
    return (
        f"{shares[0]}, {shares[1]}, {left} of {len(verdicts)} left UNCERTAIN; cross-validated in {folds} folds, each "
        "frame judged by what the other folds' frames set"
    )


def _scope(frames: Iterable[CalibrationFrame]) -> ScopeLimit | None:
    """From good frames' distances, but for the farthest tenth, or one: what lies apart must not let all others in."""
    distances = sorted(f.scope_distance for f in frames if not f.defective and f.scope_distance is not None)
    return scope_limit(distances[: -max(1, len(distances) // 10)] or distances)


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


def _reviewed(inspector: Inspector, screened: Inspection, path: str) -> Inspection:
    """Raises: FrameError: its P(yes) is not to be had."""
    after = inspector.review(screened).wait()
    if after.p_yes is None:
        raise FrameError(
            f"{path} cannot be calibrated with: {after.reason}. Without reviews (--no-review, review=False) the screen "
            "is calibrated alone"
        )
    return after


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
        p_yes=inspection.p_yes,
    )
