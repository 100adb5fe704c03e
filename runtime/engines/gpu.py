"""The NVIDIA GPU of this machine, asked of the driver itself: nothing else need be installed for that."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from vmad_edge.runtime.errors import VmadError

LEAST_CUDA = 12000
"""As cuDriverGetVersion writes 12.0: JetPack 6, or driver 525. The libraries of today are built for it or newer."""
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: tuple[int, int]
    """(8, 7) is SM 8.7."""
    driver: str
    """Version of the kernel module, where it tells, and the CUDA that it serves."""

    def __str__(self) -> str:
        return f"{self.name}, SM {self.compute_capability[0]}.{self.compute_capability[1]}"


def gpu() -> Gpu:
    """The first GPU.

    Raises:
        VmadError: no driver, a driver without a GPU, or one older than LEAST_CUDA.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise VmadError(f"no NVIDIA driver ({error}): install one, or run on the CPU") from None
    version, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value < LEAST_CUDA:
        raise VmadError(
            f"the NVIDIA driver is too old: expected one for CUDA {_dotted(LEAST_CUDA)} or newer, found "
            f"CUDA {_dotted(version.value)}. Update the driver (on a Jetson: JetPack 6 or newer)"
        )
    if status := driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise VmadError(f"the NVIDIA driver gives no GPU: {(text.value or b'').decode() or f'error {status}'}")
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", module.read_text()) if module.exists() else None
    kernel = f"{found[0]}, " if found else ""
    return Gpu(name.value.decode(), (capability[0], capability[1]), f"{kernel}CUDA {_dotted(version.value)}")


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
