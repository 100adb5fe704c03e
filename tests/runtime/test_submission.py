from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from plain_parts import plain_part

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.inspector import Inspector


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two objects of MVTec AD 2, as distributed."""
    rng = np.random.default_rng(0)
    for object in ("can", "fruit_jelly"):
        for name in (
            *(f"train/good/{i:03}_regular" for i in range(3)),
            *("validation/good/000_regular", "test_public/good/000_regular", "test_public/bad/000_regular"),
            *("test_private/000_regular", "test_private/001_regular", "test_private_mixed/000_mixed"),
        ):
            path = tmp_path / "ad2" / object / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            frame = plain_part(rng, 6, 64, 90)
            if path.parent.name in ("bad", "test_private_mixed"):
                frame[20:40, 30:60] = rng.integers(0, 256, (20, 30, 3))
            Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(path)
        mask = np.zeros((64, 90), np.uint8)
        mask[20:40, 30:60] = 255
        (path.parents[1] / "test_public/ground_truth/bad").mkdir(parents=True)
        Image.fromarray(mask).save(path.parents[1] / "test_public/ground_truth/bad/000_regular_mask.png")
    return tmp_path / "ad2"


def test_is_what_the_benchmarks_own_checker_asks_for(
    bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(bundle.path), str(dataset), "--shots", "all", "--out", str(tmp_path / "out")]
    assert main([*command, "--submission"]) == 0
    assert "can: 3 more frames have no labels and are in no figure" in " ".join(capsys.readouterr().err.split())
    folder = tmp_path / "out/submission"
    private = [*(f"test_private/00{i}_regular" for i in range(2)), "test_private_mixed/000_mixed"]
    places = [f"{object}/{name}" for object in ("can", "fruit_jelly") for name in private]
    files = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert files.keys() == {f"anomaly_images/{place}.tiff" for place in places} | {
        f"anomaly_images_thresholded/{place}.png" for place in places
    }
    with Inspector.open(bundle.path, tmp_path / "station") as inspector:
        inspector.enroll(sorted((dataset / "can/train/good").iterdir()), object="can", keep=False)
        threshold = inspector.thresholds("can")
        assert threshold is not None
        for name in private:
            expected = inspector.inspect(dataset / f"can/{name}.png", object="can", review=False).map
            assert expected is not None
            heat = tifffile.imread(folder / f"anomaly_images/can/{name}.tiff")
            assert heat.dtype == np.float16 and heat.shape == (64, 90)
            seen = ~np.isnan(expected)
            np.testing.assert_allclose(heat[seen], expected[seen], rtol=1e-3, atol=1e-4)
            assert (heat[~seen] <= heat[seen].min()).all()
            with Image.open(folder / f"anomaly_images_thresholded/can/{name}.png") as image:
                marked = np.asarray(image)
            assert marked.shape == (64, 90) and set(np.unique(marked)) <= {0, 255}
            sure = seen & (np.abs(expected - threshold.defect_above) > 1e-4)
            np.testing.assert_array_equal(marked[sure] > 0, expected[sure] > threshold.defect_above)

    (folder / "anomaly_images/can/test_private/000_regular.tiff").unlink()
    (dataset / "can/test_private_mixed/001_mixed.png").write_text("no image")
    assert main([*command, "--submission"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "can: the submission lacks 1 maps" in said and "not a readable image" in said
    again = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert again.keys() == files.keys()
    assert {name for name in files if files[name] != again[name]} == {
        "anomaly_images/can/test_private/000_regular.tiff",
        "anomaly_images_thresholded/can/test_private/000_regular.png",
    }


def test_nothing_to_submit(bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "can/test_public").rename(dataset / "can/test")
    for name in ("test_private", "test_private_mixed"):
        (dataset / "can" / name).rename(tmp_path / name)
    command = ["evaluate", str(bundle.path), str(dataset / "can"), "--out", str(tmp_path / "out"), "--submission"]
    assert main(command) == 2
    assert "expected frames without labels (MVTec AD 2)" in " ".join(capsys.readouterr().err.split())
