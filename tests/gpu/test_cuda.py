"""The CUDA kernels on a GPU: the contract that tests/kernels/test_cuda_host.py holds on the processor, and what only a
GPU can show.

tests/gpu/run.sh runs it under compute-sanitizer too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cuda_contract import *  # noqa: F403  the tests that any machine must pass
from cuda_contract import TOLERANCE, Operators, bits

from vmad_edge.kernels import cuda
from vmad_edge.runtime.device import Device, DeviceThread
from vmad_edge.runtime.errors import VmadError


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    if cuda.targets() is None:
        pytest.skip("not run: this build has no CUDA kernels")
    try:
        device = Device()
    except VmadError as error:
        pytest.skip(f"not run: {error}")
    yield device
    device.close()


@pytest.fixture
def operators(device: Device) -> Operators:
    return Operators(device)


@pytest.mark.usefixtures("device")
def test_memory_that_another_thread_drops_comes_back() -> None:
    """As the driver counts it, 64 MiB; the 2 MiB are the driver's step."""
    thread = DeviceThread()

    def free() -> int:
        import pycuda.driver

        return int(pycuda.driver.mem_get_info()[0])

    before = thread.call(free)
    memory = thread.call(thread.device.zeros, (64 << 20,), np.uint8)
    assert thread.call(free) <= before - memory.shape[0]
    del memory
    small = thread.call(thread.device.zeros, (1,), np.uint8)
    assert thread.call(free) >= before - (2 << 20)
    assert small.shape == (1,)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("path", ["fused", "split"])
@pytest.mark.parametrize(("q", "m"), [(256, 256), (256, 2560), (576, 18432)])
def test_at_the_sizes_of_a_line(operators: Operators, dtype: cuda.Dtype, path: cuda.Path, q: int, m: int) -> None:
    rng = np.random.default_rng(0)
    query, bank = (rng.standard_normal((count, 1024), np.float32) for count in (q, m))
    score, index = operators.max_cosine(query, bank, dtype=dtype, path=path)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, bank)]
    exact = unit[0] @ unit[1].T
    np.testing.assert_allclose(score, exact.max(axis=1), rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(exact[np.arange(q), index], exact.max(axis=1), rtol=0, atol=2 * TOLERANCE[dtype])


def test_a_graph_repeats_the_screen(device: Device, operators: Operators) -> None:
    """Similarity, map and score captured as one graph; each launch reads the patches that are there by then."""
    rng = np.random.default_rng(1)
    bank = operators.bank(rng.standard_normal((2560, 96)).astype(np.float32), "float16")
    query, index = device.zeros((64, 96), np.float32), device.zeros((64,), np.int64)
    score, map, result = (device.zeros(shape, np.float32) for shape in ((8, 8), (40, 50), (2,)))
    flat = cuda.view(score, (64,))
    size = max(cuda.max_cosine_workspace(64, bank), cuda.top_mean_workspace(2000))
    workspace = device.zeros((size,), np.uint8)
    y, x = (cuda.map_axis(8, 56, 4, np.linspace(0, 55, n)).on_device(device.upload) for n in (40, 50))

    def screen() -> None:
        cuda.max_cosine(query, bank, flat, index, workspace, stream=device.stream)
        cuda.anomaly_map(score, y, x, map, stream=device.stream)
        cuda.top_mean(map, result, workspace, stream=device.stream)

    graph = device.capture(screen)
    for _ in range(3):
        patches = rng.standard_normal((64, 96)).astype(np.float32)
        device.write(query, patches)
        graph.launch()
        got = [device.download(memory) for memory in (score, map, result)]
        screen()
        for before, memory in zip(got, (score, map, result), strict=True):
            assert (bits(before) == bits(device.download(memory))).all()
