"""LTC projector: coarse queries attend to their own region of fine, multi-level CLIP features.

VMAD publishes the idea (low-resolution query, high-resolution local keys, several CLIP layers injected), not the
module; this one follows TokenPacker (CircleRadon/TokenPacker, multimodal_projector/builder.py). [ASSUME]
"""

from __future__ import annotations

from torch import Tensor, nn


class LtcProjector(nn.Module):
    """`patches` [B,N,D], `patches_multi` [B,L,N,D] → `visual_tokens` [B,K,H], K = N / scale_factor²."""

    def __init__(self, width: int, levels: int, language_width: int, scale_factor: int, heads: int) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Sequential(nn.Linear(levels * width, width), nn.GELU(), nn.Linear(width, width))
        self.v_proj = nn.Sequential(nn.Linear(levels * width, width), nn.GELU(), nn.Linear(width, width))
        self.q_norm = nn.LayerNorm(width, eps=1e-6)
        self.k_norm = nn.LayerNorm(width, eps=1e-6)
        self.v_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, language_width), nn.GELU(), nn.Linear(language_width, language_width))

    def forward(self, patches: Tensor, patches_multi: Tensor) -> Tensor:
        batch, n, width = patches.shape
        grid, s = int(n**0.5), self.scale_factor
        coarse = grid // s
        fine = patches_multi.transpose(1, 2).flatten(2)
        query = patches.transpose(1, 2).reshape(batch, width, grid, grid)
        query = nn.functional.interpolate(query, size=(coarse, coarse), mode="bilinear", align_corners=False)
        query = self.q_norm(self.q_proj(query.flatten(2).transpose(1, 2)))
        key, value = self.k_norm(self.k_proj(fine)), self.v_norm(self.v_proj(fine))
        out, _ = self.attention(
            query.reshape(1, batch * coarse * coarse, width),
            self._regions(key, coarse),
            self._regions(value, coarse),
            need_weights=False,
        )
        tokens: Tensor = self.mlp(out.reshape(batch, coarse * coarse, width))
        return tokens

    def _regions(self, x: Tensor, coarse: int) -> Tensor:
        """[B,N,D] → [s², B·K, D]: for each coarse cell the s×s fine patches that it covers."""
        batch, s, width = x.shape[0], self.scale_factor, x.shape[2]
        x = x.reshape(batch, coarse, s, coarse, s, width).permute(2, 4, 0, 1, 3, 5)
        return x.reshape(s * s, batch * coarse * coarse, width)
