from __future__ import annotations

import hashlib
import json
import os
import shutil
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
    """A sealed bundle of small files."""
    for name in Manifest.needed:
        (tmp_path / name).write_bytes(b"weights")
    files = {name: sha256(tmp_path / name) for name in Manifest.needed}
    seal(tmp_path, Manifest.model_validate({**MANIFEST, "files": files}))
    return tmp_path


def reseal(folder: Path, **changes: object) -> None:
    """Change the manifest as somebody would who also writes a matching hash."""
    fields = json.loads((folder / "manifest.json").read_text()) | changes
    sealed_as(folder, json.dumps({name: value for name, value in fields.items() if value is not None}))


def sealed_as(folder: Path, text: str) -> None:
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


INFINITE, NO_NUMBER = float("inf"), float("nan")


@pytest.mark.parametrize(
    "place,value,says",
    [
        ("schema_version", "1", "newer vmad-edge"),
        ("made_with", {str(i): "1" for i in range(101)}, "at most 100"),
        ("weights.origin", "x" * 20_001, "at most 20000 characters"),
        ("clip.size", 8193, "less than or equal to 8192"),
        ("clip.size", -1, "greater than 0"),
        ("clip.size", "28", "valid integer"),
        ("clip.size", True, "valid integer"),
        ("clip.size", 28.5, "valid integer"),
        ("clip.rescale_factor", 0, "rescale_factor: .* greater than or equal to"),
        ("clip.rescale_factor", 255, "less than or equal to 1,"),
        ("clip.mean", [0.5, 0.5, NO_NUMBER], "clip.mean.2"),
        ("clip.mean", [0.5, 0.5], "clip.mean.2: Field required"),
        ("clip.std", [0.5, 0.0, 0.5], "clip.std.1: .*0.001"),
        ("clip.std", [0.5, INFINITE, 0.5], "clip.std.1: .*255"),
        ("clip.std", [0.5, -0.5, 0.5], "clip.std.1"),
        ("sam.size", 10**9, "less than or equal to 8192"),
        ("sam.std", [58.395, 57.12, 0], "sam.std.2"),
        ("sam.mean", [1e300, 0, 0], "sam.mean.0"),
        ("vision.grid", 29, "grid, 29, has more patches a side than clip.size has pixels"),
        ("vision.grid", 513, "less than or equal to 512"),
        ("vision.width", 65_537, "less than or equal to 65536"),
        ("vision.levels", [-1, -2, -1], "each of levels once, found -1 twice"),
        ("vision.levels", ["a", "a"], "each of levels once, found 'a' twice"),
        ("vision.levels", [], "at least 1"),
        ("vision.patches_level", 10**6, "less than or equal to 1000"),
        ("vision", {"grid": 28, "width": 65_536, "levels": list(range(64))}, "at most 1073741824 numbers"),
        ("conversation.object", "x" * 201, "at most 200 characters"),
        ("conversation.question", "x" * 20_001, "at most 20000 characters"),
        ("language.width", 0, "greater than 0"),
        ("language.vocabulary", 2**20 + 1, "less than or equal to 1048576"),
        ("language.vocabulary", 299, "below the vocabulary, 299, found 299"),
        ("language.seg_token", "", "at least 1 character"),
        ("language.seg_token_id", 1, "found 1 twice"),
        ("language.seg_token_id", -1, "greater than or equal to 0"),
        ("language.yes_token_ids", [1, 2], "yes_token_ids and no_token_ids once, found 2 twice"),
        ("language.yes_token_ids", [1, 1], "found 1 twice"),
        ("language.yes_token_ids", [300], "below the vocabulary, 300, found 300"),
        ("language.no_token_ids", [-2], "language.no_token_ids.0"),
        ("language.no_token_ids", [], "at least 1"),
        ("language.context_length", 9, "at least 10 tokens, more than context_length, 9"),
        ("language.context_length", 2**20 + 1, "less than or equal to 1048576"),
        ("language.visual_tokens", 56, "at least 65 tokens, more than context_length, 64"),
        ("language.max_new_tokens", 10**100, "language.max_new_tokens"),
        ("language.llama", {"gpu_layers": 10**6}, "less than or equal to 10000"),
        ("language.llama", {"gpu_layers": -2}, "greater than or equal to -1"),
        ("language.llama", {"kv_type": "q8_0"}, "needs flash_attention"),
        ("similarity.temperature", 0, "0.001"),
        ("similarity.temperature", 1e-300, "0.001"),
        ("similarity.temperature", INFINITE, "less than or equal to 100"),
        ("similarity.smoothing_sigma", 257, "less than or equal to 256"),
        ("similarity.smoothing_sigma", NO_NUMBER, "smoothing_sigma"),
        ("similarity.reference_weight", 1.5, "less than or equal to 1"),
        ("similarity.reference_gain", INFINITE, "less than or equal to 4"),
        ("similarity.thresholds", {"good_below": 5, "defect_above": 9}, "at most 2"),
        ("similarity.thresholds", {"good_below": 0.5, "defect_above": 1e308}, "less than or equal to 10"),
        ("similarity.thresholds", {"good_below": -1, "defect_above": 0.5}, "greater than or equal to -0.01"),
        ("similarity.coreset", 0, "greater than 0"),
        ("precision", {"nothing": "fp16"}, "precision names nothing, which no graph"),
        ("precision", {"clip_encoder": "fp64"}, "precision.clip_encoder"),
        ("dynamic_axes", {"batch": 4097}, "dynamic_axes.batch: .*4096"),
        ("dynamic_axes", {"batch": 0}, "dynamic_axes.batch"),
        ("files", {"clip_encoder.onnx": "0" * 64}, "files: expected llm.gguf, ltc_projector.onnx, mask_decoder.onnx"),
        ("files", {"../llm.gguf": "0" * 64}, "should match pattern"),
        ("files", {"/etc/passwd": "0" * 64}, "should match pattern"),
        ("files", {"in/llm.gguf": "0" * 64}, "should match pattern"),
        ("files", {"..": "0" * 64}, "should match pattern"),
        ("files", {"a\0b": "0" * 64}, "should match pattern"),
        ("files", {"llm.gguf": "0" * 63}, "should match pattern"),
        ("files", {f"{i}.bin": "0" * 64 for i in range(1001)}, "at most 1000"),
    ],
)
def test_absurd_numbers_are_refused(folder: Path, place: str, value: object, says: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    at, names = manifest, place.split(".")
    for name in names[:-1]:
        at = at[name]
    at[names[-1]] = value
    reseal(folder, **manifest)
    with pytest.raises(BundleError, match=says) as raised:
        Bundle.open(folder)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_a_name_that_comes_twice_is_refused(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    for name, value in (("size", 20), ("llm.gguf", f'"{"0" * 64}"'), ("system", '"vmad"')):
        sealed_as(folder, text.replace(f'"{name}":', f'"{name}": {value}, "{name}":', 1))
        with pytest.raises(BundleError, match=f"names in an object once, found '{name}' twice"):
            Bundle.open(folder)


@pytest.mark.parametrize(
    "clip,grid,width,levels,sam,llm,visual,context,vocabulary",
    [
        pytest.param(224, 16, 192, 4, 256, 256, 64, 512, 1025, id="demo"),
        pytest.param(336, 24, 1024, 4, 1024, 4096, 576, 2048, 32_001, id="LLaVA-1.5-7B"),
        pytest.param(336, 24, 1024, 4, 1024, 5120, 2880, 4096, 32_064, id="LLaVA-1.6-13B, anyres"),
        pytest.param(448, 32, 3200, 4, 1024, 8192, 256, 131_072, 128_256, id="InternViT-6B, Llama-3-70B"),
        pytest.param(384, 27, 1152, 4, 1024, 3584, 729, 32_768, 256_000, id="SigLIP, Gemma-2"),
        pytest.param(2880, 205, 1280, 4, 1024, 16_384, 2880, 131_072, 300_000, id="ViT-H at 2880 px"),
    ],
)
def test_real_sizes_are_within_the_limits(
    folder: Path,
    clip: int,
    grid: int,
    width: int,
    levels: int,
    sam: int,
    llm: int,
    visual: int,
    context: int,
    vocabulary: int,
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["clip"]["size"], manifest["sam"]["size"] = clip, sam
    manifest["vision"] |= {"grid": grid, "width": width, "levels": list(range(-levels, 0))}
    sizes = {"width": llm, "visual_tokens": visual, "context_length": context, "vocabulary": vocabulary}
    manifest["language"] |= sizes | {"seg_token_id": vocabulary - 1, "max_new_tokens": 256}
    reseal(folder, **manifest)
    assert Bundle.open(folder).for_review.language.vocabulary == vocabulary


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
    reseal(folder, files={name: sha256(folder / "weights") for name in (*Manifest.needed, "weights")})
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
    shutil.rmtree(folder)
    with pytest.raises(BundleError, match="is not a bundle: expected a folder"), bundle.opened("llm.gguf"):
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
    assert events == ["sync", "sync", "sync", "rename", "sync"]  # both files and their folder; then its new name


def test_whole_folder_leaves_the_old_one_on_error(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "target/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
