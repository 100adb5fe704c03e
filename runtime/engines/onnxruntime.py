"""ONNX Runtime: the embedded default on CPU, CUDA where onnxruntime-gpu and a driver are."""

from __future__ import annotations

import ctypes
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

import onnxruntime as ort

from vmad_edge.runtime.engines import Arrays, ran_out_of_memory
from vmad_edge.runtime.errors import BundleError, VmadError

_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32 would make an FP32 graph less than that, unasked; doubling arenas would take memory that llama.cpp needs.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}),
}


class OnnxRuntimeEngine:
    """One ONNX graph in one session. Thread-safe: a session may run from several threads at once.

    Args:
        path: the graph.
        threads: intra-op threads; None lets ONNX Runtime use every core.

    Raises:
        BundleError: not an ONNX graph that this ONNX Runtime can load.
        VmadError: "cuda" was asked for and ONNX Runtime would silently run on the CPU instead, or has no memory left.
    """

    def __init__(self, path: Path, device: Literal["cpu", "cuda"] = "cpu", threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        # Spinning threads would steal the cores from llama.cpp and from the other lane.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if device == "cuda":
            with redirect_stdout(io.StringIO()):  # it prints what it does not find
                ort.preload_dlls(directory="")  # CUDA and cuDNN where pip put them
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[_PROVIDERS[device]])
        except Exception as error:  # ONNX Runtime raises a class of its own for each of its status codes
            if ran_out_of_memory(str(error)):
                raise VmadError(_OUT_OF_MEMORY.format(path=path, error=error)) from None
            raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from None
        found = self._session.get_providers()[0]
        if found != _PROVIDERS[device][0]:
            raise VmadError(
                f"device {device!r} was asked for, but ONNX Runtime would run {path.name} with {found}: "
                f'{_why_no_cuda()}. Install the "gpu" extra with the CUDA and cuDNN that onnxruntime-gpu '
                f"{ort.__version__} was built for (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use device=\"cpu\"."
            )
        self.provider = f"ONNX Runtime {ort.__version__}, {device.upper()}"
        self._path = path

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name; arrays stay what the graph declares (float32 in every graph of a bundle)."""
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, inputs), strict=True))
        except Exception as error:
            if ran_out_of_memory(str(error)):
                raise VmadError(_OUT_OF_MEMORY.format(path=self._path, error=error)) from None
            raise


_OUT_OF_MEMORY = (
    "{path}: no memory left for it ({error:.200}). Free some, keep fewer of the language model's layers on the GPU, or "
    "export with a smaller --llm or --precision fp16."
)


def _why_no_cuda() -> str:
    """What the dynamic linker says of ONNX Runtime's CUDA provider, which ONNX Runtime itself only logs."""
    library = Path(ort.__file__).parent / "capi/libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return "it says no more"
