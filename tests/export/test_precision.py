"""FP16 in the graphs: how far from FP32, what stays FP32, and what would go wrong if it did not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from vmad_edge.export import precision
from vmad_edge.export.graphs.onnx_export import export_onnx
from vmad_edge.export.parity import Parity
from vmad_edge.export.precision import fp16_session, lower, write_fp16
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import main

GRAPHS = ["clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder"]
HALF_EPS = 2.0**-11
"""FP16's largest relative rounding error."""


@pytest.fixture(scope="module")
def halves(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny bundle's graphs in FP16."""
    folder = tmp_path_factory.mktemp("fp16")
    for name in GRAPHS:
        write_fp16(bundle.file(f"{name}.onnx"), folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in GRAPHS}


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(of: ort.InferenceSession, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    names = [output.name for output in of.get_outputs()]
    return dict(zip(names, of.run(names, inputs), strict=True))


def noise_for(of: ort.InferenceSession) -> dict[str, NDArray[np.float32]]:
    noise = np.random.default_rng(0)
    return {
        value.name: noise.standard_normal([2 if isinstance(n, str) else n for n in value.shape], np.float32)
        for value in of.get_inputs()
    }


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def types(path: Path) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    values = {
        value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]
    }
    return values | {weight.name: weight.data_type for weight in graph.initializer}


@pytest.mark.parametrize("name", GRAPHS)
def test_fp16_is_as_near_as_fp16_can_be(bundle: Bundle, halves: dict[str, Path], name: str) -> None:
    """Off by a few roundings, with and without ONNX Runtime's short cuts; by none would mean nothing was done."""
    full = session(bundle.file(f"{name}.onnx"))
    inputs = noise_for(full)
    expected = run(full, inputs)
    for half in (session(halves[name]), fp16_session(halves[name])):
        found = run(half, inputs)
        assert found.keys() == expected.keys()
        for output, array in expected.items():
            assert found[output].dtype == np.float32
            assert HALF_EPS / 100 < relative_error(found[output], array) < 6 * HALF_EPS, output


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_valid_and_its_norms_and_softmaxes_are_fp32(halves: dict[str, Path], name: str) -> None:
    onnx.checker.check_model(str(halves[name]), full_check=True)
    graph, kinds = onnx.load(halves[name]).graph, types(halves[name])
    assert {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]} == {TensorProto.FLOAT}
    for node in graph.node:
        floats = {kinds[i] for i in [*node.input, *node.output] if i and kinds[i] != TensorProto.INT64}
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert floats == {TensorProto.FLOAT}, node.name
        if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
            assert floats == {TensorProto.FLOAT16}, node.name


@pytest.mark.parametrize("name", GRAPHS)
def test_scores_are_scaled_before_their_product_and_summed_in_fp32(halves: dict[str, Path], name: str) -> None:
    graph, kinds = onnx.load(halves[name]).graph, types(halves[name])
    producer = {output: node for node in graph.node for output in node.output}
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        scores = producer[softmax.input[0]]
        while scores.op_type in ("Add", "Cast"):
            assert scores.op_type == "Cast" or kinds[scores.output[0]] == TensorProto.FLOAT
            scores = producer[scores.input[0]]
        assert scores.op_type == "MatMul"
        assert [producer[side].op_type for side in scores.input] == ["Mul", "Mul"]


@pytest.mark.parametrize("name", GRAPHS)
def test_casts_are_only_where_precision_changes(halves: dict[str, Path], name: str) -> None:
    graph, kinds = onnx.load(halves[name]).graph, types(halves[name])
    weights = {weight.name for weight in graph.initializer}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    results = {node.output[0] for node in casts}
    assert len({(node.input[0], kinds[node.output[0]]) for node in casts}) == len(casts)  # none twice
    for node in casts:
        assert {kinds[node.input[0]], kinds[node.output[0]]} == {TensorProto.FLOAT, TensorProto.FLOAT16}
        assert node.input[0] not in results  # none of another
        assert (
            node.input[0] not in weights or kinds[node.input[0]] == TensorProto.FLOAT16
        )  # weights are rounded already


def test_same_graph_same_bytes(bundle: Bundle, halves: dict[str, Path], tmp_path: Path) -> None:
    write_fp16(bundle.file("sam_encoder.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == halves["sam_encoder"].read_bytes()


class Attention(nn.Module):
    """Attention over tokens [n,64] whose products of queries and keys pass FP16's 65504; scores stay below it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        wide = tokens[None, None] * 50
        return F.scaled_dot_product_attention(wide, wide, tokens[None, None])[0, 0]


def all_in_fp16(target: Path) -> None:
    """The planted fault: the same with every float in FP16, and scores scaled after their product."""
    nodes = [
        helper.make_node("Cast", ["tokens"], ["x"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["x", "fifty"], ["wide"]),
        helper.make_node("Transpose", ["wide"], ["turned"]),
        helper.make_node("MatMul", ["wide", "turned"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"]),
        helper.make_node("MatMul", ["weights", "x"], ["half"]),
        helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
    ]
    tokens, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [9, 64]) for name in ("tokens", "y"))
    fifty, scale = (numpy_helper.from_array(np.float16(v), n) for n, v in (("fifty", 50), ("scale", 1 / 8)))  # 1/√64
    graph = helper.make_graph(nodes, "fault", [tokens], [y], [fifty, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), target)


def test_large_activations_stay_finite_and_right(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    assert np.abs(50 * tokens @ tokens.T * 50).max() > 65504
    export_onnx(Attention(), tmp_path / "attention.onnx", inputs={"tokens": torch.from_numpy(tokens)}, outputs=["y"])
    write_fp16(tmp_path / "attention.onnx", tmp_path / "half.onnx")
    all_in_fp16(tmp_path / "fault.onnx")
    expected = Attention()(torch.from_numpy(tokens)).numpy()
    right = run(fp16_session(tmp_path / "half.onnx"), {"tokens": tokens})["y"]
    assert relative_error(right, expected) < 4 * HALF_EPS
    fault = run(fp16_session(tmp_path / "fault.onnx"), {"tokens": tokens})["y"]
    assert not np.isfinite(fault).all()


class Overflow(nn.Module):
    """In FP16 the product overflows before it is made small again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 300) * 300 * 1e-4


def test_overflow_between_neighbours_is_seen(tmp_path: Path) -> None:
    """ONNX Runtime alone computes them in FP32 on the CPU, and hides what the hardware will do."""
    x = np.ones((2, 2), np.float32)
    export_onnx(Overflow(), tmp_path / "full.onnx", inputs={"x": torch.from_numpy(x)}, outputs=["y"])
    write_fp16(tmp_path / "full.onnx", tmp_path / "half.onnx")
    assert np.isfinite(run(session(tmp_path / "half.onnx"), {"x": x})["y"]).all()
    assert np.isinf(run(fp16_session(tmp_path / "half.onnx"), {"x": x})["y"]).all()


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.full((4,), 1e6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.large


def test_weights_beyond_fp16_keep_their_node_fp32(tmp_path: Path) -> None:
    x = np.full((3, 4), 1 / 3, np.float32)
    export_onnx(Large(), tmp_path / "full.onnx", inputs={"x": torch.from_numpy(x)}, outputs=["y"])
    write_fp16(tmp_path / "full.onnx", tmp_path / "half.onnx")
    assert np.array_equal(run(session(tmp_path / "half.onnx"), {"x": x})["y"], x * np.float32(1e6))


def test_export_in_fp16(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lowered and compared on a 12-bit camera's images."""
    target, deep = tmp_path / "bundle", tmp_path / "deep"
    deep.mkdir()
    for path in (tiny / "parity_images").iterdir():
        cv2.imwrite(str(deep / f"{path.stem}.png"), cv2.imread(str(path)).astype(np.uint16) * 16)
    command = ["export", str(tiny), str(target), "--llm", "f32", "--precision", "fp16", "--parity-images", str(deep)]
    assert main(command) == 2
    assert "bit_depth" in capsys.readouterr().err
    assert main([*command, "--bit-depth", "12"]) == 0
    assert "graphs in fp16" in capsys.readouterr().out.replace("\n", " ")
    half = Bundle.open(target)
    assert half.manifest.precision == dict.fromkeys(GRAPHS, "fp16")
    parity = Parity.model_validate_json(half.file("parity.json").read_bytes())
    assert parity.precision == half.manifest.precision
    errors = {row.stage: row.max_relative_error for row in parity.stages}
    assert all(1e-5 < (errors[stage] or 0) < 2e-2 for stage in ("patches", "visual_tokens", "image_embeddings"))
    assert errors["sam_pixels"] is not None and errors["sam_pixels"] < 1e-5


def test_graph_that_fp16_moves_too_far_stays_fp32(
    tiny: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph is made to overflow; the others are not blamed for it. Weights beside a graph do not stay behind."""
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    path = folder / "ltc_projector.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="ltc_projector.onnx.data")
    rewrite = precision.write_fp16

    def with_overflow(source: Path, target: Path) -> None:
        rewrite(source, target)
        if source.stem == "sam_encoder":
            model = onnx.load(target)
            weight = next(w for w in model.graph.initializer if w.name.endswith("patch_embed.projection.bias.fp16"))
            weight.CopyFrom(numpy_helper.from_array(np.full(weight.dims, np.inf, np.float16), weight.name))
            onnx.save(model, target)

    monkeypatch.setattr(precision, "write_fp16", with_overflow)
    before = {name: (folder / f"{name}.onnx").read_bytes() for name in GRAPHS}
    images = [str(tiny / "parity_images" / "wide.png")]
    chosen = lower(folder, bundle.manifest, images)
    assert chosen == {**dict.fromkeys(GRAPHS, "fp16"), "sam_encoder": "fp32"}
    report = Parity(images=(), question="", precision=chosen, quantization="f32", tensor_types={}, stages=())
    assert report.precision_in_words == "graphs in fp16 (sam_encoder in fp32)"
    changed = {name for name in GRAPHS if (folder / f"{name}.onnx").read_bytes() != before[name]}
    assert changed == set(GRAPHS) - {"sam_encoder"}
    assert {path.name for path in folder.iterdir()} == {path.name for path in bundle.path.iterdir()}
