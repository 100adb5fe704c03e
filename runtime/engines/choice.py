"""What runs a bundle's graphs on this machine, and why: TensorRT, else CUDA, else OpenVINO, else the CPU.

OpenVINO's gain is bf16: an FP32 graph costs it the processor time that it costs ONNX Runtime (reference model, SAM's
encoder 10.4 and 10.3 ms, CLIP's 11.1 and 11.3). So "auto" leaves a bundle that is FP32 throughout to ONNX Runtime; and
one with INT8 graphs where OpenVINO cannot compute them as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import get_args

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.device import DeviceThread
from vmad_edge.runtime.engines import Device, DeviceEngine, Engine
from vmad_edge.runtime.engines.gpu import gpu
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.engines.tensorrt import TensorRtEngine, open_plan, why_not
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.machine import lacks_vnni


@dataclass(frozen=True)
class Engines:
    """Opens a bundle's graphs on one device."""

    bundle: Bundle
    device: Device
    """Never "auto"."""
    passed_over: dict[Device, str]
    """What "auto" would rather have taken, and why it did not."""
    plans: Plans | None

    @staticmethod
    def choose(bundle: Bundle, device: Device, plans: Plans | None = None) -> Engines:
        """The first device that can run the bundle; one that is named is taken or refused.

        Args:
            plans: TensorRT's, of the station; without them TensorRT cannot be had.

        Raises:
            VmadError: the device cannot be had here; the message says why and what to do.
        """
        passed_over: dict[Device, str] = {}
        for candidate in get_args(Device)[1:] if device == "auto" else (device,):
            reason = _why_not(candidate, bundle, plans)
            if reason is None and device == "auto":
                reason = _no_gain(candidate, bundle)
            if reason is None:
                return Engines(bundle, candidate, passed_over, plans)
            passed_over[candidate] = reason
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise VmadError(f"device {device!r} cannot run {bundle.path} here. {reasons}.")

    @property
    def on_gpu(self) -> bool:
        """Whether that is an NVIDIA GPU, which the language model may then use too."""
        return self.device in ("tensorrt", "cuda")

    def open_on(self, graph: str, thread: DeviceThread) -> DeviceEngine:
        """The engine of `graph` on the GPU (so `on_gpu`), in memory and on the stream of `thread`'s device.

        Raises: as `open`.
        """
        if self.device == "tensorrt":
            return self._plan(graph, thread)
        from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

        with self.bundle.opened(f"{graph}.onnx") as path:
            return OnnxRuntimeEngine(path, "cuda", thread=thread)

    def open(self, graph: str) -> Engine:
        """The engine of `graph` ("clip_encoder", …), on a stream of its own where it runs on the GPU.

        Raises:
            BundleError: the bundle has no such graph, or the engine cannot load it.
            VmadError: the device fails, or has no memory left.
        """
        if self.device == "tensorrt":
            return self._plan(graph, None)
        with self.bundle.opened(f"{graph}.onnx") as path:
            # Imported here: each is an extra of its own, and a device needs one of them.
            if self.device == "openvino":
                from vmad_edge.runtime.engines.openvino import OpenVinoEngine

                return OpenVinoEngine(path, self.bundle.manifest.precision.get(graph, "fp32"))
            from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(path, "cuda" if self.device == "cuda" else "cpu")

    def _plan(self, graph: str, thread: DeviceThread | None) -> TensorRtEngine:
        assert self.plans is not None  # without them it was not chosen
        return open_plan(self.bundle, graph, self.plans, gpu(), thread)


def _why_not(device: Device, bundle: Bundle, plans: Plans | None) -> str | None:
    """What keeps this machine from it; None: nothing that is known before an engine is opened."""
    if device == "tensorrt":
        return _no_gpu() or why_not(bundle, plans, gpu())
    if device == "openvino":
        return None if find_spec("openvino") else "OpenVINO is not installed (pip install openvino)"
    if not find_spec("onnxruntime"):
        return "ONNX Runtime is not installed (pip install onnxruntime, or onnxruntime-gpu)"
    if device == "cpu":
        return None
    from vmad_edge.runtime.engines.onnxruntime import ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA (pip uninstall onnxruntime, then pip install onnxruntime-gpu)"
    return _no_gpu()


def _no_gain(device: Device, bundle: Bundle) -> str | None:
    """Why "auto" passes over a device that could be had."""
    if device != "openvino" or not find_spec("onnxruntime"):
        return None
    precisions = set(bundle.manifest.precision.values())
    if precisions <= {"fp32"}:
        return "this bundle's graphs are FP32, which it computes no faster than ONNX Runtime"
    if "int8" in precisions and lacks_vnni():
        return "this processor has no VNNI, without which it computes INT8 graphs in FP32"
    return None


def _no_gpu() -> str | None:
    try:
        gpu()
    except VmadError as error:
        return str(error)
    return None
