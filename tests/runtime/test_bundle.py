from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from examples import MANIFEST

from vmad_edge.runtime.bundle import Bundle, Manifest, seal
from vmad_edge.runtime.errors import BundleError, VmadError
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
        pytest.param(lambda f: (f / "more").mkdir(), "does not list: more", id="extra folder"),
        pytest.param(lambda f: replaced(f / "llm.gguf").mkdir(), r"llm\.gguf is no file", id="folder"),
        pytest.param(lambda f: os.mkfifo(replaced(f / "llm.gguf")), r"llm\.gguf is no file", id="FIFO"),
        pytest.param(lambda f: os.mkfifo(replaced(f / "manifest.json")), r"manifest\.json is no file", id="FIFO first"),
        pytest.param(lambda f: replaced(f / "llm.gguf").symlink_to("/dev/zero"), "is no file", id="device"),
        pytest.param(lambda f: replaced(f / "llm.gguf").symlink_to("llm.gguf"), "symbolic links", id="link to itself"),
        pytest.param(
            lambda f: linked_out(f, "llm.gguf"), r"llm\.gguf is a link to .*elsewhere.* `cp -L`", id="link out"
        ),
        pytest.param(lambda f: linked_out(f, "manifest.sha256"), r"manifest\.sha256 is a link to", id="hash out"),
        pytest.param(lambda f: (f / "manifest.json").write_text(" " * 2**21), "at most 1048576", id="huge manifest"),
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


def replaced(path: Path) -> Path:
    path.unlink()
    return path


def linked_out(folder: Path, name: str) -> None:
    """The same bytes, but not the bundle's."""
    elsewhere = folder.parent / f"{folder.name} elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


@pytest.mark.parametrize("path", ["", "a\0b", "missing", "/dev/null", "x" * 300], ids=repr)
def test_what_is_no_folder(path: str) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(path)


def test_a_link_within_the_bundle(folder: Path) -> None:
    (folder / "llm.gguf").rename(folder / "weights")
    (folder / "llm.gguf").symlink_to("weights")
    reseal(folder, files={name: sha256(folder / "weights") for name in ("llm.gguf", "weights")})
    with Bundle.open(folder).opened("llm.gguf") as path:
        assert path.read_bytes() == b"weights"


def test_a_link_to_the_bundle_is_followed_once(folder: Path, tmp_path: Path) -> None:
    link = tmp_path.parent / f"{tmp_path.name} now"
    link.symlink_to(folder)
    bundle = Bundle.open(link)
    link.unlink()
    link.symlink_to("/tmp")
    with bundle.opened("llm.gguf") as path:
        assert path.read_bytes() == b"weights"


def test_another_bundle_than_expected(folder: Path) -> None:
    hash = Bundle.open(folder).hash
    assert Bundle.open(folder, hash).hash == hash
    reseal(folder, made_with={})
    with pytest.raises(BundleError, match=f"another bundle by now: expected {hash[:16]}…, found "):
        Bundle.open(folder, hash)


def there_and_back(path: Path) -> None:
    """Another file for a moment."""
    other, kept = path.with_name("other"), path.with_name("kept")
    other.write_bytes(b"WEIGHTS")
    path.rename(kept)
    other.rename(path)
    path.unlink()
    kept.rename(path)


def rewritten(path: Path) -> None:
    """The same bytes, size and time of writing."""
    about = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("when", ["before", "while", "while it fails"])
@pytest.mark.parametrize(
    "change,names",
    [
        pytest.param(lambda path: path.write_bytes(b"WEIGHTS"), "llm.gguf", id="written"),
        pytest.param(rewritten, "llm.gguf", id="rewritten"),
        pytest.param(there_and_back, "llm.gguf", id="there and back"),
        pytest.param(lambda path: path.unlink(), "llm.gguf", id="gone"),
        pytest.param(lambda path: path.with_name("llm.gguf.data").touch(), "llm.gguf.data", id="one more"),
    ],
)
def test_a_file_that_changes_before_it_is_used(
    folder: Path, change: Callable[[Path], object], names: str, when: str
) -> None:
    bundle = Bundle.open(folder)
    time.sleep(0.02)  # a file system's clock ticks every 4 to 10 ms
    if when == "before":
        change(folder / "llm.gguf")
    with (
        pytest.raises(BundleError, match=rf"was changed after its files were checked: {names}\."),
        bundle.opened("llm.gguf"),
    ):
        change(folder / "llm.gguf")
        if when == "while it fails":
            raise VmadError("this is no model")


def test_a_folder_that_changes_places_while_it_is_used(folder: Path) -> None:
    bundle, other = Bundle.open(folder), folder.with_name("other")
    with bundle.opened("llm.gguf") as path:
        folder.rename(other)
        folder.mkdir()
        (folder / "llm.gguf").write_bytes(b"WEIGHTS")
        assert path.read_bytes() == b"weights"
    with pytest.raises(BundleError, match="was changed"), bundle.opened("llm.gguf"):
        pass


def test_errors_name_the_file_in_its_bundle(folder: Path) -> None:
    with pytest.raises(BundleError) as raised, Bundle.open(folder).opened("llm.gguf") as path:
        raise BundleError(f"{path}: this is no model")
    assert str(raised.value) == f"{folder}/llm.gguf: this is no model"


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
    assert events == ["sync", "sync", "sync", "rename"]  # both files and their folder


def test_whole_folder_leaves_the_old_one_on_error(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "target/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
