"""The command as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
        noise = np.random.default_rng(seed).normal(128, 2, (64, 64, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"good/{seed}.png")
    odd = np.random.default_rng(9).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(odd).save(folder / "odd/odd.png")
    (folder / "broken/broken.png").write_bytes(b"this is text")
    return folder


@pytest.fixture(scope="module")
def station(tiny_bundle: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A station in which good/ is enrolled."""
    folder = tmp_path_factory.mktemp("station")
    enrolled = vmad("enroll", tiny_bundle, parts / "good", "--station", folder, "--json")
    assert enrolled.returncode == 0, enrolled.stderr
    assert json.loads(enrolled.stdout)["frames"] == 6
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
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"index.html", "odd_odd.png.png", "broken_broken.png.png", *(f"good_{n}.png.png" for n in range(6))}
    page = (tmp_path / "report/index.html").read_text()
    assert page.count("<tr data-name") == 8
    assert "http" not in page  # self-contained


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
    assert done.returncode == 2 and "2 frames would write 1 maps" in done.stderr
    assert not (tmp_path / "maps").exists()


def test_info(tiny_bundle: Path, station: Path) -> None:
    facts = json.loads(vmad("info", tiny_bundle, "--station", station, "--device", "cpu", "--json").stdout)
    assert facts["enrolled"] == ["part"]
    assert facts["device"] == "cpu" and facts["provider"].startswith("ONNX Runtime")
    assert len(facts["hash"]) == 64


def test_info_warns_of_a_crop(tiny_bundle: Path, tmp_path: Path) -> None:
    from vmad_edge.runtime.bundle import Bundle, seal

    shutil.copytree(tiny_bundle, tmp_path / "cropping")
    manifest = Bundle.open(tiny_bundle).manifest
    clip = manifest.clip.model_copy(update={"resize": "shortest_edge"})
    seal(tmp_path / "cropping", manifest.model_copy(update={"clip": clip}))
    assert "not inspected" in vmad("info", tmp_path / "cropping", "--station", tmp_path).stderr


@pytest.mark.parametrize("command", ["inspect", "enroll"])
def test_language_model_without_seg(command: str, tiny_bundle: Path, parts: Path, tmp_path: Path) -> None:
    """Though all hashes are right."""
    from vmad_edge.runtime.bundle import Bundle, seal
    from vmad_edge.runtime.files import sha256

    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    whole = (other / "llm.gguf").read_bytes()
    assert whole.count(b"<seg>") == 1
    (other / "llm.gguf").write_bytes(whole.replace(b"<seg>", b"<sag>"))
    manifest = Bundle.open(tiny_bundle).manifest
    files = {**manifest.files, "llm.gguf": sha256(other / "llm.gguf")}
    seal(other, manifest.model_copy(update={"files": files}))
    done = vmad(command, other, parts / "good", "--station", tmp_path / "station")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "llm.gguf: token 400 is '<sag>'" in done.stderr


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
    assert vmad("inspect", tiny_bundle, deep, "--no-review", *how).returncode == 0
    assert "is one of the enrolled references" in vmad("calibrate", tiny_bundle, "--good", deep, *how).stderr
    assert vmad("bench", tiny_bundle, "--frames", deep, "--repeats", "1", "--no-review", *how).returncode == 0
