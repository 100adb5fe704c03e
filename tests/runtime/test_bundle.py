from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from examples import MANIFEST

from vmad_edge.runtime.bundle import Bundle, Manifest, seal
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.files import sha256, whole_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed bundle with one file."""
    (tmp_path / "llm.gguf").write_bytes(b"weights")
    seal(tmp_path, Manifest.model_validate({**MANIFEST, "files": {"llm.gguf": sha256(tmp_path / "llm.gguf")}}))
    return tmp_path


def reseal(folder: Path, **changes: object) -> None:
    """Change the manifest as somebody would who also writes a matching hash."""
    fields = json.loads((folder / "manifest.json").read_text()) | changes
    text = json.dumps({name: value for name, value in fields.items() if value is not None})
    (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_opens(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.hash == sha256(folder / "manifest.json")
    assert bundle.file("llm.gguf").read_bytes() == b"weights"
    with pytest.raises(BundleError, match=r"has no sam\.onnx"):
        bundle.file("sam.onnx")


@pytest.mark.parametrize(
    "damage,says",
    [
        pytest.param(lambda f: (f / "llm.gguf").write_bytes(b"Weights"), "llm.gguf was changed", id="changed byte"),
        pytest.param(lambda f: (f / "llm.gguf").unlink(), "lacks llm.gguf", id="missing file"),
        pytest.param(lambda f: (f / "more.bin").touch(), "does not list: more.bin", id="extra file"),
        pytest.param(lambda f: (f / "manifest.json").unlink(), "is not a bundle", id="no manifest"),
        pytest.param(lambda f: (f / "manifest.sha256").unlink(), "is not a bundle", id="no hash"),
        pytest.param(lambda f: (f / "manifest.json").write_text("{}"), "manifest.json was changed", id="edited"),
        pytest.param(lambda f: reseal(f, schema_version=2), "schema_version.*newer vmad-edge", id="newer schema"),
        pytest.param(lambda f: reseal(f, weights=None), "weights: Field required", id="missing field"),
        pytest.param(lambda f: reseal(f, unheard_of=1), "unheard_of", id="unknown field"),
        pytest.param(
            lambda f: reseal(f, conversation={"template": "no image", "question": ""}), "<image>", id="template"
        ),
    ],
)
def test_refuses(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder)
    with pytest.raises(BundleError, match=says):
        Bundle.open(folder)


def test_whole_folder_replaces(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "target") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "target/file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_whole_folder_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append("sync") or sync(file))
    monkeypatch.setattr(Path, "rename", lambda path, to: events.append("rename") or rename(path, to))
    with whole_folder(tmp_path / "target") as folder:
        (folder / "one").touch()
        (folder / "two").touch()
    assert events == ["sync", "sync", "sync", "rename", "sync"]  # both files and their folder; then its new name


def test_whole_folder_leaves_the_old_one_on_error(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "target/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
