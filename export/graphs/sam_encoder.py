"""`sam_encoder.onnx`: SAM's image encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs.onnx_export import export_onnx


class SamEncoder(nn.Module):
    """`sam_pixels` [1,3,S_s,S_s] → `image_embeddings` [1,256,S_s/16,S_s/16]."""

    def __init__(self, vision_encoder: nn.Module) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder

    def forward(self, sam_pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.vision_encoder(sam_pixels).last_hidden_state
        return embeddings


def export(checkpoint: Checkpoint, path: Path) -> None:
    size = checkpoint.sam.size
    export_onnx(
        SamEncoder(checkpoint.segmenter().vision_encoder),
        path,
        inputs={"sam_pixels": torch.zeros(1, 3, size, size)},
        outputs=["image_embeddings"],
    )
