"""The CUDA kernels where no GPU is: compiled by the C++ compiler and run on the machine of `cuda_host/host.h`, and what
nvcc and ptxas said of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from cuda_contract import *  # noqa: F403  the tests that any machine must pass
from cuda_contract import Operators
from cuda_host import HostArray, HostDevice

import vmad_edge.kernels
from vmad_edge.kernels import cuda
from vmad_edge.kernels.cuda import library


@pytest.fixture
def operators(cuda_device: HostDevice) -> Operators:
    # How threads take turns (forwards, backwards, shuffled), and the multiprocessors: with one, tiles are large.
    machines = (machine for seed in count(2) for machine in ((seed, 4), (0, 1), (seed, 1), (1, 40)))
    return Operators(cuda_device, lambda: library.library().vmad_host_machine(*next(machines)))


@pytest.mark.parametrize(
    ("m", "k", "path", "launches"),
    [
        pytest.param(2560, 1, "auto", 1, id="a small bank: one launch"),
        pytest.param(5000, 1, "auto", 1, id="a larger one too"),
        pytest.param(2560, 2, "auto", 3, id="second best: the query's rows, a product, a reduction"),
        pytest.param(5000, 1, "split", 5, id="two chunks"),
    ],
)
def test_launches(
    operators: Operators, cuda_device: HostDevice, m: int, k: int, path: cuda.Path, launches: int
) -> None:
    query, features = HostArray(np.ones((3, 8), np.float32)), np.ones((m, 8), np.float32)
    bank = operators.bank(features, "int8")
    workspace = operators.workspace(cuda.max_cosine_workspace(3, bank, k, path=path))
    before = library.library().vmad_host_launches()
    score, index = HostArray(np.zeros(3, np.float32)), HostArray(np.zeros(3, np.int64))
    cuda.max_cosine(query, bank, score, index, workspace, k, path=path, stream=cuda_device.stream)
    assert library.library().vmad_host_launches() - before == launches and (index.array == k - 1).all()


ROWS = HostArray(np.zeros((4, 64), np.uint8))
BANK = cuda.DeviceBank(ROWS, None, 8, "float16")
QUERY, SCORE, INDEX = (HostArray(np.zeros(shape, t)) for shape, t in (((3, 8), "f4"), (3, "f4"), (3, "i8")))
SPACE = HostArray(np.zeros(1 << 20, np.uint8))
NO_ROWS = cuda.DeviceBank(HostArray(np.zeros((0, 64), np.uint8)), None, 8, "float16")
OFFSETS = cuda.DeviceOffsets(np.array([0, 3]), HostArray(np.array([0, 3])))
BYTES = HostArray(np.zeros((9, 9), np.uint8))
UNALIGNED = HostArray(np.zeros(1 << 20, np.uint8))
UNALIGNED.array = UNALIGNED.array[8 + -UNALIGNED.array.ctypes.data % 16 :]
AXIS = cuda.resize_axis(9, 4, "bilinear").on_device(HostArray)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cuda.max_cosine(np.zeros((3, 8), "f4"), BANK, SCORE, INDEX, SPACE),
            TypeError,
            "query: .* got ndarray",
        ),
        (lambda: cuda.max_cosine(SCORE, BANK, SCORE, INDEX, SPACE), ValueError, r"query: .*2 dimensions.* \[3\]"),
        (lambda: cuda.max_cosine(ROWS, BANK, SCORE, INDEX, SPACE), TypeError, "query: .*float16, got uint8"),
        (lambda: cuda.max_cosine(QUERY, NO_ROWS, SCORE, INDEX, SPACE), ValueError, "bank: expected at least 1 row"),
        (lambda: cuda.max_cosine(QUERY, BANK, SCORE, SCORE, SPACE), TypeError, "index: expected int64, got float32"),
        (lambda: cuda.max_cosine(QUERY, BANK, SCORE, INDEX, SPACE, 0), ValueError, "k: expected at least 1, got 0"),
        (lambda: cuda.max_cosine(QUERY, BANK, SCORE, INDEX, SPACE, 2, path="fused"), ValueError, "k of 1, got 2"),
        (
            lambda: cuda.max_cosine(QUERY, BANK, SCORE, INDEX, UNALIGNED),
            ValueError,
            "multiple of 16 bytes",
        ),
        (lambda: cuda.max_cosine(QUERY, BANK, SCORE, INDEX, HostArray(np.zeros(9, "u1"))), ValueError, "got 9"),
        (
            lambda: cuda.segmented_max_cosine(QUERY, BANK, OFFSETS, SCORE, SPACE),
            ValueError,
            "start at 0 and end at 4, the bank's rows, got 0 and 3",
        ),
        (lambda: cuda.DeviceOffsets.check([0, 2, 2, 4], 4), ValueError, "segment 1 from 2 to 2"),
        (lambda: cuda.DeviceBank(ROWS, None, 64, "float16"), ValueError, r"rows: expected shape \[4, 128\]"),
        (lambda: cuda.DeviceBank(ROWS, None, 64, "int8"), ValueError, "scale: expected one with int8"),
        (lambda: cuda.normalise(QUERY, BANK), ValueError, r"features: expected shape \[4, 8\], got \[3, 8\]"),
        (
            lambda: cuda.preprocess(BYTES, "rgb8", AXIS, AXIS, QUERY, QUERY, SPACE),
            ValueError,
            r"frame: expected 3 dimensions, got shape \[9, 9\]",
        ),
        (
            lambda: cuda.preprocess(HostArray(np.zeros((2, 9), "u1")), "mono8", AXIS, AXIS, QUERY, QUERY, SPACE),
            ValueError,
            "mono8 of at least 3 × 3 pixels",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(
    operators: Operators, call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_kernel_spills_on_any_target() -> None:
    """What ptxas said when the library was built: it is compiled for every target, and all stays in registers."""
    reports = [Path(folder) / "libvmad_cuda.registers" for folder in vmad_edge.kernels.__path__]
    report = next((path.read_text() for path in reports if path.exists()), None)
    if report is None:
        pytest.skip("this build has no CUDA kernels")
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", report)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(kernels) == len(spills) > 0
    assert set(spills) == {("0", "0", "0")}
    named = re.match(r"([\d, ]+) and PTX of 80", cuda.targets() or "")
    assert named and {target for _, target in kernels} == set(named[1].split(", "))


def test_without_the_library_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vmad_edge.kernels, "__path__", [str(tmp_path)])
    library.library.cache_clear()
    assert cuda.targets() is None
    with pytest.raises(RuntimeError, match="CUDACXX names one"):
        library.library()
    library.library.cache_clear()


def test_a_library_of_another_version_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"another version of vmad-edge: it has no vmad_targets. Install it again"):
        library.open_library(Path("libc.so.6"))


@pytest.mark.skipif(cuda.targets() is None, reason="this build has no CUDA kernels")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or Path("/dev/nvhost-gpu").exists(), reason="here is a GPU")
def test_without_a_gpu_cuda_says_so() -> None:
    features = HostArray(np.ones((1, 4), np.float32))
    bank = cuda.DeviceBank(HostArray(np.zeros((1, 64), np.uint8)), None, 4, "float16")
    with pytest.raises(RuntimeError, match=r"vmad_normalise: CUDA says: .*(driver|device)"):
        cuda.normalise(features, bank)
