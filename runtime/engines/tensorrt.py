"""TensorRT: one adapter for tensorrt 10.x (Jetson), tensorrt 11.x (workstation) and tensorrt_rtx.

Networks are strongly typed: precision lives in the graph (see export/precision.py). So the three differ in little more
than names; FLAVOURS holds what they differ in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vmad_edge.kernels.cuda import DeviceArray
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.device import DeviceMemory, DeviceThread
from vmad_edge.runtime.engines import Arrays, GiveUp, ran_out_of_memory
from vmad_edge.runtime.engines.gpu import Gpu
from vmad_edge.runtime.engines.plans import PlanKey, Plans, graph_hash
from vmad_edge.runtime.errors import BundleError, VmadError

FLAGS = "strongly typed, no TF32"
"""TF32 would make a graph that was exported FP32 less than that, unasked."""

Progress = Callable[[str, float], None]
"""Gets what TensorRT is at, and the share that is done."""


@dataclass(frozen=True)
class Flavour:
    """What one TensorRT package does otherwise than the others."""

    package: str
    majors: tuple[int, ...]
    """Versions that this code is written for."""
    timing_cache: bool
    """RTX tunes where it runs, and warns of the calls."""
    names_its_target: bool
    """Builds for the compute capabilities that it is told, with or without a GPU; else for the GPU at hand."""


FLAVOURS = (
    Flavour("tensorrt", (10, 11), timing_cache=True, names_its_target=False),
    Flavour("tensorrt_rtx", (1,), timing_cache=False, names_its_target=True),
)


@dataclass(frozen=True)
class TensorRt:
    """The TensorRT that is installed here."""

    flavour: Flavour
    module: Any
    version: str

    def __str__(self) -> str:
        return f"{self.flavour.package} {self.version}"


@cache
def tensorrt() -> TensorRt:
    """The first of FLAVOURS that can be imported.

    Raises:
        VmadError: none can, or its version is not one that this code is written for.
    """
    reasons = []
    for flavour in FLAVOURS:
        if find_spec(flavour.package) is None:
            continue
        try:
            module = import_module(flavour.package)
        except Exception as error:  # PyPI's tensorrt is a shell that fails in ways of its own without its libraries
            reasons.append(f"{flavour.package} is installed but cannot be imported ({error})")
            continue
        version: str = module.__version__
        if int(version.split(".")[0]) in flavour.majors:
            return TensorRt(flavour, module, version)
        expected = " or ".join(f"{major}.x" for major in flavour.majors)
        reasons.append(f"expected {flavour.package} {expected}, found {version}")
    installed = "; ".join(reasons) or "TensorRT is not installed"
    raise VmadError(f'{installed}. On a Jetson it comes with JetPack, elsewhere with the extras "tensorrt[-rtx]"')


def plan_key(bundle: Bundle, graph: str, trt: TensorRt, gpu: Gpu) -> PlanKey:
    """What a plan of `graph` must have been built for to run here and now."""
    axes = bundle.manifest.dynamic_axes
    return PlanKey(
        graph=graph_hash(bundle, graph),
        tensorrt=str(trt),
        gpu=str(gpu),
        driver=gpu.driver,
        precision=bundle.manifest.precision.get(graph, "fp32"),
        profile=", ".join(f"{name} 1…{axes[name]}" for name in sorted(axes)),
        flags=FLAGS,
    )


def why_not(bundle: Bundle, plans: Plans | None, gpu: Gpu) -> str | None:
    """What keeps TensorRT from running the bundle here; None: nothing."""
    try:
        trt = tensorrt()
    except VmadError as error:
        return str(error)
    if plans is None:
        return "plans are built for a station, and none is known here"
    reasons = (plans.refusal(graph, plan_key(bundle, graph, trt, gpu)) for graph in graphs(bundle))
    if (reason := next(filter(None, reasons), None)) is not None:
        return reason
    if not (find_spec("pycuda") and find_spec("cuda")):
        return "running plans needs pycuda and cuda-bindings (pip install pycuda cuda-bindings)"
    return None


def open_plan(bundle: Bundle, graph: str, plans: Plans, gpu: Gpu, thread: DeviceThread | None = None) -> TensorRtEngine:
    """The engine of a plan that `build_plans` made; `thread` see TensorRtEngine.

    Raises:
        BundleError: the plan is not there, was changed, or was built for something else.
        VmadError: see TensorRtEngine.
    """
    trt = tensorrt()
    return TensorRtEngine(trt, plans.load(graph, plan_key(bundle, graph, trt, gpu)), gpu, thread)


def graphs(bundle: Bundle) -> list[str]:
    """Names of the bundle's graphs."""
    return sorted(Path(name).stem for name in bundle.manifest.files if name.endswith(".onnx"))


class TensorRtEngine:
    """One plan, with memory of its own. Thread-safe: runs take turns.

    Args:
        thread: where it lives, and whose device it runs on; None: one of its own, so that its stream waits for nothing.

    Raises:
        VmadError: no memory left for it, or no driver that TensorRT can use.
        BundleError: TensorRT refuses the plan.
    """

    def __init__(self, trt: TensorRt, plan: bytes, gpu: Gpu, thread: DeviceThread | None = None) -> None:
        self.provider = f"{trt}, {gpu}"
        self.capturable = True
        self.thread = thread or DeviceThread()
        self.thread.call(self._open, trt, plan)

    def run(self, inputs: Arrays, give_up: GiveUp | None = None) -> Arrays:
        """Outputs by name, float32.

        Raises:
            ValueError: an input outside of the plan's profile.
        """
        return self.thread.call(self._run, inputs)

    def outputs(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceMemory]:
        """Memory for the outputs of `inputs`. For the engine's own thread, as is `queue`.

        Raises:
            ValueError: an input outside of the plan's profile.
        """
        for name, array in inputs.items():
            shape = tuple(array.__cuda_array_interface__["shape"])
            if not self._context.set_input_shape(name, shape):
                raise ValueError(f"{name}: shape {shape} is outside of the plan's profile")
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        return {name: self.thread.device.zeros(shape, np.float32) for name, shape in shapes.items()}

    def queue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """One run on the device's stream, from float32 memory into that of `outputs`.

        Raises:
            VmadError: TensorRT refuses.
        """
        for name, array in inputs.items():
            self._context.set_input_shape(name, tuple(array.__cuda_array_interface__["shape"]))
        for name, array in {**inputs, **outputs}.items():
            self._context.set_tensor_address(name, array.__cuda_array_interface__["data"][0])
        if not self._context.execute_async_v3(self.thread.device.stream):
            raise VmadError(f"{self.provider} could not run a plan")

    def _open(self, trt: TensorRt, plan: bytes) -> None:
        log = _log(trt.module)
        self._runtime = trt.module.Runtime(log)  # which the engine needs as long as it lives
        engine = self._runtime.deserialize_cuda_engine(plan)
        self._context: Any = None if engine is None else engine.create_execution_context()
        if self._context is None:
            raise _failure(trt, "load a plan", log)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        if any(engine.get_tensor_dtype(name) != trt.module.float32 for name in names):
            raise BundleError(f"expected float32 inputs and outputs of a graph with {', '.join(names)}, found others")
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == trt.module.TensorIOMode.OUTPUT]
        self._memory: dict[tuple[tuple[int, ...], ...], dict[str, DeviceMemory]] = {}

    def _run(self, inputs: Arrays) -> Arrays:
        taken = {
            name: self.thread.device.upload(array.astype(np.float32, copy=False)) for name, array in inputs.items()
        }
        shapes = tuple(array.shape for array in inputs.values())
        if shapes not in self._memory:
            self._memory[shapes] = self.outputs(taken)
        self.queue(taken, self._memory[shapes])
        return {name: self.thread.device.download(memory) for name, memory in self._memory[shapes].items()}


def build_plans(
    bundle: Bundle,
    plans: Plans,
    gpu: Gpu,
    *,
    workspace: int | None = None,
    progress: Callable[[str, str, float], None] = lambda graph, phase, share: None,
) -> dict[str, str]:
    """Build the plans that are not there or do not fit; what fits is left alone.

    Args:
        workspace: bytes that a plan may use beside its weights and outputs; None: all the memory there is.
        progress: gets the graph, what TensorRT is at, and the share that is done.

    Returns:
        Why each graph was built; the others' plans did fit.

    Raises:
        VmadError: no TensorRT, or no memory left.
        BundleError: a graph that TensorRT cannot build.
    """
    trt = tensorrt()
    built: dict[str, str] = {}
    for graph in graphs(bundle):
        key = plan_key(bundle, graph, trt, gpu)
        try:
            plans.load(graph, key)
            continue
        except BundleError as error:
            built[graph] = str(error)
        with bundle.opened(f"{graph}.onnx") as path:
            plan, timings = build(
                trt,
                path,
                bundle.manifest.dynamic_axes,
                gpu.compute_capability,
                plans.timings(graph),
                workspace,
                partial(progress, graph),
            )
        plans.save(graph, key, plan, timings)
    return built


def build(
    trt: TensorRt,
    path: Path,
    axes: dict[str, int],
    target: tuple[int, int],
    timings: bytes = b"",
    workspace: int | None = None,
    progress: Progress = lambda phase, share: None,
) -> tuple[bytes, bytes]:
    """One graph's plan and the timing cache after it, for the compute capability `target`.

    The profile is tuned for size 1 of every dynamic axis, and takes up to its size in `axes`.

    Raises:
        VmadError: no memory left, or a target that this TensorRT does not build for.
        BundleError: a graph that TensorRT cannot parse or build, or with an axis that is not in `axes`.
    """
    module, log = trt.module, _log(trt.module)
    try:
        builder = module.Builder(log)
    except TypeError:  # pybind11's word for a constructor that gave nothing
        raise _failure(trt, "start", log) from None
    # Without the flag 10.x would choose precisions itself; the others are strongly typed, and take it too.
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BundleError(f"{trt} cannot parse {path}: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)
    if workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, workspace)
    if trt.flavour.names_its_target:
        _set_target(trt, config, target)
    config.add_optimization_profile(_profile(builder, network, path, axes))
    if trt.flavour.timing_cache:
        _set_timings(config, timings)
    config.progress_monitor = monitor = _monitor(module, progress)
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is None:
        raise _failure(trt, f"build {path}", log)
    return bytes(plan), bytes(config.get_timing_cache().serialize()) if trt.flavour.timing_cache else b""


def _failure(trt: TensorRt, doing: str, log: Any) -> VmadError:
    """What TensorRT said when it could not do something, and the way out."""
    said = "; ".join(log.errors)
    if ran_out_of_memory(said):
        return VmadError(
            f"no memory left to {doing} ({said:.300}). Stop what else uses the GPU; `vmad build --workspace-mib N` "
            "makes plans that need less, and a bundle exported with --precision fp16 half"
        )
    if "cudaError 35" in said or "error: 35" in said:  # cudaErrorInsufficientDriver
        return VmadError(
            f"{trt} cannot {doing}: the NVIDIA driver is missing, or older than it needs. Update the driver"
        )
    return BundleError(f"{trt} cannot {doing}: {said}")


def _set_target(trt: TensorRt, config: Any, target: tuple[int, int]) -> None:
    known = trt.module.ComputeCapability.__members__
    name = f"SM{target[0]}{target[1]}"
    if name not in known:
        listed = ", ".join(sorted(found for found in known if found.startswith("SM")))
        raise VmadError(
            f"{trt} does not build for {name}: it lists {listed}. Install tensorrt in its place, or use another device"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)


def _profile(builder: Any, network: Any, path: Path, axes: dict[str, int]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        smallest, largest = list(tensor.shape), list(tensor.shape)
        for axis in (i for i, size in enumerate(tensor.shape) if size < 0):
            name = tensor.get_dimension_name(axis)
            if name not in axes:
                raise BundleError(
                    f"{path}: axis {axis} of {tensor.name} is dynamic and called {name!r}, and the manifest's "
                    f"dynamic_axes have only {', '.join(axes)}. Export the bundle again"
                )
            smallest[axis], largest[axis] = 1, axes[name]
        if smallest != largest:
            profile.set_shape(tensor.name, smallest, smallest, largest)
    return profile


def _set_timings(config: Any, timings: bytes) -> None:
    for blob in (timings, b""):  # one of another chip or version is refused; then it starts anew
        cache = config.create_timing_cache(blob)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _log(module: Any) -> Any:
    class Log(module.ILogger):  # type: ignore[misc]
        """Keeps the latest errors; the rest is nobody's business."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _monitor(module: Any, progress: Progress) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Nested phases as one share. An exception must not pass through TensorRT: it ends the build and waits."""

        def __init__(self) -> None:
            super().__init__()
            self.stopped: BaseException | None = None
            self._phases: list[tuple[str, int, int]] = []
            self._share = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases.append((name, 0, steps))

        def step_complete(self, name: str, step: int) -> bool:
            self._phases = [(n, step + 1 if n == name else done, steps) for n, done, steps in self._phases]
            self._share = max(self._share, _share(self._phases))  # some phases begin again
            try:
                progress(name, self._share)
            except BaseException as error:
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, name: str) -> None:
            self._phases = [phase for phase in self._phases if phase[0] != name]

    return Monitor()


def _share(phases: Sequence[tuple[str, int, int]]) -> float:
    """Of the whole: each phase is one step of the phase around it."""
    share, width = 0.0, 1.0
    for _, done, steps in phases:
        width /= max(steps, 1)
        share += done * width
    return min(share, 1.0)
