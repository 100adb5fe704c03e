"""How far FP16 moves MobileSAM's encoder: its embeddings, and the masks behind them.

    python benchmarks/mobile_sam_fp16.py ../shared/weights/mobile_sam.safetensors ../shared/data/cookies/train/good

Every FP16 value is rounded to FP16, as hardware does it. Masks come from the FP32 decoder on both sides, asked for what
is in a box around the middle.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import SamModel

from vmad_edge.export.graphs.mask_decoder import PromptedDecoder
from vmad_edge.export.graphs.onnx_export import export_onnx
from vmad_edge.export.graphs.sam_encoder import SamEncoder
from vmad_edge.export.models.mobile_sam import MobileSamConfig, load_mobile_sam
from vmad_edge.export.precision import LIMIT, fp16_session, write_fp16
from vmad_edge.runtime.bundle import SamInput
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import sam_pixels

SIZE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("photographs")
    parser.add_argument("--count", type=int, default=4, help="of the photographs")
    options = parser.parse_args()

    sam = load_mobile_sam(MobileSamConfig(model_type="mobile_sam"), options.weights)
    decoder = PromptedDecoder(sam)
    print(f"| photograph | max relative error (limit {LIMIT}) | relative L2 error | IoU of the masks |")
    print("|---|---|---|---|")
    with TemporaryDirectory() as folder:
        full, half = Path(folder) / "sam_encoder.onnx", Path(folder) / "half.onnx"
        pixels = torch.zeros(1, 3, SIZE, SIZE)
        export_onnx(SamEncoder(sam.vision_encoder), full, inputs={"sam_pixels": pixels}, outputs=["image_embeddings"])
        write_fp16(full, half)
        fp32, fp16 = OnnxRuntimeEngine(full), fp16_session(half)
        for path in list_images([options.photographs])[: options.count]:
            inputs, covered = sam_pixels(Frame.read(path), SamInput(size=SIZE))
            a = fp32.run({"sam_pixels": inputs})["image_embeddings"]
            (b,) = fp16.run(["image_embeddings"], {"sam_pixels": inputs})
            largest = np.abs(a - b).max() / np.abs(a).max()
            total = np.linalg.norm(a - b) / np.linalg.norm(a)
            one, other = (mask(sam, decoder, embeddings, covered) for embeddings in (a, b))
            iou = (one & other).sum() / (one | other).sum()
            print(f"| {Path(path).name} | {largest:.2e} | {total:.2e} | {iou:.4f} |", flush=True)


@torch.no_grad()
def mask(
    sam: SamModel, decoder: PromptedDecoder, embeddings: NDArray[np.float32], covered: tuple[int, int]
) -> NDArray[np.bool_]:
    """[256,256], of the box that leaves out a fifth of the image on each side."""
    height, width = covered
    box = torch.tensor([[[0.2 * width, 0.2 * height, 0.8 * width, 0.8 * height]]])
    sparse, _ = sam.prompt_encoder(input_points=None, input_labels=None, input_boxes=box, input_masks=None)
    logits, _ = decoder(torch.from_numpy(embeddings), sparse[0])
    found: NDArray[np.bool_] = logits[0, 0].numpy() > 0
    return found


if __name__ == "__main__":
    main()
