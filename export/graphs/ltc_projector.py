"""`ltc_projector.onnx`: CLIP's patches → the visual tokens that the LLM reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import Dim

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs.onnx_export import export_onnx


def export(checkpoint: Checkpoint, path: Path) -> None:
    """`patches` [B,N,D], `patches_multi` [B,L,N,D] → `visual_tokens` [B,K,H]."""
    n, width, levels = checkpoint.grid**2, checkpoint.width, len(checkpoint.config.levels)
    batch = Dim("batch", min=1, max=8)
    export_onnx(
        checkpoint.projector(),
        path,
        inputs={"patches": torch.zeros(2, n, width), "patches_multi": torch.zeros(2, levels, n, width)},
        outputs=["visual_tokens"],
        dynamic={"patches": batch, "patches_multi": batch},
    )
