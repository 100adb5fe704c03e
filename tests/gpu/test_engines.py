"""Engines on a real GPU against ONNX Runtime on the CPU. Each says what was not run, and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from vmad_edge.runtime.engines import Arrays
from vmad_edge.runtime.engines.choice import Engines

DEMO = Path(__file__).parents[2] / "demo/bundle"


@pytest.mark.parametrize("graph", ["clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder"])
@pytest.mark.parametrize("size", [1, 2])  # of the dynamic axes
def test_the_gpu_computes_what_the_cpu_computes(graph: str, size: int, engines: Engines) -> None:
    session = ort.InferenceSession(DEMO / f"{graph}.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(size)
    inputs: Arrays = {
        found.name: rng.normal(size=[n if isinstance(n, int) else size for n in found.shape]).astype(np.float32)
        for found in session.get_inputs()
    }
    names = [output.name for output in session.get_outputs()]
    found = engines.open(graph).run(inputs)
    for name, expected in zip(names, session.run(names, inputs), strict=True):
        # FP32 without TF32: sums in another order, layer upon layer
        assert np.abs(found[name] - expected).max() < 1e-4 * np.abs(expected).max(), name
