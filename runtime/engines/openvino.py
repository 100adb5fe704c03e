"""OpenVINO: x86 industrial PCs."""

from __future__ import annotations

import threading
from pathlib import Path

import openvino

from vmad_edge.runtime.bundle import Precision
from vmad_edge.runtime.engines import Arrays
from vmad_edge.runtime.errors import BundleError

# A pinned thread waits while llama.cpp or another lane has its processor: on a busy machine SAM's encoder took 2 to 4
# times as long as not pinned (p50, in turns), CLIP's about as long.
_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}


class OpenVinoEngine:
    """One ONNX graph, compiled for this processor. Thread-safe: each thread has a request of its own.

    Args:
        path: the graph.
        precision: of the graph, as the manifest says. "fp16" computes in bf16 where the processor has it, else in FP32:
            x86 has no FP16 arithmetic to speak of; so does what "int8" leaves in FP32. "fp32" stays that: bf16 has 8
            bits, and moves the reference model's patches by 2e-2.

    Raises:
        BundleError: not an ONNX graph that this OpenVINO can load.
    """

    def __init__(self, path: Path, precision: Precision = "fp32") -> None:
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        computes = "bf16" if has_bf16 and precision != "fp32" else "f32"
        try:
            self._compiled = core.compile_model(str(path), "CPU", _SETTINGS | {"INFERENCE_PRECISION_HINT": computes})
        except RuntimeError as error:
            raise BundleError(f"OpenVINO {openvino.__version__} cannot load {path}: {error}") from None
        self._requests = threading.local()
        version = openvino.__version__.split("-")[0]
        self.provider = f"OpenVINO {version}, CPU, {computes}"

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name, float32."""
        if not hasattr(self._requests, "mine"):
            self._requests.mine = self._compiled.create_infer_request()
        found = self._requests.mine.infer(inputs, share_inputs=True)
        return {output.any_name: found[output] for output in self._compiled.outputs}
