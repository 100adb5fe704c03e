"""How an object comes to be released, and what is said of it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import stat
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from examples import CALIBRATION, MANIFEST
from kills import kills
from plain_parts import plain_part
from scipy.stats import beta

from vmad_edge.runtime import audit
from vmad_edge.runtime.bundle import Bundle, Manifest, Thresholds, seal
from vmad_edge.runtime.calibrate import Targets, calibrate, defects_needed
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.errors import BundleError, VmadError
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.release import Release, Shown
from vmad_edge.runtime.station import Calibration, Station

BUNDLE = Bundle(Path("bundle"), "ab" * 32, Manifest.model_validate({**MANIFEST, "files": {}}))
OBJECT = CALIBRATION.object


@pytest.mark.parametrize(
    "missed,share,confidence",
    [(0, 0.5, 0.95), (1, 0.5, 0.95), (0, 0.1, 0.95), (3, 0.1, 0.9), (0, 0.01, 0.99), (7, 0.9, 0.5)],
)
def test_defects_needed_are_enough_and_one_less_is_not(missed: int, share: float, confidence: float) -> None:
    needed = defects_needed(missed, share, confidence)
    assert beta.ppf(confidence, missed + 1, needed - missed) <= share
    assert needed == missed + 1 or beta.ppf(confidence, missed + 1, needed - 1 - missed) > share


@pytest.mark.parametrize(
    "defects,missed,confidence,says",
    [
        (29, 0, 0.95, "29 defects, none missed: at most 10% missed at 95%"),
        (29, 2, 0.95, "29 defects, 2 missed: at most 21% missed at 95%"),
        (9, 1, 0.9, "9 defects, 1 missed: at most 37% missed at 90%"),
    ],
)
def test_a_bound_is_said_no_smaller_than_it_is(defects: int, missed: int, confidence: float, says: str) -> None:
    bound = float(beta.ppf(confidence, missed + 1, defects - missed))
    told = Shown(defects=defects, missed=missed, bound=bound, confidence=confidence, allowed=0.5, needed=defects).told
    assert told == says
    assert int(re.findall(r"(\d+)%", told)[0]) == np.ceil(100 * bound)


# ------------------------------------------------------------------------------ how an object comes to be released


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """enrolled/, others/ and good/: textures alike; defects/: ten others, of which few/ has four."""
    folder, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for name, count, deviation in (("enrolled", 3, 4), ("others", 3, 4), ("good", 6, 4), ("defects", 10, 20)):
        (folder / name).mkdir()
        for number in range(count):
            image = plain_part(rng, deviation, 64, 64).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"{number}.png"), image)
    (folder / "few").mkdir()
    for number in range(4):
        os.link(folder / f"defects/{number}.png", folder / f"few/{number}.png")
    return folder


@pytest.fixture(scope="module")
def makers_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With thresholds of its maker's, for its own kind of part."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("makers") / "bundle")
    manifest = Bundle.open(tiny_bundle).manifest
    thresholds = Thresholds(good_below=0.5, defect_above=0.9)
    seal(
        folder,
        manifest.model_copy(update={"similarity": manifest.similarity.model_copy(update={"thresholds": thresholds})}),
    )
    return folder


def files(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.iterdir())]


class Shop:
    """Where an object is enrolled, calibrated and released, step by step."""

    def __init__(self, bundle: Path, station: Path, parts: Path, object: str) -> None:
        self.bundle, self.place, self.parts, self.object = bundle, station, parts, object

    def open(self, **options: Any) -> Inspector:
        return Inspector.open(self.bundle, self.place, fallback="bundle", **options)

    def enroll(self, folder: str = "enrolled") -> None:
        with self.open(calibrated=False) as inspector:
            inspector.enroll(files(self.parts / folder), object=self.object)

    def calibrate(self, defects: str | None = None) -> None:
        found = [] if defects is None else files(self.parts / defects)
        with self.open(calibrated=False) as inspector:
            targets = Targets(overkill=0.5, suspects=0.5, confidence=0.95)
            calibrate(inspector, files(self.parts / "good"), found, object=self.object, targets=targets, by="the line")

    def lose(self) -> None:
        """All but the audit."""
        for path in (*self.place.glob("*/*/*.calibration"), *self.place.glob("*/*/*.release")):
            path.unlink()

    def answer(self, released: bool = True) -> None:
        with self.open() as inspector:
            inspector.station.answer(self.object, "A. Meier", "a trial of 40 parts", released=released)


ENROLL, ENROLL_OTHERS = methodcaller("enroll"), methodcaller("enroll", "others")
GOOD, FEW, DEFECTS = (methodcaller("calibrate", folder) for folder in (None, "few", "defects"))
LOST = methodcaller("lose")
PERSON, WITHDRAWN = methodcaller("answer"), methodcaller("answer", released=False)

NOBODY = "not released: nobody has shown yet .* the defects of 'tile'.*vmad calibrate .*--defects DIR.*vmad release"
SEEN = "^released: 10 defects, none missed: at most 26% missed at 95% .by the line"
MEIER = "^released: a trial of 40 parts .by A. Meier"
TAKEN_BACK = "^not released: withdrawn by A. Meier, .*: a trial of 40 parts"
MAKER = "^released: by the bundle's maker, for its own kind of part .'part'"


@pytest.mark.parametrize(
    "object,steps,says",
    [
        pytest.param("tile", [], NOBODY, id="unknown, compared with the bundle's features"),
        pytest.param("tile", [ENROLL], NOBODY, id="enrolled"),
        pytest.param("tile", [ENROLL, GOOD], NOBODY, id="good frames show no defect"),
        pytest.param("tile", [ENROLL, DEFECTS], SEEN, id="real defects"),
        pytest.param("tile", [DEFECTS], SEEN, id="real defects, against the bundle's features"),
        pytest.param(
            "tile",
            [ENROLL, FEW],
            "^not released: 4 defects, none missed: at most 53% missed at 95%, where 50% are allowed; 5 defects and no",
            id="four defects show too little",
        ),
        pytest.param("tile", [ENROLL, FEW, PERSON], MEIER, id="a person after too few defects"),
        pytest.param("tile", [ENROLL, PERSON], MEIER, id="a person"),
        pytest.param("tile", [ENROLL, PERSON, WITHDRAWN], TAKEN_BACK, id="withdrawn"),
        pytest.param("tile", [ENROLL, DEFECTS, WITHDRAWN], TAKEN_BACK, id="withdrawn although seen"),
        pytest.param("tile", [ENROLL, WITHDRAWN, DEFECTS], TAKEN_BACK, id="seen after it was withdrawn"),
        pytest.param("tile", [ENROLL, WITHDRAWN, ENROLL_OTHERS], TAKEN_BACK, id="withdrawn, other frames"),
        pytest.param("tile", [ENROLL, WITHDRAWN, DEFECTS, PERSON], MEIER, id="withdrawn, seen, released"),
        pytest.param("tile", [ENROLL, PERSON, ENROLL], MEIER, id="the same frames enrolled again"),
        pytest.param("tile", [ENROLL, PERSON, ENROLL_OTHERS], "^not released: .* another bank", id="other frames"),
        pytest.param("tile", [ENROLL, PERSON, GOOD], "^not released: .* another calibration", id="calibrated anew"),
        pytest.param("tile", [ENROLL, DEFECTS, GOOD], "^not released: .* another calibration", id="good frames later"),
        pytest.param("tile", [ENROLL, DEFECTS, GOOD, DEFECTS], SEEN, id="defects again"),
        pytest.param("part", [], MAKER, id="the bundle's own"),
        pytest.param("part", [WITHDRAWN], TAKEN_BACK, id="the bundle's own, withdrawn"),
        pytest.param("part", [WITHDRAWN, PERSON], MEIER, id="the bundle's own, withdrawn, released"),
        pytest.param("part", [ENROLL], NOBODY.replace("tile", "part"), id="the bundle's own, enrolled"),
        pytest.param("part", [GOOD], NOBODY.replace("tile", "part"), id="the bundle's own, calibrated with good"),
        pytest.param("part", [GOOD, LOST], NOBODY.replace("tile", "part"), id="the bundle's own, its calibration gone"),
        pytest.param(
            "part", [WITHDRAWN, LOST], NOBODY.replace("tile", "part"), id="the bundle's own, its release gone"
        ),
    ],
)
def test_how_an_object_comes_to_be_released(
    object: str, steps: list[Callable[[Shop], object]], says: str, makers_bundle: Path, parts: Path, tmp_path: Path
) -> None:
    shop = Shop(makers_bundle, tmp_path / "station", parts, object)
    for step in steps:
        step(shop)
    with shop.open() as inspector:
        standing = inspector.standing(object)
        assert re.search(says, standing.told) and standing.told.startswith(("not released", "released"))
        assert standing.released == standing.told.startswith("released")
        for frame in (parts / "good/0.png", b"no frame"):
            inspection = inspector.inspect(frame, object=object, review=False)
            assert inspection.released is inspection.to_json()["released"] is standing.released
        assert inspector.compared_with(object)["released"] is standing.released
        assert ("; not released;" in inspector.told(object)) is not standing.released
    with shop.open(stream=20) as inspector:
        assert inspector.standing(object) == standing
        station, device = inspector.station, inspector.engines.device
    bank = station.bank_hash(object)
    assert station.standing(object, bank, station.load_calibration(object, bank), device) == standing


def test_what_this_run_alone_is_compared_with_is_not_released(makers_bundle: Path, parts: Path, tmp_path: Path) -> None:
    """Also where the object itself is."""
    shop = Shop(makers_bundle, tmp_path / "station", parts, "part")
    with shop.open() as inspector:
        assert inspector.standing().released
        inspector.enroll(files(parts / "enrolled"), keep=False)
        assert "this run alone" in inspector.standing().told
        assert not inspector.inspect(parts / "good/0.png", review=False).released
        inspector.compare_unlabelled(files(parts / "good"))
        assert "unlabelled" in inspector.standing().told
        assert not inspector.inspect(parts / "good/0.png", review=False).released
    with Inspector.open(makers_bundle, shop.place) as inspector:
        assert inspector.standing().released


def test_thresholds_that_are_not_used_are_not_released(makers_bundle: Path, parts: Path, tmp_path: Path) -> None:
    shop = Shop(makers_bundle, tmp_path / "station", parts, "tile")
    shop.enroll()
    shop.calibrate("defects")
    with shop.open(calibrated=False) as inspector:
        assert "another calibration" in inspector.standing("tile").told


# ---------------------------------------------------------------------------------------------------- what is kept


def test_a_calibrations_hash_is_of_what_it_says() -> None:
    """And the same for who reads it with a version that knows more fields."""

    class Later(Calibration):
        more: int | None = None

    again = Calibration.model_validate_json(CALIBRATION.model_dump_json(indent=3))
    assert again.hash == CALIBRATION.hash == Later.model_validate_json(CALIBRATION.model_dump_json()).hash
    for field, value in (("by", "another"), ("bank", "cd" * 32), ("when", "2026-01-01T00:00:01+0000")):
        assert CALIBRATION.model_copy(update={field: value}).hash != CALIBRATION.hash


@pytest.fixture
def station(tmp_path: Path) -> Station:
    made = Station(tmp_path / "station", BUNDLE)
    made.save_calibration(CALIBRATION)
    return made


def lines(station: Station) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (station.path / "audit.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("by", ["A. Meier", "\udce4", "名前", "a\nb"])
def test_a_release_is_read_as_it_was_written(by: str, station: Station) -> None:
    release = station.answer(OBJECT, f" {by} ", "a trial")
    assert station.load_release(OBJECT) == release and release.released
    assert release.by == by.encode("utf-8", "backslashreplace").decode()
    assert release.calibration == CALIBRATION.hash and release.bank is None
    assert station.standing(OBJECT, None, CALIBRATION, "cpu").released
    assert station.load_release("another") is None


@pytest.mark.parametrize("nothing", ["", " ", "\n\t"])
@pytest.mark.parametrize("option", ["by", "why"])
def test_a_person_gives_a_name_and_a_reason(option: str, nothing: str, station: Station) -> None:
    with pytest.raises(VmadError, match=f"--{option}: expected .*, got nothing"):
        station.answer(OBJECT, **{"by": "me", "why": "a trial", option: nothing})
    assert station.load_release(OBJECT) is None and len(lines(station)) == 1


@pytest.mark.parametrize("object", ["M3 skrew", "", "x"])
def test_nobody_answers_for_what_is_not_known(object: str, station: Station) -> None:
    with pytest.raises(VmadError, match=r"enrolled or calibrated .*there are: .*'M3 screw'"):
        station.answer(object, "me", "a trial")
    assert len(lines(station)) == 1


@pytest.mark.parametrize(
    "damage,says",
    [
        pytest.param(lambda f: f.write_bytes(f.read_bytes()[:-1]), "was changed", id="changed"),
        pytest.param(lambda f: rewrite(f, lambda text: b"{}"), "not a complete release", id="no release"),
        pytest.param(lambda f: changed(f, released=None), "released", id="no yes or no"),
        pytest.param(lambda f: changed(f, why=None), "why or shown", id="rests on nothing"),
        pytest.param(lambda f: changed(f, object="nut"), "is the release of 'nut'", id="another object's"),
        pytest.param(lambda f: changed(f, schema_version=2), "newer vmad-edge", id="a later schema"),
        pytest.param(
            lambda f: changed(f, why=None, shown=Shown(**SHOWN).model_dump()), "if it is enough", id="shows too little"
        ),
        pytest.param(lambda f: f.chmod(0o666), "others can have changed", id="others can write"),
    ],
)
def test_refuses_a_damaged_one(damage: Callable[[Path], object], says: str, station: Station) -> None:
    station.answer(OBJECT, "me", "a trial")
    (path,) = (station.path / "releases").glob("*.release")
    damage(path)
    with pytest.raises(BundleError, match=says) as raised:
        station.standing(OBJECT, None, CALIBRATION, "cpu")
    assert "\n" not in str(raised.value) and "pydantic" not in str(raised.value)


SHOWN = {"defects": 1, "missed": 0, "bound": 0.95, "confidence": 0.95, "allowed": 0.5, "needed": 5}


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Another content, with the hash that it has."""
    content = change(path.read_bytes()[65:])
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def changed(path: Path, **fields: object) -> None:
    rewrite(path, lambda text: json.dumps({**json.loads(text), **fields}).encode())


@pytest.mark.parametrize(
    "seen_by,device,released",
    [("cpu", "cpu", True), (None, "cpu", True), ("cuda", "cpu", False), ("cpu", "tensorrt", False)],
)
def test_what_another_device_saw(seen_by: str | None, device: str, released: bool, station: Station) -> None:
    """A person's word is for any."""
    calibration = CALIBRATION.model_copy(update={"device": seen_by})
    station.save_calibration(calibration)
    named = {"bundle": "ab" * 32, "object": OBJECT, "bank": None, "calibration": calibration.hash, "by": "it"}
    station.save_release(Release(**named, released=True, when="now", shown=Shown(**{**SHOWN, "bound": 0.4})))
    standing = station.standing(OBJECT, None, calibration, device)
    assert standing.released is released
    assert released or f"its defects were seen by device {seen_by}, this is {device} (released: 1 def" in standing.told
    station.answer(OBJECT, "me", "a trial")
    assert station.standing(OBJECT, None, calibration, device).released


def test_of_another_bundle(station: Station) -> None:
    station.answer(OBJECT, "me", "a trial")
    (path,) = (station.path / "releases").glob("*.release")
    changed(path, bundle="cd" * 32)
    assert "another bundle" in station.standing(OBJECT, None, CALIBRATION, "cpu").told


# ------------------------------------------------------------------------------------------------------- the audit


def test_the_audit_tells_who_did_what(station: Station) -> None:
    station.answer(OBJECT, "me", "a trial")
    before = (station.path / "audit.jsonl").read_bytes()
    station.answer(OBJECT, "you", "a claim", released=False)
    shown = Shown(**{**SHOWN, "bound": 0.4})
    named = {"bundle": "ab" * 32, "object": OBJECT, "bank": None, "calibration": CALIBRATION.hash}
    station.save_release(Release(**named, released=True, by="it", when="now", shown=shown))
    station.save_release(Release(**named, released=False, by="it", when="now", shown=Shown(**SHOWN)))
    assert (station.path / "audit.jsonl").read_bytes().startswith(before)  # never rewritten
    found = lines(station)
    assert [(line["did"], line["by"]) for line in found] == [
        ("calibrated", "somebody"),
        ("released", "me"),
        ("withdrawn", "you"),
        ("released", "it"),
        ("not released", "it"),
    ]
    assert {(line["object"], line["account"]) for line in found} == {(OBJECT, audit.account())}
    assert {line["calibration"] for line in found} == {CALIBRATION.hash}
    assert found[1]["why"] == "a trial" and found[3]["shown"]["bound"] == 0.4
    assert stat.S_IMODE((station.path / "audit.jsonl").stat().st_mode) == 0o644


def test_a_torn_line_stays_a_line(station: Station) -> None:
    path = station.path / "audit.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    torn = path.read_bytes()
    station.answer(OBJECT, "me", "a trial")
    first, second = path.read_bytes().splitlines()
    assert first == torn and json.loads(second)["did"] == "released"


def test_nothing_is_released_where_others_can_write_the_audit(station: Station) -> None:
    (station.path / "audit.jsonl").chmod(0o666)
    with pytest.raises(BundleError, match=r"others can have changed .*audit\.jsonl"):
        station.answer(OBJECT, "me", "a trial")
    assert station.load_release(OBJECT) is None


def test_a_release_is_in_the_audit_whenever_its_writer_is_killed(station: Station) -> None:
    found = set()
    for number in kills(lambda: station.answer(OBJECT, "the killed", "a trial")):
        release = station.load_release(OBJECT)
        by = None if release is None else release.by
        found.add(by)
        if by == "the killed":
            assert lines(station)[-1]["by"] == by
        station.answer(OBJECT, "me", f"a trial {number}")
        assert lines(station)[-1]["why"] == f"a trial {number}"
    assert found == {None, "me", "the killed"}


def _note(folder: Path, name: str) -> None:
    for number in range(50):
        audit.note(folder, {"by": name, "number": number, "why": "x" * 5000})


def test_writers_beside_each_other_write_whole_lines(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_note, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    for name in "ab":
        assert [line["number"] for line in found if line["by"] == name] == list(range(50))


# ----------------------------------------------------------------------------------------------------- the command


def test_the_command(makers_bundle: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, common = str(makers_bundle), ["--station", str(tmp_path / "station"), "--object", "tile"]
    inspect = ["inspect", bundle, str(parts / "enrolled"), *common, "--no-review"]
    answer = ["release", bundle, *common, "--by", "A. Meier", "--why", "a trial"]

    def told(*command: str) -> tuple[int, str, str]:
        status, said = main(list(command)), capsys.readouterr()
        return status, said.out, " ".join(said.err.split())

    assert told(*answer)[0] == 2  # nothing is known of it yet
    status, out, _ = told("enroll", bundle, str(parts / "enrolled"), *common, "--json")
    assert status == 0 and json.loads(out)["released"] is False
    status, out, err = told(*inspect)
    assert status == 3 and "GOOD" in out and "not released" in out
    assert err.startswith("warning: not released: nobody has shown yet") and f"vmad release {makers_bundle}" in err
    run = [*inspect, "--jsonl", str(tmp_path / "run.jsonl"), "--csv", str(tmp_path / "run.csv")]
    assert told(*run)[0] == 3
    assert (tmp_path / "run.csv").read_text().splitlines()[0].count("released") == 1

    status, out, _ = told(*answer)
    assert status == 0 and "'tile' is released: a trial (by A. Meier" in out and "audit.jsonl" in out
    status, out, err = told(*inspect, "--json")
    assert (status, err) == (0, "") and [row["released"] for row in json.loads(out)] == [True] * 3
    status, _, err = told(*run[:-2], "--resume")
    assert status == 2 and "released False, now True" in err
    assert told("inspect", bundle, str(parts / "defects"), *common, "--no-review")[0] == 1
    status, out, _ = told("info", bundle, *common[:2], "--json")
    assert [fact["released"] for fact in json.loads(out)["release"].values()] == [True, True]

    status, out, _ = told(*answer, "--withdraw", "--json")
    assert status == 0 and json.loads(out)["released"] is False
    status, _, err = told(*inspect)
    assert status == 3 and "withdrawn by A. Meier" in err
    status, out, _ = told("info", bundle, *common[:2], "--json")
    assert "withdrawn by A. Meier" in json.loads(out)["release"]["tile"]["release"]
    for missing in ("--by", "--why"):
        with pytest.raises(SystemExit, match="2"):
            main([part for part in answer if part not in (missing, answer[answer.index(missing) + 1])])


def test_defects_release_by_the_command(
    makers_bundle: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", str(makers_bundle), "--station", str(tmp_path), "--object", "tile", "--json"]
    command += ["--good", str(parts / "good"), "--defects", str(parts / "defects"), "--no-review"]
    for missed, released in (("0.3", False), ("0.4", True)):  # cross-validated: the least defect lies below the others
        assert main([*command, "--missed", missed]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["released"] is released and "10 defects, 1 missed: at most 40% missed at 95%" in made["release"]
    next(tmp_path.glob("*/releases/*.release")).write_text("no release")
    assert main(["info", *command[1:4], "--json"]) == 0
    refused = json.loads(capsys.readouterr().out)["release"]["tile"]
    assert refused["released"] is False and "was changed" in refused["release"]
