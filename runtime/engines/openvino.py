"""OpenVINO: x86 industrial PCs."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import openvino

from vmad_edge.runtime.bundle import Precision
from vmad_edge.runtime.engines import Arrays, GiveUp, limited_processors
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.machine import lacks_vnni

# A pinned thread waits while llama.cpp or another lane has its processor: on a busy machine SAM's encoder took 2 to 4
# times as long as not pinned (p50, in turns), CLIP's about as long.
_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}


@cache
def _core() -> openvino.Core:
    """One for all engines, to the process's end.

    Where the processor has AMX, each core lays a signal stack of its own under the thread and frees it with itself. Of
    two, the second to go would put back the freed one of the first: the next signal, a Ctrl-C, would be a SIGSEGV.
    """
    return openvino.Core()


class OpenVinoEngine:
    """One ONNX graph, compiled for this processor. Thread-safe: each thread has a request of its own.

    It is compiled for each batch size, 1 at once and others when they come: with fixed shapes CLIP's encoder takes a
    tenth less time. The file is read once.

    Args:
        path: the graph.
        precision: of the graph, as the manifest says. "fp16" computes in bf16 where the processor has it, else in FP32:
            x86 has no FP16 arithmetic to speak of; so does what "int8" leaves in FP32. "fp32" stays that: bf16 has 8
            bits, and moves the reference model's patches by 2e-2. "int8" without VNNI multiplies the rounded values in
            FP32: OpenVINO's integer sums saturate there, and were off by 0.1 to 0.24 of a stage's largest value.

    Raises:
        BundleError: not an ONNX graph that this OpenVINO can load.
    """

    def __init__(self, path: Path, precision: Precision = "fp32") -> None:
        has_bf16 = "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        computes = "bf16" if has_bf16 and precision != "fp32" else "f32"
        self._settings = _SETTINGS | {"INFERENCE_PRECISION_HINT": computes}
        if (limit := limited_processors()) is not None:
            self._settings["INFERENCE_NUM_THREADS"] = limit
        if precision == "int8" and lacks_vnni():
            self._settings["LP_TRANSFORMS_MODE"] = "NO"
        self._compiled: dict[_Shapes, openvino.CompiledModel] = {}
        self._lock, self._mine = threading.Lock(), threading.local()
        try:
            self._model = _core().read_model(str(path))
            inputs = self._model.inputs
            self._compile(frozenset((i.any_name, tuple(n.min_length or 1 for n in i.partial_shape)) for i in inputs))
        except RuntimeError as error:
            raise BundleError(
                f"OpenVINO {openvino.__version__} cannot load {path}: expected an ONNX graph that it knows. "
                "Export it again, or use --device cpu."
            ) from error
        version = openvino.__version__.split("-")[0]
        self.provider = f"OpenVINO {version}, CPU, {computes}"

    def run(self, inputs: Arrays, give_up: GiveUp | None = None) -> Arrays:
        """Outputs by name, float32."""
        shapes = frozenset((name, array.shape) for name, array in inputs.items())
        requests = self._mine.__dict__.setdefault("requests", {})
        if shapes not in requests:
            requests[shapes] = self._compile(shapes).create_infer_request()
        request = requests[shapes]
        request.start_async(inputs, share_inputs=True)
        if give_up is not None:
            give_up.on_call(request.cancel)
        request.wait()
        return {output.any_name: array.copy() for output, array in request.results.items()}  # the request's own memory

    def _compile(self, shapes: _Shapes) -> openvino.CompiledModel:
        with self._lock:
            if shapes not in self._compiled:
                model = self._model.clone()
                model.reshape(dict(shapes))
                self._compiled[shapes] = _core().compile_model(model, "CPU", self._settings)
            return self._compiled[shapes]


_Shapes = frozenset[tuple[str, tuple[int, ...]]]
"""Of each input, by name."""
