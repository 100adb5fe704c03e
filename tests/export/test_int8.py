"""INT8 in the graphs: which products, how they are rounded, that integer kernels run them, and what is left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxruntime import quantization
from torch import nn

from vmad_edge.export import pipeline
from vmad_edge.export.graphs.onnx_export import export_onnx
from vmad_edge.export.int8 import LEAST_FRAMES, LIMIT, calibrate, quantize, write_int8
from vmad_edge.export.parity import Parity
from vmad_edge.export.precision import ENCODERS, encoder_stages, largest_error
from vmad_edge.kernels import paths
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.engines import Arrays, onnxruntime
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.folders import list_images


@pytest.fixture(scope="module")
def frames(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many as are needed, of a 12-bit camera: the parity images in all eight positions."""
    folder = tmp_path_factory.mktemp("frames")
    for path in (tiny / "parity_images").iterdir():
        image = cv2.imread(str(path)).astype(np.uint16) * 16
        for i in range(8):
            turned = np.rot90(image, i // 2)
            cv2.imwrite(str(folder / f"{path.stem}{i}.png"), turned[::-1] if i % 2 else turned)
    return folder


@pytest.fixture(scope="module")
def int8(tiny: Path, frames: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of `tiny`, its encoders in INT8."""
    target = tmp_path_factory.mktemp("int8") / "bundle"
    options = ["--llm", "f32", "--precision", "int8", "--calibrate", str(frames), "--bit-depth", "12"]
    assert main(["export", str(tiny), str(target), *options]) == 0
    return Bundle.open(target)


@pytest.fixture(scope="module")
def stages(tiny: Path, bundle: Bundle) -> list[Arrays]:
    """What the FP32 encoders take and give."""
    return list(encoder_stages(bundle.path, bundle.for_review, list_images([str(tiny / "parity_images")])))


def test_the_report_names_the_precision(int8: Bundle) -> None:
    assert int8.manifest.precision == {**dict.fromkeys(ENCODERS, "int8"), "mask_decoder": "fp32"}
    parity = Parity.model_validate_json(int8.file("parity.json").read_bytes())
    assert parity.precision_in_words == "graphs in int8 (mask_decoder in fp32)" and parity.failure is None


@pytest.mark.parametrize("graph", ENCODERS)
def test_all_products_with_weights_are_quantized_and_nothing_else(graph: str, bundle: Bundle, int8: Bundle) -> None:
    path = int8.file(f"{graph}.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path).graph
    weights = {weight.name: numpy_helper.to_array(weight) for weight in model.initializer}
    producer = {output: node for node in model.node for output in node.output}
    quantized = 0
    for node in model.node:
        before = [producer.get(name) for name in node.input]
        if node.op_type == "MatMul" and all(made is not None and made.op_type == "DequantizeLinear" for made in before):
            quantized += 1
            left, right = (made.input for made in before if made is not None)
            assert producer[left[0]].op_type == "QuantizeLinear" and weights[left[1]].shape == ()
            assert weights[right[0]].dtype == np.int8 and np.abs(weights[right[0]]).max(axis=0).tolist() == [127] * len(
                weights[right[1]]
            )
            assert not weights[left[2]].any() and not weights[right[2]].any()  # symmetric
        else:
            assert not any(made is not None and made.op_type == "DequantizeLinear" for made in before), node.name
            assert node.op_type != "MatMul" or not any(_is_weight(name, weights, producer) for name in node.input)
    of_before = [node for node in onnx.load(bundle.file(f"{graph}.onnx")).graph.node if node.op_type == "MatMul"]
    assert 0 < quantized < len(of_before)


def _is_weight(name: str, weights: dict[str, NDArray[Any]], producer: dict[str, onnx.NodeProto]) -> bool:
    return name in weights or (producer[name].op_type == "Cast" and producer[name].input[0] in weights)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("graph", ENCODERS)
def test_int8_is_near_fp32(graph: str, engine: str, int8: Bundle, stages: list[Arrays]) -> None:
    """By none would mean nothing was done."""
    path = int8.file(f"{graph}.onnx")
    if engine == "openvino":
        pytest.importorskip("openvino")
        from vmad_edge.runtime.engines.openvino import OpenVinoEngine

        run = OpenVinoEngine(path, "int8").run
    else:
        run = OnnxRuntimeEngine(path).run
    errors = [largest_error(run({name: each[name] for name in ENCODERS[graph]}), each) for each in stages]
    assert all(1e-3 < error < LIMIT / 2 for error in errors)


@pytest.fixture
def optimised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ONNX Runtime leaves what it makes of the graph that an engine loads, with the engine's settings."""
    options, path = ort.SessionOptions, tmp_path / "optimised.onnx"

    def keeping_the_graph() -> ort.SessionOptions:
        made = options()
        made.optimized_model_filepath = str(path)
        return made

    monkeypatch.setattr(ort, "SessionOptions", keeping_the_graph)
    return path


@pytest.mark.parametrize("graph", ENCODERS)
def test_integer_kernels_run_them(graph: str, int8: Bundle, optimised: Path) -> None:
    """No product with weights is left in FP32."""
    OnnxRuntimeEngine(int8.file(f"{graph}.onnx"))
    left = onnx.load(optimised).graph
    weights = {weight.name for weight in left.initializer}
    kinds = [node.op_type for node in left.node if len(node.input) > 1 and node.input[1] in weights]
    written = [node.op_type for node in onnx.load(int8.file(f"{graph}.onnx")).graph.node]
    assert "DequantizeLinear" not in [node.op_type for node in left.node]
    assert kinds.count("MatMulIntegerToFloat") == written.count("QuantizeLinear") and "MatMul" not in kinds


@pytest.mark.skipif("avx512_vnni" not in paths(), reason="a processor with VNNI is needed to see the difference")
def test_weights_are_unsigned_where_signed_ones_would_saturate(
    int8: Bundle, stages: list[Arrays], optimised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors without VNNI. The sums are the same integers."""
    graph = int8.file("clip_encoder.onnx")
    found, kinds = [], []
    for processor in (paths(), ["plain", "avx2"]):
        monkeypatch.setattr(onnxruntime, "paths", lambda processor=processor: processor)
        found.append(OnnxRuntimeEngine(graph).run({"clip_pixels": stages[0]["clip_pixels"]}))
        left = onnx.load(optimised).graph
        types = {weight.name: weight.data_type for weight in left.initializer}
        kinds.append({types[node.input[1]] for node in left.node if node.op_type == "MatMulIntegerToFloat"})
    assert kinds == [{TensorProto.INT8}, {TensorProto.UINT8}]
    assert largest_error(found[1], found[0]) < 1e-5


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.second(torch.relu(self.first(x))))


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, inputs: list[Arrays]) -> None:
        self._inputs: Iterator[Arrays] = iter(inputs)

    def get_next(self) -> Arrays | None:
        return next(self._inputs, None)


def test_same_as_onnx_runtimes_own_quantization(tmp_path: Path) -> None:
    """Symmetric, by largest values, a scale for each column: the same scales, integers and results."""
    rng = np.random.default_rng(0)
    inputs: list[Arrays] = [{"x": rng.standard_normal((2, 5, 24), np.float32)} for _ in range(4)]
    full, ours, theirs = (tmp_path / f"{name}.onnx" for name in ("full", "ours", "theirs"))
    export_onnx(Perceptron(), full, inputs={"x": torch.from_numpy(inputs[0]["x"])}, outputs=["y"])
    write_int8(full, ours, calibrate(full, inputs))
    quantization.quantize_static(
        full,
        theirs,
        Reader(inputs),
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        extra_options={
            "ActivationSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    constants = [
        sorted(
            (numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer if w.data_type in _KINDS),
            key=lambda array: (array.dtype.name, array.shape, array.sum()),
        )
        for path in (ours, theirs)
    ]
    assert [a.shape for a in constants[0]] == [a.shape for a in constants[1]]
    for a, b in zip(*constants, strict=True):
        assert np.allclose(a, b, rtol=1e-6, atol=0)
    for x in inputs:
        found, expected = (OnnxRuntimeEngine(path).run(x)["y"] for path in (ours, theirs))
        assert np.allclose(found, expected, atol=1e-6)


_KINDS = (TensorProto.FLOAT, TensorProto.INT8)


@pytest.mark.parametrize("smoothed", [True, False])
def test_what_int8_would_ruin(
    smoothed: bool,
    tiny: Path,
    bundle: Bundle,
    frames: Path,
    tmp_path: Path,
    stages: list[Arrays],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A norm's channel is made 3000 times larger, and smaller again by the product behind it: nothing changes but that
    one step of INT8 is now 3000 times coarser for the others. Smoothing mends it; without it the product stays FP32."""
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    path = folder / "clip_encoder.onnx"
    model = onnx.load(path)
    graph = model.graph
    producer = {output: node for node in graph.node for output in node.output}
    norm, product = next(
        (node, users[0])
        for node in graph.node
        if node.op_type == "LayerNormalization"
        and len(users := [user for user in graph.node if node.output[0] in user.input]) == 1
        and users[0].op_type == "MatMul"
    )
    for name, factor in ((norm.input[1], 3000.0), (norm.input[2], 3000.0), (product.input[1], 1 / 3000)):
        stored = producer[name].input[0] if name in producer else name
        weight = next(weight for weight in graph.initializer if weight.name == stored)
        values = numpy_helper.to_array(weight).astype(np.float32)
        values[0] *= factor
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    inputs = [{"clip_pixels": each["clip_pixels"]} for each in stages]
    same = OnnxRuntimeEngine(path)
    assert all(largest_error(same.run(x), each) < 1e-4 for x, each in zip(inputs, stages, strict=True))

    write_int8(path, tmp_path / "whole.onnx", calibrate(path, inputs))
    whole = OnnxRuntimeEngine(tmp_path / "whole.onnx")
    assert all(largest_error(whole.run(x), each) > LIMIT for x, each in zip(inputs, stages, strict=True))
    if not smoothed:
        monkeypatch.setattr("vmad_edge.export.int8.smooth", lambda source, target, frames: shutil.copy(source, target))
    chosen = quantize(folder, bundle.for_review, list_images([str(frames)]), {"bit_depth": 12, "colour": "rgb"})
    assert chosen["clip_encoder"] == "int8"
    kept = OnnxRuntimeEngine(path)
    assert all(largest_error(kept.run(x), each) < LIMIT / 2 for x, each in zip(inputs, stages, strict=True))
    written = onnx.load(path).graph
    producer = {output: node for node in written.node for output in node.output}
    left = next(node for node in written.node if node.name == product.name)
    is_int8 = ["DequantizeLinear", "DequantizeLinear"]
    stays_fp32 = ["LayerNormalization", "Cast"]
    assert [producer[name].op_type for name in left.input] == (is_int8 if smoothed else stays_fp32)
    assert {path.name for path in folder.iterdir()} == {path.name for path in bundle.path.iterdir()}


BAD = {
    # case: (options, frames in `few`, what is said)
    "no frames named": (["--precision", "int8"], 0, "--precision int8 and --calibrate DIR"),
    "frames for nothing": (["--calibrate", "few"], LEAST_FRAMES, "go together"),
    "no such folder": (["--precision", "int8", "--calibrate", "nowhere"], 0, "nowhere does not exist"),
    "empty folder": (["--precision", "int8", "--calibrate", "few"], 0, "no images in"),
    "too few": (["--precision", "int8", "--calibrate", "few"], 3, f"at least {LEAST_FRAMES} frames"),
}


@pytest.mark.parametrize(("options", "count", "says"), BAD.values(), ids=BAD)
def test_bad_calibration_is_refused_first(
    options: list[str],
    count: int,
    says: str,
    frames: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the checkpoint is opened."""
    (tmp_path / "few").mkdir()
    for image in list_images([str(frames)])[:count]:
        shutil.copy(image, tmp_path / "few")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "Checkpoint", None)
    assert main(["export", "checkpoint", "bundle", *options]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["few"]
