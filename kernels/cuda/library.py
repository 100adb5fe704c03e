"""libvmad_cuda.so, and checks of the device memory that goes into it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

import vmad_edge.kernels

WORKSPACE_ZEROS = 1 << 16
"""The first bytes of a workspace that must be zero before its first use; every call leaves them zero."""


class DeviceArray(Protocol):
    """Device memory that says where it is and what it holds, version 2 or later of the interface."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class Memory(Protocol):
    """Where device memory comes from, and the stream that it is used on."""

    @property
    def stream(self) -> int: ...
    def upload(self, array: NDArray[Any], /) -> DeviceArray: ...
    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, /) -> DeviceArray: ...
    def wait(self) -> None: ...


@dataclass(frozen=True)
class DeviceView:
    """A part of other device memory, or that in another shape; see `view`."""

    of: DeviceArray
    """Keeps the memory alive."""
    __cuda_array_interface__: dict[str, Any]


def view(array: DeviceArray, shape: tuple[int, ...], start: int = 0, kind: str | None = None) -> DeviceView:
    """The elements of C-contiguous `array` from number `start` on as `shape`; `kind`, a type string, reads them anew.

    Raises:
        TypeError, ValueError: not device memory, not C-contiguous, or too few elements.
    """
    about = _interface("array", array)
    whole, own = tuple(about["shape"]), str(about["typestr"])
    kind = kind or own
    size, first = np.dtype(kind).itemsize, pointer("array", array, whole, own)
    if not 0 <= start <= start + math.prod(shape) <= math.prod(whole) * np.dtype(own).itemsize // size:
        raise ValueError(f"array: expected room for {list(shape)} from element {start} on, got shape {list(whole)}")
    place = (first + start * size, False)
    return DeviceView(array, {"shape": shape, "typestr": kind, "data": place, "strides": None, "version": 3})


def targets() -> str | None:
    """What the library was compiled for and by, and what was left out; None where this build has no library."""
    path = _path()
    if path is None:
        return None
    text: bytes = open_library(path).vmad_targets()
    return text.decode()


def _path() -> Path | None:
    found = (Path(folder) / "libvmad_cuda.so" for folder in vmad_edge.kernels.__path__)
    return next((path for path in found if path.exists()), None)


@cache
def library() -> ctypes.CDLL:
    path = _path()
    if path is None:
        raise RuntimeError(
            "this build of vmad-edge has no CUDA kernels: they are compiled where a GPU with an nvcc is, or CUDACXX "
            "names one. Install it again there, or use the kernels on the CPU."
        )
    return open_library(path)


_SIZE, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_QUERY = (_POINTER, _INT, _SIZE)
_BANK = (_POINTER, _POINTER, _SIZE, _SIZE, _INT)
_AXIS = (_POINTER, _POINTER, _INT, _INT)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: what it returns, its arguments; kernels/cuda/*.cu
    "vmad_targets": (ctypes.c_char_p,),
    "vmad_error": (ctypes.c_char_p, _INT),
    "vmad_normalise": (_INT, _POINTER, _INT, _SIZE, _SIZE, _INT, _POINTER, _POINTER, _POINTER),
    "vmad_max_cosine_workspace": (_SIZE, _SIZE, _SIZE, _INT, _INT, _INT),
    "vmad_max_cosine": (_INT, *_QUERY, *_BANK, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER),
    "vmad_segmented_max_cosine_workspace": (_SIZE, _SIZE, _SIZE, _SIZE, _INT, _SIZE, _INT),
    "vmad_segmented_max_cosine": (
        *(_INT, *_QUERY, *_BANK),
        *(_POINTER, _POINTER, _SIZE, _INT, _POINTER, _POINTER, _POINTER),
    ),
    "vmad_interval_mean": (_INT, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER),
    "vmad_patch_scores": (
        *(_INT, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE),
        *(ctypes.c_float, ctypes.c_float, ctypes.c_float, _POINTER, _POINTER, _POINTER),
    ),
    "vmad_preprocess": (
        *(_INT, _POINTER, _INT, _INT, _INT, _INT, _INT, ctypes.c_char_p, *_AXIS, *_AXIS),
        *(_INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER),
    ),
    "vmad_anomaly_map": (_INT, _POINTER, _INT, *_AXIS, *_AXIS, _POINTER, _POINTER),
    "vmad_top_mean_workspace": (_SIZE, _SIZE),
    "vmad_top_mean": (_INT, _POINTER, _SIZE, _INT, _POINTER, _POINTER, _POINTER),
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path`, its functions with their types.

    Raises:
        RuntimeError: it was not built with this module.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in _SIGNATURES.items():
        if not hasattr(library, name):
            raise RuntimeError(f"{path} is of another version of vmad-edge: it has no {name}. Install it again.")
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def call(name: str, *arguments: object) -> None:
    kernels = library()
    error: int = getattr(kernels, name)(*arguments)
    if error:
        text: bytes = kernels.vmad_error(error)
        raise RuntimeError(f"{name}: CUDA says: {text.decode()}")


def describe(name: str, array: DeviceArray, dimensions: int, *kinds: str) -> tuple[tuple[int, ...], str]:
    """Shape and type string."""
    about = _interface(name, array)
    shape, kind = tuple(about["shape"]), str(about["typestr"])
    if kind not in kinds:
        raise TypeError(f"{name}: expected {' or '.join(np.dtype(k).name for k in kinds)}, got {np.dtype(kind).name}")
    if len(shape) != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {list(shape)}")
    return shape, kind


def _interface(name: str, array: DeviceArray) -> dict[str, Any]:
    about: dict[str, Any] | None = getattr(array, "__cuda_array_interface__", None)
    if about is None:
        raise TypeError(f"{name}: expected device memory with __cuda_array_interface__, got {type(array).__name__}")
    return about


def pointer(name: str, array: DeviceArray, shape: tuple[int, ...], kind: str) -> int:
    got, _ = describe(name, array, len(shape), kind)
    if got != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(got)}")
    about = array.__cuda_array_interface__
    steps = np.dtype(kind).itemsize * np.cumprod([1, *shape[:0:-1]])[::-1]
    if about.get("strides") is not None and tuple(about["strides"]) != tuple(steps):
        raise ValueError(f"{name}: expected C-contiguous memory, got strides {list(about['strides'])}")
    return int(about["data"][0])


def workspace_pointer(workspace: DeviceArray, needed: int) -> int:
    """Of [bytes] uint8, at least `needed`.

    Raises:
        TypeError, ValueError: as `pointer`, or a smaller one.
    """
    (size,), kind = describe("workspace", workspace, 1, "|u1")
    if size < needed:
        raise ValueError(f"workspace: expected at least {needed} bytes, got {size}")
    return aligned("workspace", pointer("workspace", workspace, (size,), kind))


def aligned(name: str, address: int) -> int:
    """Of memory that is copied 16 bytes at a time."""
    if address % 16:
        raise ValueError(f"{name}: expected memory that begins at a multiple of 16 bytes, got {address:#x}")
    return address
