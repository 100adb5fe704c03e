"""The screen on a GPU: a frame goes up, map, score and what the scope check needs come back, and a suspect's features.

frame → preprocess → clip_encoder → patches → similarity → anomaly map, score: one CUDA graph from the second frame of a
size on, where the encoder is a TensorRT plan.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from vmad_edge.kernels import cuda
from vmad_edge.runtime.bundle import ScreenManifest
from vmad_edge.runtime.device import Device, Graph
from vmad_edge.runtime.engines import DeviceEngine
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Features, Later, Screening
from vmad_edge.runtime.stages.preprocess import View, clip_geometry
from vmad_edge.runtime.stages.preprocess_cuda import CudaPreprocess
from vmad_edge.runtime.stages.similarity import NormalFeatures, References, inspected_patches, patch_box
from vmad_edge.runtime.stages.similarity_cuda import CudaMap, CudaSimilarity
from vmad_edge.runtime.timing import Stopwatch

_LANES = 16
"""Frame sizes, each with a similarity source, that stay prepared: the latest ones."""

Source = NormalFeatures | References


class CudaScreen:
    """The fast lane. Thread-safe: frames take turns in the encoder's thread.

    Args:
        encoder: the bundle's clip_encoder.

    Raises:
        VmadError: no memory left.
        RuntimeError: no CUDA kernels in this build, or none that this GPU can run.
    """

    def __init__(self, encoder: DeviceEngine, manifest: ScreenManifest) -> None:
        self._encoder, self._manifest = encoder, manifest
        self._captures = encoder.capturable
        self.how = "CUDA, one graph from frame to score" if self._captures else "CUDA"
        """For people."""
        self._lanes: OrderedDict[tuple[int, tuple[int, int]], _Lane] = OrderedDict()
        encoder.thread.call(self._open)

    def run(self, frame: Frame, source: Source, watch: Stopwatch) -> Screening:
        """One frame against `source`."""
        return self._encoder.thread.call(self._run, frame, source, watch)

    def close(self) -> None:
        """Free what was prepared for frames."""
        self._encoder.thread.call(self._close)

    def _open(self) -> None:
        self._device: Device = self._encoder.thread.device
        size, vision = self._manifest.clip.size, self._manifest.vision
        self._pixels = self._device.zeros((1, 3, size, size), np.float32)
        self._inputs = {"clip_pixels": self._pixels}
        self._outputs = self._encoder.outputs(self._inputs)
        self._patches = cuda.view(self._outputs["patches"], (vision.grid**2, vision.width))
        cuda.try_kernels(self._device)

    def _close(self) -> None:
        while self._lanes:
            self._lanes.popitem()[1].forget()

    def _run(self, frame: Frame, source: Source, watch: Stopwatch) -> Screening:
        lane = self._lane(source, (frame.pixels.shape[0], frame.pixels.shape[1]))
        with watch("gpu"):
            self._device.write(lane.frame, frame.pixels)
            if lane.similarity.update():
                for other in self._lanes.values():
                    if other.similarity is lane.similarity:
                        other.forget()
            if lane.graph is None and lane.used and self._captures:
                lane.graph = self._captured(lane)
            lane.used = True  # frames of ever other sizes are not worth a graph each
            if lane.graph is None:
                self._queue(lane)
            else:
                lane.graph.launch()
            self._device.wait()
        with watch("download"):
            return self._screening(lane, frame)

    def _captured(self, lane: _Lane) -> Graph | None:
        """None where this engine or driver cannot: then it is not tried again."""
        try:
            return self._device.capture(lambda: self._queue(lane))
        except (VmadError, RuntimeError) as error:
            self._captures, self.how = False, f"CUDA, but no graph: {error}"
            return None

    def _queue(self, lane: _Lane) -> None:
        lane.preprocess.queue(lane.frame)
        self._encoder.queue(self._inputs, self._outputs)
        lane.similarity.queue(self._patches, lane.counts)
        lane.map.queue(lane.similarity)

    def _screening(self, lane: _Lane, frame: Frame) -> Screening:
        largest, top_mean = self._device.download(lane.map.largest)
        result = float(largest if self._manifest.similarity.score_rule == "max" else top_mean)
        nearest = lane.similarity.nearest
        score, similarity, index = map(
            self._device.download, (lane.similarity.score, nearest.similarity, nearest.index)
        )
        worst = int(np.argmax(np.where(lane.inspected, score, -np.inf)))
        row = int(index[worst])
        thresholds = lane.source.thresholds
        good = thresholds is not None and result < thresholds.good_below
        features = Later(lane.view, lambda: self._again(frame, lane.source)) if good else self._features(lane.view)
        distance = None
        if (scope := lane.source.scope) is not None:
            patches = self._device.download(self._outputs["patches"])[0] if good else features.patches
            distance = scope.distance(patches[lane.inspected])
        return Screening(
            features,
            result,
            self._device.download(lane.map.map),
            (row if row < 0 else row - nearest.bank.first, float(similarity[worst])),
            patch_box(worst, lane.view, self._manifest.vision.grid, frame.pixels.shape[:2]),
            distance,
        )

    def _features(self, view: View) -> Features:
        """Of the frame that was encoded last."""
        kept = {name: self._outputs[name] for name in ("patches", "patches_multi") if name in self._outputs}
        found = {name: self._device.download(memory)[0] for name, memory in kept.items()}
        levels = found.get("patches_multi", found["patches"][None])  # a graph without them screens only
        return Features(found["patches"], levels, view)

    def _again(self, frame: Frame, source: Source) -> Features:
        def encode() -> Features:
            lane = self._lane(source, (frame.pixels.shape[0], frame.pixels.shape[1]))
            self._device.write(lane.frame, frame.pixels)
            lane.preprocess.queue(lane.frame)
            self._encoder.queue(self._inputs, self._outputs)
            self._device.wait()
            return self._features(lane.view)

        return self._encoder.thread.call(encode)

    def _lane(self, source: Source, size: tuple[int, int]) -> _Lane:
        key = id(source), size  # a lane holds its source: no other has that id meanwhile
        if key not in self._lanes:
            same = (lane.similarity for (known, _), lane in self._lanes.items() if known == id(source))
            similarity = next(same, None) or CudaSimilarity(source, self._device, self._manifest.vision.grid**2)
            self._lanes[key] = _Lane(source, similarity, self._device, self._pixels, self._manifest, size)
            if len(self._lanes) > _LANES:
                self._lanes.popitem(last=False)[1].forget()
        self._lanes.move_to_end(key)
        return self._lanes[key]


class _Lane:
    """What is prepared for frames of one size, compared with one source."""

    def __init__(
        self,
        source: Source,
        similarity: CudaSimilarity,
        device: Device,
        pixels: cuda.DeviceArray,
        manifest: ScreenManifest,
        size: tuple[int, int],
    ) -> None:
        self.source, self.similarity = source, similarity
        self.graph: Graph | None = None
        self.used = False
        grid, clip = manifest.vision.grid, manifest.clip
        self.view = clip_geometry(*size, clip).view
        self.inspected = inspected_patches(self.view, grid, size)
        self.counts = device.upload(self.inspected.astype(np.uint8))
        self.frame = device.zeros((*size, 3), np.uint8)
        self.preprocess = CudaPreprocess.clip(device, "rgb8", *size, clip, pixels)
        self.map = CudaMap(device, grid, self.view, manifest.similarity, clip.size, size)

    def forget(self) -> None:
        """The graph, which uses memory that is gone."""
        if self.graph is not None:
            self.graph.close()
        self.graph = None
