"""`clip_encoder.onnx`: CLIP's vision transformer, with the hidden levels that LTC and the screen take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs.onnx_export import export_onnx


class ClipEncoder(nn.Module):
    """`clip_pixels` [B,3,S_c,S_c] → `patches` [B,N,D], `patches_multi` [B,L,N,D], `cls` [B,D] (after the last norm)."""

    def __init__(self, vision: nn.Module, patches_level: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.vision = vision
        self.patches_level = patches_level
        self.levels = levels

    def forward(self, clip_pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.vision(pixel_values=clip_pixels, output_hidden_states=True)
        patches = [hidden[:, 1:] for hidden in out.hidden_states]
        return patches[self.patches_level], torch.stack([patches[i] for i in self.levels], 1), out.pooler_output


def export(checkpoint: Checkpoint, path: Path) -> None:
    encoder = ClipEncoder(checkpoint.vision(), checkpoint.config.patches_level, checkpoint.config.levels)
    size = checkpoint.clip.size
    export_onnx(
        encoder,
        path,
        inputs={"clip_pixels": torch.zeros(2, 3, size, size)},
        outputs=["patches", "patches_multi", "cls"],
        dynamic={"clip_pixels": Dim("batch", min=1, max=8)},
    )
