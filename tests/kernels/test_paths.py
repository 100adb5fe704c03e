"""Every path through the compiled operators, forced: on this processor, on aarch64 under qemu, AMX emulated."""

from __future__ import annotations

import platform
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vmad_edge.kernels import ReferenceBank, max_cosine, paths, segmented_max_cosine

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16", "int8")  # in the order of vmad::Type
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3, "int8": 1e-2}
X86 = ("plain", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
ARM = ("plain", "neon", "neon_dot")

SIZES = pytest.mark.parametrize(
    ("q", "m", "d", "first"),
    [
        pytest.param(1, 1, 1, 0, id="one of each"),
        pytest.param(13, 33, 17, 0, id="a row more than tiles and panels hold"),
        pytest.param(33, 300, 100, 0, id="more than a block"),
        pytest.param(50, 290, 70, 37, id="evicted rows before the first"),
        pytest.param(5, 2100, 300, 0, id="parts of the bank, several bricks at once"),
    ],
)


def draw(q, m, d, first):
    """Query, bank with its evicted rows, and segments. Some rows are zero, NaN, infinite, or like each other."""
    rng = np.random.default_rng(q + m + d)
    query = rng.standard_normal((q, d)).astype(np.float32)
    bank = rng.standard_normal((first + m, d)).astype(np.float32)
    bank[first : first + q][: m // 2] = (query * 2)[: min(q, m // 2)]
    if q > 4 and d > 1:
        query[1] = bank[first + 7] = bank[first + 9, 1] = 0
        query[2, 0] = bank[first + 11, 0] = np.nan
        query[3, -1] = bank[first + 12, -1] = np.inf
        bank[first + 20 : first + 30] = query[4]
    cuts = {0, m, *rng.integers(1, m, 5).tolist()} if m > 1 else {0, m}
    return query, bank, np.array(sorted(cuts))


def check(query, bank, offsets, k, tolerance, score, index, segments):
    """Against cosines in float64."""
    finite_query, finite_bank = np.isfinite(query).all(1), np.isfinite(bank).all(1)
    unit = [np.where(np.isfinite(x), x, 0).astype(np.float64) for x in (query, bank)]
    lengths = [np.sqrt((x * x).sum(1, keepdims=True)) for x in unit]
    a, b = (x / np.where(length == 0, 1, length) for x, length in zip(unit, lengths, strict=True))
    cosine = a @ b.T
    cosine[:, ~finite_bank] = -np.inf
    assert np.isnan(score[~finite_query]).all() and (index[~finite_query] == -1).all()
    assert np.isnan(segments[~finite_query]).all()
    for i in np.flatnonzero(finite_query):
        expected = -np.sort(-cosine[i])[k - 1] if k <= len(bank) else -np.inf
        if expected == -np.inf:
            assert np.isnan(score[i]) and index[i] == -1
        else:
            assert abs(score[i] - expected) <= tolerance
            assert abs(cosine[i, index[i]] - expected) <= 2 * tolerance
        best = np.array([cosine[i, start:end].max() for start, end in pairwise(offsets)])
        np.testing.assert_allclose(segments[i], np.where(np.isinf(best), np.nan, best), rtol=0, atol=tolerance)


@SIZES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", X86 if platform.machine() == "x86_64" else ARM)
def test_forced(path, dtype, q, m, d, first, monkeypatch):
    if path not in paths():
        pytest.skip(f"this processor has no {path}")
    monkeypatch.setenv("VMAD_PATH", path)
    query, bank, offsets = draw(q, m, d, first)
    kept = ReferenceBank.from_array(bank, dtype)
    kept.evict(first)
    for k, threads in ((1, 1), (1, 3), (3, 3)):
        score, index = max_cosine(query, kept, k, threads=threads)
        segments = segmented_max_cosine(query, kept, offsets, threads=threads)
        check(query, bank[first:], offsets, k, TOLERANCE[dtype], score, index, segments)
    if q > 4 and d > 1:
        assert max_cosine(query, kept)[1][4] == (4 if m // 2 > 4 else 20)  # ten equal rows: the first


def test_unknown_path(monkeypatch):
    monkeypatch.setenv("VMAD_PATH", "sse9")
    with pytest.raises(ValueError, match=r"VMAD_PATH: expected one of plain, .* got 'sse9'"):
        max_cosine(np.ones((1, 3), np.float32), np.ones((1, 3), np.float32))


def build(target, compiler, sources, *flags):
    """A program of tests/kernels/paths.cpp and these sources of kernels/cpu, each with flags of its own."""
    common = ["-std=c++17", "-O2", "-fopenmp-simd", "-ffp-contract=off", f"-I{ROOT / 'kernels/include'}", *flags]
    objects = []
    for source, own in ({HERE / "paths.cpp": [], ROOT / "kernels/cpu/similarity.cpp": []} | sources).items():
        objects.append(target / f"{source.stem}.o")
        subprocess.run([compiler, *common, *own, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([compiler, "-static", "-pthread", *objects, "-o", target / "paths"], check=True)
    return target / "paths"


def run(command, dtype, k, q, m, d, first):
    query, bank, offsets = draw(q, m, d, first)
    sizes = np.array([DTYPES.index(dtype), k, first, q, m, d, len(offsets) - 1])
    given = b"".join(array.tobytes() for array in (sizes, query, bank, offsets))
    done = subprocess.run(command, input=given, capture_output=True)
    assert done.returncode == 0, done
    score, index, segments = np.split(np.frombuffer(done.stdout, np.uint8), [4 * q, 12 * q])
    check(
        query,
        bank[first:],
        offsets,
        k,
        TOLERANCE[dtype],
        score.view(np.float32),
        index.view(np.int64),
        segments.view(np.float32).reshape(q, -1),
    )


@pytest.fixture(scope="session")
def aarch64(tmp_path_factory):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    cpu = ROOT / "kernels/cpu"
    sources = {cpu / "plain.cpp": [], cpu / "neon.cpp": [], cpu / "neon_dot.cpp": ["-march=armv8.2-a+dotprod"]}
    return [emulator, "-cpu", "max", build(tmp_path_factory.mktemp("aarch64"), compiler, sources)]


@SIZES
@pytest.mark.parametrize("path", ARM)
def test_aarch64(aarch64, path, q, m, d, first):
    for dtype in DTYPES:
        run([*aarch64, path], dtype, 1 if d > 70 else 2, q, m, d, first)


@pytest.fixture(scope="session")
def amx(tmp_path_factory):
    if "avx512_bf16" not in paths():
        pytest.skip("AMX is emulated, but what it stands on needs AVX-512 with bfloat16")
    avx512 = [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vnni", "bf16")]
    cpu = ROOT / "kernels/cpu"
    sources = {
        cpu / "plain.cpp": [],
        cpu / "avx2.cpp": ["-mavx2", "-mfma"],
        cpu / "avx512.cpp": avx512,
        cpu / "amx.cpp": [*avx512, "-include", HERE / "amx_emulated.h"],
    }
    return build(tmp_path_factory.mktemp("amx"), shutil.which("g++") or "c++", sources)


@SIZES
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_amx_emulated(amx, dtype, q, m, d, first):
    """The tiles' arithmetic, not the instructions: no processor with AMX was at hand."""
    for k in (1, 2):
        run([amx, "amx"], dtype, k, q, m, d, first)
