"""The verdict's rules: two thresholds, and what a review may and may not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from examples import MANIFEST as FIELDS

from vmad_edge.runtime.bundle import MAKERS_RULE, Manifest, ReviewRule, Thresholds, makers_rule
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Inspection, Reason, Verdict, settled, verdict_of
from vmad_edge.runtime.inspector import ReviewHandle
from vmad_edge.runtime.review import PendingReview
from vmad_edge.runtime.systems.vmad import Finding

MANIFEST = Manifest.model_validate({**FIELDS, "files": {}})
GOOD, DEFECT, UNCERTAIN = Verdict.GOOD, Verdict.DEFECT, Verdict.UNCERTAIN
THRESHOLDS = Thresholds(good_below=0.2, defect_above=0.5)


@pytest.mark.parametrize(
    "score,expected",
    [(0.0, GOOD), (0.1999, GOOD), (0.2, UNCERTAIN), (0.4999, UNCERTAIN), (0.5, DEFECT), (1.0, DEFECT)],
)
def test_thresholds(score: float, expected: Verdict) -> None:
    assert verdict_of(score, Thresholds(good_below=0.2, defect_above=0.5)) is expected
    assert verdict_of(score, None) is UNCERTAIN


@pytest.mark.parametrize(
    "screen,p_yes,expected,decided_by",
    [
        (DEFECT, 0.9, DEFECT, "screen"),
        (DEFECT, 0.1, DEFECT, "screen"),  # a review never turns DEFECT into GOOD
        (UNCERTAIN, 0.5, DEFECT, "review"),
        (UNCERTAIN, 0.49, GOOD, "review"),
        (GOOD, 0.9, GOOD, "screen"),  # somebody reviewed a good part out of interest
    ],
)
def test_review_settles_uncertain_alone(screen: Verdict, p_yes: float, expected: Verdict, decided_by: str) -> None:
    pending = PendingReview(lambda: None)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:] = True
    pending.finding = Finding(p_yes, "Yes. A pit.", mask, False, None)
    pending._ended.set()
    after = ReviewHandle(screened(screen), pending, MANIFEST).wait()
    assert (after.verdict, after.decided_by) == (expected, decided_by)
    assert after.explanation == "Yes. A pit."
    assert [region.area for region in after.regions] == [6]


CALIBRATED = ReviewRule(good_below=0.2, defect_above=0.7, question="Is the part broken?")
GOOD_ALONE, DEFECT_ALONE = (CALIBRATED.model_copy(update={side: None}) for side in ("defect_above", "good_below"))


@pytest.mark.parametrize("screen", [GOOD, DEFECT, UNCERTAIN, Verdict.NOT_INSPECTED])
@pytest.mark.parametrize(
    "rule,p_yes,expected",
    [
        pytest.param(CALIBRATED, 0.19, GOOD, id="below"),
        pytest.param(CALIBRATED, 0.2, UNCERTAIN, id="not below"),
        pytest.param(CALIBRATED, 0.69, UNCERTAIN, id="between"),
        pytest.param(CALIBRATED, 0.7, DEFECT, id="from"),
        pytest.param(GOOD_ALONE, 0.19, GOOD, id="GOOD alone, below"),
        pytest.param(GOOD_ALONE, 1.0, UNCERTAIN, id="GOOD alone, above"),
        pytest.param(DEFECT_ALONE, 0.0, UNCERTAIN, id="DEFECT alone, below"),
        pytest.param(DEFECT_ALONE, 0.7, DEFECT, id="DEFECT alone, from"),
        pytest.param(None, 0.0, UNCERTAIN, id="nobody calibrated, No"),
        pytest.param(None, 1.0, UNCERTAIN, id="nobody calibrated, Yes"),
        pytest.param(makers_rule(THRESHOLDS), 0.49, GOOD, id="the maker's, No"),
        pytest.param(makers_rule(THRESHOLDS), 0.5, DEFECT, id="the maker's, Yes"),
        pytest.param(makers_rule(None), 0.5, UNCERTAIN, id="the maker gave none"),
    ],
)
def test_a_review_settles_by_its_rule(
    screen: Verdict, rule: ReviewRule | None, p_yes: float, expected: Verdict
) -> None:
    assert settled(screen, p_yes, rule) is (expected if screen is UNCERTAIN else screen)
    for reason in (Reason.OUT_OF_SCOPE, Reason.NOT_RELEASED, Reason.NOTHING_TO_COMPARE):
        raised = DEFECT if expected is DEFECT else UNCERTAIN
        assert settled(screen, p_yes, rule, reason) is (raised if screen is UNCERTAIN else screen)


@pytest.mark.parametrize("p_yes,expected,decided_by", [(0.5, DEFECT, "review"), (0.49, UNCERTAIN, "screen")])
def test_review_cannot_make_good_what_is_out_of_scope(p_yes: float, expected: Verdict, decided_by: str) -> None:
    pending = PendingReview(lambda: None)
    pending.finding = Finding(p_yes, "Yes.", None, False, "asked to")
    pending._ended.set()
    unlike = replace(screened(UNCERTAIN), reason="unlike all", reason_code=Reason.OUT_OF_SCOPE)
    after = ReviewHandle(unlike, pending, MANIFEST).wait()
    assert (after.verdict, after.decided_by, after.reason_code) == (expected, decided_by, Reason.OUT_OF_SCOPE)
    assert after.reason == "unlike all; the review was stopped: asked to"


@pytest.mark.parametrize("p_yes", [0.9, 0.1])
def test_review_settles_nothing_without_a_rule(p_yes: float) -> None:
    pending = PendingReview(lambda: None)
    pending.finding = Finding(p_yes, "Yes.", None, False, None)
    pending._ended.set()
    after = ReviewHandle(replace(screened(UNCERTAIN), review_rule=None), pending, MANIFEST).wait()
    assert (after.verdict, after.decided_by, after.p_yes) == (UNCERTAIN, "screen", p_yes)


@pytest.mark.parametrize("screen", [DEFECT, UNCERTAIN, GOOD])
def test_a_fault_in_the_review_leaves_the_verdict(screen: Verdict) -> None:
    pending = PendingReview(lambda: None)
    pending._receive({"kind": "fault", "id": 1, "reason": "out of memory"}, {})
    after = ReviewHandle(screened(screen), pending, MANIFEST).wait()
    assert (after.verdict, after.decided_by) == (screen, "screen")
    assert (after.reason, after.reason_code) == ("review failed: out of memory", Reason.REVIEW_FAULT)


@pytest.mark.parametrize(
    "screen,p_yes,expected", [(UNCERTAIN, 0.9, DEFECT), (UNCERTAIN, 0.1, GOOD), (UNCERTAIN, None, UNCERTAIN)]
)
def test_a_late_review_gives_what_it_has(screen: Verdict, p_yes: float | None, expected: Verdict) -> None:
    pending = PendingReview(lambda: None)
    if p_yes is not None:
        for kind, value in (("p_yes", p_yes), ("text", "Yes."), ("text", " A pit")):
            pending._receive({"kind": kind, kind: value}, {})
    after = ReviewHandle(screened(screen), pending, MANIFEST).wait(0.01)
    assert (after.verdict, after.p_yes) == (expected, p_yes)
    assert after.explanation == (None if p_yes is None else "Yes. A pit")
    assert after.reason == "the review did not end in time" and after.mask is None


def screened(verdict: Verdict) -> Inspection:
    frame = Frame(np.zeros((4, 4, 3), np.uint8), "test")
    return Inspection(frame, "part", verdict, score=0.3, map=np.zeros((4, 4), np.float32), review_rule=MAKERS_RULE)
