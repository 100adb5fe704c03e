"""ONNX Runtime: the embedded default on CPU, CUDA where onnxruntime-gpu and a driver are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnxruntime as ort

from vmad_edge.runtime.engines import Arrays
from vmad_edge.runtime.errors import BundleError, VmadError

Device = Literal["auto", "cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeEngine:
    """One ONNX graph in one session. Thread-safe: a session may run from several threads at once.

    Args:
        path: the graph.
        device: "auto" takes CUDA where ONNX Runtime offers it, else the CPU.
        threads: intra-op threads; None lets ONNX Runtime use every core.

    Raises:
        BundleError: not an ONNX graph that this ONNX Runtime can load.
        VmadError: "cuda" was asked for and ONNX Runtime would silently run on the CPU instead.
    """

    def __init__(self, path: Path, device: Device = "cpu", threads: int | None = None) -> None:
        if device == "auto":
            device = "cuda" if _PROVIDERS["cuda"] in ort.get_available_providers() else "cpu"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        # Spinning threads would steal the cores from llama.cpp and from the other lane.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[_PROVIDERS[device]])
        except Exception as error:  # ONNX Runtime raises a class of its own for each of its status codes
            raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from None
        self.provider: str = self._session.get_providers()[0]
        if self.provider != _PROVIDERS[device]:
            raise VmadError(
                f"device {device!r} was asked for, but ONNX Runtime would run {path.name} with {self.provider}. "
                'Install the "gpu" extra and a matching driver, or use device="cpu".'
            )

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name; arrays stay what the graph declares (float32 in every graph of a bundle)."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))
