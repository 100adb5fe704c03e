"""ONNX Runtime: the embedded default on CPU, CUDA where onnxruntime-gpu and a driver are."""

from __future__ import annotations

import ctypes
import io
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from vmad_edge.kernels import paths
from vmad_edge.kernels.cuda import DeviceArray
from vmad_edge.runtime.device import DeviceThread
from vmad_edge.runtime.engines import Arrays, GiveUp, limited_processors, ran_out_of_memory
from vmad_edge.runtime.errors import BundleError, VmadError

__all__ = ["OnnxRuntimeEngine", "ort"]  # nothing else imports the library: `runtime/__init__.py` comes before it here

_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32 would make an FP32 graph less than that, unasked; doubling arenas would take memory that llama.cpp needs.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}),
}


class OnnxRuntimeEngine:
    """One ONNX graph in one session. Thread-safe: a session may run from several threads at once.

    Args:
        path: the graph.
        threads: intra-op threads; None lets ONNX Runtime use every core that the process is allowed.
        thread: whose device's stream and memory it runs on, in turns with what else does; None: a stream of its own.

    Raises:
        BundleError: not an ONNX graph that this ONNX Runtime can load.
        VmadError: "cuda" was asked for and ONNX Runtime would silently run on the CPU instead, or has no memory left.
    """

    def __init__(
        self,
        path: Path,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int | None = None,
        thread: DeviceThread | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or limited_processors() or 0
        # Spinning threads would steal the cores from llama.cpp and from the other lane.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # SAM ViT-H's activations take 4.6 GB: kept between runs, and once more for the pattern that the second run lays
        # out. Asked of the system each time, they took as long.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if "avx512_vnni" not in paths():  # sums of INT8 products would saturate; weights as UINT8 take twice the time
            options.add_session_config_entry("session.x64quantprecision", "1")
        if device == "cuda":
            with redirect_stdout(io.StringIO()):  # it prints what it does not find
                ort.preload_dlls(directory="")  # CUDA and cuDNN where pip put them
        provider, settings = _PROVIDERS[device]
        if device == "cuda" and thread is not None:
            settings = settings | {"user_compute_stream": str(thread.device.stream)}
        try:
            # Folded with its bias into Gemm, a product would lose its INT8 kernel.
            self._session = ort.InferenceSession(
                str(path), options, providers=[(provider, settings)], disabled_optimizers=["MatMulAddFusion"]
            )
        except Exception as error:  # ONNX Runtime raises a class of its own for each of its status codes
            if ran_out_of_memory(str(error)):
                raise VmadError(_OUT_OF_MEMORY.format(path=path, error=error)) from None
            raise BundleError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {_in_its_words(error)}. Export it again, for "
                "the ONNX Runtime that is installed here."
            ) from error
        found = self._session.get_providers()[0]
        if found != provider:
            raise VmadError(
                f"device {device!r} was asked for, but ONNX Runtime would run {path.name} with {found}: "
                f"{_why_no_cuda()}. Install onnxruntime-gpu in its place, with CUDA and cuDNN (pip uninstall "
                "onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'), or use device=\"cpu\"."
            )
        self.provider = f"ONNX Runtime {ort.__version__}, {device.upper()}"
        self._name, self._device, self._thread = path.name, device, thread
        self.capturable = False  # it waits at the end of each run

    @property
    def thread(self) -> DeviceThread:
        assert self._thread is not None  # of an engine that was opened with one
        return self._thread

    def run(self, inputs: Arrays, give_up: GiveUp | None = None) -> Arrays:
        """Outputs by name; arrays stay what the graph declares (float32 in every graph of a bundle)."""
        names = [output.name for output in self._session.get_outputs()]
        options = ort.RunOptions()
        if give_up is not None:
            give_up.on_call(lambda: setattr(options, "terminate", True))
        run = partial(self._session.run, names, inputs, options)
        return dict(
            zip(names, self._run(run if self._thread is None else partial(self._thread.call, run)), strict=True)
        )

    def outputs(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """Memory for the outputs of `inputs`. For the engine's own thread, as is `queue`."""
        sizes: dict[str, int] = {}
        for given in self._session.get_inputs():
            sizes |= zip(given.shape, inputs[given.name].__cuda_array_interface__["shape"], strict=True)
        return {
            output.name: self.thread.device.zeros(tuple(sizes.get(size, size) for size in output.shape), np.float32)
            for output in self._session.get_outputs()
        }

    def queue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """One run on the device's stream, from float32 memory into that of `outputs`."""
        binding = self._session.io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                about = array.__cuda_array_interface__
                bind(name, self._device, 0, np.float32, about["shape"], about["data"][0])
        self._run(partial(self._session.run_with_iobinding, binding))

    def _run(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            if ran_out_of_memory(str(error)):
                raise VmadError(_OUT_OF_MEMORY.format(path=self._name, error=error)) from None
            raise


_ITS_INSIDE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?(/\S+:\d+ [^)]*\) )?")


def _in_its_words(error: Exception) -> str:
    """What ONNX Runtime says is wrong, without the place in its own source where it noticed."""
    lines = _ITS_INSIDE.sub("", str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")


_OUT_OF_MEMORY = (
    "{path}: no memory left for it ({error!s:.200}). Free some, keep fewer of the language model's layers on the GPU, "
    "or export with a smaller --llm or --precision fp16."
)


def _why_no_cuda() -> str:
    """What the dynamic linker says of ONNX Runtime's CUDA provider, which ONNX Runtime itself only logs."""
    library = Path(ort.__file__).parent / "capi/libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return "it says no more"
