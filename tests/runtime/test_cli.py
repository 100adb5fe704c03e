"""The command as a user types it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plain_parts import plain_part
from safetensors.numpy import load_file, save_file

from vmad_edge.runtime.cli import main

VMAD = str(Path(sys.executable).with_name("vmad"))


def vmad(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VMAD, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/: six textures alike; odd/: one that is not; broken/: no image at all."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("good", "odd", "broken"):
        (folder / name).mkdir()
    for seed in range(6):
        noise = plain_part(np.random.default_rng(seed), 2, 64, 64).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"good/{seed}.png")
    odd = plain_part(np.random.default_rng(9), 2, 64, 64) + 20 * np.sin(np.arange(64)[:, None] * (0.5, 0.7, 0.9))
    Image.fromarray(odd.clip(0, 255).astype(np.uint8)).save(folder / "odd/odd.png")
    (folder / "broken/broken.png").write_bytes(b"this is text")
    return folder


@pytest.fixture(scope="module")
def station(tiny_bundle: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A station in which good/ is enrolled and released."""
    folder = tmp_path_factory.mktemp("station")
    enrolled = vmad("enroll", tiny_bundle, parts / "good", "--station", folder, "--json")
    assert enrolled.returncode == 0, enrolled.stderr
    assert json.loads(enrolled.stdout)["frames"] == 6
    answered = vmad("release", tiny_bundle, "--station", folder, "--by", "a test", "--why", "its odd part is a DEFECT")
    assert answered.returncode == 0, answered.stderr
    return folder


@pytest.mark.parametrize(
    "paths,status,verdicts",
    [
        (["good/0.png", "good/1.png"], 0, ["GOOD", "GOOD"]),
        (["good/0.png", "odd"], 1, ["GOOD", "DEFECT"]),
        (["good/0.png", "broken"], 3, ["GOOD", "NOT_INSPECTED"]),
        (["broken", "odd"], 1, ["NOT_INSPECTED", "DEFECT"]),  # the unreadable file does not stop the rest
    ],
)
def test_json_and_exit_status(
    paths: list[str], status: int, verdicts: list[str], tiny_bundle: Path, parts: Path, station: Path
) -> None:
    done = vmad("inspect", tiny_bundle, *paths, "--station", station, "--no-review", "--json", cwd=parts)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [row["verdict"] for row in rows] == verdicts
    assert done.returncode == status
    assert rows[0]["path"] == {"good": "good/0.png", "broken": "broken/broken.png"}[paths[0][:6].split("/")[0]]
    for row in rows:
        expected = {"path", "verdict", "score", "p_yes", "regions", "explanation", "reason", "timings_ms"}
        assert expected | {"deadline_met"} <= set(row)
        assert (row["score"] is None) == (row["verdict"] == "NOT_INSPECTED") == (row["reason"] is not None)


def test_enrolling_copies_is_warned_of(tiny_bundle: Path, parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "good", tmp_path / "parts")
    shutil.copy(parts / "good/0.png", tmp_path / "parts/0 (1).png")
    done = vmad("enroll", tiny_bundle, tmp_path / "parts", "--station", tmp_path / "station", "--json")
    assert json.loads(done.stdout)["frames"] == 6 and "1 of 7 frames are copies of others" in done.stderr


def test_references_for_one_run(tiny_bundle: Path, parts: Path, tmp_path: Path) -> None:
    done = vmad(
        "inspect", tiny_bundle, parts / "odd", "--references", parts / "good", "--station", tmp_path, "--no-review"
    )
    assert done.returncode == 1 and "DEFECT" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["inspect", "enroll"])
def test_a_broken_reference_is_named_and_nothing_is_kept(
    command: str, tiny_bundle: Path, parts: Path, tmp_path: Path
) -> None:
    rest = ["odd", "--references", "."] if command == "inspect" else ["."]
    done = vmad(command, tiny_bundle, *rest, "--station", tmp_path, cwd=parts)
    assert done.returncode == 2
    assert "broken/broken.png: not a readable image" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_report(tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path) -> None:
    done = vmad("inspect", tiny_bundle, ".", "--station", station, "--report", tmp_path / "report", cwd=parts)
    assert done.returncode == 1, done.stderr
    for folder in ("pictures", "thumbnails", "places"):  # of the broken one there is nothing to show
        names = {path.name for path in (tmp_path / "report" / folder).iterdir()}
        assert names == {"odd_odd.png.vmad.jpg", *(f"good_{n}.png.vmad.jpg" for n in range(6))}
    page = (tmp_path / "report/index.html").read_text()
    assert page.count("compared with references") == 7  # all but the broken one
    assert page.count("<article data-name") == 8
    assert "://" not in page  # self-contained


def test_maps(tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path) -> None:
    vmad("inspect", tiny_bundle, "odd", "broken", "--station", station, "--maps", tmp_path, cwd=parts)
    for name in ("odd.tiff", "odd_language.tiff"):
        heat = np.asarray(Image.open(tmp_path / "odd" / name))
        assert heat.shape == (64, 64) and heat.dtype == np.float32 and np.isfinite(heat).all()
    masks = {path.name for path in (tmp_path / "odd").iterdir()} - {"odd.tiff", "odd_language.tiff"}
    assert masks <= {"odd_mask.png"}  # a mask if P(yes) came out above 0.5
    for name in masks:
        assert np.asarray(Image.open(tmp_path / "odd" / name)).shape == (64, 64)
    assert {path.name for path in tmp_path.iterdir()} == {"odd"}  # the broken frame has no map


def test_maps_of_two_frames_of_one_name(tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path) -> None:
    shutil.copy(parts / "odd/odd.png", tmp_path / "odd.png")
    shutil.copy(parts / "odd/odd.png", tmp_path / "odd.bmp")
    done = vmad("inspect", tiny_bundle, tmp_path, "--station", station, "--maps", tmp_path / "maps")
    assert done.returncode == 1, done.stderr
    maps = [path.name for path in (tmp_path / "maps").rglob("*.tiff") if "_language" not in path.name]
    assert len(maps) == 2 and all(name.startswith("odd-") for name in maps)


def test_info(tiny_bundle: Path, station: Path) -> None:
    facts = json.loads(vmad("info", tiny_bundle, "--station", station, "--device", "cpu", "--json").stdout)
    assert facts["enrolled"] == ["part"] and facts["enrolled_with_other_bundles"] == {}
    assert facts["device"] == "cpu" and facts["provider"].startswith("ONNX Runtime")
    assert len(facts["hash"]) == 64


def test_info_warns_of_a_crop(tiny_bundle: Path, tmp_path: Path) -> None:
    from vmad_edge.runtime.bundle import Bundle, seal

    shutil.copytree(tiny_bundle, tmp_path / "cropping")
    manifest = Bundle.open(tiny_bundle).manifest
    clip = manifest.clip.model_copy(update={"resize": "shortest_edge"})
    seal(tmp_path / "cropping", manifest.model_copy(update={"clip": clip}))
    assert "not inspected" in vmad("info", tmp_path / "cropping", "--station", tmp_path).stderr


def changed_bundle(bundle: Path, name: str, change: Callable[[Path], None], target: Path) -> Path:
    """A copy at `target` whose file `name` is another, though all hashes are right."""
    from vmad_edge.runtime.bundle import Bundle, seal
    from vmad_edge.runtime.files import sha256

    other = shutil.copytree(bundle, target)
    change(other / name)
    manifest = Bundle.open(bundle).manifest
    seal(other, manifest.model_copy(update={"files": {**manifest.files, name: sha256(other / name)}}))
    return other


def without_seg(gguf: Path) -> None:
    whole = gguf.read_bytes()
    assert whole.count(b"<seg>") == 1
    gguf.write_bytes(whole.replace(b"<seg>", b"<sag>"))


def narrower(features: Path) -> None:
    save_file({name: array[:, :-1].copy() for name, array in load_file(features).items()}, features)


@pytest.mark.parametrize(
    "command,name,change,says",
    [
        ("inspect", "llm.gguf", without_seg, "llm.gguf: token 400 is '<sag>'"),
        ("enroll", "llm.gguf", without_seg, "llm.gguf: token 400 is '<sag>'"),
        ("inspect", "similarity.safetensors", narrower, "similarity.safetensors: expected features of width"),
    ],
)
def test_bundle_that_contradicts_itself(
    command: str, name: str, change: Callable[[Path], None], says: str, tiny_bundle: Path, parts: Path, tmp_path: Path
) -> None:
    other = changed_bundle(tiny_bundle, name, change, tmp_path / "other")
    done = vmad(command, other, parts / "good", "--station", tmp_path / "station")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    "args,says",
    [
        (["inspect", "{bundle}", "{tmp}"], "no images in"),
        (["inspect", "{bundle}", "{tmp}/nothing.png"], "does not exist"),
        (["inspect", "{tmp}", "{bundle}/manifest.json"], "is not a bundle"),
        (["enroll", "{bundle}", "{tmp}"], "no images in"),
        (["info", "{tmp}"], "is not a bundle"),
        (["inspect"], "usage: vmad inspect"),
        ([], "usage: vmad"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(args: list[str], says: str, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = vmad(*(arg.format(bundle=tiny_bundle, tmp=tmp_path / "empty") for arg in args))
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    if "usage" not in says:
        assert done.stderr.count("\n") == 1


@pytest.fixture
def exported_anew(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The same bundle with another hash."""
    from vmad_edge.runtime.bundle import Bundle, seal

    folder = shutil.copytree(tiny_bundle, tmp_path / "anew")
    manifest = Bundle.open(tiny_bundle).manifest
    seal(folder, manifest.model_copy(update={"made_with": {"vmad-edge": "a later one"}}))
    return folder


def test_an_unknown_object_among_known_ones(tiny_bundle: Path, parts: Path, station: Path) -> None:
    command = ["inspect", tiny_bundle, parts / "good/0.png", "--station", station, "--no-review", "--object", "Part"]
    done = vmad(*command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Did you mean 'part'?" in done.stderr
    allowed = vmad(*command, "--fallback", "bundle")
    assert allowed.returncode == 3 and "compared with" in allowed.stdout and "normal features" in allowed.stdout
    rows = json.loads(vmad(*command, "--fallback", "bundle", "--json").stdout)
    assert rows[0]["compared_with"] == "normal features" and rows[0]["object"] == "Part"


def test_a_bundle_exported_anew(tiny_bundle: Path, exported_anew: Path, parts: Path, tmp_path: Path) -> None:
    """What was enrolled hangs on the old one: it is said, with a command that brings it over."""
    shutil.copytree(parts / "good", tmp_path / "good")
    common = ["--station", tmp_path / "station", "--json"]
    for name in ("M3 screw", "part"):
        assert vmad("enroll", tiny_bundle, "good", "--object", name, *common, cwd=tmp_path).returncode == 0
    inspect = ["inspect", exported_anew, "good/0.png", "--no-review", *common]
    done = vmad(*inspect, "--object", "M3 screw", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    command = next(part for part in done.stderr.split("`") if part.startswith("vmad enroll"))

    usual = vmad(*inspect, cwd=tmp_path)  # the bundle's own object: compared with its features, which is said
    assert usual.returncode == 3 and usual.stderr.startswith("note: 'part' is enrolled with another bundle")

    kept = (tmp_path / "good/3.png").rename(tmp_path / "3.png")
    lost = vmad(*shlex.split(command)[1:])
    assert lost.returncode == 2 and "\n" not in lost.stderr.strip()
    assert (
        f"1 of the enrolled frames are gone or changed, so nothing was enrolled: {tmp_path}/good/3.png" in lost.stderr
    )
    facts = json.loads(vmad("info", exported_anew, "--device", "cpu", *common).stdout)
    assert facts["enrolled"] == [] and list(facts["enrolled_with_other_bundles"].values()) == [["M3 screw", "part"]]

    kept.rename(tmp_path / "good/3.png")
    brought = vmad(*shlex.split(command)[1:], "--json")
    assert brought.returncode == 0 and json.loads(brought.stdout)["frames"] == 6
    row = json.loads(vmad(*inspect, "--object", "M3 screw", cwd=tmp_path).stdout)[0]
    assert (row["verdict"], row["compared_with"]) == ("GOOD", "references")


@pytest.mark.parametrize("given", [[], ["good", "--from-station", "abab"]])
def test_frames_to_enroll_come_from_one_place(given: list[str], tiny_bundle: Path, parts: Path) -> None:
    done = vmad("enroll", tiny_bundle, *given, cwd=parts)
    assert done.returncode == 2 and "expected DIR, or --from-station OLD in its place" in done.stderr


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("module", ["vmad_edge.runtime.cli", "vmad_edge.runtime.bundle"])
def test_an_interrupt_before_anything_begins_says_nothing(module: str) -> None:
    """While the command's own modules are loaded, which takes seconds."""
    code = f"""
import os, signal, sys
from vmad_edge.runtime.__main__ import main
class AtImport:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, AtImport())
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_that_a_library_makes_another_error_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def info(*_: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None
        return 0

    monkeypatch.setattr("vmad_edge.runtime.cli._info", info)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert main(["info", "bundle"]) == 130
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_readable_and_goes_on(
    number: signal.Signals, status: int, tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path
) -> None:
    (tmp_path / "many").mkdir()
    for count in range(300):
        shutil.copy(parts / f"good/{count % 6}.png", tmp_path / f"many/{count:03}.png")
    args = [
        "inspect",
        tiny_bundle,
        "many",
        "--station",
        station,
        "--no-review",
        "--jsonl",
        "run.jsonl",
        "--report",
        "r",
    ]
    args += ["--csv", "run.csv", "--json"]
    run = tmp_path / "run.jsonl"
    with (
        (tmp_path / "out.json").open("w") as out,
        subprocess.Popen(list(map(str, [VMAD, *args])), cwd=tmp_path, stdout=out, stderr=subprocess.PIPE) as going,
    ):
        for _ in range(3000):
            if run.exists() and run.stat().st_size:
                break
            time.sleep(0.02)
        going.send_signal(number)
        error = going.communicate(timeout=300)[1].decode()
    assert going.returncode == status and f"{number.name} after" in error and "--resume" in error
    done = len(rows_of(run))
    assert 0 < done < 300 and len(json.loads((tmp_path / "out.json").read_text())) == done
    assert (tmp_path / "r/index.html").read_text().count("<article data-name") == done
    with run.open("a") as file:
        file.write('{"path": "many/299.png", "verdi')
    before = run.read_text().splitlines()[:done]
    resumed = vmad(*args, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    rows = rows_of(run)
    assert run.read_text().splitlines()[:done] == before
    assert [row["path"] for row in rows] == [f"many/{count:03}.png" for count in range(300)]
    assert len(json.loads(resumed.stdout)) == 300 and (tmp_path / "run.csv").read_text().count("\n") == 301
    assert (tmp_path / "r/index.html").read_text().count("<article data-name") == 300


def test_resume_counts_old_rows_and_refuses_other_settings(
    tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run.jsonl"
    args = ["inspect", tiny_bundle, "--station", station, "--no-review", "--jsonl", run]
    assert vmad(*args, parts / "odd").returncode == 1
    again = vmad(*args, parts / "good")
    assert again.returncode == 2 and "is there already" in again.stderr
    assert vmad(*args, parts / "good", "--resume").returncode == 1
    assert len(rows_of(run)) == 7
    other = vmad(*args, parts / "good", "--resume", "--answer", "short")
    assert other.returncode == 2 and "answer none, now short" in other.stderr


def test_a_picture_that_cannot_be_written_is_a_warning(
    tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path
) -> None:
    (tmp_path / "r/pictures/odd_odd.png.vmad.jpg").mkdir(parents=True)
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps/odd").write_text("a file where a folder would be")
    args = ["--station", station, "--no-review", "--json", "--report", tmp_path / "r", "--maps", tmp_path / "maps"]
    done = vmad("inspect", tiny_bundle, "odd", "good/0.png", *args, cwd=parts)
    assert done.returncode == 1 and len(json.loads(done.stdout)) == 2
    assert "picture of odd/odd.png is missing" in done.stderr and "maps of odd/odd.png is missing" in done.stderr
    assert "2 pictures, maps or pages" in done.stderr
    assert (tmp_path / "r/index.html").read_text().count("<article data-name") == 2


def test_names_are_shown_as_they_are(tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path) -> None:
    names = ["Bild [kopie].png", "part[red]7.png", "cam:warning:1.png", "\x1b[31mred.png", "ä.png", "x" * 240 + ".png"]
    (tmp_path / "lot[").mkdir()
    for name in [*map(os.fsencode, names), b"caf\xe9.png", b"lot[/17].png"]:
        shutil.copy(parts / "good/0.png", os.path.join(os.fsencode(tmp_path), name))  # noqa: PTH118
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C"}
    args = ["inspect", tiny_bundle, ".", "--station", station, "--no-review", "--report", "r", "--maps", "m"]
    done = subprocess.run(
        [VMAD, *map(str, args)], capture_output=True, cwd=tmp_path, env=ascii_only, timeout=300, check=False
    )
    told = done.stdout.decode("ascii")
    assert done.returncode == 0 and done.stderr == b""
    for shown in (*names[:3], "\\x1b[31mred.png", "\\xe4.png", "caf\\xe9.png", "17].png"):
        assert shown in told
    assert len(list((tmp_path / "r/pictures").iterdir())) == len(list((tmp_path / "m").rglob("*.tiff"))) == 8


@pytest.mark.parametrize("debug", [False, True])
def test_what_nobody_expected_is_4(
    debug: bool, parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vmad_edge.runtime import cli
    from vmad_edge.runtime.bundle import Bundle

    def fails(path: object) -> Bundle:
        raise TypeError("no such\nthing")

    monkeypatch.setattr(Bundle, "open", fails)
    assert cli.main(["inspect", "bundle", str(parts / "good"), *(["--debug"] if debug else [])]) == 4
    said = capsys.readouterr().err
    assert "vmad: unexpected TypeError: no such thing" in said and ("Traceback" in said) == debug
    assert debug or said.count("\n") == 1


def test_nobody_reads_standard_output(tiny_bundle: Path, parts: Path, station: Path) -> None:
    args = [VMAD, "inspect", tiny_bundle, parts / "good", "--station", station, "--no-review", "--jsonl"]
    with subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as going:
        assert going.stdout is not None and going.stderr is not None
        going.stdout.close()
        assert going.wait(300) == 141 and going.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_the_table(tiny_bundle: Path, parts: Path, station: Path) -> None:
    args = ["--station", station, "--no-review", "--jsonl", "/dev/full"]
    done = vmad("inspect", tiny_bundle, parts / "odd", *args)
    assert done.returncode == 4 and "DEFECT" in done.stdout
    assert "No space left" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name,status", [("notes.txt", 0), (".DS_Store", 0), ("a.heic", 3), ("gone.png", 3), ("odd", 1)]
)
def test_what_a_folder_holds_beside_good_frames(
    name: str, status: int, tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path
) -> None:
    shutil.copy(parts / "good/0.png", tmp_path)
    if name in ("gone.png", "odd"):
        (tmp_path / name).symlink_to(parts / name)  # one to nothing, one to the folder of a defective part
    else:
        (tmp_path / name).touch()
    done = vmad("inspect", tiny_bundle, tmp_path, "--station", station, "--no-review")
    assert done.returncode == status, done.stdout + done.stderr
    assert name in done.stdout + done.stderr


def test_deep_frames_are_read_alike_everywhere(tiny_bundle: Path, parts: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    for path in (parts / "good").iterdir():
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 16).save(deep / path.name)
    where = "--station", tmp_path / "station"
    how = "--object", "deep", *where, "--bit-depth", "12"
    assert "16-bit values; say how" in vmad("enroll", tiny_bundle, deep, *where).stderr
    assert vmad("enroll", tiny_bundle, deep, *how).returncode == 0
    inspected = vmad("inspect", tiny_bundle, deep, "--no-review", "--json", *how)
    assert inspected.returncode == 3 and {row["verdict"] for row in json.loads(inspected.stdout)} == {"GOOD"}
    assert "is one of the enrolled references" in vmad("calibrate", tiny_bundle, "--good", deep, *how).stderr
    assert vmad("bench", tiny_bundle, "--frames", deep, "--repeats", "1", "--no-review", *how).returncode == 0


def test_a_log_that_is_no_terminal_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from vmad_edge.runtime import console

    monkeypatch.setattr(console, "_BETWEEN_LINES_S", 0.0)
    monkeypatch.setattr(console, "err", Console(stderr=True, markup=False))
    assert list(console.track(["a", "b", "c"], "enrolling [M3]")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [f"enrolling [M3]: {count} of 3" for count in range(3)]


def test_steps_in_a_log_that_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from vmad_edge.runtime import console

    monkeypatch.setattr(console, "err", Console(stderr=True, markup=False))
    with console.steps() as tell:
        for step in ("checkpoint", "image 1 of 3", "image 2 of 3", "checkpoint", "bundle"):
            tell(step)
    assert capsys.readouterr().err.splitlines() == ["checkpoint", "image 1 of 3", "bundle"]


def test_memory_is_flat(tiny_bundle: Path, parts: Path, tmp_path: Path) -> None:
    """Kept results, rows of the report and torn heaps took 0.19 MiB a frame."""
    frames = tmp_path / "frames"
    frames.mkdir()
    big = Image.open(parts / "odd/odd.png").resize((256, 256))
    big.save(frames / "000.png")
    for number in range(1, 400):
        os.link(frames / "000.png", frames / f"{number:03}.png")
    (tmp_path / "good").mkdir()
    for number in range(3):  # of that size
        Image.open(parts / f"good/{number}.png").resize((256, 256)).save(tmp_path / f"good/{number}.png")
    args = [VMAD, "inspect", tiny_bundle, frames, "--references", tmp_path / "good", "--station", tmp_path / "station"]
    args += ["--no-review", "--jsonl", "--report", "r"]
    resident = []
    with subprocess.Popen(list(map(str, args)), cwd=tmp_path, stdout=subprocess.PIPE) as going:
        assert going.stdout is not None
        for number, _ in enumerate(going.stdout):
            if number in (100, 390):
                pages = int(Path(f"/proc/{going.pid}/statm").read_text().split()[1])
                resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert going.returncode == 1
    assert resident[1] - resident[0] < 20


def test_standard_output_may_be_closed(tiny_bundle: Path, parts: Path, station: Path) -> None:
    """A traceback's exit status is 1, which is DEFECT here."""
    command = [VMAD, "inspect", tiny_bundle, parts / "broken", "--station", station]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 3 and "Traceback" not in done.stderr


def test_what_a_run_wrote_is_no_frame_of_the_next(
    tiny_bundle: Path, parts: Path, station: Path, tmp_path: Path
) -> None:
    shutil.copytree(parts / "good", tmp_path / "lot")
    args = ["lot", "--report", "lot/out", "--maps", "lot/maps", "--station", station, "--no-review", "--json"]
    runs = [vmad("inspect", tiny_bundle, *args, cwd=tmp_path) for _ in range(2)]
    assert [len(json.loads(run.stdout)) for run in runs] == [6, 6]
    assert "18 pictures of a report" in runs[1].stderr and runs[1].returncode == 0
    shutil.copy(next((parts / "good").iterdir()), tmp_path / "lot/maps/one_more.jpg")
    assert len(json.loads(vmad("inspect", tiny_bundle, *args, cwd=tmp_path).stdout)) == 7
    shutil.copy(tmp_path / "lot/maps/one_more.jpg", tmp_path / "lot/maps/no_map.tiff")  # of no frame that is there
    assert len(json.loads(vmad("inspect", tiny_bundle, *args, cwd=tmp_path).stdout)) == 8
    (tmp_path / "link").symlink_to("lot/maps")
    for inside in ("lot/maps", "lot/out/", "lot/maps/one_more.jpg", tmp_path / "lot/maps", "link"):
        refused = vmad("inspect", tiny_bundle, inside, *args, cwd=tmp_path)
        assert refused.returncode == 2 and "name another folder for" in refused.stderr
    for option in ("--report", "--maps"):
        refused = vmad("inspect", tiny_bundle, "lot", option, tiny_bundle / "out", cwd=tmp_path)
        assert refused.returncode == 2 and "lies in the bundle" in refused.stderr


def test_a_name_that_may_be_forgotten_is_asked_for(tiny_bundle: Path, parts: Path, tmp_path: Path) -> None:
    """Else the frames would be compared with the bundle's own features, and released by its maker."""
    station = tmp_path / "station"
    assert vmad("enroll", tiny_bundle, parts / "good", "--object", "tile", "--station", station).returncode == 0
    args = ("inspect", tiny_bundle, parts / "good", "--no-review", "--station", station)
    forgotten = vmad(*args)
    assert forgotten.returncode == 2 and "expected --object, as the station" in forgotten.stderr
    for meant in (("--object", "tile"), ("--fallback", "bundle")):
        assert vmad(*args, *meant).returncode in (1, 3), meant


@pytest.mark.parametrize("deadline", ["inf", "nan", "-inf", "1e999", "soon"])
def test_a_deadline_that_no_row_could_tell_is_refused(deadline: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "bundle", "parts", f"--deadline-ms={deadline}"])
    assert f"expected a number of milliseconds, got '{deadline}'" in capsys.readouterr().err


def test_rows_of_two_kinds_never_share_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.write_text("what an earlier run found")
    for more in ([], ["--resume"]):
        files = ["--jsonl", str(run), "--csv", f"{tmp_path}/../{tmp_path.name}/run"]
        assert main(["inspect", "bundle", "parts", *files, *more]) == 2
        assert "expected two files for --jsonl and --csv" in capsys.readouterr().err
    assert run.read_text() == "what an earlier run found"
