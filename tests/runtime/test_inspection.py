from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import ndimage

from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Inspection, Verdict, find_regions


@pytest.mark.parametrize("seed", range(5))
def test_regions_equal_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heat = ndimage.gaussian_filter(rng.normal(size=(40, 60)), 2).astype(np.float32)
    where = heat > 0.1
    labels, count = ndimage.label(where, np.ones((3, 3)))
    found = find_regions(where, heat)
    assert len(found) == count > 1
    assert [r.area for r in found] == sorted((r.area for r in found), reverse=True)
    expected = set()
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        box = (columns.start, rows.start, columns.stop, rows.stop)
        expected.add((box, int((labels == label).sum()), float(heat[labels == label].max())))
    assert {(r.box, r.area, r.peak) for r in found} == expected
    for region in found:
        left, top, right, bottom = region.box
        inside = labels == labels[top:bottom, left:right][heat[top:bottom, left:right] == region.peak][0]
        assert region.centroid[::-1] == pytest.approx(ndimage.center_of_mass(inside))


def test_no_region() -> None:
    assert find_regions(np.zeros((5, 5), bool), np.zeros((5, 5), np.float32)) == ()


def test_region_outside_the_inspected_part_has_no_peak_in_json() -> None:
    regions = find_regions(np.ones((5, 5), bool), np.full((5, 5), np.nan, np.float32))
    frame = Frame(np.zeros((5, 5, 3), np.uint8), "x")
    made = Inspection(frame, "part", Verdict.DEFECT, regions=regions).to_json()
    assert json.loads(json.dumps(made, allow_nan=False))["regions"][0]["peak"] is None
