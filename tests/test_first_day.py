"""The walk of docs/first-day.md: real photographs, a real network, frames that neither enroll nor calibrate saw."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vmad_edge.export.reference.teacher import installed
from vmad_edge.runtime.cli import main

ROOT = Path(__file__).parents[1]
COOKIES = ROOT.parent / "shared/data/cookies"
PAGE, FRONT = (" ".join((ROOT / name).read_text("utf-8").split()) for name in ("docs/first-day.md", "README.md"))
CALIBRATED = {"good": [f"normal-{n}.jpg" for n in range(21, 31)], "broken": [f"anomaly-{n}.jpg" for n in range(1, 21)]}
TESTED = {
    "good": [f"test-normal-{n}.jpg" for n in range(1, 15)],
    "broken": [f"anomaly-{n}.jpg" for n in range(21, 33)],
}

pytestmark = [
    pytest.mark.skipif(not COOKIES.is_dir(), reason="the photographs of cookies are not beside the project"),
    pytest.mark.skipif(not installed(), reason="the packages of EfficientNet-lite0 are not installed"),
]


def copied(frames: dict[str, list[str]], folder: Path) -> Path:
    for kind, names in frames.items():
        (folder / kind).mkdir(parents=True)
        for name in names:
            shutil.copy(COOKIES / "test" / kind / name, folder / kind)
    return folder


def test_from_photographs_to_a_released_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import efficientnet_lite0

    station = ["--station", str(tmp_path / "station"), "--device", "cpu"]

    def vmad(*words: str | Path) -> tuple[int, str]:
        status = main([str(word) for word in words])
        return status, capsys.readouterr().out

    efficientnet_lite0.write_graph(tmp_path / "lite0.onnx", 320)
    bundle = tmp_path / "lite0"
    levels = "reduction_3,reduction_4,reduction_5"
    assert vmad("export-features", tmp_path / "lite0.onnx", bundle, "--levels", levels, "--coreset", "0.01")[0] == 0
    assert vmad("enroll", bundle, COOKIES / "train/good", "--object", "cookie", *station)[0] == 0

    def inspected(frames: Path) -> list[dict[str, Any]]:
        _, out = vmad("inspect", bundle, frames, "--object", "cookie", "--json", *station)
        return list(json.loads(out))

    (odd,) = inspected(COOKIES / "test/good/normal-31.jpg")
    assert (odd["reason_code"], odd["released"]) == ("out_of_scope", False)
    assert odd["reason"] in PAGE

    line = copied(CALIBRATED, tmp_path / "line")
    heaps = ["--good", line / "good", "--defects", line / "broken"]
    status, out = vmad("calibrate", bundle, *heaps, "--object", "cookie", "--json", *station)
    calibrated = json.loads(out)
    assert status == 0 and calibrated["released"]
    assert calibrated["promise"] in PAGE
    released = calibrated["release"].split(" (by ")[0]
    assert released in PAGE
    assert f"at most {released.split('at most ')[1].split()[0]} of broken cookies missed" in FRONT

    rows = inspected(copied(TESTED, tmp_path / "test"))
    assert all(row["released"] for row in rows)
    counts = Counter((Path(row["path"]).parent.name, row["verdict"]) for row in rows)
    for kind, label in (("good", "14 normal"), ("broken", "12 broken")):
        row = [label, *(str(counts[kind, verdict]) for verdict in ("GOOD", "UNCERTAIN", "DEFECT"))]
        assert f"| {' | '.join(row)} |" in PAGE, row
    found, overkill = (counts[kind, "DEFECT"] for kind in ("broken", "good"))
    assert f"{found} of 12 broken ones DEFECT, and {overkill} of 14 normal" in FRONT
