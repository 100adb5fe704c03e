"""INT8 written into the encoders' graphs: their products with weights run on integer kernels, all else stays FP32.

x·W becomes DQ(Q(x))·DQ(W₈), the form that TensorRT, OpenVINO and ONNX Runtime fuse alike: symmetric with zero point 0,
one scale for x, by its largest value on the calibration frames, and one for each column of W. Before that, what makes
single channels of x large is moved into W (SmoothQuant, Xiao et al. 2022). Attention's products of activations, norms,
softmax and GELU keep FP32. So do convolutions: a transformer has few, and ONNX Runtime has integer ones only where what
comes out is INT8 too. The mask decoder is not touched: few tokens, and the last word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vmad_edge.export.graphs.onnx_export import save_model
from vmad_edge.export.precision import ENCODERS, encoder_stages, largest_error
from vmad_edge.runtime.bundle import Manifest, Precision
from vmad_edge.runtime.engines import Arrays
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import AS_STORED, Reading

LEAST_FRAMES = 16
"""To calibrate on: a range that few frames showed is soon exceeded."""
LIMIT = 0.1
"""Largest max |fp32 − int8| / max |fp32| of an output.

A step is 1/127 of a tensor's largest value, and rounding to it moves a value by 0.0023 of that largest one; most values
are a tenth of it, so a product's input is off by about 2%. A row of some twenty products adds up to √20 · 2%.
"""

SMOOTHING = 0.65
"""SmoothQuant's α. Of 0.5, 0.65 and 0.8 it moved the demo's outputs least: CLIP's by 0.064, and by 0.115 without."""

Scales = Mapping[str, float]
"""What one step of INT8 is worth, of each product's activations, by the name of the value."""


def calibration_frames(folder: Path) -> list[str]:
    """The images in `folder`.

    Raises:
        FrameError: fewer than LEAST_FRAMES, or no folder at all.
    """
    frames = list_images([str(folder)])
    if len(frames) < LEAST_FRAMES:
        raise FrameError(
            f"{folder}: expected at least {LEAST_FRAMES} frames to calibrate INT8 on, found {len(frames)}. Take them "
            "from the line that the bundle is for, good parts as they come"
        )
    return frames


def quantize(
    folder: Path,
    manifest: Manifest,
    frames: Sequence[str],
    reading: Reading = AS_STORED,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Precision]:
    """Put the encoders in `folder` into INT8, calibrated on `frames`; returns every graph's name and precision.

    Where an output of a graph then moves by more than LIMIT, the products that INT8 moves most are left in FP32: one,
    two, four, … of them, until it holds. Each graph is fed what its FP32 self is fed.

    Raises:
        FrameError: a frame that cannot be read.
        BundleError: an exported file that its engine refuses.
    """
    chosen: dict[str, Precision] = {path.stem: "fp32" for path in sorted(folder.glob("*.onnx"))}
    stages = list(encoder_stages(folder, manifest, frames, reading))
    for name, inputs in ENCODERS.items():
        progress(f"INT8: {name}")
        source = folder / f"{name}.onnx"
        fed = [{key: each[key] for key in inputs} for each in stages]
        with TemporaryDirectory(dir=folder) as scratch:
            target, smoothed = Path(scratch) / source.name, Path(scratch) / "smoothed.onnx"
            smooth(source, smoothed, fed)
            scales = calibrate(smoothed, fed)
            for kept in _fewest_first(smoothed, fed, scales):
                write_int8(smoothed, target, scales, kept)
                engine = OnnxRuntimeEngine(target)
                errors = [largest_error(engine.run(x), each) for x, each in zip(fed, stages, strict=True)]
                if np.max(errors) <= LIMIT:  # NaN is not
                    chosen[name] = "int8"
                    source.with_name(f"{source.name}.data").unlink(missing_ok=True)
                    for path in Path(scratch).glob(f"{source.name}*"):
                        path.replace(folder / path.name)
                    break
    return chosen


def smooth(source: Path, target: Path, frames: Sequence[Arrays]) -> None:
    """The FP32 graph at `source` to `target`, whose products have channels of more equal size: x·W = (x/s)·(s·W).

    s = max|x|^α / max|W|^(1−α) by channel, on `frames`; where nothing else reads it, a LayerNorm before gives x/s.
    """
    model = ir.load(source)
    largest = [_largest_channels(model.graph, x) for x in list(_products(model.graph))]
    of_frames = _measured(model, source.parent, frames, largest)
    model = ir.load(source)
    graph = model.graph
    for place, (x, nodes) in enumerate(_products(graph).items()):
        weights = [_matrix(node) for node in nodes]
        of_x = np.max([frame[place] for frame in of_frames], axis=0)
        of_w = np.max([np.abs(matrix).max(axis=1) for matrix in weights], axis=0)
        there = (of_x > 0) & (of_w > 0)
        factor = np.ones_like(of_x)
        factor[there] = of_x[there] ** SMOOTHING / of_w[there] ** (1 - SMOOTHING)
        factor /= np.exp(np.log(factor).mean())
        norm = x.producer()
        if norm is not None and norm.op_type == "LayerNormalization" and {use.node for use in x.uses()} <= set(nodes):
            for place_in_norm in (1, 2):
                given = _weights(norm.inputs[place_in_norm])
                assert given is not None
                name = f"{norm.name}.{place_in_norm}.smoothed"
                norm.replace_input_with(place_in_norm, _constant(graph, name, given / factor))
        else:
            divided = ir.node("Mul", [x, _constant(graph, f"{nodes[0].name}.x.factor", 1 / factor)])
            graph.insert_before(nodes[0], divided)
            x, (divided.outputs[0].type, divided.outputs[0].shape) = divided.outputs[0], (x.type, x.shape)
            x.name = f"{nodes[0].name}.x.smoothed"
        for node, matrix in zip(nodes, weights, strict=True):
            node.replace_input_with(0, x)
            node.replace_input_with(1, _constant(graph, f"{node.name}.w.smoothed", matrix * factor[:, None]))
    RemoveUnusedNodesPass()(model)
    save_model(model, target)


def write_int8(source: Path, target: Path, scales: Scales, kept: Collection[str] = ()) -> None:
    """The FP32 graph at `source`, with its products in INT8, to `target`; the same bytes for the same graph.

    Products of one x are joined: ONNX Runtime's integer kernels want a quantized value for themselves.

    Args:
        kept: products that stay FP32, by the names of their nodes.
    """
    model = ir.load(source)
    graph = model.graph
    for activations, nodes in _products(graph).items():
        nodes = [node for node in nodes if node.name not in kept]
        if not nodes:
            continue
        columns, steps = zip(*(_columns(node) for node in nodes), strict=True)
        widths = [len(part) for part in steps]
        name = nodes[0].name
        scale = _constant(graph, f"{name}.x.scale", np.float32(scales[str(activations.name)]))
        zero = _constant(graph, f"{name}.x.zero", np.int8(0))
        quantized = ir.node("QuantizeLinear", [activations, scale, zero])
        left = ir.node("DequantizeLinear", [quantized.outputs[0], scale, zero])
        weights = _constant(graph, f"{name}.w.int8", np.concatenate(columns, axis=1))
        step = _constant(graph, f"{name}.w.scale", np.concatenate(steps))
        zeros = _constant(graph, f"{name}.w.zero", np.zeros(sum(widths), np.int8))
        right = ir.node("DequantizeLinear", [weights, step, zeros], {"axis": 1})
        product = ir.node("MatMul", [left.outputs[0], right.outputs[0]], name=name)
        added = [quantized, left, right, product]
        parts: Sequence[ir.Value] = product.outputs
        if len(nodes) > 1:
            ends = _constant(graph, f"{name}.widths", np.array(widths))
            added.append(ir.node("Split", [product.outputs[0], ends], {"axis": -1}, num_outputs=len(nodes)))
            parts = added[-1].outputs
        graph.insert_before(nodes[0], added)
        for node, part in zip(nodes, parts, strict=True):
            part.type, part.shape = node.outputs[0].type, node.outputs[0].shape
            node.outputs[0].replace_all_uses_with(part)
        for number, value in enumerate(value for node in added for value in node.outputs):
            value.name = f"{name}.int8.{number}"
    RemoveUnusedNodesPass()(model)
    save_model(model, target)


def calibrate(source: Path, frames: Sequence[Arrays]) -> dict[str, float]:
    """Scales for `write_int8`: the largest value that the graph at `source` makes of `frames` is 127 steps."""
    model = ir.load(source)
    values = list(_products(model.graph))
    reduced = [_reduced(model.graph, "ReduceMax", value) for value in values]
    largest = np.max(_measured(model, source.parent, frames, reduced), axis=0)
    return {str(value.name): float(found) / 127 or 1.0 for value, found in zip(values, largest, strict=True)}


def _fewest_first(source: Path, frames: Sequence[Arrays], scales: Scales) -> Iterator[Collection[str]]:
    """Which products to leave in FP32: none, then 1, 2, 4, … of those whose result INT8 moves most on `frames`."""
    yield ()
    model = ir.load(source)
    graph, names, lengths = model.graph, [], []
    for activations, nodes in _products(graph).items():
        scale = _constant(graph, f"{activations.name}.scale", np.float32(scales[str(activations.name)]))
        zero = _constant(graph, f"{activations.name}.zero", np.int8(0))
        rounded = _append(graph, "DequantizeLinear", _append(graph, "QuantizeLinear", activations, scale, zero), scale)
        for node in nodes:
            integers, steps = _columns(node)
            weights = _constant(graph, f"{node.name}.rounded", integers * steps)
            error = _append(graph, "Sub", _append(graph, "MatMul", rounded, weights), node.outputs[0])
            lengths += [_reduced(graph, "ReduceL2", error), _reduced(graph, "ReduceL2", node.outputs[0])]
            names.append(str(node.name))
    error, length = np.square(_measured(model, source.parent, frames, lengths)).sum(0).reshape(-1, 2).T
    worst_first = [names[i] for i in np.argsort(-error / length, kind="stable")]
    count = 1
    while count < len(names):
        yield worst_first[:count]
        count *= 2


def _products(graph: ir.Graph) -> dict[ir.Value, list[ir.Node]]:
    """The products with weights [I,O], by what they multiply, in the graph's order."""
    found = defaultdict[ir.Value, list[ir.Node]](list)
    for node in graph:
        if node.op_type == "MatMul" and (weights := _weights(node.inputs[1])) is not None and weights.ndim == 2:
            assert node.inputs[0] is not None
            found[node.inputs[0]].append(node)
    return found


def _weights(value: ir.Value | None) -> NDArray[np.float32] | None:
    """None of what is computed from the frame. Some are cast from FP16, and attention's split in three and turned."""
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy(), np.float32)
    node = value.producer()
    before = _weights(node.inputs[0]) if node is not None and node.op_type in ("Cast", "Split", "Transpose") else None
    if node is None or before is None or node.op_type == "Cast":
        return before
    if node.op_type == "Transpose":
        return before.transpose(node.attributes["perm"].as_ints())
    return np.split(before, len(node.outputs), node.attributes["axis"].as_int())[value.index() or 0]


def _columns(product: ir.Node) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The weights [I,O] of one of _products in steps, and what a step is worth in each column [O]."""
    weights = _matrix(product)
    largest = np.abs(weights).max(axis=0)
    steps = np.where(largest == 0, 1, largest / 127).astype(np.float32)
    return np.rint(weights / steps).astype(np.int8), steps


def _matrix(product: ir.Node) -> NDArray[np.float32]:
    weights = _weights(product.inputs[1])
    assert weights is not None
    return weights


def _measured(
    model: ir.Model, folder: Path, frames: Sequence[Arrays], values: Sequence[ir.Value]
) -> list[list[NDArray[np.float32]]]:
    """What `values` are on each of `frames`."""
    model.graph.outputs[:] = values
    with TemporaryDirectory(dir=folder) as scratch:
        save_model(model, Path(scratch) / "measured.onnx")
        engine = OnnxRuntimeEngine(Path(scratch) / "measured.onnx")
        return [list(engine.run(frame).values()) for frame in frames]


def _reduced(graph: ir.Graph, by: str, value: ir.Value) -> ir.Value:
    """ReduceMax or ReduceL2 of all |values|."""
    scalar = _append(graph, by, _append(graph, "Abs", value), keepdims=0)
    scalar.type, scalar.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    return scalar


def _largest_channels(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """max |x| [I] of each channel of x [..., I]."""
    assert value.shape is not None
    axes = _constant(graph, f"{value.name}.but_last", np.arange(len(value.shape) - 1))
    largest = _append(graph, "ReduceMax", _append(graph, "Abs", value), axes, keepdims=0)
    largest.type, largest.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([value.shape[-1]])
    return largest


def _append(graph: ir.Graph, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
    node = ir.node(kind, inputs, attributes)
    node.outputs[0].name = f"int8.{len(graph)}"
    graph.append(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
    graph.register_initializer(value)
    return value
