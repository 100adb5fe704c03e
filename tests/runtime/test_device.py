"""The GPU's one file, where no GPU is: what it asks of pycuda and cuda-bindings, and what it says when they refuse."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vmad_edge.runtime import device
from vmad_edge.runtime.device import Device, DeviceThread
from vmad_edge.runtime.errors import VmadError

THREAD_LOCAL = 1


class Allocation:
    def __init__(self, size: int, freed: list[int]) -> None:
        self.bytes, self.freed = np.zeros(size, np.uint8), freed

    def __del__(self) -> None:
        self.freed.append(threading.get_ident())

    def __int__(self) -> int:
        return self.bytes.ctypes.data


class Driver:
    """pycuda.driver and cuda.bindings.driver as far as device.py asks them, as they document their calls; `calls` are
    those that queue."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=THREAD_LOCAL)

    def __init__(self, devices: int = 1, room: int = 1 << 20, refuses: str = "") -> None:
        self.devices, self.room, self.refuses = devices, room, refuses
        self.calls: list[Any] = []
        self.contexts: list[tuple[str, int]] = []
        self.freed: list[int] = []
        """The thread that freed, for each allocation that is gone."""

    def init(self) -> None:
        if not self.devices:
            raise self.Error("cuInit failed: no CUDA-capable device is detected")

    def Device(self, number: int) -> Any:
        if number >= self.devices:
            raise self.Error("cuDeviceGet failed: invalid device ordinal")
        found = SimpleNamespace(name=lambda: "A")

        def note(what: str) -> Any:
            return lambda: self.contexts.append((what, threading.get_ident()))

        context = SimpleNamespace(push=note("push"), pop=note("pop"), detach=note("detach"), get_device=lambda: found)
        return SimpleNamespace(retain_primary_context=lambda: context)

    def Stream(self, flags: int) -> Any:
        assert flags == 1  # CU_STREAM_NON_BLOCKING
        return SimpleNamespace(handle=9, synchronize=self.synchronize)

    def synchronize(self) -> None:
        self.calls.append("wait")
        if self.refuses == "synchronize":
            raise self.Error("cuStreamSynchronize failed: an illegal memory access was encountered")

    def mem_alloc(self, size: int) -> Any:
        if size > self.room:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return Allocation(size, self.freed)

    def memcpy_htod_async(self, to: int, array: Any, stream: Any) -> None:
        ctypes.memmove(to, array.ctypes.data, array.nbytes)

    def memcpy_dtoh_async(self, array: Any, source: int, stream: Any) -> None:
        ctypes.memmove(array.ctypes.data, source, array.nbytes)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            error = SimpleNamespace(name="CUDA_ERROR_X") if name == self.refuses else self.CUresult.CUDA_SUCCESS
            made = {"cuStreamEndCapture": ("graph",), "cuGraphInstantiate": ("executable",)}
            return (error, *made.get(name, ()))

        return call


@pytest.fixture
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver: Driver = getattr(request, "param", None) or Driver()
    for name, module in {
        "pycuda": SimpleNamespace(driver=driver),
        "pycuda.driver": driver,
        "cuda": SimpleNamespace(),
        "cuda.bindings": SimpleNamespace(driver=driver),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return driver


@pytest.mark.parametrize("closes", [True, False])
def test_a_thread_leaves_its_context(driver: Driver, closes: bool) -> None:
    """Once, and in the thread itself: pycuda aborts the process where one ends with a context."""
    held: list[Device] = []

    def work() -> None:
        held.append(Device())
        if closes:
            held[0].close()

    thread = threading.Thread(target=work)
    thread.start()
    number = thread.ident
    thread.join()
    assert [call for call in driver.contexts if call[0] != "detach"] == [("push", number), ("pop", number)]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(VmadError, match=r"pip install pycuda cuda-bindings.* and an NVIDIA driver: .*pycuda"):
        Device()


@pytest.mark.parametrize(
    ("driver", "number", "says"),
    [
        # a driver without a GPU
        (Driver(devices=0), 0, "gives no GPU 0: .*no CUDA-capable device"),
        # a second one that is not there
        (Driver(), 1, "gives no GPU 1: .*invalid device ordinal"),
    ],
    indirect=["driver"],
)
def test_no_gpu(driver: Driver, number: int, says: str) -> None:
    with pytest.raises(VmadError, match=says):
        Device(number)


def test_what_goes_up_comes_back(driver: Driver) -> None:
    here = Device()
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    memory = here.upload(array.T)
    np.testing.assert_array_equal(here.download(memory), array.T)
    here.write(memory, 2 * array.T)
    np.testing.assert_array_equal(here.download(memory), 2 * array.T)
    assert here.upload(np.zeros((0, 4))).shape == (0, 4)


def test_memory_is_freed_at_once_where_its_last_user_is_the_devices_thread(driver: Driver) -> None:
    memory = Device().zeros((3,), np.float32)
    assert driver.freed == []
    del memory
    assert driver.freed == [threading.get_ident()]


@pytest.mark.parametrize("then", ["uploads", "closes", "ends"])
def test_memory_that_another_thread_dropped_is_freed_by_the_devices(driver: Driver, then: str) -> None:
    """pycuda: "cannot activate out-of-thread context"; the memory would be lost."""
    thread = DeviceThread()
    number = thread.call(threading.get_ident)
    memory = thread.call(thread.device.zeros, (3,), np.float32)
    thread.call(lambda: None)  # by now the thread itself holds nothing of what it returned
    del memory
    assert driver.freed == []
    if then == "uploads":
        kept = thread.call(thread.device.zeros, (3,), np.float32)
        assert kept.shape == (3,)
    elif then == "closes":
        thread.call(thread.device.close)
    else:
        thread._pool.shutdown()
    assert driver.freed[0] == number


@pytest.mark.parametrize("driver", [Driver(room=100)], indirect=True)
def test_out_of_memory_says_what_to_shrink(driver: Driver) -> None:
    with pytest.raises(VmadError, match=r"no memory left on A for 3\.8 MiB.*gpu_layers.*enroll fewer frames.*fp16"):
        Device().zeros((1000, 1000), np.float32)


def test_a_graph_is_captured_after_a_first_run_and_launched_on_its_stream(driver: Driver) -> None:
    graph = Device().capture(lambda: driver.calls.append("work"))
    graph.launch()
    graph.close()
    assert driver.calls == [
        *("work", "wait", ("cuStreamBeginCapture", 9, THREAD_LOCAL), "work", ("cuStreamEndCapture", 9)),
        *(("cuGraphInstantiate", "graph", 0), ("cuGraphLaunch", "executable", 9)),
        *(("cuGraphExecDestroy", "executable"), ("cuGraphDestroy", "graph")),
    ]


@pytest.mark.parametrize("driver", [Driver(refuses="cuStreamEndCapture")], indirect=True)
def test_what_cannot_be_captured(driver: Driver) -> None:
    with pytest.raises(VmadError, match="CUDA says: CUDA_ERROR_X"):
        Device().capture(lambda: None)


@pytest.mark.parametrize("driver", [Driver(refuses="synchronize")], indirect=True)
def test_what_failed_on_the_device_is_told(driver: Driver) -> None:
    with pytest.raises(VmadError, match=r"CUDA says: .*illegal memory access"):
        Device().wait()


def test_each_thread_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So SAM's encoder waits for nothing that the screen or the language model queues."""
    monkeypatch.setattr(device, "Device", lambda: object())
    assert DeviceThread().device is not DeviceThread().device
