"""FP16 written into the graphs: strongly typed, as TensorRT 11 wants them, for whatever engine takes them.

Products, convolutions and what lies between them compute in FP16. LayerNorm and softmax, with the sums that make its
scores, stay FP32, and so do inputs and outputs. The exporter writes attention as (q·s)(k·s)ᵀ, s² = 1/√d: scaled
before the product, where FP16 would overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vmad_edge.export.graphs.onnx_export import save_model
from vmad_edge.runtime.bundle import Manifest, Precision
from vmad_edge.runtime.engines import Arrays
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine, ort
from vmad_edge.runtime.frame import AS_STORED, Frame, Reading
from vmad_edge.runtime.stages.language import LanguageModel
from vmad_edge.runtime.stages.preprocess import clip_pixels, sam_pixels

LIMIT = 1e-2
"""Largest max |fp32 − fp16| / max |fp32| of an output. One rounding is 5e-4; some hundred in a row add up to this."""

ENCODERS = {
    "clip_encoder": ("clip_pixels",),
    "ltc_projector": ("patches", "patches_multi"),
    "sam_encoder": ("sam_pixels",),
}
"""The graphs before the language model, and what each takes."""

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
ELEMENTWISE = frozenset({"Add", "Gelu", "Mul", "Relu", "Sigmoid"})
MOVES = frozenset(
    {"Concat", "Expand", "Gather", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""They compute nothing, and go with what they move."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def lower(
    folder: Path,
    manifest: Manifest,
    images: Sequence[str],
    reading: Reading = AS_STORED,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Precision]:
    """Put each graph in `folder` into FP16, unless one of its outputs then moves by more than LIMIT on `images`.

    Each is fed what its FP32 self is fed, so that none answers for another. Returns the graphs' names and precisions.

    Raises:
        FrameError: an image that cannot be read.
        BundleError: an exported file that its engine refuses.
    """
    chosen: dict[str, Precision] = {}
    frames = list(_fp32_stages(folder, manifest, images, reading))
    for source in sorted(folder.glob("*.onnx")):
        progress(f"FP16: {source.stem}")
        with TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / source.name
            write_fp16(source, target)
            error = _error(target, frames)
            chosen[source.stem] = "fp16" if error <= LIMIT else "fp32"  # NaN is not
            if error <= LIMIT:
                source.with_name(f"{source.name}.data").unlink(missing_ok=True)
                for path in Path(scratch).glob(f"{source.name}*"):
                    path.replace(folder / path.name)
    return chosen


def write_fp16(source: Path, target: Path) -> None:
    """The FP32 graph at `source`, in FP16, to `target`; the same bytes for the same graph."""
    model = ir.load(source)
    _to_fp16(model.graph)
    RemoveUnusedNodesPass()(model)
    save_model(model, target)


def fp16_session(path: Path) -> ort.InferenceSession:
    """The graph on the CPU, every FP16 value rounded to FP16, as hardware does it.

    On the CPU ONNX Runtime computes FP16 nodes in FP32 and drops the casts between neighbours: what overflows in FP16
    would go unseen. Two Identities after a node keep the casts apart, where nothing is optimised away.
    """
    model = ir.load(path)
    graph = model.graph
    for node in list(graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16:
                first = ir.node("Identity", [value])
                second = ir.node("Identity", [first.outputs[0]])
                _type_as(value, first.outputs[0], second.outputs[0])
                value.replace_all_uses_with(second.outputs[0])
                first.replace_input_with(0, value)
                graph.insert_after(node, [first, second])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with TemporaryDirectory(dir=path.parent) as scratch:
        save_model(model, Path(scratch) / path.name)
        return ort.InferenceSession(Path(scratch) / path.name, options, providers=["CPUExecutionProvider"])


def _to_fp16(graph: ir.Graph) -> None:
    scores = _scores(graph)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Cast":  # of a weight that is stored in FP16
            continue
        to = ir.DataType.FLOAT16 if _is_half(node, scores) else ir.DataType.FLOAT
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in _FLOATS and value.dtype != to:
                if (value, to) not in casts:
                    casts[value, to] = _cast(graph, value, to)
                node.replace_input_with(index, casts[value, to])
        if to == ir.DataType.FLOAT16:  # PRODUCTS, ELEMENTWISE and MOVES of floats give floats and nothing else
            for value in node.outputs:
                value.dtype = to
    for index, output in enumerate(graph.outputs):
        if output.dtype == ir.DataType.FLOAT16:
            name, output.name = output.name, f"{output.name}.fp16"
            graph.outputs[index] = _cast(graph, output, ir.DataType.FLOAT)
            graph.outputs[index].name = name


def _scores(graph: ir.Graph) -> set[ir.Node]:
    """What lies between softmax and the products before it: scores, their bias, their mask."""
    found: set[ir.Node] = set()
    for node in reversed(graph):
        feeds = {user for value in node.outputs for user in value.consumers()}
        if node.op_type in ELEMENTWISE | MOVES and any(user.op_type == "Softmax" or user in found for user in feeds):
            found.add(node)
    return found


def _is_half(node: ir.Node, scores: set[ir.Node]) -> bool:
    floats = [value for value in node.inputs if value is not None and value.dtype in _FLOATS]
    if node in scores or not all(map(_fits, floats)):
        return False
    if node.op_type in MOVES:
        return any(value.dtype == ir.DataType.FLOAT16 for value in floats)
    return node.op_type in PRODUCTS | ELEMENTWISE


def _fits(value: ir.Value) -> bool:
    return value.const_value is None or bool(np.abs(value.const_value.numpy()).max(initial=0) <= np.finfo("f2").max)


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType) -> ir.Value:
    """`value` in another precision; a weight is rounded here and now."""
    producer = value.producer()
    before = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    if before is not None and before.dtype == to:
        return before
    name = f"{value.name}.{'fp16' if to == ir.DataType.FLOAT16 else 'fp32'}"
    if value.const_value is not None:
        rounded = ir.val(name, const_value=ir.tensor(value.const_value.numpy().astype(to.numpy()), name=name))
        graph.register_initializer(rounded)
        return rounded
    node = ir.node("Cast", [value], attributes={"to": to}, name=f"cast_{name}")
    cast = node.outputs[0]
    cast.name, cast.dtype, cast.shape = name, to, value.shape
    if producer is None:
        graph.insert_before(graph[0], [node])
    else:
        graph.insert_after(producer, [node])
    return cast


def _type_as(value: ir.Value, *others: ir.Value) -> None:
    for other in others:
        other.type, other.shape = value.type, value.shape


def encoder_stages(
    folder: Path, manifest: Manifest, images: Sequence[str], reading: Reading = AS_STORED
) -> Iterator[Arrays]:
    """The inputs and outputs of every graph in ENCODERS at FP32, by name, for each image.

    Raises:
        FrameError: an image that cannot be read.
        BundleError: an exported file that its engine refuses.
    """
    engines = {name: OnnxRuntimeEngine(folder / f"{name}.onnx") for name in ENCODERS}
    for image in images:
        frame = Frame.read(image, **reading)
        stages = {
            "clip_pixels": clip_pixels(frame, manifest.clip)[0],
            "sam_pixels": sam_pixels(frame, manifest.sam)[0],
        }
        for name, inputs in ENCODERS.items():
            stages |= engines[name].run({key: stages[key] for key in inputs})
        yield stages


def largest_error(found: Arrays, expected: Arrays) -> float:
    """The largest max relative error of any array in `found`; NaN where one is not finite."""
    return float(np.max([np.abs(found[k] - expected[k]).max() / np.abs(expected[k]).max() for k in found]))


def _fp32_stages(folder: Path, manifest: Manifest, images: Sequence[str], reading: Reading) -> Iterator[Arrays]:
    """Every graph's inputs and outputs, by name, for each image."""
    mask_decoder = OnnxRuntimeEngine(folder / "mask_decoder.onnx")
    question = manifest.conversation.question.replace("{object}", manifest.conversation.object)
    with LanguageModel(folder / "llm.gguf", manifest.language, manifest.conversation) as language:
        for stages in encoder_stages(folder, manifest, images, reading):
            h_seg = language.answer(stages["visual_tokens"][0], question, mode="short", mask_from=0).h_seg
            assert h_seg is not None  # mask_from 0 asks for one on every image
            stages["h_seg"] = h_seg
            yield stages | mask_decoder.run({key: stages[key] for key in ("image_embeddings", "h_seg")})


def _error(path: Path, frames: Sequence[Arrays]) -> float:
    """The largest relative error of any output on any frame; NaN where one is not finite."""
    session = fp16_session(path)
    inputs, outputs = ([v.name for v in values] for values in (session.get_inputs(), session.get_outputs()))
    errors = []
    for stages in frames:
        found = session.run(outputs, {name: stages[name] for name in inputs})
        errors.append(largest_error(dict(zip(outputs, found, strict=True)), stages))
    return float(np.max(errors))
