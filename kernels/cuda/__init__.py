"""The kernels on CUDA: device memory in, device memory out, on the caller's stream.

`max_cosine`, `segmented_max_cosine`, `mutual_score` and `interval_mean` keep the contract of their namesakes in
`vmad_edge.kernels`, with these differences: rows are held as float16 or as int8 with a scale a row, their sums are
float32 or int32; the caller owns all memory and passes it in, results included; calls return as soon as their kernels
are queued, so that a CUDA graph can capture them. Arrays are C-contiguous and speak `__cuda_array_interface__`.
`MirroredBank` alone asks for memory and waits: it brings a `ReferenceBank` to the device.

`preprocess` and `anomaly_map` do on the device what `vmad_edge.runtime.stages` does on the processor, `top_mean` finds
the largest value and the mean of the largest.

libvmad_cuda.so is opened at the first call: importing this module needs neither a GPU nor the library.
"""

from vmad_edge.kernels.cuda.bank import MirroredBank
from vmad_edge.kernels.cuda.images import (
    Axis,
    DeviceAxis,
    Filter,
    Kind,
    anomaly_map,
    map_axis,
    preprocess,
    preprocess_workspace,
    resize_axis,
    top_mean,
    top_mean_workspace,
)
from vmad_edge.kernels.cuda.library import WORKSPACE_ZEROS, DeviceArray, DeviceView, Memory, targets, view
from vmad_edge.kernels.cuda.scores import interval_mean, mutual_score, mutual_score_workspace, patch_scores
from vmad_edge.kernels.cuda.similarity import (
    DeviceBank,
    DeviceOffsets,
    Dtype,
    Path,
    max_cosine,
    max_cosine_workspace,
    normalise,
    row_bytes,
    segmented_max_cosine,
    segmented_max_cosine_workspace,
    try_kernels,
)

__all__ = [
    "WORKSPACE_ZEROS",
    "Axis",
    "DeviceArray",
    "DeviceAxis",
    "DeviceBank",
    "DeviceOffsets",
    "DeviceView",
    "Dtype",
    "Filter",
    "Kind",
    "Memory",
    "MirroredBank",
    "Path",
    "anomaly_map",
    "interval_mean",
    "map_axis",
    "max_cosine",
    "max_cosine_workspace",
    "mutual_score",
    "mutual_score_workspace",
    "normalise",
    "patch_scores",
    "preprocess",
    "preprocess_workspace",
    "resize_axis",
    "row_bytes",
    "segmented_max_cosine",
    "segmented_max_cosine_workspace",
    "targets",
    "top_mean",
    "top_mean_workspace",
    "try_kernels",
    "view",
]
