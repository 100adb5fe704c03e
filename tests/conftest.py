"""One tiny checkpoint of random weights, and its bundle, for all tests that only read them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_host import HostDevice, Library, compile_kernels

import vmad_edge.export  # noqa: F401  # before a test imports transformers: offline
from vmad_edge.kernels.cuda import library
from vmad_edge.runtime import device
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.device import DeviceThread


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heeded() -> None:
    """A shell has its background jobs ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's folder."""
    from tiny_checkpoint import write_checkpoint  # torch: not for those who test the kernels alone

    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def bundle(tiny: Path) -> Bundle:
    """The bundle of `tiny`, its language model in F32."""
    from vmad_edge.runtime.cli import main  # llama.cpp: nor this

    target = tiny.parent / "bundle"
    assert main(["export", str(tiny), str(target), "--llm", "f32"]) == 0
    return Bundle.open(target)


@pytest.fixture(scope="session")
def tiny_bundle(bundle: Bundle) -> Path:
    """Its folder."""
    return bundle.path


@pytest.fixture(scope="session")
def cuda_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels, compiled for the processor."""
    return compile_kernels(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture
def cuda_device(cuda_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostDevice]:
    """A GPU on the processor, whose kernels vmad_edge.kernels.cuda takes."""
    device, open_library = HostDevice(), library.open_library
    monkeypatch.setattr(library, "_path", lambda: cuda_kernels)
    monkeypatch.setattr(library, "open_library", lambda path: Library(open_library(path), device))
    library.library.cache_clear()
    yield device
    library.library.cache_clear()


@pytest.fixture
def thread(cuda_device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> DeviceThread:
    """A thread whose device that is."""
    monkeypatch.setattr(device, "Device", lambda: cuda_device)
    return DeviceThread()
