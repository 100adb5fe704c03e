"""TensorRT's plans: built without a GPU where the package can, kept, and refused. Running them needs a GPU."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_host import HostDevice

from vmad_edge.export.int8 import calibrate, write_int8
from vmad_edge.export.precision import ENCODERS, write_fp16
from vmad_edge.runtime import cli, device
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.engines import choice, gpu, tensorrt
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.engines.gpu import Gpu
from vmad_edge.runtime.engines.plans import PlanKey, Plans
from vmad_edge.runtime.engines.tensorrt import FLAVOURS, TensorRt, TensorRtEngine, build, build_plans, plan_key
from vmad_edge.runtime.errors import BundleError, VmadError

DEMO = Path(__file__).parents[2] / "demo/bundle"
GRAPHS = ("clip_encoder", "ltc_projector", "mask_decoder", "sam_encoder")
AMPERE, ADA = Gpu("GeForce RTX 3090", (8, 6), "580.1, CUDA 13.0"), Gpu("GeForce RTX 4090", (8, 9), "580.1, CUDA 13.0")
ORIN = Gpu("Orin", (8, 7), "540.4, CUDA 12.6")
needs_rtx = pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open(DEMO)


@pytest.fixture
def small(demo: Bundle) -> Bundle:
    """The demo bundle as if it had one graph."""
    name = "ltc_projector.onnx"
    files = {name: demo.manifest.files[name]}
    return replace(demo, manifest=demo.manifest.model_copy(update={"files": files}))


@pytest.fixture
def rtx() -> TensorRt:
    return TensorRt(FLAVOURS[1], pytest.importorskip("tensorrt_rtx"), "1.7")


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_is_built_for_two_architectures(graph: str, demo: Bundle, rtx: TensorRt, tmp_path: Path) -> None:
    exact, half = demo.file(f"{graph}.onnx"), tmp_path / "half.onnx"
    write_fp16(exact, half)
    axes = demo.manifest.dynamic_axes
    ampere, ada, fp16 = (
        build(rtx, path, axes, chip.compute_capability)[0]
        for path, chip in ((exact, AMPERE), (exact, ADA), (half, AMPERE))
    )
    assert ampere != ada
    # The weights are in there, in the graph's precision: FP16 is no flag, and nothing is rounded unasked.
    assert len(ampere) - len(fp16) > 0.8 * exact.stat().st_size  # FP16 in the file, where that is exact
    if graph in ENCODERS:
        noise = np.random.default_rng(0)
        inputs = onnx.load(exact).graph.input
        shapes = {value.name: [axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim] for value in inputs}
        frame = {name: noise.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        integer = tmp_path / "int8.onnx"
        write_int8(exact, integer, calibrate(exact, [frame]))
        int8 = build(rtx, integer, axes, AMPERE.compute_capability)[0]
        assert len(ampere) - len(int8) > integer.stat().st_size


@pytest.mark.parametrize(
    "axes,target,damage,error,says",
    [
        ({"batch": 8}, (8, 7), None, VmadError, r"does not build for SM87: it lists .*SM86"),  # Jetson's
        ({"prompts": 4}, (8, 6), None, BundleError, r"axis 0 of patches is dynamic and called 'batch'"),
        ({"batch": 8}, (8, 6), b"no graph", BundleError, "cannot parse"),
    ],
)
def test_what_cannot_be_built(
    axes: dict[str, int],
    target: tuple[int, int],
    damage: bytes | None,
    error: type[VmadError],
    says: str,
    demo: Bundle,
    rtx: TensorRt,
    tmp_path: Path,
) -> None:
    path = demo.file("ltc_projector.onnx")
    if damage is not None:
        path = tmp_path / "ltc_projector.onnx"
        path.write_bytes(damage)
    with pytest.raises(error, match=says):
        build(rtx, path, axes, target)


@needs_rtx
def test_plans_are_built_once_and_again_when_something_changed(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rtx: TensorRt
) -> None:
    monkeypatch.setattr(tensorrt, "tensorrt", lambda: rtx)
    plans = Plans(tmp_path / "engines")
    shares: list[float] = []

    def built(chip: Gpu = AMPERE) -> dict[str, str]:
        return build_plans(small, plans, chip, progress=lambda graph, phase, share: shares.append(share))

    assert "there is no plan" in built()["ltc_projector"]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1
    assert oct((tmp_path / "engines").stat().st_mode)[-3:] == "700"
    assert built() == {}
    assert (
        "another driver (580.1, CUDA 13.0, now 590" in built(replace(AMPERE, driver="590, CUDA 13.2"))["ltc_projector"]
    )
    assert "another gpu" in built(ADA)["ltc_projector"]
    plan = tmp_path / "engines/ltc_projector/plan.trt"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "is not what was built here" in built(ADA)["ltc_projector"]
    assert built(ADA) == {}


@needs_rtx
def test_an_interrupted_build_leaves_nothing(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rtx: TensorRt
) -> None:
    def interrupt(graph: str, phase: str, share: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt, "tensorrt", lambda: rtx)
    with pytest.raises(KeyboardInterrupt):
        build_plans(small, Plans(tmp_path / "engines"), AMPERE, progress=interrupt)
    assert not list(tmp_path.rglob("*.trt"))


def test_a_stale_plan_is_named_when_a_device_is_chosen(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = TensorRt(FLAVOURS[0], FakeTensorRt(), "10.3.0")
    monkeypatch.setattr(tensorrt, "tensorrt", lambda: trt)
    monkeypatch.setattr(choice, "gpu", lambda: ORIN)
    plans = Plans(tmp_path / "engines")
    assert "there is no plan of ltc_projector" in Engines.choose(small, "auto", plans).passed_over["tensorrt"]
    build_plans(small, plans, replace(ORIN, driver="540.3, CUDA 12.6"))
    assert "another driver (540.3" in Engines.choose(small, "auto", plans).passed_over["tensorrt"]
    with pytest.raises(VmadError, match=r"another driver \(540\.3"):
        Engines.choose(small, "tensorrt", plans)
    build_plans(small, plans, ORIN)
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: name)  # pycuda and cuda-bindings
    assert Engines.choose(small, "auto", plans).device == "tensorrt"


@needs_rtx
def test_build_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rtx: TensorRt
) -> None:
    monkeypatch.setattr(tensorrt, "tensorrt", lambda: rtx)
    monkeypatch.setattr(cli, "gpu", lambda: AMPERE)
    command = ["build", str(DEMO), "--station", str(tmp_path)]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert all(f"{graph}: built, for there is no plan" in first for graph in GRAPHS)
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("0 plans built")


def test_build_command_without_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu.ctypes, "CDLL", load)
    assert cli.main(["build", str(DEMO), "--station", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no NVIDIA driver" in said and not list(tmp_path.iterdir())


KEY = PlanKey(
    graph="ab" * 32,
    tensorrt="tensorrt 10.3.0",
    gpu="Orin, SM 8.7",
    driver="540.4, CUDA 12.6",
    precision="fp16",
    profile="batch 1…8",
    flags="none",
)


@pytest.mark.parametrize(
    "part,now",
    [
        ("graph", "cd" * 32),  # another export
        ("tensorrt", "tensorrt 10.16.2"),  # JetPack was updated
        ("gpu", "Thor, SM 11.0"),  # the station was copied to another device
        ("driver", "540.5, CUDA 12.6"),
        ("precision", "fp32"),
        ("profile", "batch 1…4"),
        ("flags", "strongly typed"),
    ],
)
def test_a_plan_for_something_else_is_refused_and_the_part_named(part: str, now: str, tmp_path: Path) -> None:
    plans = Plans(tmp_path / "engines")
    plans.save("clip_encoder", KEY, b"plan", b"timings")
    assert plans.load("clip_encoder", KEY) == b"plan"
    assert plans.timings("clip_encoder") == b"timings"
    other = KEY.model_copy(update={part: now})
    with pytest.raises(BundleError, match=f"built for another {part} .*, now {now}"):
        plans.load("clip_encoder", other)


def _reseal_nothing(folder: Path) -> None:
    (folder / "clip_encoder/plan.trt").write_bytes(b"evil")


def _forget_the_record(folder: Path) -> None:
    (folder / "clip_encoder/plan.json").unlink()


def _unlist(folder: Path) -> None:
    path = folder / "clip_encoder/plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": {}}))


@pytest.mark.parametrize(
    "damage,says",
    [
        (_reseal_nothing, "is not what was built here"),
        (_forget_the_record, "there is no plan of clip_encoder"),
        (_unlist, "is not what was built here"),
        (lambda folder: (folder / "clip_encoder/plan.json").write_text("{}"), "no plan's record"),
        (lambda folder: (folder / "clip_encoder/plan.trt").unlink(), "is not what was built here"),
        # whoever may write there may plant code
        (lambda folder: folder.chmod(0o770), "nobody else can enter, found owner .*, mode 770"),
        # a link to a folder that somebody else filled
        (lambda folder: folder.symlink_to(folder.rename(folder.with_name("elsewhere"))), "holds executable code"),
    ],
)
def test_a_plan_that_may_not_be_ours_is_refused(damage: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    plans = Plans(tmp_path / "engines")
    plans.save("clip_encoder", KEY, b"plan", b"")
    damage(plans.folder)
    with pytest.raises(BundleError, match=says):
        plans.load("clip_encoder", KEY)


def test_nothing_is_written_where_others_could_change_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="holds executable code"):
        Plans(tmp_path / "engines").save("clip_encoder", KEY, b"plan", b"")
    assert not list((tmp_path / "elsewhere").iterdir())


class FakeTensorRt:
    """The calls of TensorRT 10's Python API that building makes, as it documents them, without its work."""

    __version__ = "10.3.0"
    Cache = SimpleNamespace

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)

    class IProgressMonitor:
        pass

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32=6)
    MemoryPoolType = SimpleNamespace(WORKSPACE=0)

    def __init__(self, failure: str | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[Any, ...]] = []

    def OnnxParser(self, network: Any, log: Any) -> Any:
        return SimpleNamespace(parse_from_file=lambda path: True)

    def Builder(self, log: Any) -> Any:
        def serialize(network: Any, config: Any) -> bytes | None:
            if self.failure is not None:
                log.log(1, self.failure)
                return None
            return b"plan"

        return SimpleNamespace(
            create_network=lambda flags: self.calls.append(("network", flags)) or SimpleNamespace(num_inputs=0),
            create_builder_config=lambda: self,
            create_optimization_profile=SimpleNamespace,
            build_serialized_network=serialize,
        )

    def clear_flag(self, flag: int) -> None:
        self.calls.append(("clear", flag))

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        self.calls.append(("workspace", size))

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def create_timing_cache(self, blob: bytes) -> Any:
        return SimpleNamespace(blob=blob, serialize=lambda: blob + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.calls.append(("timings", cache.blob))
        self.cache = cache
        return ignore_mismatch or not cache.blob.startswith(b"another chip")

    def get_timing_cache(self) -> Any:
        return self.cache


def test_timings_are_kept_for_the_next_build(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTensorRt()
    monkeypatch.setattr(tensorrt, "tensorrt", lambda: TensorRt(FLAVOURS[0], fake, "10.3.0"))
    plans = Plans(tmp_path / "engines")
    for driver in ("540.4", "540.5"):
        build_plans(small, plans, replace(ORIN, driver=driver), workspace=1 << 20)
    assert [call[1] for call in fake.calls if call[0] == "timings"] == [b"", b"+"]
    assert {("network", 2), ("clear", 6), ("workspace", 1 << 20)} <= set(fake.calls)

    key = plan_key(small, "ltc_projector", tensorrt.tensorrt(), ORIN)
    plans.save("ltc_projector", key, b"plan", b"another chip's")
    build_plans(small, plans, replace(ORIN, driver="540.6"))
    assert [call[1] for call in fake.calls if call[0] == "timings"][2:] == [b"another chip's", b""]


@pytest.mark.parametrize(
    "failure,error,says",
    [
        ("Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)", VmadError, "--workspace-mib"),
        ("Error Code 10: Internal Error (Could not find any implementation for node X)", BundleError, "node X"),
    ],
)
def test_a_build_that_fails_says_why(failure: str, error: type[VmadError], says: str, small: Bundle) -> None:
    trt = TensorRt(FLAVOURS[0], FakeTensorRt(failure), "10.3.0")
    with pytest.raises(error, match=says):
        build(trt, small.file("ltc_projector.onnx"), small.manifest.dynamic_axes, (8, 7))


@pytest.mark.parametrize(
    "installed,expected",
    [
        ({"tensorrt": "10.3.0"}, "tensorrt 10.3.0"),  # Jetson
        ({"tensorrt": "11.4.1", "tensorrt_rtx": "1.7.1"}, "tensorrt 11.4.1"),  # a workstation with both
        ({"tensorrt_rtx": "1.7.1"}, "tensorrt_rtx 1.7.1"),
        # PyPI's shell, which has no libraries, beside RTX
        ({"tensorrt": ImportError("libnvinfer.so.10"), "tensorrt_rtx": "1.7.1"}, "tensorrt_rtx 1.7.1"),
        ({"tensorrt": ImportError("libnvinfer.so.10")}, r"tensorrt is installed but cannot be imported \(libnvinfer"),
        ({"tensorrt": "8.6.2"}, r"expected tensorrt 10\.x or 11\.x, found 8\.6\.2"),  # JetPack 5
        ({}, "TensorRT is not installed"),
    ],
)
def test_which_tensorrt(installed: dict[str, str | Exception], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if isinstance(found := installed[name], Exception):
            raise found
        return SimpleNamespace(__version__=found)

    monkeypatch.setattr(tensorrt, "find_spec", lambda name: installed.get(name))
    monkeypatch.setattr(tensorrt, "import_module", load)
    find = tensorrt.tensorrt.__wrapped__
    if expected.startswith(("tensorrt 1", "tensorrt_rtx 1")):
        assert str(find()) == expected
    else:
        with pytest.raises(VmadError, match=expected):
            find()


class FakePlan:
    """TensorRT's runtime with a plan that doubles `x` [n,2], n 1 to 4."""

    __version__ = "10.3.0"
    ILogger, float32 = FakeTensorRt.ILogger, "float32"
    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    num_io_tensors = 2

    def Runtime(self, log: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self)

    def create_execution_context(self) -> Any:
        self.addresses: dict[str, int] = {}
        return self

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def get_tensor_mode(self, name: str) -> int:
        return int(name == "y")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return 1 <= shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * np.prod(self.shape)).from_address(self.addresses[name]))
            for name in ("x", "y")
        )
        y[:] = 2 * x
        return stream == HostDevice.stream


def test_a_plan_is_run_at_each_shape_of_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "Device", HostDevice)
    engine = TensorRtEngine(TensorRt(FLAVOURS[0], FakePlan(), "10.3.0"), b"plan", ORIN)
    assert engine.provider == "tensorrt 10.3.0, Orin, SM 8.7"
    for n in (1, 4, 1):
        x = np.random.default_rng(n).normal(size=(n, 2))
        np.testing.assert_allclose(engine.run({"x": x})["y"], 2 * x, rtol=1e-6)
    with pytest.raises(ValueError, match=r"x: shape \(5, 2\) is outside of the plan's profile"):
        engine.run({"x": np.zeros((5, 2))})


def test_a_real_plan_without_a_driver(small: Bundle, rtx: TensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = build(rtx, small.file("ltc_projector.onnx"), small.manifest.dynamic_axes, ADA.compute_capability)
    monkeypatch.setattr(device, "Device", HostDevice)
    try:
        gpu.gpu()
    except VmadError:
        with pytest.raises(VmadError, match="driver is missing, or older than it needs"):
            TensorRtEngine(rtx, plan, ADA)
    else:
        pytest.skip("there is a driver")
