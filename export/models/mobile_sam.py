"""MobileSAM (arXiv 2306.14289): SAM's prompt encoder and mask decoder behind a TinyViT (arXiv 2207.10666).

The published 5M encoder: embedding at stride 4, one stage of inverted bottlenecks, three of windowed attention. For
SAM the last stage keeps the grid of the one before it (stride 16), and SAM's neck follows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamConfig, SamModel, SamVisionConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.sam.modeling_sam import SamVisionNeck

from vmad_edge.runtime.bundle import Record

WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (4, 5, 10)
"""Of the stages with attention."""
WINDOWS = (7, 14, 7)
STRIDES = (2, 2, 1)
"""Between the stages."""


class MobileSamConfig(Record):
    """`segmenter/config.json`. The architecture has one size; only the image's side may differ from the published."""

    model_type: Literal["mobile_sam"]
    image_size: int = Field(default=1024, gt=0)

    def sam(self) -> SamConfig:
        vision = {"hidden_size": WIDTHS[-1], "num_hidden_layers": 0, "image_size": self.image_size}
        return SamConfig(
            vision_config=vision,
            prompt_encoder_config={"image_size": self.image_size},
            mask_decoder_config={"layer_norm_eps": 1e-5},  # segment-anything's; transformers' default is 1e-6
        )


def mobile_sam(config: MobileSamConfig) -> SamModel:
    """A SamModel with a TinyViT in the place of its encoder, weights not yet loaded."""
    sam = SamModel(config.sam())
    sam.vision_encoder = TinyVit()  # type: ignore[assignment]
    sam.train(False)
    return sam


class ConvNorm(nn.Module):
    """Convolution and batch norm, [B,inputs,h,w] → [B,outputs,h/stride,w/stride]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.c(x))
        return y


class Bottleneck(nn.Module):
    """Point-wise, depth-wise, point-wise, GELU between; within a stage (with a residual) and from one to the next."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = ConvNorm(inputs, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride, groups=hidden)
        self.conv3 = ConvNorm(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(x + y) if self.residual else y


class WindowAttention(nn.Module):
    """Attention among the window² places [B,window²,width] of a window, with a bias for each distance."""

    distances: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window**2))
        rows, columns = torch.arange(window**2) // window, torch.arange(window**2) % window
        distances = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
        self.register_buffer("distances", distances, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.attention_biases[:, self.distances])
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return y


class AttentionBlock(nn.Module):
    """[B,width,h,w] → the same: attention within windows, a depth-wise convolution across them, an MLP."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_conv(x + self._attend(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        y: Tensor = self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + y

    def _attend(self, x: Tensor) -> Tensor:
        """[B,h,w,width]; the last windows are filled with zeros, which take part as in training."""
        batch, height, width, channels = x.shape
        size = self.window
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        windows = x.reshape(batch, rows, size, columns, size, channels).transpose(2, 3)
        y: Tensor = self.attn(windows.reshape(-1, size**2, channels))
        y = y.reshape(batch, rows, columns, size, size, channels).transpose(2, 3)
        return y.reshape(x.shape)[:, :height, :width]


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        if downsample is not None:
            self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class TinyVit(nn.Module):
    """[1,3,S_s,S_s] → `last_hidden_state` [1,256,S_s/16,S_s/16]."""

    def __init__(self) -> None:
        super().__init__()
        first, half = WIDTHS[0], WIDTHS[0] // 2
        embed = nn.Sequential(ConvNorm(3, half, 3, 2), nn.GELU(), ConvNorm(half, first, 3, 2))
        self.patch_embed = nn.ModuleDict({"seq": embed})
        blocks: list[list[nn.Module]] = [
            [Bottleneck(first, 4 * first, first, 1, residual=True) for _ in range(DEPTHS[0])]
        ]
        for width, depth, heads, window in zip(WIDTHS[1:], DEPTHS[1:], HEADS, WINDOWS, strict=True):
            blocks.append([AttentionBlock(width, heads, window) for _ in range(depth)])
        between = [
            Bottleneck(before, after, after, stride, residual=False)
            for before, after, stride in zip(WIDTHS, WIDTHS[1:], STRIDES, strict=False)
        ]
        self.layers = nn.Sequential(*(Stage(*stage) for stage in zip(blocks, [*between, None], strict=True)))
        self.neck = SamVisionNeck(SamVisionConfig(hidden_size=WIDTHS[-1]))

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        x = self.layers(self.patch_embed["seq"](pixel_values))
        return BaseModelOutput(last_hidden_state=self.neck(x.permute(0, 2, 3, 1)))


_UPSTREAM = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(?:prompt_encoder\.shared|shared_image)_embedding\.", "prompt_encoder.pe_layer."),
        (r"\.positional_embedding$", ".positional_encoding_gaussian_matrix"),
        (r"^vision_encoder\.", "image_encoder."),
        (r"\.neck\.conv1\.", ".neck.0."),
        (r"\.neck\.layer_norm1\.", ".neck.1."),
        (r"\.neck\.conv2\.", ".neck.2."),
        (r"\.neck\.layer_norm2\.", ".neck.3."),
        (r"\.point_embed\.", ".point_embeddings."),
        (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
        (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
        (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
        (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
        (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
        (r"(mlps\.\d|prediction_head)\.layers\.0\.", r"\1.layers.1."),
        (r"\.proj_in\.", ".layers.0."),
        (r"\.proj_out\.", ".layers.2."),
        (r"\.upscale_conv1\.", ".output_upscaling.0."),
        (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
        (r"\.upscale_conv2\.", ".output_upscaling.3."),
        (r"\.layer_norm", ".norm"),
    )
)
"""transformers' names → segment-anything's, which MobileSAM's weights have."""

CLASSIFIER = re.compile(r"^image_encoder\.(norm_)?head\.")
"""TinyViT's, from its pretraining: in the published weights, and not part of the encoder."""


def upstream_name(name: str) -> str:
    """What a tensor of `mobile_sam()` is called in MobileSAM's published weights."""
    for pattern, replacement in _UPSTREAM:
        name = pattern.sub(replacement, name)
    return name


def load_mobile_sam(config: MobileSamConfig, path: Path) -> SamModel:
    """The model in FP32 with the published names' weights at `path`, known to be all there in their shapes."""
    sam, weights = mobile_sam(config), load_file(path)
    sam.load_state_dict({name: weights[upstream_name(name)] for name in sam.state_dict()})
    return sam
