"""LTC against TokenPacker's description, one region at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from vmad_edge.export.models.ltc import LtcProjector

Array = NDArray[np.float64]


def resized(grid: Array, i: int, j: int, s: int) -> Array:
    """Cell (i, j) of a bilinear resize of [g,g,D] by 1/s, half-pixel centres."""

    def ends(at: float) -> tuple[int, int, float]:
        low = int(np.floor(at))
        return low, min(low + 1, len(grid) - 1), at - low

    (y0, y1, fy), (x0, x1, fx) = (ends((k + 0.5) * s - 0.5) for k in (i, j))
    top, bottom = ((1 - fx) * grid[y, x0] + fx * grid[y, x1] for y in (y0, y1))
    return np.asarray((1 - fy) * top + fy * bottom)


def linear(layer: nn.Module, x: Array) -> Array:
    assert isinstance(layer, nn.Linear)
    y = x @ layer.weight.detach().numpy().T
    return y if layer.bias is None else y + layer.bias.detach().numpy()


def mlp(layers: nn.Sequential, x: Array) -> Array:
    hidden = torch.from_numpy(linear(layers[0], x))
    return linear(layers[2], nn.functional.gelu(hidden).numpy())


def norm(layer: nn.LayerNorm, x: Array) -> Array:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return np.asarray(y * layer.weight.detach().numpy() + layer.bias.detach().numpy())


def attend(attention: nn.MultiheadAttention, query: Array, key: Array, value: Array) -> Array:
    """One query [D] on keys [n,D]."""
    weights = np.split(attention.in_proj_weight.detach().numpy(), 3)
    biases = np.split(attention.in_proj_bias.detach().numpy(), 3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    heads = []
    for q_head, k_head, v_head in zip(*(np.split(x, attention.num_heads, -1) for x in (q, k, v)), strict=True):
        odds = np.exp(k_head @ q_head / np.sqrt(len(q_head)))
        heads.append(odds / odds.sum() @ v_head)
    return linear(attention.out_proj, np.concatenate(heads))


@pytest.mark.parametrize(
    ("grid", "scale", "levels", "heads"),
    [
        pytest.param(4, 2, 3, 2, id="even scale: a query between patches"),
        pytest.param(6, 3, 1, 4, id="odd scale: a query on a patch"),
        pytest.param(4, 1, 2, 1, id="no reduction"),
        pytest.param(8, 4, 4, 2, id="wide regions"),
    ],
)
def test_each_query_attends_to_its_own_region(grid: int, scale: int, levels: int, heads: int) -> None:
    torch.manual_seed(0)
    ltc = LtcProjector(width=8, levels=levels, language_width=12, scale_factor=scale, heads=heads).double()
    for parameter in ltc.parameters():  # biases and norms that do something
        nn.init.normal_(parameter, std=0.5)
    patches = torch.randn(2, grid * grid, 8, dtype=torch.float64)
    multi = torch.randn(2, levels, grid * grid, 8, dtype=torch.float64)
    with torch.no_grad():
        tokens = ltc(patches, multi).numpy()
    assert tokens.shape == (2, (grid // scale) ** 2, 12)
    for image in range(2):
        coarse = patches[image].numpy().reshape(grid, grid, 8)
        fine = np.concatenate(list(multi[image].numpy()), -1).reshape(grid, grid, levels * 8)
        for i in range(grid // scale):
            for j in range(grid // scale):
                query = norm(ltc.q_norm, linear(ltc.q_proj, resized(coarse, i, j, scale)))
                region = fine[i * scale : (i + 1) * scale, j * scale : (j + 1) * scale].reshape(scale * scale, -1)
                key, value = norm(ltc.k_norm, mlp(ltc.k_proj, region)), norm(ltc.v_norm, mlp(ltc.v_proj, region))
                expected = mlp(ltc.mlp, attend(ltc.attention, query, key, value))
                np.testing.assert_allclose(tokens[image, i * (grid // scale) + j], expected, rtol=1e-9, atol=1e-9)
