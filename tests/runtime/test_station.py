from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import CALIBRATION, MANIFEST
from kills import kills
from numpy.typing import NDArray
from parsers import in_tiles
from PIL import Image
from safetensors.numpy import load, save

from vmad_edge.runtime.bundle import Bundle, Manifest, Thresholds
from vmad_edge.runtime.errors import BundleError, VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.objects import folder_name, object_name
from vmad_edge.runtime.release import Release
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.scope import Scope, ScopeLimit
from vmad_edge.runtime.stages.similarity import EnrolledFrame, References
from vmad_edge.runtime.station import Station, same_frames

SCHEMA_1 = Path(__file__).parent / "station_schema_1"
"""Written by the last version of that layout."""


def bundle(hash: str = "ab" * 32) -> Bundle:
    return Bundle(Path("bundle"), hash, Manifest.model_validate({**MANIFEST, "files": {}}))


def references() -> References:
    rng = np.random.default_rng(0)
    frames = (
        EnrolledFrame("one.png", 0, 2, (View(0, 0, 8, 8),), (8, 8), (b"first picture",), "a1"),
        EnrolledFrame("two.png", 2, 5, (View(-1, 0.5, 8, 8),), (8, 7), (b"second",), "b2"),
    )
    features = rng.normal(size=(5, 8)).astype(np.float32)
    thresholds, scope = Thresholds(good_below=0.1, defect_above=0.2), Scope(features[1:3], ScopeLimit(limit=0.1))
    return References(features, np.array([0, 1, 0, 2, 3], np.int32), frames, thresholds, scope=scope)


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
    assert loaded.scope is not None and saved.scope is not None and loaded.scope.limit == saved.scope.limit
    np.testing.assert_array_equal(loaded.scope.descriptors, saved.scope.descriptors)


@pytest.mark.parametrize("other", ["m3 screw", "M3_screw", "M3/screw", "../M3 screw", "M3 screw ", ""])
def test_objects_have_banks_of_their_own(other: str, tmp_path: Path) -> None:
    station = Station(tmp_path / "station", bundle())
    station.save_references("M3 screw", references())
    (station.path / "banks/Thumbs.db").touch()  # no object
    assert station.load_references(other) is None
    station.save_references(other, references())
    assert station.enrolled() == sorted(["M3 screw", other])
    assert [path.name for path in tmp_path.iterdir()] == ["station"]


def test_another_bundle_has_banks_of_its_own(tmp_path: Path) -> None:
    Station(tmp_path, bundle()).save_references("part", references())
    assert Station(tmp_path, bundle("cd" * 32)).load_references("part") is None


def hashed(content: bytes) -> bytes:
    """As whoever also writes a matching hash would."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def bank(change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], object]) -> Callable[[bytes], bytes]:
    """The same bank with its record and arrays changed."""

    def changed(file: bytes) -> bytes:
        content = file[65:]
        record = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["bank"])
        arrays = {name: array.copy() for name, array in load(content).items()}
        change(record, arrays)
        return hashed(save(arrays, {"bank": json.dumps(record)}))

    return changed


def changed_array(name: str, make: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[bytes], bytes]:
    return bank(lambda _, arrays: arrays.update({name: np.ascontiguousarray(make(arrays[name]))}))


def changed_frame(**fields: object) -> Callable[[bytes], bytes]:
    return bank(lambda record, _: record["frames"][1].update(fields))


def put(array: NDArray[Any], value: float) -> NDArray[Any]:
    array.flat[-1] = value
    return array


NOT_COMPLETE, NOT_POSSIBLE = "is not a complete reference bank: ", "is not a possible reference bank: "


@pytest.mark.parametrize(
    "damage,says",
    [
        pytest.param(lambda file: file[:-1], "was changed", id="cut"),
        pytest.param(lambda file: file[:70] + b"!" + file[71:], "was changed", id="changed"),
        pytest.param(lambda file: file[65:], "was changed", id="no hash"),
        pytest.param(lambda file: b"\xff" * 65 + file[65:], "was changed", id="hash is no text"),
        pytest.param(lambda file: b"", "was changed", id="empty"),
        pytest.param(lambda file: hashed(b"\xff" * 64), NOT_COMPLETE, id="not safetensors"),
        pytest.param(lambda file: hashed(b""), NOT_COMPLETE, id="nothing"),
        pytest.param(lambda file: hashed(save({})), NOT_COMPLETE + "expected features", id="no metadata"),
        pytest.param(
            lambda file: hashed(save(load(file[65:]), {"bank": "{"})),
            NOT_COMPLETE + "the file: expected JSON",
            id="no JSON",
        ),
        pytest.param(
            bank(lambda record, _: record.update(bundle=3)),
            NOT_COMPLETE + r"bundle: Input should be a valid string, found 3\.",
            id="another record",
        ),
        pytest.param(bank(lambda _, arrays: arrays.pop("patch")), NOT_COMPLETE + "expected features", id="no patches"),
        pytest.param(
            changed_array("features", lambda a: a[:, :7]), NOT_POSSIBLE + ".*width 8.* found 7", id="another width"
        ),
        pytest.param(changed_array("features", lambda a: a[0]), NOT_POSSIBLE + r".*\[5,D\]", id="one row"),
        pytest.param(
            changed_array("features", lambda a: a.astype(np.float64)), NOT_POSSIBLE + ".*float32", id="another type"
        ),
        pytest.param(changed_array("features", lambda a: put(a, np.nan)), NOT_POSSIBLE + ".*finite", id="NaN"),
        pytest.param(changed_array("features", lambda a: put(a, -np.inf)), NOT_POSSIBLE + ".*finite", id="infinite"),
        pytest.param(
            bank(lambda record, arrays: record.update(frames=[]) or arrays.update(empty())),
            NOT_POSSIBLE + r".*\[0,D\]",
            id="no rows",
        ),
        pytest.param(changed_array("patch", lambda a: a[1:]), NOT_POSSIBLE + r".*\[4,D\]", id="a row more"),
        pytest.param(
            changed_array("patch", lambda a: put(a, 4)), NOT_POSSIBLE + ".*below 4, found 0 to 4", id="beyond the grid"
        ),
        pytest.param(changed_array("patch", lambda a: put(a, -1)), NOT_POSSIBLE + ".*found -1", id="before the grid"),
        pytest.param(
            changed_array("patch", lambda a: a.astype(np.int64)), NOT_POSSIBLE + ".*patch numbers", id="longer numbers"
        ),
        pytest.param(changed_frame(stop=6), NOT_POSSIBLE + ".*share 5 rows", id="a frame beyond the rows"),
        pytest.param(changed_frame(start=1), NOT_POSSIBLE + ".*share 5 rows", id="a row of two frames"),
        pytest.param(changed_frame(stop=4), NOT_POSSIBLE + ".*share 5 rows", id="a row of no frame"),
        pytest.param(
            bank(lambda record, _: record["frames"][0].update(stop=5) or record["frames"][1].update(start=5, stop=5)),
            NOT_POSSIBLE + ".*at most 4 each",
            id="more rows than patches",
        ),
        pytest.param(bank(lambda _, arrays: arrays.pop("scope")), NOT_POSSIBLE + ".*one of them", id="a limit alone"),
        pytest.param(bank(lambda record, _: record.pop("scope")), NOT_POSSIBLE + ".*one of them", id="no limit"),
        pytest.param(changed_array("scope", lambda a: a[:1]), NOT_POSSIBLE + r".*\[2, 8\]", id="scope of one frame"),
        pytest.param(
            changed_array("scope", lambda a: put(a, np.nan)), NOT_POSSIBLE + ".*finite", id="NaN in the scope"
        ),
        pytest.param(
            bank(lambda record, _: record["scope"].update(limit=float("inf"))),
            NOT_COMPLETE + ".*limit",
            id="an endless scope",
        ),
        pytest.param(changed_frame(start=-1), NOT_COMPLETE + ".*start", id="a negative row"),
        pytest.param(changed_frame(jpeg=[13, 20]), NOT_POSSIBLE + ".*pictures", id="a picture beyond the bytes"),
        pytest.param(changed_frame(jpeg=[0, 19]), NOT_POSSIBLE + ".*pictures", id="a picture over another"),
        pytest.param(changed_frame(size=[0, 7]), NOT_COMPLETE + ".*size", id="no pixels"),
        pytest.param(changed_frame(views=[[0, 0, 0, 8]]), NOT_COMPLETE + ".*left < right", id="an empty view"),
        pytest.param(changed_frame(views=[[0, 0, float("inf"), 8]]), NOT_COMPLETE + ".*view", id="an endless view"),
        pytest.param(
            bank(lambda record, _: record["thresholds"].update(good_below=float("nan"))),
            NOT_COMPLETE + ".*good_below",
            id="no threshold",
        ),
        pytest.param(
            bank(lambda record, _: record["thresholds"].update(defect_above=float("inf"))),
            NOT_COMPLETE + ".*defect_above",
            id="endless threshold",
        ),
        pytest.param(
            bank(lambda record, _: record["thresholds"].update(good_below=0.3)),
            NOT_COMPLETE + ".*exceeds defect_above",
            id="thresholds in another order",
        ),
        pytest.param(
            bank(lambda record, _: record.update(object="nut")), "is the reference bank of 'nut'", id="another object"
        ),
    ],
)
def test_refuses_a_damaged_bank(damage: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    path = station.save_references("part", references())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=says) as raised:
        station.load_references("part")
    said = str(raised.value)
    assert said.endswith("Enroll 'part' again.") and "\n" not in said
    for inside in ("pydantic", "Errno", "0x", "Header", "validation error", "deserializ"):  # of a library
        assert inside not in said


def empty() -> dict[str, NDArray[Any]]:
    return {"features": np.zeros((0, 8), np.float32), "patch": np.zeros(0, np.int32), "jpeg": np.zeros(0, np.uint8)}


@dataclass(frozen=True)
class Kept:
    """What a station keeps of one object, in versions that differ."""

    save: Callable[[Station, float], Path]
    load: Callable[[Station], float | None]


def _save_bank(station: Station, version: float) -> Path:
    made = references()
    made.features[:] = version
    made.thresholds = Thresholds(good_below=version, defect_above=9)
    return station.save_references("M3 screw", made)


def _load_bank(station: Station) -> float | None:
    if (found := station.load_references("M3 screw")) is None:
        return None
    assert found.thresholds is not None
    if (version := found.thresholds.good_below) > 1:
        assert (found.features == version).all()
    return version


def _save_calibration(station: Station, version: float) -> Path:
    thresholds = Thresholds(good_below=version, defect_above=9)
    return station.save_calibration(CALIBRATION.model_copy(update={"thresholds": thresholds}))


def _load_calibration(station: Station) -> float | None:
    found = station.load_calibration("M3 screw", None)
    return None if found is None else found.thresholds.good_below


def _save_release(station: Station, version: float) -> Path:
    named = {"bundle": "ab" * 32, "object": "M3 screw", "bank": None, "calibration": None}
    return station.save_release(Release(**named, released=True, by="me", when="now", why=f"{version:g} trials"))


def _load_release(station: Station) -> float | None:
    found = station.load_release("M3 screw")
    return None if found is None else float((found.why or "").split()[0])


KEPT = {
    "bank": Kept(_save_bank, _load_bank),
    "calibration": Kept(_save_calibration, _load_calibration),
    "release": Kept(_save_release, _load_release),
}
kept = pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)


@pytest.mark.parametrize(
    "damage,says",
    [
        (bank(lambda record, _: record.pop("ignored")), "expected an ignore mask and its width, or neither"),
        (bank(lambda _, arrays: arrays.pop("ignored")), "expected an ignore mask and its width, or neither"),
        (changed_array("ignored", lambda a: a[:, :1]), r"expected an ignore mask of \[h,2\] bytes, found \[9, 1\]"),
        (changed_array("ignored", lambda a: a | 255), "leaves nothing to inspect"),
        (changed_array("ignored", lambda a: a[:8]), "region of interest 0,0,16,9 reaches beyond"),
        (bank(lambda record, _: record.update(region=[9, 0, 9, 9])), "at least 8 wide and high, got 9,0,9,9"),
        (bank(lambda record, _: record.update(tiles={"count": 99})), "tiles.count: expected 1 to 32 tiles"),
        (changed_array("patch", lambda a: a[::-1]), "of each frame, tile by tile, patches of its tiles"),
        (changed_array("patch", lambda a: a + 1), "expected patch numbers from 0 to below 8, found 1 to 8"),
        (bank(lambda record, _: record["frames"][0]["views"].pop()), "expected 1 pictures, one after the other"),
    ],
)
def test_refuses_a_damaged_bank_of_tiles(damage: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    station, made = Station(tmp_path, bundle()), in_tiles()
    path = station.save_references("part", made)
    loaded = station.load_references("part")
    assert loaded is not None and loaded.layout.key == made.layout.key and loaded.frames == made.frames
    frames, layout = Station(tmp_path, bundle("cd" * 32)).enrolled_with("abab", "part")
    assert frames == made.frames and layout.key == made.layout.key
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=f"(possible|complete) reference bank: .*{says}"):
        station.load_references("part")


@kept
@pytest.mark.parametrize("before", ["nothing", "another", "schema 1"])
def test_a_writer_killed_at_any_system_call_leaves_the_old_or_the_new(before: str, kept: Kept, tmp_path: Path) -> None:
    root = tmp_path / "station"
    station = Station(root, bundle())

    def reset() -> None:
        if before == "another":
            kept.save(station, 2)
        else:
            shutil.rmtree(root, ignore_errors=True)
        if before == "schema 1":
            shutil.copytree(SCHEMA_1, root)
            subprocess.run(["chmod", "-R", "go-w", root], check=True)
            if kept is KEPT["calibration"]:  # its own was made with its bank
                _rewrite_schema_1(root, lambda json: re.sub(rb'"bank":"[0-9a-f]+"', b'"bank":null', json))

    reset()
    old = kept.load(station)
    found, after = set(), set()
    for calls in kills(lambda: kept.save(station, 3)):
        found.add(kept.load(Station(root, bundle())))
        after.add(calls)
        path = kept.save(Station(root, bundle()), 4)
        assert kept.load(Station(root, bundle())) == 4
        left = {name.name for name in path.parent.iterdir()} - {path.stem}
        assert left == {".lock", path.name}  # nothing of the dead writer
        reset()
    assert found == {old, 3} and len(after) > 20
    assert kept.load(station) == 3


def _rewrite_schema_1(root: Path, change: Callable[[bytes], bytes]) -> None:
    (path,) = root.glob("*/calibrations/*/calibration.json")
    content = change(re.sub(rb'(": )', b'":', path.read_bytes()))
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")


def test_a_writer_that_writes_in_place_is_found_out(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    path = _save_bank(station, 2)
    content = path.read_bytes()
    with pytest.raises(BundleError, match="was changed"):
        for _ in kills(lambda: path.write_bytes(content)):
            _load_bank(station)


@kept
def test_readers_beside_writers_find_whole_ones(kept: Kept, tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    kept.save(station, 2)

    def write(version: int) -> None:
        while True:
            kept.save(station, version)

    writers = [multiprocessing.get_context("fork").Process(target=write, args=(version,)) for version in (3, 4)]
    for writer in writers:
        writer.start()
    try:
        found = {2.0}
        for _ in range(2000):
            found.add(kept.load(station) or 0)
        assert all(writer.is_alive() for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert found == {2, 3, 4}
    path = kept.save(station, 5)  # whatever they held when they were killed
    assert kept.load(station) == 5
    assert {name.name for name in path.parent.iterdir()} == {".lock", path.name}


@pytest.fixture
def schema_1(tmp_path: Path) -> Path:
    root = shutil.copytree(SCHEMA_1, tmp_path / "station")
    subprocess.run(["chmod", "-R", "go-w", root], check=True)  # git keeps no such modes
    return root


def test_a_station_of_schema_1_is_read(schema_1: Path) -> None:
    station = Station(schema_1, bundle())
    assert station.enrolled() == ["M3 screw"]
    loaded = station.load_references("M3 screw")
    assert loaded is not None and loaded.features.shape == (7, 8)
    np.testing.assert_array_equal(loaded.features, np.random.default_rng(1).normal(size=(7, 8)).astype(np.float32))
    np.testing.assert_array_equal(loaded.patch, [0, 1, 2, 3, 0, 1, 3])
    assert [(f.id, f.start, f.stop, f.jpegs, f.path) for f in loaded.frames] == [
        ("one.png", 0, 4, (b"first picture",), "/parts/one.png"),
        ("two.png", 4, 7, (b"second",), None),
    ]
    assert loaded.thresholds == Thresholds(good_below=0.1, defect_above=0.2)
    calibration = station.load_calibration("M3 screw", loaded.hash)
    assert calibration is not None and calibration.thresholds == Thresholds(good_below=0.125, defect_above=0.25)
    assert station.calibrated() == {"M3 screw": calibration}
    anew = Station(schema_1, bundle("cd" * 32))
    assert "--from-station abababababababab" in (anew.left_behind("M3 screw") or "")
    assert anew.enrolled_with("abab", "M3 screw")[0] == loaded.frames

    older = station.path / "banks/_4d_3_20_screw"
    for version, folder_stays in ((2, True), (3, False)):  # a reader may have begun on it
        _save_bank(station, version)
        assert _load_bank(station) == version and older.exists() is folder_stays
        assert station.enrolled() == ["M3 screw"]
    assert "another reference bank" in str(station.calibrated()["M3 screw"])


@pytest.mark.parametrize("name", ["bank.safetensors", "bank.sha256"])
@pytest.mark.parametrize(
    "damage,says",
    [(Path.unlink, "No such file"), (lambda path: path.write_bytes(b"\xff" * 65), "was changed")],
    ids=["missing", "changed"],
)
def test_refuses_a_damaged_bank_of_schema_1(
    damage: Callable[[Path], object], says: str, name: str, schema_1: Path
) -> None:
    station = Station(schema_1, bundle())
    damage(station.path / "banks/_4d_3_20_screw" / name)
    with pytest.raises(BundleError, match=rf"{says}.* Enroll 'M3 screw' again\."):
        station.load_references("M3 screw")


def test_a_bank_of_schema_1_whose_writer_was_killed_is_brought_back(schema_1: Path) -> None:
    """Between its two renames. Nothing lay in its place, and other features were taken."""
    station = Station(schema_1, bundle())
    folder = station.path / "banks/_4d_3_20_screw"
    left = folder.with_name("._4d_3_20_screw.x1y2z3w4")
    left.mkdir()
    folder.rename(left / "old")
    for ask in (station.load_references, station.knows, station.check_known):
        with pytest.raises(BundleError, match=r"interrupted write left of 'M3 screw'.*`mv ") as raised:
            ask("M3 screw")
    assert station.load_references("nut") is None
    subprocess.run(re.findall("`(.*)`", str(raised.value))[0], shell=True, check=True)
    assert station.load_references("M3 screw") is not None


BANK = "station/abababababababab/banks/part.bank"


@pytest.mark.parametrize("depth", [0, 1, 2, 3], ids=["station", "bundle", "banks", "bank"])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path),
        lambda path: path.mkdir() if path.suffix else path.touch(),
        lambda path: os.mkfifo(path),
    ],
    ids=["link to nowhere", "link to itself", "something else", "pipe"],
)
def test_what_cannot_be_read_is_no_absence(make: Callable[[Path], object], depth: int, tmp_path: Path) -> None:
    station = Station(tmp_path / "station", bundle())
    station.save_references("part", references())
    path = tmp_path / Path(*Path(BANK).parts[: depth + 1])
    path.rename(tmp_path / "moved")
    make(path)
    with pytest.raises(BundleError):
        station.load_references("part")
    with pytest.raises(BundleError):
        station.bank_hash("part")
    for ask in (station.enrolled, lambda: station.check_known("nut")) if depth < 3 else ():
        with pytest.raises(BundleError):
            ask()
    for ask in (station.calibrated, lambda: station.load_calibration("part", None)) if depth < 2 else ():
        with pytest.raises(BundleError):
            ask()
    if depth == 3:
        assert station.enrolled() == ["part"]
        with pytest.raises(BundleError, match="There are: 'part'"):
            station.check_known("nut")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("depth", [0, 1, 2, 3], ids=["station", "bundle", "banks", "bank"])
def test_what_may_not_be_read_is_no_absence(depth: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        station = Station(Path(folder, "station"), bundle())
        station.save_references("part", references())
        station.save_calibration(CALIBRATION)
        path = folder / Path(*Path(BANK).parts[: depth + 1])
        path.chmod(0)
        asks = [lambda: station.load_references("part"), lambda: station.bank_hash("part")]
        if depth < 3:
            asks += [station.enrolled, lambda: station.check_known("nut")]
        if depth < 2:
            asks += [station.calibrated, lambda: station.load_calibration("M3 screw", None)]
        with as_nobody():
            for ask in asks:
                with pytest.raises(BundleError, match="Permission denied"):
                    ask()
        path.chmod(0o755)


@pytest.mark.parametrize("depth", [0, 1, 2, 3], ids=["station", "bundle", "banks", "bank"])
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777, 0o620])
def test_refuses_what_others_can_write(mode: int, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmad_edge.runtime.files.os.geteuid", os.getuid)
    station = Station(tmp_path / "station", bundle())
    station.save_references("part", references())
    path = tmp_path / Path(*Path(BANK).parts[: depth + 1])
    if path.stat().st_uid == path.stat().st_gid != 0:
        os.chown(path, -1, os.getgroups()[-1])
    path.chmod(mode | stat.S_IXUSR)
    with pytest.raises(BundleError, match=f"others can have changed {path}: .*mode {mode | stat.S_IXUSR:o}") as raised:
        station.load_references("part")
    if depth < 3:
        with pytest.raises(BundleError, match="others can have changed"):
            station.save_references("part", references())
    subprocess.run(re.findall("`(chmod .*)`", str(raised.value))[0], shell=True, check=True)
    assert station.load_references("part") is not None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("depth", [0, 1, 2, 3], ids=["station", "bundle", "banks", "bank"])
def test_refuses_what_another_user_owns(depth: int, tmp_path: Path) -> None:
    station = Station(tmp_path / "station", bundle())
    station.save_references("part", references())
    path = tmp_path / Path(*Path(BANK).parts[: depth + 1])
    os.chown(path, 65534, 65534)
    with pytest.raises(BundleError, match=r"found owner 65534, mode .*: `sudo chown -R 0 ") as raised:
        station.load_references("part")
    subprocess.run(re.findall("`sudo (chown .*)`", str(raised.value))[0], shell=True, check=True)
    assert station.load_references("part") is not None


def test_what_is_written_nobody_else_can_change(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Station(tmp_path / "station", bundle()).save_references("part", references())
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & 0o022 for path in (tmp_path / "station", *(tmp_path / "station").rglob("*")))


def test_reading_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a disk that is mounted read-only."""
    station = Station(tmp_path, bundle())
    station.save_references("part", references())
    station.save_calibration(CALIBRATION)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    open = os.open

    def read_only(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return open(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr("fcntl.flock", lambda *_: pytest.fail("readers need no lock"))
    assert station.load_references("part") is not None and station.enrolled() == ["part"]
    assert station.load_calibration("M3 screw", None) == CALIBRATION
    with pytest.raises(OSError, match="Read-only"):
        station.save_calibration(CALIBRATION)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(BundleError, match=f"{tmp_path}.* cannot lock files .*--station"):
        Station(tmp_path, bundle()).save_references("part", references())
    assert Station(tmp_path, bundle()).enrolled() == []


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Of files, a file system may hold any bytes."""
    odd, made = os.fsdecode(b"screw \xff.png"), references()
    made.frames = (replace(made.frames[0], id=odd, path=f"/parts/{odd}"), made.frames[1])
    station = Station(tmp_path, bundle())
    station.save_references(odd, made)
    loaded = station.load_references(odd)
    assert loaded is not None and loaded.frames[0].id == r"screw \udcff.png" and station.enrolled() == [odd]


@pytest.mark.parametrize(
    "spoil,says",
    [
        (lambda made: put(made.features, np.nan), "expected finite features"),
        (lambda made: put(made.patch, 4), "expected patch numbers from 0 to below 4, found 0 to 4"),
        (lambda made: replaced_frame(made, stop=4), "expected frames that share 5 rows"),
        (lambda made: replaced_frame(made, views=(View(8, 0, 0, 8),)), "expected a view with left < right"),
    ],
)
def test_what_no_reader_would_take_is_not_written(
    spoil: Callable[[References], object], says: str, tmp_path: Path
) -> None:
    station, made = Station(tmp_path, bundle()), references()
    spoil(made)
    with pytest.raises(BundleError, match=f"references of 'part' cannot be kept: .*{says}"):
        station.save_references("part", made)
    assert list(tmp_path.iterdir()) == [] and made.hash is None


def replaced_frame(made: References, **fields: Any) -> None:
    made.frames = (made.frames[0], replace(made.frames[1], **fields))


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
    station.save_references("part", references())
    station.save_calibration(CALIBRATION)
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    with room(100), pytest.raises(OSError, match="File too large"):
        station.save_references("part", references())
    with room(100), pytest.raises(OSError, match="File too large"):
        station.save_calibration(CALIBRATION)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "name",
    ["screw", "M3 screw", "M3_screw", "../../etc", "", "_", "_2e_", "Ünterlage", "歯車", "🔩", "a\nb", "x" * 240],
)
def test_folders_of_objects(name: str) -> None:
    folder = folder_name(name)
    assert re.fullmatch("[a-z0-9_-]{1,240}", folder)
    assert object_name(folder) == name


@pytest.mark.parametrize("name", ["x" * 241, "歯" * 60])
def test_a_name_too_long_for_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(VmadError, match=f"too long to name a folder: {len(name)} characters .* at most 240"):
        Station(tmp_path, bundle()).save_references(name, references())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("known", [[], ["part"], ["Screw"], ["screw", "Screw"]])
def test_a_name_that_is_known_or_alone_is_taken(known: list[str], tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    for name in known:
        station.save_references(name, references())
    for name in [*known, "part", *([] if known else ["anything"])]:
        station.check_known(name)


def test_calibrated_names_are_known(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    station.save_calibration(CALIBRATION)
    assert station.enrolled() == [] and station.knows("M3 screw")
    station.check_known("M3 screw")
    with pytest.raises(BundleError, match=r"There are: 'M3 screw'\. Did you mean 'M3 screw'"):
        station.check_known("m3 screw")


@pytest.mark.parametrize("object", ["M3 screw", "part", "\ud800"])  # another, the bundle's own, half a character
def test_a_bank_that_is_gone_is_missed(object: str, tmp_path: Path) -> None:
    """Else the next run would compare with other features and not say so."""
    station = Station(tmp_path, bundle())
    path = station.save_references(object, references())
    hash = station.bank_hash(object)
    station.save_references("nut", references())  # of which the audit speaks last
    path.unlink()
    with pytest.raises(BundleError, match=rf"is gone from .*banks \(SHA-256 {hash}; the audit: enrolled 20.* by "):
        station.check_known(object)
    station.check_known(object, also=[object])  # enrolled for this run alone
    station.save_references(object, references())
    station.check_known(object)


def test_a_bank_and_its_calibration_that_are_gone_are_missed(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    path = station.save_references("part", references())
    bank = station.bank_hash("part")
    calibration = station.save_calibration(CALIBRATION.model_copy(update={"object": "part", "bank": bank}))
    path.unlink()
    calibration.unlink()
    with pytest.raises(BundleError, match=r"is gone from .* the audit: calibrated"):
        station.check_known("part")


@pytest.mark.parametrize(
    "line",
    [b"", b"torn", b'"part"\n', b'{"object": "part"}\n', b'{"object": "nut", "did": "enrolled", "sha256": "a"}\n'],
)
def test_what_the_audit_does_not_tell_is_not_missed(line: bytes, tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    station.path.mkdir(0o755)
    (station.path / "audit.jsonl").write_bytes(line)
    station.check_known("part")


def test_of_many_names_the_closest_are_listed(tmp_path: Path) -> None:
    station = Station(tmp_path, bundle())
    for number in range(30):
        station.save_references(f"gear {number}", references())
    with pytest.raises(BundleError, match=r"There are: 'gear 27', .* and 20 more\. Did you mean 'gear 27'\?"):
        station.check_known("Gear27")


@pytest.mark.parametrize("given", ["screw", "Screw", " screw "])
def test_a_bundle_exported_anew_says_where_its_objects_are(given: str, tmp_path: Path) -> None:
    """The station is keyed by the bundle's hash, so nothing is enrolled any more."""
    root = tmp_path / "my station"
    Station(root, bundle("ef" * 32)).save_references("nut", references())
    Station(root, bundle()).save_references("screw", references())
    anew = Station(root, bundle("cd" * 32))
    (root / "notes").mkdir()  # not a station
    command = f"`vmad enroll bundle --from-station abababababababab --object screw --station '{root}'`"
    with pytest.raises(BundleError) as raised:
        anew.check_known(given)
    assert f"nothing is enrolled or calibrated for {given!r}" in str(raised.value) and command in str(raised.value)
    assert anew.enrolled_elsewhere() == {"ab" * 8: ["screw"], "ef" * 8: ["nut"]}
    anew.check_known("bolt")  # of which nobody knows anything: other bundles' objects are not this one's
    anew.save_references(given, references())
    anew.check_known(given)
    assert anew.left_behind(given) is None


def test_a_calibration_with_another_bundle_is_told_of(tmp_path: Path) -> None:
    Station(tmp_path, bundle()).save_calibration(CALIBRATION)
    with pytest.raises(BundleError, match=r"'M3 screw' is calibrated with another bundle .*: `vmad calibrate` it"):
        Station(tmp_path, bundle("cd" * 32)).check_known("M3 screw")


def test_the_last_enrolment_is_named(tmp_path: Path) -> None:
    for age, hash in enumerate(("ab", "ef", "12")):
        folder = Station(tmp_path, bundle(hash * 32)).save_references("screw", references())
        os.utime(folder, (1e9, 1e9 - (age - 1) ** 2))
    assert "--from-station efefefefefefefef" in (Station(tmp_path, bundle("cd" * 32)).left_behind("screw") or "")


@pytest.mark.parametrize("other", ["ab" * 32, "ab" * 8, "abab", "ABAB", "{root}", "{root}/abababababababab"])
@pytest.mark.parametrize("inside", [True, False])
def test_frames_enrolled_with_another_bundle(inside: bool, other: str, tmp_path: Path) -> None:
    old = tmp_path / ("new" if inside else "old")
    Station(old, bundle()).save_references("screw", references())
    anew = Station(tmp_path / "new", bundle("cd" * 32))
    if inside or "{root}" in other:
        assert anew.enrolled_with(other.format(root=old), "screw")[0] == references().frames
    else:
        with pytest.raises(BundleError, match=f"found '{other}'; in {tmp_path}/new there are: none"):
            anew.enrolled_with(other, "screw")


@pytest.mark.parametrize(
    "other,object,says",
    [
        ("abab", "Screw", r"'Screw' is not enrolled in abab; there are: 'screw'\. Did you mean 'screw'"),
        ("9999", "screw", "beginning of that bundle's hash, found '9999'; in .* there are: abababababababab, abcdabcd"),
        ("ab", "screw", "'screw' is enrolled with several bundles in ab: say which of abababababababab, abcdabcdabcd"),
        ("cdcd", "screw", "found 'cdcd'"),  # itself
        ("{tmp}", "screw", "with several bundles"),
        ("{tmp}/nothing", "screw", "found '.*nothing'"),
    ],
)
def test_no_such_enrolment(other: str, object: str, says: str, tmp_path: Path) -> None:
    for hash in ("ab" * 32, "abcd" * 16):
        Station(tmp_path, bundle(hash)).save_references("screw", references())
    with pytest.raises(BundleError, match=says):
        Station(tmp_path, bundle("cd" * 32)).enrolled_with(other.format(tmp=tmp_path), object)


def enrolled(path: Path, pixels: NDArray[np.uint8]) -> EnrolledFrame:
    Image.fromarray(pixels).save(path)
    return EnrolledFrame(path.name, 0, 1, (View(0, 0, 9, 9),), (9, 9), (b"",), Frame.read(path).pixel_hash, str(path))


def test_the_same_frames_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 480, 640, 3), np.uint8)
    frames = [enrolled(tmp_path / f"{number}.png", one) for number, one in enumerate(pixels)]
    again = list(same_frames(frames))
    assert [frame.id for frame in again] == ["0.png", "1.png", "2.png", "3.png"]
    np.testing.assert_array_equal([frame.pixels for frame in again], pixels)

    Image.fromarray(pixels[0]).save(tmp_path / "0.png", compress_level=1)  # another file, the same picture
    assert len(list(same_frames(frames))) == 4
    monkeypatch.chdir(tmp_path)
    assert len(list(same_frames([replace(frame, path=None) for frame in frames]))) == 4  # an older bank

    (tmp_path / "1.png").unlink()
    Image.fromarray(pixels[2] ^ 1).save(tmp_path / "2.png")
    read: list[str] = []
    with pytest.raises(BundleError) as raised:
        read.extend(frame.id for frame in same_frames(frames))
    assert read == ["0.png"]  # all are looked at, none is used after the first that is lost
    said = str(raised.value)
    assert f"2 of the enrolled frames are gone or changed, so nothing was enrolled: {tmp_path}/1.png: cannot be" in said
    assert f"{tmp_path}/2.png: its pixels are not those" in said and "3.png" not in said
