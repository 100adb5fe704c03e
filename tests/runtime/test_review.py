"""What a review said before its time was up, without its process."""

from __future__ import annotations

import numpy as np
from examples import MANIFEST

from vmad_edge.runtime.bundle import Manifest
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Inspection, Verdict
from vmad_edge.runtime.inspector import ReviewHandle
from vmad_edge.runtime.review import PendingReview


def test_review_out_of_time_returns_what_it_has() -> None:
    frame = Frame(np.zeros((8, 8, 3), np.uint8), "part.png")
    pending = PendingReview(lambda: None)
    manifest = Manifest.model_validate({**MANIFEST, "files": {}})
    handle = ReviewHandle(Inspection(frame, "part", Verdict.DEFECT, score=0.5), pending, manifest)
    assert handle.wait(0).p_yes is None
    pending._receive({"kind": "p_yes", "id": 1, "p_yes": 0.25}, {})
    pending._receive({"kind": "text", "id": 1, "text": "No. The"}, {})
    pending._receive({"kind": "text", "id": 1, "text": " part"}, {})
    late = handle.wait(0)
    assert (late.p_yes, late.explanation, late.reason) == (0.25, "No. The part", "the review did not end in time")
    assert late.verdict is Verdict.DEFECT and late.mask is None  # a review never turns DEFECT into GOOD
