"""The screen on a GPU, on a machine that plays one (tests/cuda_host.py), against the screen on the processor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_host import HostDevice, HostEngine

from vmad_edge.kernels import Dtype
from vmad_edge.kernels.cuda import DeviceArray, library
from vmad_edge.runtime import cli, device
from vmad_edge.runtime.bundle import Bundle, Similarity, Thresholds
from vmad_edge.runtime.device import Device, DeviceThread
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Screening, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.stages.similarity import NormalFeatures, References
from vmad_edge.runtime.systems import screen_cuda
from vmad_edge.runtime.systems.screen_cuda import CudaScreen
from vmad_edge.runtime.systems.vmad import Finding, Review, Screen
from vmad_edge.runtime.timing import Stopwatch

DEMO = Path(__file__).parents[2] / "demo/bundle"
PARTS = sorted((DEMO.parent / "parts").rglob("*.jpg"))
LIMIT = 2e-3
"""Of map and score. Rows of 192 halves put a cosine some 1e-4 off; the softmax at 0.07 makes up to 3.6 times that."""


def encoder(bundle: Bundle, thread: DeviceThread, captures: bool = True) -> HostEngine:
    return HostEngine(bundle.file("clip_encoder.onnx"), thread, captures)


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open(DEMO)


@pytest.fixture(scope="module")
def cpu(demo: Bundle) -> Screen:
    return Screen(demo, "cpu")


def part(number: int, step: int = 6) -> Frame:
    """A demo part, every so many pixels of it."""
    return Frame.read(Frame.read(PARTS[number]).pixels[::step, ::step])


def normal_features(bundle: Bundle, **spec: Any) -> NormalFeatures:
    return NormalFeatures(bundle.file("similarity.safetensors"), Similarity(**spec))


def references(cpu: Screen, beside: NormalFeatures | None, dtype: Dtype = "float32") -> References:
    """Of two parts, every fourth patch."""
    found = cpu.enroll([part(0), part(1)], beside)
    found.dtype = dtype
    return found.take(np.arange(0, len(found.features), 4))


def compare(found: Screening, expected: Screening, limit: float = LIMIT) -> None:
    np.testing.assert_array_equal(found.features.patches, expected.features.patches)
    np.testing.assert_array_equal(found.features.patches_multi, expected.features.patches_multi)
    assert found.features.view == expected.features.view
    np.testing.assert_allclose(found.map, expected.map, rtol=0, atol=limit)  # NaN where the other has it
    assert abs(found.score - expected.score) <= limit
    assert found.scope_distance == expected.scope_distance
    assert found.worst[0] == expected.worst[0] and abs(found.worst[1] - expected.worst[1]) <= limit


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        pytest.param(lambda cpu, demo: normal_features(demo), LIMIT, id="normal and abnormal features"),
        pytest.param(lambda cpu, demo: references(cpu, None), LIMIT, id="references alone"),
        pytest.param(lambda cpu, demo: references(cpu, normal_features(demo)), LIMIT, id="references beside features"),
        pytest.param(lambda cpu, demo: references(cpu, None, "int8"), 1e-2, id="int8 references"),
    ],
)
def test_one_graph_screens_frame_after_frame(
    source: Callable[[Screen, Bundle], NormalFeatures | References],
    limit: float,
    cpu: Screen,
    demo: Bundle,
    thread: DeviceThread,
    cuda_device: HostDevice,
) -> None:
    compared_with = source(cpu, demo)
    screen = CudaScreen(encoder(demo, thread), demo.manifest)
    for frame in (part(2), part(-1), part(2)):
        expected = cpu.run(frame, compared_with, Stopwatch())
        compare(screen.run(frame, compared_with, Stopwatch()), expected, limit)
    assert cuda_device.graphs == 1


@pytest.mark.parametrize(
    ("clip", "rule"),
    [
        pytest.param({"resize": "shortest_edge"}, "max", id="cropped: the map knows what was not inspected"),
        pytest.param({"pad_to_square": True}, "mean_top_1_percent", id="padded: what is not the frame does not count"),
    ],
)
def test_other_preprocessing(clip: dict[str, Any], rule: str, demo: Bundle, thread: DeviceThread) -> None:
    manifest = demo.manifest.model_copy(
        update={
            "clip": demo.manifest.clip.model_copy(update=clip),
            "similarity": demo.manifest.similarity.model_copy(update={"score_rule": rule}),
        }
    )
    other, features = replace(demo, manifest=manifest), normal_features(demo)
    frame = Frame.read(np.ascontiguousarray(part(3).pixels[: part(3).pixels.shape[0] // 2]))
    expected = Screen(other, "cpu").run(frame, features, Stopwatch())
    compare(CudaScreen(encoder(other, thread), manifest).run(frame, features, Stopwatch()), expected)


def test_a_bank_that_grows_and_frames_of_many_sizes(
    cpu: Screen, demo: Bundle, thread: DeviceThread, cuda_device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are captured again when their memory is other memory; lanes that were dropped are made again."""
    monkeypatch.setattr(screen_cuda, "_LANES", 2)
    compared_with = references(cpu, None)
    screen = CudaScreen(encoder(demo, thread), demo.manifest)

    def screened(frame: Frame) -> int:
        """Graphs captured until then."""
        found = screen.run(frame, compared_with, Stopwatch())
        compare(found, cpu.run(frame, compared_with, Stopwatch()))
        return cuda_device.graphs

    large, small = part(4, 24), part(4, 28)
    assert [screened(frame) for frame in (large, large, small, small)] == [0, 1, 1, 2]
    compared_with.bank.evict(10)  # other rows have these numbers now, in the same memory
    assert screened(large) == 2
    compared_with.bank.extend(cpu.run(part(5), compared_with, Stopwatch()).features.patches[::3])
    assert [screened(frame) for frame in (part(5, 24), small)] == [3, 4]
    assert [screened(frame) for frame in (part(5, 20), large, large)] == [4, 4, 5]


def test_an_engine_that_cannot_be_captured(
    cpu: Screen, demo: Bundle, thread: DeviceThread, cuda_device: HostDevice
) -> None:
    """ONNX Runtime's: the same memory, kernel by kernel."""
    features, frame = normal_features(demo), part(6)
    screen = CudaScreen(encoder(demo, thread, captures=False), demo.manifest)
    compare(screen.run(frame, features, Stopwatch()), cpu.run(frame, features, Stopwatch()))
    assert cuda_device.graphs == 0


def test_features_of_a_good_frame_come_when_they_are_asked_for(
    cpu: Screen, demo: Bundle, thread: DeviceThread, cuda_device: HostDevice
) -> None:
    """And are that frame's, although others were screened since."""
    features, first, second = normal_features(demo), part(6, 24), part(7, 24)
    features.thresholds = Thresholds(good_below=9, defect_above=9)
    screen = CudaScreen(encoder(demo, thread), demo.manifest)
    before = cuda_device.brought
    found = screen.run(first, features, Stopwatch())
    assert cuda_device.brought - before < found.map.nbytes + 10_000 < demo.manifest.vision.grid**2 * 192 * 4
    screen.run(second, features, Stopwatch())
    compare(found, cpu.run(first, features, Stopwatch()))


def test_the_scope_of_a_good_frame(cpu: Screen, demo: Bundle, thread: DeviceThread) -> None:
    """Its patches come for that; its features stay where they are."""
    compared_with, frame = references(cpu, None), part(6, 24)
    compared_with.thresholds = Thresholds(good_below=9, defect_above=9)
    found = CudaScreen(encoder(demo, thread), demo.manifest).run(frame, compared_with, Stopwatch())
    assert found.scope_distance is not None and "patches" not in vars(found.features)
    compare(found, cpu.run(frame, compared_with, Stopwatch()))


def test_a_capture_that_fails_is_told_and_not_tried_again(
    cpu: Screen, demo: Bundle, thread: DeviceThread, cuda_device: HostDevice
) -> None:
    class Uncapturable(HostEngine):
        tried = 0

        def queue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
            if cuda_device.captures:
                Uncapturable.tried += 1
                raise VmadError("CUDA says: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            super().queue(inputs, outputs)

    features, frame = normal_features(demo), part(6, 24)
    screen = CudaScreen(Uncapturable(demo.file("clip_encoder.onnx"), thread), demo.manifest)
    assert screen.how.startswith("CUDA, one graph")
    for _ in range(3):
        compare(screen.run(frame, features, Stopwatch()), cpu.run(frame, features, Stopwatch()))
    assert Uncapturable.tried == 1 and screen.how.endswith("CAPTURE_UNSUPPORTED")


def test_nan_is_no_score(demo: Bundle, thread: DeviceThread) -> None:
    """One patch of NaN, as an encoder that overflows leaves it: top_mean must not leave it out."""

    class Overflowing(HostEngine):
        def queue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, Any]) -> None:
            super().queue(inputs, outputs)
            host: Any = self.thread.device
            host.queue(lambda: outputs["patches"].array[0, 100].fill(np.nan))

    screen = CudaScreen(Overflowing(demo.file("clip_encoder.onnx"), thread), demo.manifest)
    assert not np.isfinite(screen.run(part(0), normal_features(demo), Stopwatch()).score)


@pytest.fixture
def on_gpu(cuda_device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU is the host device, with ONNX Runtime's CUDA provider."""
    monkeypatch.setattr(device, "Device", lambda: cuda_device)
    monkeypatch.setattr(Engines, "choose", staticmethod(lambda bundle, device, _: Engines(bundle, device, {}, None)))
    monkeypatch.setattr(Engines, "open", lambda self, graph: OnnxRuntimeEngine(self.bundle.file(f"{graph}.onnx")))
    monkeypatch.setattr(
        Engines, "open_on", lambda self, graph, thread: HostEngine(self.bundle.file(f"{graph}.onnx"), thread)
    )


def test_inspector(on_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The front door says what the processor's says; enrolling goes through the same engine."""
    with (
        Inspector.open(DEMO, tmp_path / "cpu", "cpu") as there,
        Inspector.open(DEMO, tmp_path / "gpu", "cuda") as here,
    ):
        assert here.similarity.startswith("CUDA, one graph")
        for enrolled in (False, True):
            if enrolled:
                for inspector in (there, here):
                    inspector.enroll([part(0, 12)], keep=False)
            expected, found = (inspector.inspect(part(7, 12), review=False) for inspector in (there, here))
            assert found.verdict == expected.verdict != Verdict.NOT_INSPECTED
            assert found.score is not None and expected.score is not None
            assert abs(found.score - expected.score) < LIMIT
            assert {"gpu", "download"} <= found.timings_ms.keys()
    assert cli.main(["info", str(DEMO), "--station", str(tmp_path), "--device", "cuda"]) == 0
    assert "CUDA, one graph" in capsys.readouterr().out


def test_a_review_has_sam_on_the_gpu_too(on_gpu: None, cpu: Screen, demo: Bundle) -> None:
    """The first part that the model calls defective, for the others get no mask."""
    question = demo.for_review.conversation.question.replace("{object}", "part")

    def reviewed(review: Review, frame: Frame) -> Finding:
        features = cpu.run(frame, normal_features(demo), Stopwatch()).features
        nothing: Any = lambda *_: None  # noqa: E731
        return review.run(frame, features, question, "short", nothing, nothing, nothing, Stopwatch())

    there, here = Review(demo, "cpu"), Review(demo, "cuda")
    frame, expected = next(
        (frame, found.mask_logits)
        for frame in (Frame.read(path) for path in PARTS)
        if (found := reviewed(there, frame)).mask_logits is not None
    )
    found = reviewed(here, frame).mask_logits
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    there.close()
    here.close()


def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_path", lambda: None)
    library.library.cache_clear()


def _for_other_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("vmad_normalise: CUDA says: no kernel image is available")

    monkeypatch.setattr("vmad_edge.kernels.cuda.similarity.normalise", refuse)


def _no_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "Device", Device)
    monkeypatch.setitem(sys.modules, "pycuda", None)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_no_library, "no CUDA kernels: they are compiled where a GPU"),
        (
            _for_other_chips,
            "no kernel image is available; the kernels are for the host. Install",
        ),
        (_no_pycuda, "needs pycuda"),
    ],
)
def test_without_kernels_the_processor_compares_and_says_so(
    fault: Callable[[pytest.MonkeyPatch], None],
    says: str,
    on_gpu: None,
    cpu: Screen,
    demo: Bundle,
) -> None:
    with pytest.MonkeyPatch.context() as faulty:
        fault(faulty)
        screen = Screen(demo, "cuda")
    assert screen.similarity.startswith("CPU, although") and says in screen.similarity
    features, frame = normal_features(demo), part(0)
    compare(screen.run(frame, features, Stopwatch()), cpu.run(frame, features, Stopwatch()), 0)
