from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from examples import MANIFEST

from vmad_edge.runtime.bundle import Bundle, Manifest, Thresholds
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.files import sha256
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.similarity import EnrolledFrame, References
from vmad_edge.runtime.station import Calibration, Station


def bundle(hash: str = "ab" * 32) -> Bundle:
    return Bundle(Path("bundle"), hash, Manifest.model_validate({**MANIFEST, "files": {}}))


def references() -> References:
    rng = np.random.default_rng(0)
    frames = (
        EnrolledFrame("one.png", 0, 2, View(0, 0, 8, 8), (8, 8), b"first picture", "a1"),
        EnrolledFrame("two.png", 2, 5, View(-1, 0.5, 8, 8), (8, 7), b"second", "b2"),
    )
    features = rng.normal(size=(5, 4)).astype(np.float32)
    return References(features, np.arange(5, dtype=np.int32), frames, Thresholds(good_below=0.1, defect_above=0.2))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    station, saved = Station(tmp_path, bundle()), references()
    assert station.load_references("M3 screw") is None
    station.save_references("M3 screw", saved)
    loaded = Station(tmp_path, bundle()).load_references("M3 screw")
    assert loaded is not None
    np.testing.assert_array_equal(loaded.features, saved.features)
    np.testing.assert_array_equal(loaded.patch, saved.patch)
    assert loaded.frames == saved.frames
    assert loaded.thresholds == saved.thresholds


@pytest.mark.parametrize("other", ["m3 screw", "M3_screw", "M3/screw", "../M3 screw", "M3 screw ", ""])
def test_objects_have_banks_of_their_own(other: str, tmp_path: Path) -> None:
    station = Station(tmp_path / "station", bundle())
    station.save_references("M3 screw", references())
    assert station.load_references(other) is None
    station.save_references(other, references())
    assert len(station.enrolled()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["station"]


def test_another_bundle_has_banks_of_its_own(tmp_path: Path) -> None:
    Station(tmp_path, bundle()).save_references("part", references())
    assert Station(tmp_path, bundle("cd" * 32)).load_references("part") is None


@pytest.mark.parametrize(
    "damage,says",
    [
        pytest.param(lambda f: (f / "bank.safetensors").write_bytes(b"x" * 99), "was changed", id="changed"),
        pytest.param(lambda f: (f / "bank.safetensors").unlink(), "not a complete reference bank", id="missing"),
        pytest.param(lambda f: (f / "bank.sha256").unlink(), "not a complete reference bank", id="no hash"),
        pytest.param(lambda f: junk(f), "not a complete reference bank", id="not safetensors, hash right"),
    ],
)
def test_refuses_a_damaged_bank(damage: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    damage(station.save_references("part", references()))
    with pytest.raises(BundleError, match=says):
        station.load_references("part")


def test_refuses_a_bank_copied_from_another_bundle(tmp_path: Path) -> None:
    first, second = Station(tmp_path, bundle()), Station(tmp_path, bundle("cd" * 32))
    first.save_references("part", references())
    first.path.rename(second.path)
    with pytest.raises(BundleError, match="enrolled with bundle abab"):
        second.load_references("part")


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    calibration = Calibration(
        bundle="ab" * 32,
        bank=None,
        object="part",
        thresholds=Thresholds(good_below=0.1, defect_above=0.2),
        promise="none",
        by="somebody",
        when="2026-01-01T00:00:00+0000",
        frames=(),
    )
    station.save_references("part", references())
    station.save_calibration(calibration)
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    with room(100), pytest.raises(OSError, match="File too large"):
        station.save_references("part", references())
    with room(100), pytest.raises(OSError, match="File too large"):
        station.save_calibration(calibration)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


def junk(folder: Path) -> None:
    (folder / "bank.safetensors").write_bytes(b"\xff" * 64)
    (folder / "bank.sha256").write_text(sha256(folder / "bank.safetensors"))
