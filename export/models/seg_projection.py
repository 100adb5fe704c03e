"""Γ: the hidden state of `<seg>` → SAM's prompt embedding (LISA's `text_hidden_fcs`: Linear, ReLU, Linear)."""

from __future__ import annotations

from torch import Tensor, nn


class SegProjection(nn.Module):
    """`h_seg` [n,H] → prompt embedding [n,256]."""

    def __init__(self, language_width: int, prompt_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(language_width, language_width), nn.ReLU(), nn.Linear(language_width, prompt_width)
        )

    def forward(self, h_seg: Tensor) -> Tensor:
        prompt: Tensor = self.layers(h_seg)
        return prompt
