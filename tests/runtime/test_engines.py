"""Which engine is chosen, what each computes, and what each says when it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from vmad_edge.export.precision import write_fp16
from vmad_edge.runtime.bundle import Bundle, seal
from vmad_edge.runtime.engines import Arrays, Device, choice, gpu, onnxruntime, ran_out_of_memory, tensorrt
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.engines.gpu import Gpu
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.errors import BundleError, VmadError
from vmad_edge.runtime.files import sha256

DEMO = Path(__file__).parents[2] / "demo/bundle"
GRAPHS = ("clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder")
AMPERE = Gpu("a GPU", (8, 6), "580.1, CUDA 13.0")
CPU = "CPUExecutionProvider"
needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open(DEMO)


def example(graph: Path, seed: int = 0) -> tuple[Arrays, Arrays]:
    """Random inputs, dynamic axes 2, and what ONNX Runtime itself makes of them."""
    session = ort.InferenceSession(graph, providers=[CPU])
    rng = np.random.default_rng(seed)
    shapes = {i.name: [size if isinstance(size, int) else 2 for size in i.shape] for i in session.get_inputs()}
    inputs: Arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    names = [output.name for output in session.get_outputs()]
    return inputs, dict(zip(names, session.run(names, inputs), strict=True))


def error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@needs_openvino
@pytest.mark.parametrize("graph", GRAPHS)
def test_openvino_computes_what_onnx_runtime_computes(graph: str, demo: Bundle, tmp_path: Path) -> None:
    from vmad_edge.runtime.engines.openvino import OpenVinoEngine

    inputs, expected = example(demo.file(f"{graph}.onnx"))
    exact = OpenVinoEngine(demo.file(f"{graph}.onnx"))
    assert exact.provider.endswith("f32")
    found = exact.run(inputs)
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == np.float32 and error(found[name], expected[name]) < 1e-5, name

    write_fp16(demo.file(f"{graph}.onnx"), tmp_path / "half.onnx")
    quick = OpenVinoEngine(tmp_path / "half.onnx", "fp16")
    found = quick.run(inputs)
    if not quick.provider.endswith("bf16"):
        pytest.skip("this processor has no bf16")
    for name in expected:  # 2⁻⁹ a rounding, some fifty in a row; and it must really be bf16
        assert 1e-5 < error(found[name], expected[name]) < 2e-2, name


@needs_openvino
def test_signals_come_after_openvino_engines_went(demo: Bundle) -> None:
    """On a processor with AMX two of OpenVINO's cores would leave a freed signal stack behind."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from vmad_edge.runtime.engines.openvino import OpenVinoEngine\n"
        "first, second = (OpenVinoEngine(Path(sys.argv[1])) for _ in range(2))\n"
        "del first, second\n"
        "signal.signal(signal.SIGINT, lambda *_: os._exit(9))\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(demo.file("mask_decoder.onnx"))], timeout=120)
    assert done.returncode == 9


@needs_openvino
def test_openvino_runs_in_threads(demo: Bundle) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from vmad_edge.runtime.engines.openvino import OpenVinoEngine

    path = demo.file("ltc_projector.onnx")
    engine = OpenVinoEngine(path)
    examples = [example(path, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        outputs = pool.map(engine.run, [inputs for inputs, _ in examples])
        for found, (_, expected) in zip(outputs, examples, strict=True):
            assert error(found["visual_tokens"], expected["visual_tokens"]) < 1e-5


def no_gpu() -> Gpu:
    raise VmadError("no NVIDIA driver")


@pytest.mark.parametrize(
    "cuda,found_gpu,installed,precision,expected,passed_over",
    [
        # a GPU, and an ONNX Runtime that can use it
        (True, lambda: AMPERE, {"onnxruntime", "openvino"}, "fp16", "cuda", {"tensorrt"}),
        # onnxruntime-gpu on a machine without a GPU
        (True, no_gpu, {"onnxruntime"}, "fp16", "cpu", {"tensorrt", "cuda", "openvino"}),
        # a GPU, but an ONNX Runtime for CPUs
        (False, lambda: AMPERE, {"onnxruntime", "openvino"}, "fp16", "openvino", {"tensorrt", "cuda"}),
        # graphs that OpenVINO computes no faster
        (False, no_gpu, {"onnxruntime", "openvino"}, "fp32", "cpu", {"tensorrt", "cuda", "openvino"}),
        # OpenVINO alone
        (False, no_gpu, {"openvino"}, "fp32", "openvino", {"tensorrt", "cuda"}),
        # INT8 on a processor that can, and on one that cannot compute it
        (False, no_gpu, {"onnxruntime", "openvino"}, "int8", "openvino", {"tensorrt", "cuda"}),
        (False, no_gpu, {"onnxruntime", "openvino"}, "int8 without VNNI", "cpu", {"tensorrt", "cuda", "openvino"}),
        # the least there can be
        (False, no_gpu, {"onnxruntime"}, "fp16", "cpu", {"tensorrt", "cuda", "openvino"}),
    ],
)
def test_auto_takes_the_best_and_says_why(
    cuda: bool,
    found_gpu: Callable[[], Gpu],
    installed: set[str],
    precision: str,
    expected: str,
    passed_over: set[str],
    demo: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "gpu", found_gpu)
    monkeypatch.setattr(choice, "find_spec", lambda name: name in installed)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*["CUDAExecutionProvider"] * cuda, CPU])
    monkeypatch.setattr(choice, "lacks_vnni", lambda: "without" in precision)
    of = {"clip_encoder": "fp32", "sam_encoder": precision.split()[0]}
    bundle = replace(demo, manifest=demo.manifest.model_copy(update={"precision": of}))
    engines = Engines.choose(bundle, "auto")
    assert engines.device == expected
    assert set(engines.passed_over) == passed_over and all(engines.passed_over.values())


@pytest.mark.parametrize("device", ["auto", "tensorrt", "cuda", "openvino", "cpu"])
def test_what_cannot_be_had_is_refused_with_the_reason(
    device: Device, demo: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "gpu", lambda: AMPERE)
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    monkeypatch.setattr(tensorrt, "tensorrt", tensorrt.tensorrt.__wrapped__)
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    with pytest.raises(VmadError, match="is not installed"):
        Engines.choose(demo, device)


@pytest.mark.filterwarnings("ignore::UserWarning")  # ONNX Runtime's own word, where its build has no CUDA
def test_cuda_without_its_libraries_is_refused(demo: Bundle) -> None:
    """Whatever the reason (no cuDNN, no CUDA in this build): ONNX Runtime itself would run on the CPU."""
    with (
        pytest.warns(UserWarning),
        pytest.raises(VmadError, match=r"would run clip_encoder\.onnx with CPUExecutionProvider"),
    ):
        OnnxRuntimeEngine(demo.file("clip_encoder.onnx"), "cuda")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cuda_without_cudnn_names_what_the_linker_misses(demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        assert name.endswith("libonnxruntime_providers_cuda.so")
        raise OSError("libcudnn.so.9: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(onnxruntime.ctypes, "CDLL", load)
    with pytest.raises(VmadError, match=r"libcudnn\.so\.9: cannot open .*onnxruntime-gpu\[cuda,cudnn\]"):
        OnnxRuntimeEngine(demo.file("clip_encoder.onnx"), "cuda")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_engine_takes_the_stream_of_the_thread_that_it_is_opened_on(
    demo: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def __init__(self, path: str, options: Any, providers: Any, **_: Any) -> None:
            self.providers = providers

        def get_providers(self) -> list[str]:
            return [name for name, _ in self.providers]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(choice, "gpu", lambda: AMPERE)
    monkeypatch.setattr(choice, "open_plan", lambda *arguments: arguments)
    thread: Any = SimpleNamespace(device=SimpleNamespace(stream=87))
    cuda: Any = Engines(demo, "cuda", {}, None)
    assert cuda.open_on("clip_encoder", thread)._session.providers[0][1]["user_compute_stream"] == "87"
    assert "user_compute_stream" not in cuda.open("sam_encoder")._session.providers[0][1]  # a stream of its own
    tensorrt: Any = Engines(demo, "tensorrt", {}, Plans(tmp_path))
    assert tensorrt.open_on("clip_encoder", thread)[-1] is thread and tensorrt.open("sam_encoder")[-1] is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_no_graph(device: Device, demo: Bundle, tmp_path: Path) -> None:
    (tmp_path / "clip_encoder.onnx").write_bytes(b"no graph")
    broken = Bundle(tmp_path, demo.hash, demo.manifest)
    with pytest.raises(BundleError, match=rf"cannot load {tmp_path}/clip_encoder\.onnx: .* Export it again") as raised:
        Engines.choose(broken, device).open("clip_encoder")
    assert "\n" not in str(raised.value)


@pytest.fixture
def own(demo: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the demo whose mask decoder has its weights in a file beside it, as graphs above 2 GiB have."""
    folder = tmp_path / "own"
    shutil.copytree(demo.path, folder)
    graph = onnx.load(folder / "mask_decoder.onnx")
    onnx.save(graph, folder / "mask_decoder.onnx", save_as_external_data=True, location="mask_decoder.onnx.data")
    files = {path.name: sha256(path) for path in folder.iterdir() if not path.name.startswith("manifest.")}
    seal(folder, demo.manifest.model_copy(update={"files": files}))
    return Bundle.open(folder)


@pytest.mark.parametrize("device", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_weights_beside_the_graph(device: Device, own: Bundle, demo: Bundle) -> None:
    assert own.file("mask_decoder.onnx").stat().st_size < own.file("mask_decoder.onnx.data").stat().st_size
    inputs, expected = example(demo.file("mask_decoder.onnx"))
    found = Engines.choose(own, device).open("mask_decoder").run(inputs)
    for name in expected:
        assert error(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize("name", ["mask_decoder.onnx", "mask_decoder.onnx.data"])
def test_what_changes_while_a_library_loads_it_is_refused(
    device: Device, name: str, own: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are zeros for as long as it is read, and then what they were."""
    path, load = own.file(name), ort.InferenceSession
    content = path.read_bytes()

    def swapped(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **options: Any) -> Any:
            path.write_bytes(bytes(len(content)) if name.endswith("data") else content)
            try:
                return load(*args, **options)
            finally:
                path.write_bytes(content)

        return loaded

    monkeypatch.setattr(ort, "InferenceSession", swapped(load))
    if device == "openvino":
        import openvino

        monkeypatch.setattr(openvino.Core, "read_model", swapped(openvino.Core.read_model))
    engines = Engines.choose(own, device)
    with pytest.raises(BundleError, match=rf"{own.path} was changed after its files were checked: {name}\."):
        engines.open("mask_decoder")


@needs_openvino
def test_openvino_reads_its_graph_once(own: Bundle, demo: Bundle) -> None:
    engine = Engines.choose(own, "openvino").open("mask_decoder")
    inputs, expected = example(demo.file("mask_decoder.onnx"))
    for path in own.path.iterdir():
        path.unlink()
    found = engine.run(inputs)  # another batch than the one that it was compiled for
    for name in expected:
        assert error(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize(
    "ir_version,operator,says",
    [
        (99, "Relu", "Unsupported model IR version: 99"),
        (8, "Foo", "No Op registered for Foo"),
        (8, "Add", "input size 1 not in range"),
    ],
)
def test_what_onnx_runtime_says_of_a_graph(ir_version: int, operator: str, says: str, tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "graph", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)
    onnx.save(model, str(tmp_path / "graph.onnx"))
    with pytest.raises(BundleError, match=says) as raised:
        OnnxRuntimeEngine(tmp_path / "graph.onnx")
    for inside in ("onnxruntime_src", "::Model", "ONNXRuntimeError", "std::", "\n"):
        assert inside not in str(raised.value)


@pytest.mark.parametrize(
    "message,memory",
    [
        # ONNX Runtime's arena, TensorRT's builder, llama.cpp's model and context, CUDA
        ("Failed to allocate memory for requested buffer of size 1073741824", True),
        ("Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)", True),
        ("allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory", True),
        ("graph_reserve: failed to allocate compute buffers", True),
        ("CUDA error cudaErrorMemoryAllocation:out of memory", True),
        ("Load model failed: Protobuf parsing failed.", False),
    ],
)
def test_what_libraries_say_when_memory_is_out(message: str, memory: bool) -> None:
    assert ran_out_of_memory(message) == memory


@pytest.mark.parametrize("opening", [True, False])  # the weights do not fit, or what a run needs does not
def test_onnx_runtime_out_of_memory_says_what_to_shrink(
    opening: bool, demo: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            if opening:
                self.run()

        def get_providers(self) -> list[str]:
            return [CPU]

        def get_outputs(self) -> list[Any]:
            return []

        def run(self, *_: Any) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1073741824")

    monkeypatch.setattr(ort, "InferenceSession", Session)
    with pytest.raises(VmadError, match=r"clip_encoder\.onnx: no memory left .*1073741824.* language model.*fp16"):
        OnnxRuntimeEngine(demo.file("clip_encoder.onnx")).run({})


class Driver:
    """libcuda as far as gpu.py asks it; each answer is one that the CUDA driver API documents."""

    def __init__(self, version: int = 13000, status: int = 0) -> None:
        self.version, self.status = version, status

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = {100: b"no CUDA-capable device is detected"}[status]
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"Orin"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0


@pytest.mark.parametrize(
    "driver,says",
    [
        (Driver(version=11040), r"too old: expected one for CUDA 12\.0 or newer, found CUDA 11\.4"),
        (Driver(status=100), "no CUDA-capable device is detected"),
        (OSError("libcuda.so.1: cannot open shared object file"), "no NVIDIA driver"),
    ],
)
def test_gpu_that_cannot_be_used(driver: Driver | OSError, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(gpu.ctypes, "CDLL", load)
    with pytest.raises(VmadError, match=says):
        gpu.gpu()


def test_gpu_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver())
    found = gpu.gpu()
    assert str(found) == "Orin, SM 8.7" and found.driver.endswith("CUDA 13.0")


@pytest.mark.parametrize(("allowed", "expected"), [(3, 3), (8, 0)])
def test_onnx_runtime_obeys_quota_and_affinity(
    allowed: int, expected: int, demo: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 processors; with all of them the library chooses."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("vmad_edge.runtime.engines.processors", lambda: allowed)
    engine = OnnxRuntimeEngine(demo.file("mask_decoder.onnx"))
    assert engine._session.get_session_options().intra_op_num_threads == expected


@needs_openvino
def test_openvino_obeys_quota_and_affinity(demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmad_edge.runtime.engines.openvino import OpenVinoEngine

    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("vmad_edge.runtime.engines.processors", lambda: 1)
    engine = OpenVinoEngine(demo.file("mask_decoder.onnx"))
    assert [c.get_property("INFERENCE_NUM_THREADS") for c in engine._compiled.values()] == [1]
    monkeypatch.setattr("vmad_edge.runtime.engines.processors", lambda: 8)
    assert "INFERENCE_NUM_THREADS" not in OpenVinoEngine(demo.file("mask_decoder.onnx"))._settings
