"""The walk of docs/first-day.md: real photographs, frames that neither enroll nor calibrate saw."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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

pytestmark = pytest.mark.skipif(not COOKIES.is_dir(), reason="the photographs of cookies are not beside the project")


class Walk:
    """One bundle's."""

    def __init__(self, bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._bundle, self._folder, self._capsys = bundle, folder, capsys

    def vmad(self, command: str, *words: str | Path) -> Any:
        options = ["--object", "cookie", "--station", self._folder / "station", "--device", "cpu", "--json"]
        status = main([str(word) for word in (command, self._bundle, *words, *options)])
        assert command == "inspect" or status == 0
        return json.loads(self._capsys.readouterr().out)

    def calibrate(self) -> dict[str, Any]:
        line = copied(CALIBRATED, self._folder / "line")
        found: dict[str, Any] = self.vmad("calibrate", "--good", line / "good", "--defects", line / "broken")
        return found

    def test(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.vmad(
            "inspect", copied(TESTED, self._folder / "test"), "--maps", self._folder / "maps"
        )
        assert all(row["released"] for row in rows)
        return rows

    def breaks(self, rows: list[dict[str, Any]]) -> list[tuple[float, bool]]:
        """Of each broken frame: its score if the break alone was seen, and whether the map's peak lies in it."""
        found = []
        for row in rows:
            if Path(row["path"]).parent.name == "broken":
                name = Path(row["path"]).stem
                (path,) = (self._folder / "maps").rglob(f"broken/{name}.tiff")
                heat = np.asarray(Image.open(path))
                inside = np.asarray(Image.open(COOKIES / f"ground_truth/broken/{name}_mask.png").convert("L")) > 0
                share = float(np.nanmax(heat[inside]) / np.nanmax(heat))
                found.append((row["score"] * share, share == 1))
        return found


def copied(frames: dict[str, list[str]], folder: Path) -> Path:
    for kind, names in frames.items():
        (folder / kind).mkdir(parents=True)
        for name in names:
            shutil.copy(COOKIES / "test" / kind / name, folder / kind)
    return folder


def counted(rows: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((Path(row["path"]).parent.name, row["verdict"]) for row in rows)


def check_page(calibrated: dict[str, Any], counts: Counter[tuple[str, str]]) -> None:
    assert calibrated["released"]
    assert calibrated["release"].split(" (by ")[0] in PAGE
    for kind, label in (("good", "14 normal"), ("broken", "12 broken")):
        row = [label, *(str(counts[kind, verdict]) for verdict in ("GOOD", "UNCERTAIN", "DEFECT"))]
        assert f"| {' | '.join(row)} |" in PAGE, row


@pytest.mark.skipif(not installed(), reason="the packages of EfficientNet-lite0 are not installed")
def test_a_feature_network_from_photographs_to_a_released_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import efficientnet_lite0

    graph, bundle, levels = tmp_path / "lite0.onnx", tmp_path / "lite0", "reduction_3,reduction_4,reduction_5"
    efficientnet_lite0.write_graph(graph, 320)
    assert main(["export-features", str(graph), str(bundle), "--levels", levels, "--coreset", "0.01"]) == 0
    capsys.readouterr()
    walk = Walk(bundle, tmp_path, capsys)
    walk.vmad("enroll", COOKIES / "train/good")

    (odd,) = walk.vmad("inspect", COOKIES / "test/good/normal-31.jpg")
    assert (odd["reason_code"], odd["released"]) == ("out_of_scope", False)
    assert odd["reason"] in PAGE

    calibrated, rows = walk.calibrate(), walk.test()
    counts = counted(rows)
    check_page(calibrated, counts)
    assert calibrated["promise"] in PAGE
    bound = calibrated["release"].split("at most ")[1].split()[0]
    assert f"at most {bound} of broken cookies missed" in FRONT
    found, overkill = (counts[kind, "DEFECT"] for kind in ("broken", "good"))
    assert f"{found} of 12 broken ones DEFECT, and {overkill} of 14 normal" in FRONT
    bound = re.findall(r"at most ([\d.]+%)", calibrated["promise"])[1]
    assert f"at most {bound} of good ones called DEFECT" in FRONT

    breaks = walk.breaks(rows)
    outside = sum(not peak for _, peak in breaks)
    assert f"In {outside} of 12 broken test cookies the map's peak lies outside of the break" in PAGE
    assert f"in {outside} of 12 the map's peak lies outside of the break" in FRONT
    below, above = calibrated["thresholds"]["good_below"], calibrated["thresholds"]["defect_above"]
    defects, good = sum(score >= above for score, _ in breaks), sum(score < below for score, _ in breaks)
    assert f"{defects} of 12 would be DEFECT, {12 - defects - good} UNCERTAIN and {good} GOOD" in PAGE

    region = Walk(bundle, tmp_path / "region", capsys)
    region.vmad("enroll", COOKIES / "train/good", "--roi", "0,150,576,620")
    calibrated, rows = region.calibrate(), region.test()
    check_page(calibrated, counted(rows))
    assert f"{sum(peak for _, peak in region.breaks(rows))} of 12 maps peak inside of the break" in PAGE


def test_the_toy_walks_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walk = Walk(ROOT / "demo/bundle", tmp_path, capsys)
    walk.vmad("enroll", COOKIES / "train/good")
    calibrated, counts = walk.calibrate(), counted(walk.test())
    check_page(calibrated, counts)
    assert f"misses {counts['broken', 'GOOD']} of 12 broken cookies" in FRONT
