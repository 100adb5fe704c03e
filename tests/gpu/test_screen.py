"""The screen on a real GPU against the screen on the processor, on the demo's parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.similarity import NormalFeatures
from vmad_edge.runtime.timing import Stopwatch

pytest.importorskip("llama_cpp", reason="not run: the whole runtime is not installed")

from vmad_edge.runtime.systems.vmad import Screen

PARTS = sorted((Path(__file__).parents[2] / "demo/parts").rglob("*.jpg"))


def test_the_screen_finds_what_the_cpu_finds(engines: Engines) -> None:
    """From the frame to its score on the GPU: with TensorRT one graph, launched again for each frame."""
    bundle = engines.bundle
    there, here = Screen(bundle, "cpu"), Screen(bundle, engines.device, engines.plans)
    assert here.similarity.startswith("CUDA"), here.similarity
    features = NormalFeatures(bundle.file("similarity.safetensors"), bundle.manifest.similarity)
    few = there.enroll([Frame.read(path) for path in PARTS[:2]], features)
    for path in PARTS[2:6]:
        frame = Frame.read(path)
        for source in (features, few):
            expected, found = (screen.run(frame, source, Stopwatch()) for screen in (there, here))
            assert abs(found.score - expected.score) < 5e-3  # cosines of halves, 3.6 times that after the softmax
            np.testing.assert_allclose(found.map, expected.map, rtol=0, atol=5e-3)
            scale = np.abs(expected.features.patches).max()
            assert np.abs(found.features.patches - expected.features.patches).max() < 1e-4 * scale
    assert engines.device != "tensorrt" or "one graph" in here.similarity, here.similarity
    here.close()
