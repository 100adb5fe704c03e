"""`mask_decoder.onnx`: Γ and SAM's mask decoder, with all of SAM's constants inside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import SamModel

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs.onnx_export import export_onnx


class PromptedDecoder(nn.Module):
    """`image_embeddings` [1,256,h,w], `sparse` [n,T,256] → `low_res_masks` [n,1,4h,4w] (logits), `iou` [n,1]."""

    position: Tensor
    no_mask: Tensor

    def __init__(self, sam: SamModel) -> None:
        super().__init__()
        self.decoder = sam.mask_decoder
        # Without multimask output only the first mask token's head is read: the others need not be computed.
        self.decoder.num_mask_tokens = 1
        position: Tensor = sam.get_image_wide_positional_embeddings()  # type: ignore[no-untyped-call]
        self.register_buffer("position", position.detach())
        self.register_buffer("no_mask", sam.prompt_encoder.no_mask_embed.weight.detach().reshape(1, -1, 1, 1))

    def forward(self, image_embeddings: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        masks, iou = self.decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self.position,
            sparse_prompt_embeddings=sparse[None],
            dense_prompt_embeddings=self.no_mask,
            multimask_output=False,
        )
        return masks[0], iou[0]


class MaskDecoder(nn.Module):
    """As PromptedDecoder, from `h_seg` [n,H].

    As in LISA: Γ(h_seg) is the only sparse prompt, there is no mask prompt, one mask comes out for each `<seg>`.
    """

    def __init__(self, seg_projection: nn.Module, sam: SamModel) -> None:
        super().__init__()
        self.seg_projection = seg_projection
        self.prompted = PromptedDecoder(sam)

    def forward(self, image_embeddings: Tensor, h_seg: Tensor) -> tuple[Tensor, Tensor]:
        masks: tuple[Tensor, Tensor] = self.prompted(image_embeddings, self.seg_projection(h_seg)[:, None])
        return masks


def export(checkpoint: Checkpoint, path: Path) -> None:
    grid = checkpoint.sam.size // 16
    export_onnx(
        MaskDecoder(checkpoint.seg_projection(), checkpoint.segmenter()),
        path,
        inputs={
            "image_embeddings": torch.zeros(1, 256, grid, grid),
            "h_seg": torch.zeros(2, checkpoint.language_width),
        },
        outputs=["low_res_masks", "iou"],
        dynamic={"h_seg": Dim("prompts", min=1)},
    )
