"""Frames and manifests as an attacker or a dying disk would send them: one clear error, or a good result.

VMAD_FUZZ_EXAMPLES=1000000 runs the long version; CI replays the seeds below and a short run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from examples import MANIFEST
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vmad_edge.runtime.bundle import Bundle, Manifest
from vmad_edge.runtime.errors import BundleError, FrameError
from vmad_edge.runtime.frame import Frame

EXAMPLES = int(os.environ.get("VMAD_FUZZ_EXAMPLES", "300"))
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000, suppress_health_check=list(HealthCheck)
)


def encoded(form: str, mode: str) -> bytes:
    target = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(target, form)
    return target.getvalue()


FILES = [
    encoded(form, mode)
    for form, mode in [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("TIFF", "RGB"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
    ]
]
MANIFEST_JSON = Manifest.model_validate({**MANIFEST, "files": {}}).model_dump_json().encode()
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 8)), max_size=6)


def damaged(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """Some bytes replaced, inserted or cut out."""
    for place, new, cut in changes:
        start = int(place * (len(data) + 1))
        data = data[:start] + new + data[start + cut :]
    return data


@fuzzed
@given(st.sampled_from(FILES), edits, st.sampled_from([None, 10, 16]))
@example(FILES[0], [(0.0, b"", 8)], None)  # no signature
@example(FILES[3], [(0.5, b"", 400)], None)  # half a JPEG
@example(FILES[5], [(0.02, b"\xff\xff\xff\xff", 4)], None)  # TIFF directory beyond the file
def test_damaged_images(data: bytes, changes: list[tuple[float, bytes, int]], bit_depth: int | None) -> None:
    try:
        frame = Frame.read(damaged(data, changes), bit_depth)
    except FrameError as error:
        assert str(error)
        return
    assert frame.pixels.dtype == np.uint8 and frame.pixels.ndim == 3 and frame.pixels.shape[2] == 3


@fuzzed
@given(st.binary(max_size=200))
def test_any_bytes_as_an_image(data: bytes) -> None:
    with pytest.raises(FrameError):
        Frame.read(data)


def opened(text: bytes) -> None:
    """Open a bundle with this manifest and its right hash."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(text)
        (Path(folder) / "manifest.sha256").write_text(hashlib.sha256(text).hexdigest())
        try:
            Bundle.open(folder)
        except BundleError as error:
            assert "\n" not in str(error)


@fuzzed
@given(edits)
@example([(0.0, b"\xff\xfe", 0)])
@example([(0.5, b"[" * 4, 8)] * 6)
def test_damaged_manifests(changes: list[tuple[float, bytes, int]]) -> None:
    opened(damaged(MANIFEST_JSON, changes))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@fuzzed
@given(st.sampled_from(sorted(MANIFEST)), json_values)
@example("files", {"../../etc/passwd": "0"})
@example("files", {"/etc/passwd": "0"})
@example("files", {"a\x00b": "0"})
def test_manifests_with_other_values(field: str, value: object) -> None:
    opened(json.dumps({**json.loads(MANIFEST_JSON), field: value}).encode())
