"""A GPU on the processor, for tests: the kernels of `kernels/cuda_host/host.h`, with memory, a stream and graphs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmad_edge.kernels.cuda import DeviceArray
from vmad_edge.runtime.device import DeviceThread
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

ROOT = Path(__file__).parents[1]


def compile_kernels(folder: Path) -> Path:
    """kernels/cuda/*.cu by the C++ compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "targets.h").write_text('#define VMAD_CUDA_TARGETS "the host"\n')
    sources = [*sorted((ROOT / "kernels/cuda").glob("*.cu")), ROOT / "tests/kernels/cuda_host/host.cpp"]
    headers = [f"-I{path}" for path in (folder, ROOT / "kernels/cuda", ROOT / "tests/kernels/cuda_host")]
    flags = ["-std=c++17", "-O2", "-w", "-shared", "-fPIC", *headers, "-x", "c++"]
    subprocess.run([compiler, *flags, *sources, "-o", folder / "kernels.so"], check=True, timeout=300)
    return folder / "kernels.so"


class HostArray:
    """A NumPy array that passes for device memory."""

    def __init__(self, array: Any) -> None:
        self.array = np.ascontiguousarray(array).copy()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        about = self.array.__array_interface__
        return {key: about[key] for key in ("shape", "typestr", "data", "strides")} | {"version": 3}


class HostDevice:
    """What `vmad_edge.runtime.device.Device` is, as strict: while it captures, nothing runs, is allocated or copied; a
    graph repeats what was queued with the arguments of then.
    """

    stream = 0x57
    name = "the host"

    def __init__(self) -> None:
        self._captured: list[Callable[[], object]] | None = None
        self.graphs = 0
        self.brought = 0
        """Bytes downloaded."""

    def upload(self, array: Any) -> HostArray:
        assert self._captured is None
        return HostArray(array)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> HostArray:
        return self.upload(np.zeros(shape, dtype))

    def write(self, memory: HostArray, array: Any) -> None:
        assert self._captured is None and memory.array.dtype == array.dtype
        memory.array[...] = array.reshape(memory.array.shape)

    def download(self, memory: HostArray) -> Any:
        self.wait()
        self.brought += memory.array.nbytes
        return memory.array.copy()

    def wait(self) -> None:
        assert self._captured is None

    @property
    def captures(self) -> bool:
        return self._captured is not None

    def queue(self, work: Callable[[], object]) -> object:
        """`work` on the stream."""
        if self._captured is None:
            return work()
        self._captured.append(work)
        return 0

    def capture(self, queue: Callable[[], None]) -> Graph:
        queue()
        self._captured = captured = []
        try:
            queue()
        finally:
            self._captured = None
        self.graphs += 1
        return Graph(captured)

    def close(self) -> None:
        self.wait()


class Graph:
    def __init__(self, captured: list[Callable[[], object]]) -> None:
        self._captured = captured

    def launch(self) -> None:
        for work in self._captured:
            assert not work()

    def close(self) -> None:
        self._captured = [lambda: "launched after it was closed"]


class HostEngine(OnnxRuntimeEngine):
    """An ONNX graph on the processor, run from and into the host device's memory, queued there as a plan would be."""

    def __init__(self, path: Path, thread: DeviceThread, captures: bool = True) -> None:
        super().__init__(path, "cpu", thread=thread)
        self.capturable = captures

    def queue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        host: Any = self.thread.device
        host.queue(lambda: super(HostEngine, self).queue(inputs, outputs))


class Library:
    """The kernels, whose launchers queue on the device."""

    def __init__(self, kernels: ctypes.CDLL, device: HostDevice) -> None:
        self._kernels, self._device = kernels, device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernels, name)
        if name.endswith("workspace") or name in ("vmad_error", "vmad_targets") or "host" in name:
            return function

        def launcher(*arguments: Any) -> object:
            assert arguments[-1] == HostDevice.stream, f"{name} was queued on another stream"
            return self._device.queue(lambda: function(*arguments))

        return launcher
