"""Any feature graph → a bundle that screens only, PatchCore's way (Roth et al. 2022, arXiv 2106.08265)."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from pydantic import ValidationError

from vmad_edge.export.checkpoint import refuse_lfs_pointer
from vmad_edge.export.folder import new_bundle, refuse_other_folder, with_files
from vmad_edge.export.graphs.onnx_export import save_model
from vmad_edge.runtime.bundle import ClipInput, ScreenManifest, Similarity, Vision, Weights, first_fault, seal
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.errors import CheckpointError

_WRITERS = ("vmad-edge", "onnx-ir", "onnxruntime")
_INPUT, _OUTPUT = "clip_pixels", "patches"


def export_features(
    graph: Path,
    bundle: Path,
    levels: Sequence[str],
    *,
    clip: ClipInput,
    similarity: Similarity,
    weights: Weights,
) -> ScreenManifest:
    """Write a bundle of the screen alone to `bundle`, whole or not at all; a bundle that was there is replaced.

    Its one graph is `clip_pixels` [B,3,S,S] → `patches` [B,N,D]: each level averaged over 3×3 places, resized
    (bilinear) to the finest level's grid, and joined. It has no normal features: parts are compared with references.

    Args:
        graph: an ONNX file with one input [B,3,S,S] float32, B open or 1.
        levels: names of its outputs to join, feature maps [B,C,h,h] or tokens [B,h²,C].
        clip: how a frame becomes the graph's input; `size` is S.

    Raises:
        BundleError: ONNX Runtime cannot load the graph; something else than a bundle is at `bundle`; no room there.
        CheckpointError: a git-LFS pointer, another input, a level that is not there or is no square map, or what
            no bundle may have.
    """
    refuse_other_folder(bundle)
    refuse_lfs_pointer(graph)
    engine = OnnxRuntimeEngine(graph)
    model = ir.load(graph)
    _check_input(model, graph, clip.size)
    outputs = {value.name: value for value in model.graph.outputs}
    if not levels or set(levels) - outputs.keys():
        raise CheckpointError(
            f"{graph}: expected names of its outputs as levels, found {', '.join(levels) or 'none'}; it has "
            f"{', '.join(map(str, outputs))}"
        )
    nothing = np.zeros((1, 3, clip.size, clip.size), np.float32)
    found = engine.run({str(model.graph.inputs[0].name): nothing})
    sides = {name: _side(graph, name, found[name]) for name in levels}
    grid = max(sides.values())
    joined = [_on_grid(model.graph, outputs[name], found[name], sides[name], grid) for name in levels]
    _rewire(model.graph, joined, grid**2)
    RemoveUnusedNodesPass()(model)
    with new_bundle(bundle) as folder:
        save_model(model, folder / "clip_encoder.onnx")
        patches = OnnxRuntimeEngine(folder / "clip_encoder.onnx").run({_INPUT: nothing})[_OUTPUT]
        try:
            manifest = ScreenManifest(
                made_with={"python": platform.python_version(), **{name: version(name) for name in _WRITERS}},
                weights=weights,
                clip=clip,
                vision=Vision(grid=grid, width=patches.shape[2], levels=tuple(levels)),
                similarity=similarity,
                files={},
            )
        except ValidationError as error:
            raise CheckpointError(f"{graph}: no bundle may have {': '.join(first_fault(error))}") from None
        manifest = with_files(manifest, folder)
        seal(folder, manifest)
    return manifest


def input_size(graph: Path) -> int:
    """S of a graph that takes frames of one size alone.

    Raises:
        BundleError: ONNX Runtime cannot load it.
        CheckpointError: a git-LFS pointer, or it takes frames of any size.
    """
    refuse_lfs_pointer(graph)
    OnnxRuntimeEngine(graph)
    shape = ir.load(graph).graph.inputs[0].shape
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        raise CheckpointError(f"{graph} does not fix the size of its input; say it with --size")
    return shape[3]


def _check_input(model: ir.Model, graph: Path, size: int) -> None:
    inputs = model.graph.inputs
    shape = inputs[0].shape
    wanted = (1, 3, size, size)
    fits = shape is not None and len(shape) == 4
    fits = fits and all(not isinstance(dim, int) or dim == want for dim, want in zip(shape or (), wanted, strict=True))
    if len(inputs) != 1 or not fits or inputs[0].dtype != ir.DataType.FLOAT:
        took = "; ".join(f"{value.name} {value.shape} {value.dtype}" for value in inputs)
        raise CheckpointError(
            f"{graph}: expected one input that takes [1, 3, {size}, {size}] float32, found {took}. Export it again "
            "with an open batch, or choose another --size"
        )


def _side(graph: Path, name: str, features: NDArray[np.float32]) -> int:
    """Places per side of a feature map [1,C,h,h] or of tokens [1,h²,C]."""
    shape = features.shape
    side = shape[2] if features.ndim == 4 else round(shape[1] ** 0.5) if features.ndim == 3 else 0
    if features.dtype != np.float32 or side < 2 or shape not in ((1, shape[1], side, side), (1, side**2, shape[-1])):
        raise CheckpointError(
            f"{graph}: level {name}: expected a float32 feature map [B,C,h,h] or tokens [B,h²,C] without class token, "
            f"h at least 2, found {list(shape)} {features.dtype}"
        )
    return int(side)


def _on_grid(graph: ir.Graph, level: ir.Value, features: NDArray[np.float32], side: int, grid: int) -> ir.Value:
    """The level as [B,C,grid,grid].

    Averaging and resizing are linear and separable, so one matrix a side does both, the same in every engine.
    """
    maps = level
    if features.ndim == 3:
        maps = _add(graph, "Transpose", [level], {"perm": [0, 2, 1]})
        maps = _add(graph, "Reshape", [maps, _constant(graph, [0, features.shape[2], side, side])])
    matrix = averaged_and_resized(side, grid)
    rows = _add(graph, "MatMul", [_constant(graph, matrix), maps])
    return _add(graph, "MatMul", [rows, _constant(graph, matrix.T)])


def averaged_and_resized(side: int, grid: int) -> NDArray[np.float32]:
    """[grid,side]: the mean of three neighbours (zeros beyond the border), then linear resizing, half-pixel centres."""
    mean = (np.eye(side) + np.eye(side, k=1) + np.eye(side, k=-1)) / 3
    place = np.clip((np.arange(grid) + 0.5) * side / grid - 0.5, 0, side - 1)
    # Each row of the identity, looked up between its neighbours, is a column of the resizing.
    resize = np.stack([np.interp(place, np.arange(side), row) for row in np.eye(side)], axis=1)
    return (resize @ mean).astype(np.float32)


def _rewire(graph: ir.Graph, maps: Sequence[ir.Value], patches_per_frame: int) -> None:
    """`clip_pixels` in, `patches` out."""
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.name in (_INPUT, _OUTPUT):
            value.name += ".source"
    joined = _add(graph, "Concat", maps, {"axis": 1})
    rows = _add(graph, "Reshape", [joined, _constant(graph, [0, 0, patches_per_frame])])
    patches = _add(graph, "Transpose", [rows], {"perm": [0, 2, 1]})
    graph.inputs[0].name, patches.name = _INPUT, _OUTPUT
    patches.type = ir.TensorType(ir.DataType.FLOAT)
    patches.shape = ir.Shape(["batch", patches_per_frame, None])
    graph.outputs[:] = [patches]


def _add(
    graph: ir.Graph, kind: str, inputs: Sequence[ir.Value], attributes: dict[str, int | list[int]] | None = None
) -> ir.Value:
    node = ir.node(kind, inputs, attributes)
    node.outputs[0].name = f"patchcore.{len(graph)}"
    graph.append(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, values: list[int] | NDArray[np.float32]) -> ir.Value:
    array = np.array(values, np.int64) if isinstance(values, list) else np.ascontiguousarray(values)
    value = ir.val(f"patchcore.constant.{len(graph.initializers)}", const_value=ir.tensor(array))
    graph.register_initializer(value)
    return value
