"""Checkpoint → bundle."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save
from safetensors.torch import load_file

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.folder import new_bundle, refuse_other_folder, with_files
from vmad_edge.export.graphs import clip_encoder, ltc_projector, mask_decoder, sam_encoder
from vmad_edge.export.int8 import calibration_frames, quantize
from vmad_edge.export.language import Quantization, export_language
from vmad_edge.export.parity import ParityError, measure
from vmad_edge.export.parity_page import ParityPage
from vmad_edge.export.precision import lower
from vmad_edge.runtime.bundle import Bundle, Language, Manifest, Precision, Vision, first_fault, seal
from vmad_edge.runtime.errors import CheckpointError, FrameError
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import AS_STORED, Frame, Reading

_WRITERS = ("vmad-edge", "torch", "transformers", "onnx", "onnxscript", "gguf", "llama-cpp-python")


def export(
    checkpoint: Path,
    bundle: Path,
    *,
    quantization: Quantization = "q8_0",
    precision: Precision = "fp32",
    calibrate: Path | None = None,
    parity_images: Path | None = None,
    parity_count: int | None = None,
    reading: Reading = AS_STORED,
    progress: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Write the bundle of `checkpoint` to `bundle`, whole or not at all; a bundle that was there is replaced.

    Args:
        quantization: of the language model. q8_0 halves F16, and its blocks of 32 fit nearly every model's rows;
            q4_k_m is smaller still, but wants rows that are multiples of 256.
        precision: of the graphs. A graph that FP16 or INT8 would move too far stays FP32; the manifest says which.
        calibrate: frames to calibrate INT8 on; None for the other precisions.
        parity_images: real images to compare source and export on; None takes the checkpoint's own.
        parity_count: on how many, see `images_to_compare`.
        reading: how `calibrate` and the images are read.
        progress: gets the name of each step as it begins.

    Raises:
        CheckpointError: the checkpoint cannot be exported, or there are no images to compare on.
        FrameError: too few frames to calibrate on, or one that cannot be read.
        ParityError: the export is past a limit of parity.
        BundleError: something else than a bundle is at `bundle`, or there is no room for one.
    """
    refuse_other_folder(bundle)
    frames = None if calibrate is None else calibration_frames(calibrate)
    if (precision == "int8") != (frames is not None):
        raise CheckpointError("--precision int8 and --calibrate DIR, the frames to calibrate it on, go together")
    progress("checkpoint")
    source = Checkpoint.open(checkpoint)
    images, more = images_to_compare(source, parity_images, parity_count, reading)
    manifest = _manifest(source, quantization)
    source.check_weights()
    with new_bundle(bundle) as folder:
        for graph in (clip_encoder, ltc_projector, sam_encoder, mask_decoder):
            name = graph.__name__.rpartition(".")[2]
            progress(name)
            graph.export(source, folder / f"{name}.onnx")
        progress("language model")
        export_language(source.path / "language", source.path / "adapter", folder / "llm.gguf", quantization)
        _export_similarity(source, folder / "similarity.safetensors")
        if precision == "fp16":
            manifest = manifest.model_copy(update={"precision": lower(folder, manifest, images, reading, progress)})
        elif frames is not None:
            manifest = manifest.model_copy(update={"precision": quantize(folder, manifest, frames, reading, progress)})
        manifest = with_files(manifest, folder)
        page = ParityPage()
        unsealed = Bundle(folder, "not sealed yet", manifest)
        parity = measure(source, unsealed, images, more, reading=reading, progress=progress, each=page.add)
        if parity.failure:
            raise ParityError(
                f"{bundle} was not written. {parity.failure}. A finer --llm or --precision tells whether rounding "
                "alone does it; if it stays, the export computes something else than the checkpoint: please report it.",
                parity,
            )
        (folder / "parity.json").write_text(parity.model_dump_json(indent=2) + "\n")
        page.write(folder / "parity.html", parity)
        manifest = with_files(manifest, folder)
        seal(folder, manifest)
    return manifest


_MOST_LADDERS = 16
"""Images that all stages are compared on, where a number of images is asked for: both sides' arrays are kept."""
_FIRST_DRAWN = 100_000
"""The drawn parts' numbers begin here, beyond those that train, choose or measure the reference model."""


def images_to_compare(
    source: Checkpoint, folder: Path | None, count: int | None, reading: Reading = AS_STORED
) -> tuple[list[str], list[Callable[[], Frame]]]:
    """What parity compares all stages on, and what it compares decisions on besides.

    Args:
        folder: of real images; None takes the checkpoint's own.
        count: of both together; where the checkpoint's own are fewer, parts are drawn. None takes every image of the
            folder, for all stages.
        reading: how those are read that are compared on decisions alone.

    Raises:
        CheckpointError: no images came with the checkpoint.
        FrameError: no images in the folder, or fewer than `count` in one that was named.
    """
    paths = list_images([str(folder or own_images(source))])
    if count is None:
        return paths, []
    if folder is not None and len(paths) < count:
        raise FrameError(
            f"expected {count} images in {folder}, found {len(paths)}. Without a folder, parts are drawn beside the "
            "checkpoint's own images."
        )
    drawn = max(0, count - len(paths))
    chosen = _spread(paths, min(count, len(paths)))
    ladder = _spread(chosen, min(_MOST_LADDERS, len(chosen)))
    rest = [partial(Frame.read, path, **reading) for path in chosen if path not in set(ladder)]
    return ladder, [*rest, *(partial(_drawn, _FIRST_DRAWN + i) for i in range(drawn))]


def _spread(paths: list[str], count: int) -> list[str]:
    """`count` of them, evenly over the list."""
    return [paths[i * len(paths) // count] for i in range(count)]


def _drawn(number: int) -> Frame:
    from vmad_edge.export.reference.evaluate import unseen

    (part,) = unseen(1, first=number)
    return Frame(part.image, f"drawn part {number}")


def own_images(source: Checkpoint) -> Path:
    """The folder of real images that came with the checkpoint.

    Raises:
        CheckpointError: none did.
    """
    images = source.path / "parity_images"
    if not images.is_dir():
        raise CheckpointError(
            f"{source.path} has no parity_images to compare source and export on: name a folder of real images with "
            "--parity-images"
        )
    return images


def _export_similarity(source: Checkpoint, target: Path) -> None:
    features = {name: tensor.float().numpy() for name, tensor in load_file(source.path / target.name).items()}
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{source.path / target.name}: {name}: expected finite numbers, found NaN or infinity"
            )
    target.write_bytes(save(features))


def _manifest(source: Checkpoint, quantization: Quantization) -> Manifest:
    """All but the hashes of the files, which are not written yet."""
    try:
        return _described(source, quantization)
    except ValidationError as error:
        where, what = first_fault(error)
        raise CheckpointError(f"{source.path}: no bundle may have {where}: {what}") from None


def _described(source: Checkpoint, quantization: Quantization) -> Manifest:
    config = source.config
    return Manifest(
        made_with={"python": platform.python_version(), **{name: version(name) for name in _WRITERS}},
        weights=config.weights,
        clip=source.clip,
        sam=source.sam,
        vision=Vision(grid=source.grid, width=source.width, patches_level=config.patches_level, levels=config.levels),
        conversation=config.conversation,
        language=Language(
            width=source.language_width,
            visual_tokens=source.visual_tokens,
            context_length=min(
                source.context_length, source.visual_tokens + config.max_new_tokens + config.max_prompt_tokens
            ),
            vocabulary=source.vocabulary,
            space_prefix=source.space_prefix,
            quantization=quantization,
            seg_token=config.seg_token,
            seg_token_id=source.seg_token_id,
            seg_state=config.seg_state,
            yes_token_ids=config.yes_token_ids,
            no_token_ids=config.no_token_ids,
            max_new_tokens=config.max_new_tokens,
            answer=config.answer,
            llama=config.llama,
        ),
        similarity=config.similarity,
        files={},
    )
