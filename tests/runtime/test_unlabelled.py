"""Sources of frames that nobody labelled: a folder against itself, and the line's own last frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.kernels import mutual_score
from vmad_edge.runtime.bundle import Similarity, Thresholds
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.errors import FrameError, VmadError
from vmad_edge.runtime.inspection import Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.similarity import EnrolledFrame, References, image_score
from vmad_edge.runtime.stages.unlabelled import Stream, Unlabelled

Floats = NDArray[np.float32]
SPEC = Similarity(score_rule="max")
PATTERN = np.random.default_rng(7).standard_normal((16, 32))
DEFECT = np.random.default_rng(8).standard_normal((3, 32))


def frame(seed: int, defect: bool = False) -> Floats:
    """The patches of one part: the pattern and a little noise; with a defect, always the same in the same place."""
    patches = PATTERN + 0.1 * np.random.default_rng(seed).standard_normal(PATTERN.shape)
    if defect:
        patches[4:7] = DEFECT
    return patches.astype(np.float32)


def references(thresholds: Thresholds | None) -> References:
    stacked = np.concatenate([frame(-seed) for seed in range(-9, -4)])
    view = View(0, 0, 40, 40)
    frames = tuple(EnrolledFrame(f"f{n}", n * 16, n * 16 + 16, (view,), (40, 40), (b"",), "") for n in range(5))
    return References(stacked, np.tile(np.arange(16, dtype=np.int32), 5), frames, thresholds)


def test_a_folder_against_itself_is_musc() -> None:
    frames = [frame(seed, defect=seed == 3) for seed in range(9)]
    source = Unlabelled(frames)
    found = np.stack([source.compare(patches).score for patches in frames])
    np.testing.assert_allclose(found, mutual_score(np.stack(frames)), atol=1e-6)
    assert found[:, 4:7].max(axis=1).argmax() == 3
    assert source.thresholds is None


def test_too_few_frames() -> None:
    with pytest.raises(FrameError, match="expected at least 5 frames to compare with each other, found 4"):
        Unlabelled(frame(seed) for seed in range(4))


THRESHOLDS = Thresholds(good_below=0.05, defect_above=0.1)


def test_a_defect_that_repeats_does_not_find_itself() -> None:
    """Among themselves the defective frames are as usual as good ones; beside references each is a DEFECT."""
    line = [frame(seed, defect=True) for seed in range(100, 140)]
    alone = np.stack([Unlabelled(line).compare(patches).score for patches in line])
    assert alone[:, 4:7].mean() < alone[:, 7:].mean()  # the defect is the same in each: the least unusual patch
    stream = Stream(references(THRESHOLDS), SPEC, frames=20)
    assert all(image_score(stream.compare(patches).score, SPEC) >= THRESHOLDS.defect_above for patches in line)


def test_what_the_line_does_not_know_is_found() -> None:
    """References that call everything good: with the stream a defect is not, and the good frames still are."""
    blind = Stream(references(Thresholds(good_below=1.9, defect_above=1.95)), SPEC, frames=30)
    good = [image_score(blind.compare(frame(seed)).score, SPEC) for seed in range(200, 260)]
    assert np.mean(np.array(good) < 1.9) > 0.9
    defective = blind.compare(frame(300, defect=True))
    assert image_score(defective.score, SPEC) >= 1.95
    assert set(np.flatnonzero(defective.score >= 1.95)) == {4, 5, 6}
    np.testing.assert_array_equal(defective.index, references(None).compare(frame(300, defect=True)).index)


def test_the_stream_never_lowers_a_score() -> None:
    for thresholds in (None, THRESHOLDS):
        beside = references(thresholds)
        stream = Stream(beside, SPEC, frames=12)
        for seed in range(30):
            patches = frame(seed, defect=seed % 4 == 0)
            assert (stream.compare(patches).score >= beside.compare(patches).score).all()


def test_only_the_last_frames_count() -> None:
    """After a change of the line (another pattern) the new parts are usual as soon as the old ones are forgotten."""
    stream = Stream(references(None), SPEC, frames=10)
    for seed in range(20):
        stream.compare(frame(seed))
    unusual = []
    for seed in range(20):
        changed = np.negative(frame(seed))
        unusual.append(float(stream._score(changed).max()))
        stream.compare(changed)
    assert unusual[0] > 0.5 > 0.1 > unusual[-1]


def test_nan_frames_are_not_remembered() -> None:
    stream = Stream(references(None), SPEC, frames=10)
    patches = frame(0)
    patches[3] = np.nan
    assert np.isnan(stream.compare(patches).score[3])
    for seed in range(12):
        assert np.isfinite(stream.compare(frame(seed)).score).all()


def image(seed: int, spot: bool = False) -> NDArray[np.uint8]:
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    large = np.asarray(Image.fromarray(small).resize((80, 60), Image.Resampling.BICUBIC)).astype(int)
    large += np.random.default_rng(seed).integers(-6, 7, large.shape)
    if spot:
        large[20:34, 20:40] = (255, 0, 255)
    return large.clip(0, 255).astype(np.uint8)


def test_inspector_with_a_stream(tiny_bundle: Path, tmp_path: Path) -> None:
    with Inspector.open(tiny_bundle, tmp_path, "cpu", stream=12) as inspector:
        bare = inspector.inspect(image(0), object="nut", review=False)
        assert bare.compared_with == "normal features and stream"
        inspector.enroll([image(seed) for seed in range(6)], object="screw")
        results = [inspector.inspect(image(seed, spot=True), object="screw", review=False) for seed in range(50, 75)]
    assert {result.compared_with for result in results} == {"references and stream"}
    assert {result.verdict for result in results} == {Verdict.DEFECT}
    assert all(result.nearest_normal is not None for result in results)


@pytest.mark.parametrize("frames", [-1, 9])
def test_a_stream_too_short(frames: int, tmp_path: Path) -> None:
    with pytest.raises(VmadError, match=f"stream: expected 0 or at least 10 frames, got {frames}"):
        Inspector.open(tmp_path, stream=frames)


def test_inspect_unlabelled(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for seed in range(7):
        Image.fromarray(image(seed, spot=seed == 4)).save(folder / f"{seed}.png")
    (folder / "torn.png").write_bytes(b"not an image")
    station = ["--station", str(tmp_path / "station"), "--device", "cpu", "--no-review", "--json"]
    assert main(["inspect", str(tiny_bundle), str(folder), "--unlabelled", *station]) == 3
    rows = json.loads(capsys.readouterr().out)
    scores = [each["score"] for each in rows]
    assert rows[-1]["verdict"] == "NOT_INSPECTED" and scores[:-1] == sorted(scores[:-1], reverse=True)  # by rank
    found = {Path(each["path"]).stem: each for each in rows}
    assert found.pop("torn")["verdict"] == "NOT_INSPECTED"
    assert {each["verdict"] for each in found.values()} == {"UNCERTAIN"}
    assert {each["compared_with"] for each in found.values()} == {"unlabelled frames"}
    assert max(found, key=lambda name: found[name]["score"]) == "4"
    jsonl = tmp_path / "run.jsonl"
    shown = ["inspect", str(tiny_bundle), str(folder), "--unlabelled", *station[:-1], "--jsonl", str(jsonl)]
    assert main(shown) == 3
    assert [Path(json.loads(line)["path"]).stem for line in jsonl.read_text().splitlines()] == [*"0123456", "torn"]
    table = capsys.readouterr().out
    assert [table.index(f"{Path(each['path']).name} ") for each in rows] == sorted(
        table.index(f"{Path(each['path']).name} ") for each in rows
    )
    few = [str(folder / f"{seed}.png") for seed in range(4)]
    assert main(["inspect", str(tiny_bundle), *few, "--unlabelled", *station]) == 2
    assert "expected at least 5 frames to compare with each other, found 4" in capsys.readouterr().err
    assert main(["inspect", str(tiny_bundle), *few, "--unlabelled", "--stream", "20", *station]) == 2
    assert "expected --stream or --unlabelled, got both" in capsys.readouterr().err


def test_evaluate_unlabelled(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores are those of the folder inspected against itself; another kind of run is not continued."""
    dataset = tmp_path / "nut"
    for place in ("train/good/0", *(f"test/good/{n}" for n in range(5)), "test/spot/0"):
        path = dataset / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(len(list(dataset.rglob("*.png"))), spot="spot" in place)).save(path)
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--json"]
    assert main(["evaluate", str(tiny_bundle), str(dataset), "--unlabelled", *out]) == 0
    assert json.loads(capsys.readouterr().out)["categories"]["nut"]["image_auroc"] == 1
    station = ["--station", str(tmp_path / "station"), "--device", "cpu", "--no-review", "--json"]
    main(["inspect", str(tiny_bundle), str(dataset / "test"), "--unlabelled", *station])
    inspected = {Path(each["path"]).parent.name: each["score"] for each in json.loads(capsys.readouterr().out)}
    result = json.loads((tmp_path / "out/nut/frames/test/spot/0.png/result.json").read_text())
    assert result["score"] == pytest.approx(inspected["spot"], abs=1e-6)
    assert main(["evaluate", str(tiny_bundle), str(dataset), *out]) == 2
    assert "holds another evaluation: unlabelled True, now False" in capsys.readouterr().err
    assert main(["evaluate", str(tiny_bundle), str(dataset), "--unlabelled", "--shots", "1", *out]) == 2
    assert "expected --shots 0" in capsys.readouterr().err
