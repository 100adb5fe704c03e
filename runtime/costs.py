"""What a bundle's stages cost: operations and bytes, counted from its own graphs and GGUF. No engine is opened.

Operations are those of products (2 for each multiplication with its addition); what lies between them counts nothing.
Bytes are the least that must come from memory or go there: weights once, inputs, outputs, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmad_edge.kernels import Dtype
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.headers import BFLOAT16, FLOAT16, UNKNOWN, Gguf, Graph, Node, Tensor, read_onnx

Kind = Literal["fp32", "fp16", "int8"]
"""What is multiplied."""

_MATRICES: dict[int, Kind] = {0: "fp32", 1: "fp16", 30: "fp16"}
"""By ggml's type; any other is quantized."""
_UNCOUNTED = frozenset(
    {"Attention", "ConvInteger", "DeformConv", "GRU", "LSTM", "MatMulInteger", "QLinearConv", "QLinearMatMul", "RNN"}
)
"""Products that are not counted here: no graph of a bundle has them."""


@dataclass(frozen=True)
class Cost:
    """Of one pass: a graph's run, or one decode."""

    operations: dict[Kind, float]
    bytes: float


@dataclass(frozen=True)
class GraphCost:
    run: Cost
    """For one frame, or one prompt."""
    weights: int
    """Bytes that stay in memory while the graph is loaded."""


def graph_cost(path: Path) -> GraphCost:
    """Of an ONNX graph.

    Raises:
        BundleError: it does not tell the shapes of what it multiplies.
    """
    graph = read_onnx(path)
    try:
        return _counted(graph, path)
    except (LookupError, ValueError, OverflowError, RecursionError):
        raise BundleError(
            f"{path}: its graph cannot be counted: it names values that it does not describe, or sizes that no graph "
            "has. Export the bundle again."
        ) from None


def _counted(graph: Graph, path: Path) -> GraphCost:
    made_by = {output: node for node in graph.nodes for output in node.outputs}
    cast = {node.inputs[0]: node.outputs[0] for node in graph.nodes if node.kind == "Cast"}
    operations: dict[Kind, float] = {"fp32": 0.0, "fp16": 0.0, "int8": 0.0}
    for node in graph.nodes:
        if node.kind in _UNCOUNTED:
            raise BundleError(f"{path}: it holds {node.kind}, which is not counted. Export the bundle again.")
        if node.kind in _MULTIPLICATIONS:
            count = _MULTIPLICATIONS[node.kind](node, graph)
            if count <= 0:
                raise BundleError(
                    f"{path}: it does not tell the shapes around {node.outputs[0]}. Write them into the network "
                    "(onnx.shape_inference), and export the bundle again."
                )
            operations[_kind(node, graph.tensors[node.inputs[0]], made_by)] += 2.0 * count
    # Engines hold a weight behind a Cast as what it casts to.
    weights = sum(graph.tensors[cast.get(name, name)].bytes for name in graph.weights)
    moved = weights + sum(graph.tensors[name].bytes for name in (*graph.inputs, *graph.outputs))
    return GraphCost(Cost(operations, moved), weights)


def similarity_cost(query: int, bank: int, width: int, dtype: Dtype) -> Cost:
    """Of `query` patches [Q,D] against `bank` rows [M,D] (kernels.cuda, which keeps float16 or int8 rows)."""
    kind: Kind = "int8" if dtype == "int8" else "fp16"
    size = 1 if dtype == "int8" else 2
    return Cost({kind: 2.0 * query * bank * width}, (4 * query + size * bank) * width + 12 * query)


@dataclass(frozen=True)
class LanguageCost:
    """Of a LLaMA in llama.cpp, whose quantized products multiply int8 (ggml's MMQ: activations become q8_1)."""

    kind: Kind
    matrices: int
    """Weights that every token is multiplied with."""
    matrix_bytes: int
    head: int
    """Weights of the output matrix, used where logits are asked for."""
    head_bytes: int
    attention: int
    """Layers × heads × width of a head."""
    kv_bytes: int
    """Keys and values of one position."""
    weights: int
    """Bytes of all tensors."""

    @staticmethod
    def of(gguf: Gguf, kv_type: str) -> LanguageCost:
        """Args:
            kv_type: the manifest's: f32, f16 or q8_0.

        Raises:
            BundleError: metadata of a LLaMA are missing.
        """
        arch = gguf.metadata.get("general.architecture")

        def number(name: str, default: int | None = None) -> int:
            found = gguf.metadata.get(f"{arch}.{name}", default)
            if not isinstance(found, int) or found < 1:
                raise BundleError(f"the GGUF does not tell {arch}.{name}. Export the bundle again.")
            return found

        layers, heads, width = number("block_count"), number("attention.head_count"), number("embedding_length")
        key = number("attention.key_length", width // heads)
        value = number("attention.value_length", key)
        each = {name: tensor for name, tensor in gguf.tensors.items() if len(tensor.shape) > 1 and "blk." in name}
        head = gguf.tensors.get("output.weight") or gguf.tensors.get("token_embd.weight")  # or they are the same
        if head is None or not each:
            raise BundleError("the GGUF does not hold the tensors of a LLaMA. Export the bundle again.")
        largest = max(each.values(), key=lambda tensor: math.prod(tensor.shape))
        per_value = {"f32": 4, "f16": 2, "q8_0": 34 / 32}[kv_type]
        return LanguageCost(
            kind=_MATRICES.get(largest.type, "int8"),
            matrices=sum(math.prod(tensor.shape) for tensor in each.values()),
            matrix_bytes=sum(tensor.bytes for tensor in each.values()),
            head=math.prod(head.shape),
            head_bytes=head.bytes,
            attention=layers * heads * (key + value) // 2,
            kv_bytes=round(layers * number("attention.head_count_kv", heads) * (key + value) * per_value),
            weights=sum(tensor.bytes for tensor in gguf.tensors.values()),
        )

    def decode(self, tokens: int, before: int, outputs: int) -> Cost:
        """One decode of `tokens` after `before` positions, with logits of `outputs` of them. Attention is fp16."""
        seen = tokens * before + tokens * (tokens + 1) / 2
        operations: dict[Kind, float] = {self.kind: 2.0 * (self.matrices * tokens + self.head * outputs)}
        operations["fp16"] = operations.get("fp16", 0.0) + 4.0 * self.attention * seen
        head = self.head_bytes if outputs else 0
        return Cost(operations, self.matrix_bytes + head + self.kv_bytes * (before + tokens))


def _kind(node: Node, first: Tensor, made_by: dict[str, Node]) -> Kind:
    """Both sides from DequantizeLinear: an engine multiplies what lies before it."""
    if all(name in made_by and made_by[name].kind == "DequantizeLinear" for name in node.inputs[:2]):
        return "int8"
    return "fp16" if first.type in (FLOAT16, BFLOAT16) else "fp32"


def _matmul(node: Node, graph: Graph) -> int:
    """Exporters leave some shapes within attention open: what one side does not tell, the other does."""
    a, b = (graph.tensors[name].shape for name in node.inputs)
    out = graph.tensors[node.outputs[0]].shape if node.outputs[0] in graph.tensors else (UNKNOWN,)
    if UNKNOWN not in out:
        return math.prod(out) * (b[-2] if a[-1] == UNKNOWN else a[-1])
    columns = _summed_over(node.outputs[0], graph) if b[-1] == UNKNOWN else b[-1]
    return UNKNOWN if UNKNOWN in a else math.prod(a) * columns


def _summed_over(name: str, graph: Graph) -> int:
    """A value's last axis, as the product tells that sums over it."""
    for node in graph.nodes:
        if node.kind == "MatMul" and node.inputs[0] == name:
            return graph.tensors[node.inputs[1]].shape[-2]
        if node.kind in ("Add", "Cast", "Softmax") and name in node.inputs:
            return _summed_over(node.outputs[0], graph)
    return UNKNOWN


def _gemm(node: Node, graph: Graph) -> int:
    a, out = graph.tensors[node.inputs[0]].shape, graph.tensors[node.outputs[0]].shape
    return _product(out) * a[0 if node.attributes.get("transA", 0) else 1]


def _conv(node: Node, graph: Graph) -> int:
    return _product(graph.tensors[node.outputs[0]].shape) * math.prod(graph.tensors[node.inputs[1]].shape[1:])


def _conv_transpose(node: Node, graph: Graph) -> int:
    return _product(graph.tensors[node.inputs[0]].shape) * math.prod(graph.tensors[node.inputs[1]].shape[1:])


def _einsum(node: Node, graph: Graph) -> int:
    letters = str(node.attributes["equation"]).replace(" ", "").partition("->")[0].replace(",", "")
    axes = [axis for name in node.inputs for axis in graph.tensors[name].shape]
    return _product(dict(zip(letters, axes, strict=True)).values())


def _product(axes: Iterable[int]) -> int:
    sizes = list(axes)
    return UNKNOWN if UNKNOWN in sizes else math.prod(sizes)


_MULTIPLICATIONS = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
}
"""Of a node; not above 0 where the file does not tell."""
