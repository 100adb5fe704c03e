"""CLIP ViT-L/14 at 336 pixels, the encoder alone, with random weights: each precision against torch at f32, in turns.

    python benchmarks/clip_large.py demo/checkpoint/parity_images [--layers 24] [--turns 10]

INT8 is calibrated on the given frames. `error`: of all patches, |found − torch f32| / |torch f32|, over the frames.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, CLIPVisionModel

from vmad_edge.export.graphs.clip_encoder import ClipEncoder
from vmad_edge.export.graphs.onnx_export import export_onnx
from vmad_edge.export.int8 import calibrate, calibration_frames, write_int8
from vmad_edge.export.precision import write_fp16
from vmad_edge.runtime.benchmark import WHOLE, Spread, Times, take_turns
from vmad_edge.runtime.bundle import ClipInput
from vmad_edge.runtime.engines import Engine
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.engines.openvino import OpenVinoEngine
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.stages.preprocess import clip_pixels

Array = NDArray[np.float32]
BASE = "torch f32"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = ClipInput(
    size=336, resize="exact", pad_to_square=False, resample="bicubic", rescale_factor=1 / 255, mean=MEAN, std=STD
)


def encoder(layers: int) -> ClipEncoder:
    """ViT-L/14-336's shape."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=layers,
        image_size=SPEC.size,
        patch_size=14,
    )
    return ClipEncoder(CLIPVisionModel(config).eval(), -2, (-1,))


def in_torch(module: ClipEncoder) -> Callable[[Array], Array]:
    dtype = next(module.parameters()).dtype

    @torch.no_grad()
    def run(pixels: Array) -> Array:
        return module(torch.from_numpy(pixels).to(dtype))[0].float().numpy()

    return run


def in_engine(engine: Engine) -> Callable[[Array], Array]:
    return lambda pixels: engine.run({"clip_pixels": pixels})["patches"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    run = RunInProgress()
    frames = [Frame.read(path) for path in calibration_frames(args.frames)]
    pixels = {frame.id: clip_pixels(frame, SPEC)[0] for frame in frames}
    module = encoder(args.layers)
    with TemporaryDirectory() as folder:
        full, half, integer = (Path(folder) / f"{name}.onnx" for name in ("full", "half", "integer"))
        example = {"clip_pixels": torch.zeros(1, 3, SPEC.size, SPEC.size)}
        export_onnx(module, full, inputs=example, outputs=["patches", "patches_multi", "cls"])
        write_fp16(full, half)
        write_int8(full, integer, calibrate(full, [{"clip_pixels": array} for array in pixels.values()]))
        engines: dict[str, Engine] = {
            "ONNX Runtime f32": OnnxRuntimeEngine(full),
            "ONNX Runtime int8": OnnxRuntimeEngine(integer),
            "OpenVINO bf16": OpenVinoEngine(half, "fp16"),
            "OpenVINO int8": OpenVinoEngine(integer, "int8"),
        }
        runs = {
            BASE: in_torch(module),
            "torch bf16": in_torch(encoder(args.layers).to(torch.bfloat16)),
            **{name: in_engine(engine) for name, engine in engines.items()},
        }
        found: dict[str, dict[str, Array]] = {name: {} for name in runs}

        def thing(name: str) -> Callable[[Frame], Times]:
            def once(frame: Frame) -> Times:
                start = time.perf_counter()
                found[name][frame.id] = runs[name](pixels[frame.id])
                return {WHOLE: (time.perf_counter() - start) * 1e3}

            return once

        things = {name: cast(Any, thing(name)) for name in runs}  # a Frame is a FrameSource
        take_turns(things, frames, 1)
        times = take_turns(things, frames, args.turns, lambda turns, _: track(turns, "measuring", transient=True))

    rows: dict[str, dict[str, Any]] = {}
    for name, turns in times.items():
        errors = [np.linalg.norm(a - found[BASE][id]) / np.linalg.norm(a) for id, a in found[name].items()]
        ratios = [base[WHOLE] / mine[WHOLE] for base, mine in zip(times[BASE], turns, strict=True)]
        rows[name] = {
            "with": engines[name].provider if name in engines else f"torch {torch.__version__}",
            "ms": Spread.of([turn[WHOLE] for turn in turns]).model_dump(),
            "times_faster_than_torch_f32": statistics.median(ratios),
            "error": float(max(errors)),
        }
    save(
        "clip_large", run.end(["torch"]), {"layers": args.layers, "size": SPEC.size, "turns": args.turns, "rows": rows}
    )
    table = Table("", "p50, ms", "×", "error", box=None)
    for name, row in rows.items():
        cells = (f"{row['ms']['p50']:.0f}", f"{row['times_faster_than_torch_f32']:.2f}", f"{row['error']:.4f}")
        table.add_row(f"{name} ({row['with']})", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
