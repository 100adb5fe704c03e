"""A GPU's memory, streams and graphs, for engines and for the kernels of `vmad_edge.kernels.cuda`.

The only file that knows pycuda (context, memory, streams) and cuda-bindings (graph capture, which pycuda lacks). Both
are imported when a `Device` is made: pycuda cannot be imported where there is no driver.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vmad_edge.kernels.cuda import DeviceArray
from vmad_edge.runtime.errors import VmadError

_P = ParamSpec("_P")
_T = TypeVar("_T")
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


@dataclass(frozen=True)
class DeviceMemory:
    """A C-contiguous array on the device; freed with its last user, in another thread at the next upload."""

    allocation: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        where = (int(self.allocation), False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": where, "strides": None, "version": 3}


class Device:
    """A GPU's primary context, which TensorRT, ONNX Runtime and llama.cpp use too, and one stream in it.

    The stream waits for no other, so that what two devices queue runs side by side. Of use in the thread that made it,
    until `close`.

    Raises:
        VmadError: pycuda or cuda-bindings is missing, or the driver gives no GPU.
    """

    def __init__(self, number: int = 0) -> None:
        try:
            import pycuda.driver
            from cuda.bindings import driver
        except ImportError as error:
            raise VmadError(
                f"the GPU needs pycuda, cuda-bindings (pip install pycuda cuda-bindings) and an NVIDIA driver: {error}"
            ) from None
        self._pycuda, self._driver = pycuda.driver, driver
        try:
            self._pycuda.init()
            self._context = self._pycuda.Device(number).retain_primary_context()
        except self._pycuda.Error as error:
            raise VmadError(f"the NVIDIA driver gives no GPU {number}: {error}") from None
        self._context.push()
        self._thread, self._dropped = threading.get_ident(), deque[Any]()
        self._leave = _at_threads_end(self._dropped.clear, self._context.pop)
        self._stream = self._pycuda.Stream(_NON_BLOCKING)
        self.name: str = self._context.get_device().name()

    @property
    def stream(self) -> int:
        """The stream's handle, for the kernels."""
        return int(self._stream.handle)

    def upload(self, array: NDArray[Any]) -> DeviceMemory:
        """A copy of `array`, there for every stream.

        Raises:
            VmadError: no memory left for it.
        """
        self._dropped.clear()
        try:
            allocation = self._pycuda.mem_alloc(max(1, array.nbytes))
        except self._pycuda.MemoryError:
            raise VmadError(
                f"no memory left on {self.name} for {array.nbytes / 2**20:.1f} MiB. Stop what else uses it, keep fewer "
                "of the language model's layers there (gpu_layers), enroll fewer frames or with a coreset or a "
                "bank_dtype of int8, or export with --precision fp16"
            ) from None
        memory = DeviceMemory(allocation, array.shape, array.dtype)
        weakref.finalize(memory, self._drop, allocation).atexit = False
        self.write(memory, array)
        self.wait()
        return memory

    def _drop(self, allocation: Any) -> None:
        """Keep what another thread dropped: pycuda frees nothing outside its context's thread, it warns and leaks."""
        if threading.get_ident() != self._thread:
            self._dropped.append(allocation)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceMemory:
        """Zeros, as workspaces must be at first."""
        return self.upload(np.zeros(shape, dtype))

    def write(self, memory: DeviceArray, array: NDArray[Any]) -> None:
        """`array`, of the shape and dtype of `memory`, into it, in its turn on the stream."""
        if array.nbytes:
            with self._errors():
                self._pycuda.memcpy_htod_async(_address(memory), np.ascontiguousarray(array), self._stream)

    def download(self, memory: DeviceArray) -> NDArray[Any]:
        """A copy of `memory`, which is C-contiguous, when all that was queued is done."""
        about = memory.__cuda_array_interface__
        array = np.empty(about["shape"], about["typestr"])
        if array.nbytes:
            with self._errors():
                self._pycuda.memcpy_dtoh_async(array, _address(memory), self._stream)
        self.wait()
        return array

    def wait(self) -> None:
        """Until all that was queued on the stream is done.

        Raises:
            VmadError: a part of it failed.
        """
        with self._errors():
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

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._pycuda.Error as error:
            raise VmadError(f"CUDA says: {error}") from None

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        return _checked(self._driver, answer)

    def close(self) -> None:
        self.wait()
        self._leave()
        self._context.detach()


class _Token:
    """Dies with the thread whose `_OF_THREAD` holds it."""


_OF_THREAD = threading.local()


def _at_threads_end(*leave: Callable[[], None]) -> Callable[[], object]:
    """Has each of `leave` called once: by what this returns, else at the end of this thread or program.

    pycuda aborts the process where a thread ends with a context.
    """
    token = _Token()
    _OF_THREAD.tokens = [*getattr(_OF_THREAD, "tokens", ()), token]
    return weakref.finalize(token, lambda: [call() for call in leave])


def _address(memory: DeviceArray) -> int:
    return int(memory.__cuda_array_interface__["data"][0])


@dataclass(frozen=True)
class Graph:
    """Work on a stream that is launched as a whole, from `Device.capture`, until `close`. It keeps no memory alive."""

    _driver: Any
    _executable: Any
    _graph: Any
    _stream: int

    def launch(self) -> None:
        """Queues it."""
        _checked(self._driver, self._driver.cuGraphLaunch(self._executable, self._stream))

    def close(self) -> None:
        _checked(self._driver, self._driver.cuGraphExecDestroy(self._executable))
        _checked(self._driver, self._driver.cuGraphDestroy(self._graph))


def _checked(driver: Any, answer: tuple[Any, ...]) -> Any:
    """The value of a cuda-bindings call.

    Raises:
        VmadError: the driver's error.
    """
    error, *value = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise VmadError(f"CUDA says: {error.name}")
    return value[0] if value else None


class DeviceThread:
    """A thread with a `Device`, which serves it alone: calls take turns."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "gpu")
        self.device = self.call(Device)

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `function` returns or raises in the thread."""
        return self._pool.submit(function, *args, **kwargs).result()
