"""MobileSAM as a checkpoint's segmenter: its graphs against the published computation and Meta's segment-anything."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from segment_anything_parts import prompt_encoder_and_mask_decoder
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs import mask_decoder, sam_encoder
from vmad_edge.export.graphs.onnx_export import export_onnx
from vmad_edge.export.models.mobile_sam import MobileSamConfig, mobile_sam, upstream_name
from vmad_edge.export.precision import LIMIT, fp16_session, write_fp16
from vmad_edge.runtime.bundle import SamInput
from vmad_edge.runtime.errors import CheckpointError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import sam_pixels

SHARED = Path(__file__).parents[2].parent / "shared"
WEIGHTS = SHARED / "weights" / "mobile_sam.safetensors"
PHOTOGRAPHS = SHARED / "data" / "cookies" / "train" / "good"
ALL = 20
FEW = 3
"""Of the photographs, unless VMAD_ALL_PHOTOGRAPHS is set: each takes seconds."""
SMALL = 64

needs_shared = pytest.mark.skipif(
    not (WEIGHTS.exists() and PHOTOGRAPHS.exists()), reason="MobileSAM's weights or the photographs are not there"
)
Weights = dict[str, Tensor]


# ------------------------------------------------------------------------------------------ the oracle


def tiny_vit(weights: Weights, pixels: Tensor) -> Tensor:
    """MobileSAM's encoder (arXiv 2306.14289; TinyViT-5M, arXiv 2207.10666) by its formulas, on upstream's names.

    Batch norms are folded into their convolutions, windows are taken one by one, attention is written out.
    """
    w = {name.removeprefix("image_encoder."): weight for name, weight in weights.items()}

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        norm, kernel = f"{name}.bn", w[f"{name}.c.weight"]
        scale = w[f"{norm}.weight"] / torch.sqrt(w[f"{norm}.running_var"] + 1e-5)
        bias = w[f"{norm}.bias"] - w[f"{norm}.running_mean"] * scale
        groups = x.shape[1] // kernel.shape[1]
        return F.conv2d(x, kernel * scale[:, None, None, None], bias, stride, kernel.shape[-1] // 2, 1, groups)

    def bottleneck(x: Tensor, name: str, stride: int) -> Tensor:
        x = F.gelu(convolve(x, f"{name}.conv1"))
        return convolve(F.gelu(convolve(x, f"{name}.conv2", stride)), f"{name}.conv3")

    def normalised(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        """Along the last axis."""
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attend(tokens: Tensor, name: str, window: int) -> Tensor:
        """[window²,C]"""
        biases = w[f"{name}.attention_biases"]
        heads, width = biases.shape[0], tokens.shape[1] // biases.shape[0]
        out = []
        for head, qkv in enumerate(linear(normalised(tokens, f"{name}.norm"), f"{name}.qkv").split(3 * width, 1)):
            q, k, v = qkv.split(width, 1)
            scores = (q @ k.T) / width**0.5 + biases[head][offsets(window)]
            out.append(torch.exp(scores - scores.logsumexp(1, keepdim=True)) @ v)
        assert len(out) == heads
        return linear(torch.cat(out, 1), f"{name}.proj")

    def windowed(x: Tensor, name: str, window: int) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % window, 0, -height % window))
        out = torch.empty_like(padded)
        for top, left in itertools.product(*(range(0, side, window) for side in padded.shape[2:])):
            part = np.s_[0, :, top : top + window, left : left + window]
            tokens = padded[part].flatten(1).T
            out[part] = attend(tokens, f"{name}.attn", window).T.unflatten(1, (window, window))
        return out[:, :, :height, :width]

    def mlp(x: Tensor, name: str) -> Tensor:
        tokens = normalised(x.movedim(1, -1), f"{name}.norm")
        return linear(F.gelu(linear(tokens, f"{name}.fc1")), f"{name}.fc2").movedim(-1, 1)

    x = convolve(F.gelu(convolve(pixels, "patch_embed.seq.0", 2)), "patch_embed.seq.2", 2)
    for block in range(2):
        x = F.gelu(x + bottleneck(x, f"layers.0.blocks.{block}", 1))
    for layer, (stride, depth, window) in enumerate([(2, 2, 7), (2, 6, 14), (1, 2, 7)], 1):
        x = bottleneck(x, f"layers.{layer - 1}.downsample", stride)
        for name in (f"layers.{layer}.blocks.{block}" for block in range(depth)):
            x = convolve(x + windowed(x, name, window), f"{name}.local_conv")
            x = x + mlp(x, f"{name}.mlp")
    for kernel, norm, padding in ((0, 1, 0), (2, 3, 1)):
        x = F.conv2d(x, w[f"neck.{kernel}.weight"], padding=padding)
        x = normalised(x.movedim(1, -1), f"neck.{norm}", 1e-6).movedim(-1, 1)
    return x


@cache
def offsets(window: int) -> Tensor:
    """Which bias each pair of places has: distances are numbered as they are first met."""
    places = list(itertools.product(range(window), repeat=2))
    met: dict[tuple[int, int], int] = {}
    return torch.tensor([[met.setdefault((abs(a - c), abs(b - d)), len(met)) for c, d in places] for a, b in places])


def segment_anything(weights: Weights, size: int) -> tuple[nn.Module, nn.Module]:
    """Meta's prompt encoder and mask decoder."""
    prompt, decoder = prompt_encoder_and_mask_decoder(size, mlp_dim=2048)
    for part, module in (("prompt_encoder.", prompt), ("mask_decoder.", decoder)):
        module.load_state_dict({n.removeprefix(part): w for n, w in weights.items() if n.startswith(part)})
    return prompt, decoder


def decode(weights: Weights, size: int, embeddings: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    prompt, decoder = segment_anything(weights, size)
    masks: tuple[Tensor, Tensor] = decoder(
        image_embeddings=embeddings,
        image_pe=prompt.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=prompt(points=None, boxes=None, masks=None)[1],
        multimask_output=False,
    )
    return masks


# ------------------------------------------------------------------------------------------ checkpoints


def with_segmenter(tiny: Path, folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    """A copy of the tiny checkpoint with MobileSAM as its segmenter."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("segmenter"))
    (folder / "segmenter").mkdir()
    (folder / "segmenter" / "config.json").write_text(json.dumps({"model_type": "mobile_sam", **config}))
    save_file(weights, folder / "segmenter" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def random_weights() -> Weights:
    noise = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in mobile_sam(MobileSamConfig(model_type="mobile_sam", image_size=SMALL)).state_dict().items():
        if weight.dtype != torch.float32:  # how often a batch norm was updated
            weights[upstream_name(name)] = weight
            continue
        values = torch.randn(weight.shape, generator=noise)
        values *= 0.2 if weight.ndim == 1 else weight[0].numel() ** -0.5
        if name.endswith("running_var") or (("norm" in name or "bn" in name) and name.endswith("weight")):
            values = 1 + values.abs()
        weights[upstream_name(name)] = values
    return weights


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory, random_weights: Weights) -> Checkpoint:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    return Checkpoint.open(with_segmenter(tiny, folder, {"image_size": SMALL}, random_weights))


@pytest.fixture(scope="module")
def published() -> Weights:
    return load_file(WEIGHTS)


@pytest.fixture(scope="module")
def encoder(tiny: Path, tmp_path_factory: pytest.TempPathFactory, published: Weights) -> Path:
    """The graph of the published encoder; beside it `prompted.onnx`, the published decoder behind Γ."""
    folder = tmp_path_factory.mktemp("published")
    checkpoint = Checkpoint.open(with_segmenter(tiny, folder / "checkpoint", {}, published))
    assert checkpoint.sam == SamInput(size=1024)
    sam_encoder.export(checkpoint, folder / "sam_encoder.onnx")
    export_prompted(checkpoint, folder / "prompted.onnx")
    return folder / "sam_encoder.onnx"


def export_prompted(checkpoint: Checkpoint, path: Path) -> None:
    grid = checkpoint.sam.size // 16
    export_onnx(
        mask_decoder.PromptedDecoder(checkpoint.segmenter()),
        path,
        inputs={"image_embeddings": torch.zeros(1, 256, grid, grid), "sparse": torch.zeros(2, 2, 256)},
        outputs=["low_res_masks", "iou"],
        dynamic={"sparse": Dim("prompts", min=1)},
    )


def run(path: Path, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
    return list(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs))


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def assert_close(found: NDArray[Any], expected: Tensor, relative: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected.numpy()).max() <= relative * expected.abs().max()


# ------------------------------------------------------------------------------------- random weights, small images


@torch.no_grad()
def test_encoder_is_the_published_computation(small: Checkpoint, random_weights: Weights, tmp_path: Path) -> None:
    sam_encoder.export(small, tmp_path / "sam_encoder.onnx")
    pixels = normal(1, 3, SMALL, SMALL)
    (found,) = run(tmp_path / "sam_encoder.onnx", sam_pixels=pixels)
    assert_close(found, tiny_vit(random_weights, torch.from_numpy(pixels)))


@torch.no_grad()
@pytest.mark.parametrize("prompts", [1, 3])
def test_gamma_and_decoder(small: Checkpoint, random_weights: Weights, tmp_path: Path, prompts: int) -> None:
    """h_seg → Γ → mask, Γ by its formula and the rest by Meta's package."""
    mask_decoder.export(small, tmp_path / "mask_decoder.onnx")
    embeddings, h_seg = normal(1, 256, SMALL // 16, SMALL // 16), normal(prompts, small.language_width)
    masks, iou = run(tmp_path / "mask_decoder.onnx", image_embeddings=embeddings, h_seg=h_seg)
    gamma = {name: w.float() for name, w in load_file(small.path / "seg_projection.safetensors").items()}
    hidden = (torch.from_numpy(h_seg) @ gamma["layers.0.weight"].T + gamma["layers.0.bias"]).clamp(min=0)
    sparse = (hidden @ gamma["layers.2.weight"].T + gamma["layers.2.bias"])[:, None]
    expected = decode(random_weights, SMALL, torch.from_numpy(embeddings), sparse)
    # Each side is up to 1e-6 from the same in float64; LayerNorm's epsilon a power of ten off makes 2e-5.
    assert_close(masks, expected[0], 5e-6)
    assert_close(iou, expected[1], 5e-6)


Change = Callable[[Weights], object]
FAULTS: dict[str, tuple[dict[str, Any], Change, str]] = {
    # case: (config, change of the weights, error)
    "missing": ({}, lambda w: w.pop("image_encoder.neck.2.weight"), r"expected tensor image_encoder\.neck\.2\.weight"),
    "extra": ({}, lambda w: w.update(more=torch.zeros(1)), "1 more, the first more"),
    "another shape": (
        {},
        lambda w: w.update({"mask_decoder.iou_token.weight": torch.zeros(2, 256)}),
        r"iou_token\.weight: expected shape \[1, 256\].*found \[2, 256\]",
    ),
    "another size": ({"image_size": 72}, lambda w: None, "image_size: expected a multiple of 16, found 72"),
    "unknown setting": ({"depth": 5}, lambda w: None, "depth: Extra inputs are not permitted"),
}


@pytest.mark.parametrize(("config", "change", "message"), FAULTS.values(), ids=FAULTS)
def test_fault_is_one_error_that_names_it(
    tiny: Path, tmp_path: Path, random_weights: Weights, config: dict[str, Any], change: Change, message: str
) -> None:
    weights = dict(random_weights)
    change(weights)
    folder = with_segmenter(tiny, tmp_path / "checkpoint", {"image_size": SMALL, **config}, weights)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


# ---------------------------------------------------------------------------------- published weights, photographs


@needs_shared
@torch.no_grad()
def test_masks_of_photographs(encoder: Path, published: Weights) -> None:
    """A box around the middle, encoded by Meta's package, gives the masks that the oracle gives."""
    prompt, _ = segment_anything(published, 1024)
    photographs = sorted(PHOTOGRAPHS.iterdir())[: ALL if os.environ.get("VMAD_ALL_PHOTOGRAPHS") else FEW]
    assert photographs
    for path in photographs:
        pixels, (height, width) = sam_pixels(Frame.read(str(path)), SamInput(size=1024))
        box = torch.tensor([[0.2 * width, 0.2 * height, 0.8 * width, 0.8 * height]])
        sparse, _ = prompt(points=None, boxes=box, masks=None)
        expected_embeddings = tiny_vit(published, torch.from_numpy(pixels))
        expected = decode(published, 1024, expected_embeddings, sparse)[0].numpy() > 0

        (embeddings,) = run(encoder, sam_pixels=pixels)
        assert embeddings.shape == (1, 256, 64, 64)
        assert_close(embeddings, expected_embeddings, 1e-4)
        masks, _ = run(encoder.with_name("prompted.onnx"), image_embeddings=embeddings, sparse=sparse.numpy())
        found = masks > 0
        assert found.shape == expected.shape == (1, 1, 256, 256)
        assert 0.01 < expected.mean() < 0.9  # something, and not everything
        assert (found & expected).sum() / (found | expected).sum() >= 0.999, path.name


@needs_shared
def test_encoder_keeps_its_meaning_in_fp16(encoder: Path, tmp_path: Path) -> None:
    """Its activations stay below a thousand and its norms FP32: FP16 moves it, by less than what `lower` allows."""
    pixels, _ = sam_pixels(Frame.read(str(min(PHOTOGRAPHS.iterdir()))), SamInput(size=1024))
    write_fp16(encoder, tmp_path / "half.onnx")
    (half,) = fp16_session(tmp_path / "half.onnx").run(None, {"sam_pixels": pixels})
    (full,) = run(encoder, sam_pixels=pixels)
    assert LIMIT / 100 < np.abs(half - full).max() / np.abs(full).max() < LIMIT
