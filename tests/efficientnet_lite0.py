"""EfficientNet-lite0 trained on ImageNet, as a graph of its feature maps.

`python tests/efficientnet_lite0.py FILE SIZE` writes it for benchmarks/patchcore.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from vmad_edge.export.graphs.onnx_export import export_onnx
from vmad_edge.export.reference.teacher import BLOCKS, FeatureMaps


def write_graph(path: Path, size: int) -> nn.Module:
    """Write it as ONNX; returns the torch module."""
    module = FeatureMaps(size)
    example = {"pixels": torch.zeros(2, 3, size, size)}
    export_onnx(module, path, inputs=example, outputs=list(BLOCKS), dynamic={"pixels": Dim("batch", min=1, max=8)})
    return module


if __name__ == "__main__":
    write_graph(Path(sys.argv[1]), int(sys.argv[2]))
