"""A GPU's memory, stream and graphs for the kernels of `vmad_edge.kernels.cuda`.

The only file that knows pycuda (context, memory, streams) and cuda-bindings (graph capture, which pycuda lacks). Both
are imported when a `Device` is made: pycuda cannot be imported where there is no driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vmad_edge.runtime.errors import VmadError


@dataclass(frozen=True)
class DeviceMemory:
    """A C-contiguous array on the device; freed with its last user."""

    allocation: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        where = (int(self.allocation), False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": where, "strides": None, "version": 3}


class Device:
    """A GPU's primary context, which TensorRT, ONNX Runtime and llama.cpp use too, and one stream in it.

    Of use in the thread that made it, until `close`.

    Raises:
        VmadError: pycuda or cuda-bindings is missing, or the driver gives no GPU.
    """

    def __init__(self, number: int = 0) -> None:
        try:
            import pycuda.driver
            from cuda.bindings import driver
        except ImportError as error:
            raise VmadError(
                f'the GPU needs pycuda, cuda-bindings (pip install "vmad-edge[gpu]") and an NVIDIA driver: {error}'
            ) from None
        self._pycuda, self._driver = pycuda.driver, driver
        try:
            self._pycuda.init()
            self._context = self._pycuda.Device(number).retain_primary_context()
        except self._pycuda.Error as error:
            raise VmadError(f"the NVIDIA driver gives no GPU {number}: {error}") from None
        self._context.push()
        self._stream = self._pycuda.Stream()
        self.name: str = self._context.get_device().name()

    @property
    def stream(self) -> int:
        """The stream's handle, for the kernels."""
        return int(self._stream.handle)

    def upload(self, array: NDArray[Any]) -> DeviceMemory:
        """A copy of `array`."""
        array = np.ascontiguousarray(array)
        memory = DeviceMemory(self._pycuda.mem_alloc(max(1, array.nbytes)), array.shape, array.dtype)
        if array.nbytes:
            self._pycuda.memcpy_htod(memory.allocation, array)
        return memory

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceMemory:
        """Zeros, as workspaces must be at first."""
        return self.upload(np.zeros(shape, dtype))

    def download(self, memory: DeviceMemory) -> NDArray[Any]:
        """A copy of `memory`, when all that was queued is done."""
        self.wait()
        array = np.empty(memory.shape, memory.dtype)
        if array.nbytes:
            self._pycuda.memcpy_dtoh(array, memory.allocation)
        return array

    def wait(self) -> None:
        """Until all that was queued on the stream is done."""
        self._stream.synchronize()

    def capture(self, queue: Callable[[], None]) -> Graph:
        """What `queue` queues on `stream`, as one graph. It must neither allocate nor wait.

        It is run once first: CUDA loads a kernel at its first launch, which a capture may not.
        """
        queue()
        self.wait()
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._checked(self._driver.cuStreamBeginCapture(self.stream, mode))
        try:
            queue()
        finally:
            graph = self._checked(self._driver.cuStreamEndCapture(self.stream))
        return Graph(self._driver, self._checked(self._driver.cuGraphInstantiate(graph, 0)), graph, self.stream)

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        return _checked(self._driver, answer)

    def close(self) -> None:
        self.wait()
        self._context.pop()
        self._context.detach()


@dataclass(frozen=True)
class Graph:
    """Work on a stream that is launched as a whole, from `Device.capture`. It keeps no memory alive."""

    _driver: Any
    _executable: Any
    _graph: Any
    _stream: int

    def launch(self) -> None:
        """Queues it."""
        _checked(self._driver, self._driver.cuGraphLaunch(self._executable, self._stream))


def _checked(driver: Any, answer: tuple[Any, ...]) -> Any:
    """The value of a cuda-bindings call.

    Raises:
        VmadError: the driver's error.
    """
    error, *value = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise VmadError(f"CUDA says: {error.name}")
    return value[0] if value else None
