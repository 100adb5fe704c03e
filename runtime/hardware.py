"""GPUs that one may buy: the only place for such facts. Some were read where the named source is quoted, not in it."""

from __future__ import annotations

from vmad_edge.runtime.bundle import Record


class Hardware(Record):
    name: str
    tflops: dict[str, float]
    """Peak of products, dense (no sparsity), by what is multiplied: fp32 (no TF32), fp16 into FP32, int8."""
    gigabytes: float
    """10⁹ bytes a second from memory."""
    memory_gib: float
    shared: bool
    """The memory is the system's too."""
    processors: int
    """Multiprocessors."""
    gigahertz: float
    source: str
    """Where the figures stand, and which of them follow from others there."""


HARDWARE = {
    "orin-agx": Hardware(
        name="Jetson AGX Orin 64 GB",
        tflops={"fp32": 5.3, "fp16": 42.5, "int8": 85},
        gigabytes=204.8,
        memory_gib=64,
        shared=True,
        processors=16,
        gigahertz=1.3,
        source="NVIDIA Jetson AGX Orin Series Technical Brief v1.2: the GPU alone (no DLAs), MAXN; 170 sparse INT8 "
        "TOPS are 85 dense, FP16 half of that",
    ),
    "orin-nano": Hardware(
        name="Jetson Orin Nano Super 8 GB",
        tflops={"fp32": 2.09, "fp16": 17, "int8": 33},
        gigabytes=102,
        memory_gib=8,
        shared=True,
        processors=8,
        gigahertz=1.02,
        source="https://developer.nvidia.com/blog/nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost/: "
        "MAXN SUPER; FP32: 1,024 cores, 2 operations a clock",
    ),
    "thor": Hardware(
        name="Jetson AGX Thor (T5000) 128 GB",
        tflops={"fp32": 8.06, "fp16": 258.5, "int8": 517},
        gigabytes=273,
        memory_gib=128,
        shared=True,
        processors=20,
        gigahertz=1.575,
        source="https://developer.nvidia.com/blog/introducing-nvidia-jetson-thor-the-ultimate-platform-for-physical-ai/"
        ": 1,035 sparse INT8 TOPS and 517 sparse FP16 TFLOPS, halved; FP32: 2,560 cores, 2 operations a clock",
    ),
    "rtx4090": Hardware(
        name="GeForce RTX 4090 24 GB",
        tflops={"fp32": 82.6, "fp16": 165.2, "int8": 660.6},
        gigabytes=1008,
        memory_gib=24,
        shared=False,
        processors=128,
        gigahertz=2.52,
        source="NVIDIA Ada GPU Architecture whitepaper, appendix A (FP16 with FP32 accumulate)",
    ),
    "h100": Hardware(
        name="H100 SXM 80 GB",
        tflops={"fp32": 66.9, "fp16": 989.4, "int8": 1978.9},
        gigabytes=3350,
        memory_gib=80,
        shared=False,
        processors=132,
        gigahertz=1.98,
        source="NVIDIA H100 data sheet (SXM): 1,979 sparse FP16 TFLOPS, 3,958 sparse INT8 TOPS, halved (at 1.83 GHz); "
        "FP32 at 1.98 GHz",
    ),
    "h200": Hardware(
        name="H200 SXM 141 GB",
        tflops={"fp32": 66.9, "fp16": 989.4, "int8": 1978.9},
        gigabytes=4800,
        memory_gib=131,
        shared=False,
        processors=132,
        gigahertz=1.98,
        source="NVIDIA H200 data sheet: 1,979 sparse FP16 TFLOPS and 3,958 sparse INT8 TOPS, halved (at 1.83 GHz); "
        "FP32 at 1.98 GHz; 141 × 10⁹ bytes",
    ),
}
"""By the names that `vmad bench --plan` takes."""
