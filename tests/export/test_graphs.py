"""The four graphs in ONNX Runtime against transformers, torch and Meta's segment-anything."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from segment_anything_parts import prompt_encoder_and_mask_decoder
from tiny_checkpoint import SAM_SIZE, WIDTH
from torch import nn
from transformers import CLIPVisionModel, SamModel

from vmad_edge.export.checkpoint import Checkpoint, LtcConfig
from vmad_edge.export.graphs import ltc_projector, onnx_export
from vmad_edge.export.models.ltc import LtcProjector
from vmad_edge.runtime.bundle import Bundle

GRAPHS = ["clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder"]
EMBEDDINGS = SAM_SIZE // 16
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.fixture
def graphs(bundle: Bundle) -> dict[str, Path]:
    return {name: bundle.file(f"{name}.onnx") for name in GRAPHS}


def run(path: Path, **inputs: NDArray[Any]) -> Arrays:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == inputs.keys()
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def assert_close(found: NDArray[Any], expected: torch.Tensor | NDArray[Any], relative: float = 2e-5) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("batch", [1, 3])
def test_clip_encoder_gives_the_hidden_states_of_transformers(
    checkpoint: Checkpoint, graphs: dict[str, Path], batch: int
) -> None:
    pixels = normal(batch, 3, checkpoint.clip.size, checkpoint.clip.size)
    found = run(graphs["clip_encoder"], clip_pixels=pixels)
    clip = CLIPVisionModel.from_pretrained(checkpoint.path / "vision", dtype=torch.float32).eval()
    with torch.no_grad():
        seen = clip(torch.from_numpy(pixels), output_hidden_states=True)
    hidden = [state[:, 1:].numpy() for state in seen.hidden_states]
    assert list(found) == ["patches", "patches_multi", "cls"]
    assert_close(found["patches"], hidden[2])  # level −2 of embeddings and 3 layers
    assert_close(found["patches_multi"], np.stack([hidden[3], hidden[2], hidden[1]], 1))  # −1, −2, 1
    assert_close(found["cls"], seen.pooler_output)


@pytest.mark.parametrize("scale_factor", [1, 2, 3])
def test_ltc_projector_gives_the_module_s_tokens(checkpoint: Checkpoint, tmp_path: Path, scale_factor: int) -> None:
    torch.manual_seed(scale_factor)
    module = LtcProjector(WIDTH, 3, checkpoint.language_width, scale_factor, heads=4).eval()
    save_file(module.state_dict(), tmp_path / "projector.safetensors")
    config = checkpoint.config.model_copy(update={"ltc": LtcConfig(scale_factor=scale_factor, heads=4)})
    ltc_projector.export(replace(checkpoint, path=tmp_path, config=config, grid=6), tmp_path / "ltc.onnx")
    for batch in (1, 3):
        patches, patches_multi = normal(batch, 36, WIDTH), normal(batch, 3, 36, WIDTH)
        found = run(tmp_path / "ltc.onnx", patches=patches, patches_multi=patches_multi)
        with torch.no_grad():
            expected = module(torch.from_numpy(patches), torch.from_numpy(patches_multi))
        assert found["visual_tokens"].shape == (batch, (6 // scale_factor) ** 2, checkpoint.language_width)
        assert_close(found["visual_tokens"], expected)


def test_sam_encoder_gives_transformers_image_embeddings(checkpoint: Checkpoint, graphs: dict[str, Path]) -> None:
    pixels = normal(1, 3, SAM_SIZE, SAM_SIZE)
    found = run(graphs["sam_encoder"], sam_pixels=pixels)
    sam = SamModel.from_pretrained(checkpoint.path / "segmenter", dtype=torch.float32).eval()
    assert_close(found["image_embeddings"], sam.get_image_embeddings(torch.from_numpy(pixels)))


UPSTREAM_NAMES = {  # transformers' SAM → segment-anything's
    "mask_decoder.": "",
    "shared_image_embedding.positional_embedding": "pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.point_embed.": "point_embeddings.",
    "prompt_encoder.": "",
    "mask_embed.conv1": "mask_downscaling.0",
    "mask_embed.layer_norm1": "mask_downscaling.1",
    "mask_embed.conv2": "mask_downscaling.3",
    "mask_embed.layer_norm2": "mask_downscaling.4",
    "mask_embed.conv3": "mask_downscaling.6",
    "layer_norm_final_attn": "norm_final_attn",
    "layer_norm": "norm",
    "upscale_conv1": "output_upscaling.0",
    "upscale_norm": "output_upscaling.1",
    "upscale_conv2": "output_upscaling.3",
    ".proj_in.": ".layers.0.",
    ".proj_out.": ".layers.2.",
}


def segment_anything(path: Path) -> tuple[nn.Module, nn.Module]:
    """Meta's prompt encoder and mask decoder with the weights of a transformers SamModel."""
    prompt, decoder = prompt_encoder_and_mask_decoder(SAM_SIZE, mlp_dim=64)
    parts: dict[str, dict[str, torch.Tensor]] = {"mask_decoder": {}, "prompt_encoder": {}}
    for name, weight in load_file(path).items():
        if name.startswith("vision_encoder"):
            continue
        part = "mask_decoder" if name.startswith("mask_decoder") else "prompt_encoder"
        # The middle layer of the three-layer heads is `layers.0` in transformers and `layers.1` upstream.
        name = name.replace("head.layers.0", "head.layers.1") if "prediction_head" in name else name
        if "hypernetworks" in name:
            name = name.replace(".layers.0.", ".layers.1.")
        for ours, upstream in UPSTREAM_NAMES.items():
            name = name.replace(ours, upstream)
        parts[part][name] = weight.float()
    prompt.load_state_dict(parts["prompt_encoder"])
    decoder.load_state_dict(parts["mask_decoder"])
    return prompt, decoder


@pytest.mark.parametrize("prompts", [1, 3])
def test_mask_decoder_is_segment_anything_s_behind_gamma(
    checkpoint: Checkpoint, graphs: dict[str, Path], prompts: int
) -> None:
    embeddings = normal(1, 256, EMBEDDINGS, EMBEDDINGS)
    h_seg = normal(prompts, checkpoint.language_width)
    found = run(graphs["mask_decoder"], image_embeddings=embeddings, h_seg=h_seg)

    gamma = {name: w.float().numpy() for name, w in load_file(checkpoint.path / "seg_projection.safetensors").items()}
    hidden = np.maximum(h_seg @ gamma["layers.0.weight"].T + gamma["layers.0.bias"], 0)
    seg_prompt = hidden @ gamma["layers.2.weight"].T + gamma["layers.2.bias"]
    prompt, decoder = segment_anything(checkpoint.path / "segmenter" / "model.safetensors")
    with torch.no_grad():
        _, dense = prompt(points=None, boxes=None, masks=None)
        masks, iou = decoder(
            image_embeddings=torch.from_numpy(embeddings),
            image_pe=prompt.get_dense_pe(),
            sparse_prompt_embeddings=torch.from_numpy(seg_prompt)[:, None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    assert found["low_res_masks"].shape == (prompts, 1, 4 * EMBEDDINGS, 4 * EMBEDDINGS)
    assert_close(found["low_res_masks"], masks, 5e-6)
    assert_close(found["iou"], iou, 5e-6)


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_valid_and_free_of_this_machine_s_paths(graphs: dict[str, Path], name: str) -> None:
    onnx.checker.check_model(str(graphs[name]), full_check=True)
    graph = onnx.load(graphs[name]).graph
    values = [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    assert not any(value.metadata_props or value.doc_string for value in values)
    assert b"site-packages" not in graphs[name].read_bytes()


def test_same_checkpoint_same_bytes(checkpoint: Checkpoint, graphs: dict[str, Path], tmp_path: Path) -> None:
    """In another process, where sets of strings have another order."""
    code = (
        "from pathlib import Path\n"
        "from vmad_edge.export.checkpoint import Checkpoint\n"
        "from vmad_edge.export.graphs import clip_encoder, mask_decoder\n"
        f"checkpoint = Checkpoint.open({str(checkpoint.path)!r})\n"
        "clip_encoder.export(checkpoint, Path('clip_encoder.onnx'))\n"
        "mask_decoder.export(checkpoint, Path('mask_decoder.onnx'))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == graphs[path.stem].read_bytes(), path.name


class Scale(nn.Module):
    """y = exact · x + inexact + large: one weight that FP16 holds and two that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = nn.Parameter(torch.linspace(-1, 1, 64).half().float())
        self.inexact = nn.Parameter(torch.linspace(-1, 1, 64) / 3)
        self.large = nn.Parameter(torch.full((64,), 1e6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.exact * x + self.inexact + self.large


def test_weights_are_stored_in_fp16_only_where_that_is_exact(tmp_path: Path) -> None:
    module, x = Scale(), normal(3, 64)
    onnx_export.export_onnx(module, tmp_path / "scale.onnx", inputs={"x": torch.from_numpy(x)}, outputs=["y"])
    stored = {i.name: i.data_type for i in onnx.load(tmp_path / "scale.onnx").graph.initializer}
    assert stored == {
        "exact.fp16": onnx.TensorProto.FLOAT16,
        "inexact": onnx.TensorProto.FLOAT,
        "large": onnx.TensorProto.FLOAT,
    }
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    assert np.array_equal(run(tmp_path / "scale.onnx", x=x)["y"], expected)


def test_fp16_checkpoint_gives_a_half_size_graph(checkpoint: Checkpoint, graphs: dict[str, Path]) -> None:
    weights = (checkpoint.path / "vision" / "model.safetensors").stat().st_size  # FP16
    assert graphs["clip_encoder"].stat().st_size < 1.5 * weights


def test_large_graph_keeps_its_weights_beside_it(
    checkpoint: Checkpoint, graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA_BYTES", 10_000)
    ltc_projector.export(checkpoint, tmp_path / "ltc_projector.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"ltc_projector.onnx", "ltc_projector.onnx.data"}
    n = checkpoint.grid**2
    inputs = {"patches": normal(1, n, WIDTH), "patches_multi": normal(1, 3, n, WIDTH)}
    inside, beside = run(graphs["ltc_projector"], **inputs), run(tmp_path / "ltc_projector.onnx", **inputs)
    assert np.array_equal(inside["visual_tokens"], beside["visual_tokens"])
