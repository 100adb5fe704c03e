"""SAM's encoder with its preprocessing on a machine that plays a GPU (tests/cuda_host.py), against the processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from cuda_host import HostEngine

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.device import DeviceThread
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import sam_pixels
from vmad_edge.runtime.stages.segmentation_cuda import CudaSamEncoder

DEMO = Path(__file__).parents[2] / "demo/bundle"


def test_frames_of_any_size(thread: DeviceThread) -> None:
    bundle = Bundle.open(DEMO)
    path, spec = bundle.file("sam_encoder.onnx"), bundle.for_review.sam
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    encoder = CudaSamEncoder(HostEngine(path, thread), spec)
    rng = np.random.default_rng(0)
    for size in ((60, 90), (60, 90), (70, 70)):  # the same again, then another
        frame = Frame.read(rng.integers(0, 256, (*size, 3), np.uint8))
        pixels, _ = sam_pixels(frame, spec)
        (expected,) = session.run(["image_embeddings"], {"sam_pixels": pixels})
        np.testing.assert_allclose(encoder.run(frame), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
