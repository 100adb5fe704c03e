"""A language model's file in the process that screens, which llama.cpp must not be able to end."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vmad_edge.runtime.bundle import Bundle, seal
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.files import sha256
from vmad_edge.runtime.inspection import Reason, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.stages.vocabulary import check_model, prompt_lengths

ROOT = Path(__file__).parents[2]
PART = ROOT / "demo/example.png"
SEG_ID = 1024


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(ROOT / "demo/bundle")


def after(data: bytes, key: str) -> int:
    """Where a value of GGUF's metadata begins, behind its key and its type."""
    return data.index(key.encode()) + len(key) + 4


def with_number(data: bytes, key: str, number: int) -> bytes:
    at = after(data, key)
    return data[:at] + struct.pack("<I", number) + data[at + 4 :]


def with_type(data: bytes, token: int, kind: int) -> bytes:
    at = after(data, "tokenizer.ggml.token_type") + 12 + 4 * token
    return data[:at] + struct.pack("<i", kind) + data[at + 4 :]


def token_twice(data: bytes) -> bytes:
    """llama.cpp asserts that each is there once, and ends its process."""
    return data.replace(b"<0x42>", b"<0x43>", 1)


def changed(bundle: Bundle, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """The bundle with another language model, sealed as a whole."""
    shutil.copytree(bundle.path, folder)
    model = folder / "llm.gguf"
    data = model.read_bytes()
    model.write_bytes(change(data))
    assert model.read_bytes() != data
    seal(folder, bundle.manifest.model_copy(update={"files": {**bundle.manifest.files, model.name: sha256(model)}}))
    return folder


@pytest.mark.parametrize(
    "change,says",
    [
        pytest.param(token_twice, "expected every token once", id="a token twice"),
        pytest.param(lambda data: with_type(data, SEG_ID, 1), "is '<seg>', but .* taken whole", id="<seg> cut"),
        pytest.param(lambda data: data.replace(b"<seg>", b"<sag>", 1), "is '<sag>'", id="<sag>"),
        pytest.param(lambda data: with_number(data, "llama.embedding_length", 8), "and width 8, but", id="width"),
        pytest.param(lambda data: with_number(data, "llama.context_length", 8), "context 8, but", id="context"),
        pytest.param(lambda data: data.replace(b"llama", b"lama2", 1), "width None", id="unknown family"),
        pytest.param(lambda data: data.replace(b"ggml.tokens", b"ggml.tokenz"), "a type for each of 0", id="no tokens"),
        pytest.param(lambda data: data[:700], "shapes cannot be read", id="cut"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_when_the_bundle_is_opened(
    bundle: Bundle, tmp_path: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    folder = changed(bundle, tmp_path / "bundle", change)
    with pytest.raises(BundleError, match=f"{folder}/llm.gguf: .*{says}"):
        Inspector.open(folder, tmp_path / "station", "cpu")


def test_damaged_headers_are_read_or_refused(bundle: Bundle, tmp_path: Path) -> None:
    rng, language, model, refused = np.random.default_rng(0), bundle.for_review.language, tmp_path / "llm.gguf", 0
    shutil.copyfile(bundle.file("llm.gguf"), model)
    content = np.memmap(model, np.uint8, "r+")
    for place, bit in zip(rng.integers(25_000, size=200), rng.integers(8, size=200), strict=True):
        content[place] ^= 1 << bit
        try:
            check_model(model, language)
        except BundleError:
            refused += 1
        content[place] ^= 1 << bit
    assert 0 < refused < 200


def test_llama_cpp_ends_no_process_of_ours_when_it_counts(bundle: Bundle, tmp_path: Path) -> None:
    manifest, model = bundle.for_review, tmp_path / "llm.gguf"
    asked = manifest.language, manifest.conversation, manifest.object
    for data, says in (
        (token_twice(bundle.file("llm.gguf").read_bytes()), r"llama\.cpp ends with signal 6 \(.*GGML_ASSERT.*\)"),
        (b"no model", r"llama\.cpp cannot load it"),
    ):
        model.write_bytes(data)
        with pytest.raises(BundleError, match=f"{model}: {says}") as raised:
            prompt_lengths(model, *asked)
        assert "\n" not in str(raised.value)


def test_a_model_that_ends_the_review_process_leaves_the_screen_alone(bundle: Bundle, tmp_path: Path) -> None:
    """One header in 1,500 with one byte changed passes the check and has llama.cpp abort when it loads the weights."""
    folder = changed(bundle, tmp_path / "bundle", lambda data: with_number(data, "llama.block_count", 0xFF000004))
    with Inspector.open(folder, tmp_path / "station", "cpu") as inspector:
        screened = inspector.inspect(PART, review=False)
        failed = inspector.review(screened).wait(120)
        assert (failed.verdict, failed.score) == (screened.verdict, screened.score) and failed.verdict != Verdict.GOOD
        assert failed.reason_code is Reason.REVIEW_FAULT
        assert "ended with signal 6 (Aborted) while it loaded the bundle's models: llama.cpp" in (failed.reason or "")
        assert "llm.gguf" in (failed.reason or "")
        assert inspector.inspect(PART, review=False).score == screened.score


def test_the_process_that_screens_never_imports_llama_cpp(tmp_path: Path) -> None:
    script = f"""
import sys
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.inspector import Inspector
with Inspector.open({str(ROOT / "demo/bundle")!r}, {str(tmp_path)!r}, "cpu") as inspector:
    assert inspector.inspect({str(PART)!r}, review=False).score is not None
assert "onnxruntime" in sys.modules
sys.exit(", ".join(name for name in sys.modules if name.partition(".")[0] == "llama_cpp") or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
