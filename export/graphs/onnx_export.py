"""torch module → ONNX file, by torch's dynamo exporter: nothing left over, weights in FP16 where that is exact."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.export import Dim

OPSET = 20
EXTERNAL_DATA_BYTES = 1_500_000_000
"""Larger graphs keep their weights beside them in `<name>.onnx.data`: protobuf ends at 2 GiB."""


def export_onnx(
    module: nn.Module,
    path: Path,
    *,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Dim] | None = None,
) -> None:
    """Write `module` to `path` as ONNX, the same bytes for the same weights.

    Args:
        inputs: an example for each parameter of `module.forward`, by its name, in its order.
        outputs: names of what `forward` returns.
        dynamic: inputs whose first axis varies, and that axis.
    """
    axes = dynamic or {}
    with torch.no_grad(), _without_chatter():
        program = torch.onnx.export(
            module.eval(),
            kwargs=dict(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes={name: {0: axes[name]} if name in axes else None for name in inputs},
            verbose=False,
        )
    assert program is not None  # None only for the exporter before dynamo
    model = program.model
    _clear_metadata(model)
    _store_exact_weights_in_fp16(model.graph)
    save_model(model, path)


def save_model(model: ir.Model, path: Path) -> None:
    ir.external_data.load_to_model(model)  # weights beside the file it came from do not move with it
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None)


def _clear_metadata(model: ir.Model) -> None:
    """The exporter notes stack traces, with this machine's paths, at every node and value."""
    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in values:
        value.metadata_props.clear()


def _store_exact_weights_in_fp16(graph: ir.Graph) -> None:
    """FP32 weights that FP16 holds exactly are stored in FP16 behind a Cast, which every engine folds when it loads.

    So a checkpoint in FP16 gives a bundle of half the size, and the computation stays FP32 to the last bit.
    """
    casts = []
    for name, weight in list(graph.initializers.items()):
        tensor = weight.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        exact = tensor.numpy()
        with np.errstate(over="ignore"):
            half = exact.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), exact):
            continue
        stored = ir.val(f"{name}.fp16", const_value=ir.tensor(half))
        cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT}, name=f"cast_{name}")
        weight.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, weight.type, weight.shape
        graph.register_initializer(stored)
        casts.append(cast)
    graph.insert_before(graph[0], casts)


@contextmanager
def _without_chatter() -> Iterator[None]:
    """The exporter logs and warns of what is none of the user's business (torchvision, deprecations of its own)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
