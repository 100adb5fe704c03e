"""VMAD (arXiv 2409.20146) as two compositions of stages: the screen for every frame, the review for suspects.

screen: frame → clip_encoder → patches → similarity → anomaly map, score
review: patches → ltc_projector → visual_tokens → LLM → P(yes), answer, h_seg → mask_decoder(sam_encoder(frame))
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from vmad_edge.runtime.bundle import Answer, Bundle, ReviewRule, SamInput, ScreenManifest, Thresholds
from vmad_edge.runtime.device import DeviceThread
from vmad_edge.runtime.engines import Device, Engine, GiveUp
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.errors import FrameError, VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Features, Later, Screening
from vmad_edge.runtime.stages.fitness import FitnessLimits, UnfitError, check, learned
from vmad_edge.runtime.stages.preprocess import View, clip_pixels, padding_colour, sam_covered, sam_pixels
from vmad_edge.runtime.stages.scope import Scope, descriptor
from vmad_edge.runtime.stages.segmentation import mask_logits
from vmad_edge.runtime.stages.segmentation_cuda import CudaSamEncoder
from vmad_edge.runtime.stages.similarity import (
    EnrolledFrame,
    NormalFeatures,
    PatchScores,
    References,
    anomaly_map,
    coreset,
    inspected_patches,
    leave_one_out_thresholds,
    patch_box,
    spread,
    tile_scores,
    token_scores,
)
from vmad_edge.runtime.stages.tiles import WHOLE, Layout, Tile, merged
from vmad_edge.runtime.stages.unlabelled import Unlabelled
from vmad_edge.runtime.systems.screen_cuda import CudaScreen
from vmad_edge.runtime.timing import Stopwatch


class SimilaritySource(Protocol):
    """What a frame's patches are compared with: normal features, references, or unlabelled frames."""

    kind: str
    thresholds: Thresholds | None
    review: ReviewRule | None
    fitness: FitnessLimits
    scope: Scope | None
    layout: Layout

    def compare(self, patches: NDArray[np.float32]) -> PatchScores: ...


class Screen:
    """The fast lane. Thread-safe."""

    def __init__(self, bundle: Bundle, device: Device, plans: Plans | None = None) -> None:
        self._manifest = bundle.manifest
        self.engines = Engines.choose(bundle, device, plans)
        self._clip_encoder, self._cuda, self._on_cpu = _opened(self.engines, self._manifest)
        self.provider = self._clip_encoder.provider

    @property
    def similarity(self) -> str:
        """What compares patches, and why nothing better, for people."""
        return (
            f"{self._cuda.how} (unlabelled frames, streams, and objects with a region, mask or tiles: CPU)"
            if self._cuda is not None
            else self._on_cpu
        )

    def run(self, frame: Frame, source: SimilaritySource, watch: Stopwatch) -> Screening:
        """One frame against `source`."""
        if self._cuda is not None and source.layout.is_whole and isinstance(source, NormalFeatures | References):
            return self._cuda.run(frame, source, watch)
        encoded = self._encode(frame, source.layout, watch)
        with watch("similarity"):
            found = source.compare(encoded.patches)
        with watch("map"):
            rows = np.flatnonzero(encoded.inspected)
            scores = tile_scores(found.score[rows], encoded.tile_of(rows), self._manifest.similarity)
            tile = max(scores, key=lambda number: np.nan_to_num(scores[number], nan=np.inf))
            own = rows[encoded.tile_of(rows) == tile]
            worst = int(own[np.argmax(found.score[own])])
            size = frame.pixels.shape[0], frame.pixels.shape[1]
            heat = self._map(encoded, found.score, size)
        nearest = int(found.index[worst]), float(found.similarity[worst])
        grid = self._manifest.vision.grid
        place = patch_box(worst % grid**2, encoded.tiles[tile].view_in_frame(encoded.views[tile]), grid, size)
        if source.scope is None:
            return Screening(encoded.features(tile), scores[tile], heat, nearest, place)
        with watch("scope"):
            distance = source.scope.distance(encoded.patches[rows])
        return Screening(encoded.features(tile), scores[tile], heat, nearest, place, distance)

    def enroll(self, frames: Iterable[Frame], beside: NormalFeatures | None, layout: Layout = WHOLE) -> References:
        """Patch features of normal frames, with leave-one-frame-out thresholds and scope. Holds one frame at a time.

        Equal frames are enrolled once: left out, a frame would be compared with its copy.

        Raises:
            FrameError: no frames, or one of which nothing can be seen, or that the layout does not fit.
        """
        features, patches, descriptors, enrolled, start = [], [], [], [], 0
        anything, good = FitnessLimits(), []
        seen: set[str] = set()
        for frame in frames:
            if (pixel_hash := frame.pixel_hash) in seen:
                continue
            seen.add(pixel_hash)
            size = frame.pixels.shape[0], frame.pixels.shape[1]
            if (fault := layout.fault(size)) is not None:
                raise FrameError(f"{frame.id} cannot be enrolled: {fault}")
            try:
                good.append(check(frame.pixels, anything, layout.region))
            except UnfitError as error:
                raise FrameError(f"{frame.id} is unfit to be enrolled: {error}") from None
            encoded = self._encode(frame, layout, Stopwatch())
            rows = np.flatnonzero(encoded.inspected)
            features.append(encoded.patches[rows])
            patches.append(rows.astype(np.int32))
            descriptors.append(descriptor(features[-1]))
            stop = start + len(rows)
            views = tuple(tile.view_in_frame(view) for tile, view in zip(encoded.tiles, encoded.views, strict=True))
            pictures = tuple(map(self._jpeg, encoded.tiles, encoded.views))
            path = None if frame.path is None else str(Path(frame.path).absolute())
            enrolled.append(EnrolledFrame(frame.id, start, stop, views, size, pictures, pixel_hash, path))
            start = stop
        if not enrolled:
            raise FrameError("expected at least one normal frame to enroll, found none")
        similarity = self._manifest.similarity
        stacked = np.concatenate(features), np.concatenate(patches), tuple(enrolled)
        scope = Scope.learned(np.stack(descriptors))
        whole = References(*stacked, None, beside, similarity.bank_dtype, learned(good), scope, layout)
        kept = None if similarity.coreset == 1 else coreset(whole.features, similarity.coreset)
        whole.thresholds = leave_one_out_thresholds(whole, similarity, kept, tile=self._manifest.vision.grid**2)
        return whole if kept is None else whole.take(kept)

    def unlabelled(self, frames: Iterable[Frame]) -> Unlabelled:
        """Frames to be compared with each other. Holds one frame, and every frame's patches.

        Raises:
            FrameError: too few frames.
        """
        return Unlabelled(self._encode(frame, WHOLE, Stopwatch()).patches for frame in frames)

    def close(self) -> None:
        """Free what is in use on a GPU."""
        if self._cuda is not None:
            self._cuda.close()

    def _encode(self, frame: Frame, layout: Layout, watch: Stopwatch) -> _Encoded:
        """All tiles of a frame.

        Raises:
            FrameError: no patch of it is inspected.
        """
        tiles = layout.cut(frame, padding_colour(self._manifest.clip))
        patches, views, features = [], [], None
        for features in self._features(tiles, watch):
            patches.append(features.patches)
            views.append(features.view)
        grid = self._manifest.vision.grid
        inspected = [
            inspected_patches(view, grid, tile.size, tile.ignored) for tile, view in zip(tiles, views, strict=True)
        ]
        if not np.any(inspected):
            raise FrameError(f"{frame.id}: the ignore mask leaves no patch to inspect; expected a larger part in black")

        def of_tile(number: int) -> Features:
            if features is not None and len(tiles) == 1:
                return features
            again = lambda: next(self._features(tiles[number : number + 1], Stopwatch()))  # noqa: E731
            return Later(views[number], again, tiles[number])

        return _Encoded(tiles, views, np.concatenate(patches), np.concatenate(inspected), of_tile)

    def _features(self, tiles: Sequence[Tile], watch: Stopwatch) -> Iterator[Features]:
        """Of each tile, in batches as large as the graph takes."""
        most = self._manifest.dynamic_axes.get("batch", 1)
        for start in range(0, len(tiles), most):
            batch = tiles[start : start + most]
            with watch("preprocess"):
                shown = [clip_pixels(tile.frame, self._manifest.clip) for tile in batch]
            with watch("clip_encoder"):
                out = self._clip_encoder.run({"clip_pixels": np.concatenate([pixels for pixels, _ in shown])})
            levels = out.get("patches_multi", out["patches"][:, None])  # a graph without them screens only
            for number, (tile, (_, view)) in enumerate(zip(batch, shown, strict=True)):
                yield Features(out["patches"][number], levels[number], view, tile)

    def _map(self, encoded: _Encoded, score: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
        """[h,w] in a frame's pixels, from its patches' scores."""

        def draw(number: int) -> NDArray[np.float32]:
            tile, own = encoded.tiles[number], encoded.rows(number)
            shown = score[own] if tile.ignored is None else spread(score[own], encoded.inspected[own])
            return anomaly_map(
                shown, encoded.views[number], self._manifest.similarity, self._manifest.clip.size, tile.size
            )

        if len(encoded.tiles) == 1:
            return encoded.tiles[0].in_frame(draw(0), size)
        return merged(((tile, draw(number)) for number, tile in enumerate(encoded.tiles)), size)

    def _jpeg(self, tile: Tile, view: View) -> bytes:
        """What CLIP saw of the tile, as a small picture for people."""
        side = self._manifest.clip.size
        box = (round(view.left), round(view.top), round(view.right), round(view.bottom))
        target = io.BytesIO()
        Image.fromarray(tile.frame.pixels).crop(box).resize((side, side)).save(target, "JPEG", quality=90)
        return target.getvalue()


@dataclass(frozen=True)
class _Encoded:
    """A frame's tiles, as the encoder saw them: T of them, of N patches each."""

    tiles: list[Tile]
    views: list[View]
    patches: NDArray[np.float32]
    """[T·N,D]."""
    inspected: NDArray[np.bool_]
    """[T·N]."""
    features: Callable[[int], Features]
    """Of one tile, by its number."""

    def tile_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows // (len(self.inspected) // len(self.tiles))

    def rows(self, number: int) -> slice:
        """Of one tile."""
        count = len(self.inspected) // len(self.tiles)
        return slice(number * count, (number + 1) * count)


def _opened(engines: Engines, manifest: ScreenManifest) -> tuple[Engine, CudaScreen | None, str]:
    """clip_encoder; the screen on the GPU, where it can be there; what is told of it where it is not."""
    if not engines.on_gpu:
        return engines.open("clip_encoder"), None, "CPU"
    although = "CPU, although the encoder runs on the GPU"
    try:
        thread = DeviceThread()
    except VmadError as error:
        return engines.open("clip_encoder"), None, f"{although}: {error}"
    encoder = engines.open_on("clip_encoder", thread)
    try:
        return encoder, CudaScreen(encoder, manifest), ""
    except RuntimeError as error:
        return encoder, None, f"{although}: {error}"


@dataclass(frozen=True)
class Finding:
    """What a review found. `mask` [h,w] is None if P(yes) < 0.5 or the review was stopped before `<seg>`."""

    p_yes: float
    text: str
    mask: NDArray[np.bool_] | None
    seg_forced: bool
    stopped: str | None
    token_scores: NDArray[np.float32] | None = None
    """[K], 0 … 1: DSSL's second similarity. None before the review ended."""
    mask_logits: NDArray[np.float32] | None = None
    """[h,w]; the mask is where they are above 0. They stay in the review's process."""


class Review:
    """The slow lane. One review at a time."""

    def __init__(self, bundle: Bundle, device: Device, plans: Plans | None = None) -> None:
        # Not where frames are screened: llama.cpp ends its process at some damaged files.
        from vmad_edge.runtime.stages.language import LanguageModel

        self._manifest = bundle.for_review
        engines = Engines.choose(bundle, device, plans)
        self._ltc_projector = engines.open("ltc_projector")
        self._sam_encoder = _sam_encoder(engines, self._manifest.sam)
        self._mask_decoder = engines.open("mask_decoder")
        with bundle.opened("llm.gguf") as gguf:
            self._language = LanguageModel(
                gguf, self._manifest.language, self._manifest.conversation, gpu=engines.on_gpu
            )
        with bundle.opened("similarity.safetensors") as features:
            self._semantic_normal = load_file(features)["semantic_normal"]
        self._beside = ThreadPoolExecutor(1, "sam_encoder")

    def run(
        self,
        frame: Frame,
        features: Features,
        question: str,
        mode: Answer,
        on_p_yes: Callable[[float], None],
        on_text: Callable[[str], None],
        stop: Callable[[], str | None],
        watch: Stopwatch,
        on_step: Callable[[], None] = lambda: None,
    ) -> Finding:
        """Answer `question` about the frame; SAM's encoder runs beside the language model, and is given up without use.

        Args:
            on_p_yes: called with P(yes) as soon as it is known.
            on_text: called with each piece of the answer as it is decoded.
            stop: asked between steps; a reason ends the review.
            on_step: called after each step: an encoder's run, a batch of the prompt, a token.

        Raises:
            Stopped: `stop` gave a reason before P(yes) was known.
        """
        with GiveUp() as give_up:
            embedding = self._beside.submit(self._embed, frame, give_up)

            def told(p_yes: float) -> None:
                if p_yes < 0.5:  # there will be no mask
                    give_up()
                on_p_yes(p_yes)

            def stepped() -> str | None:
                on_step()
                return stop()

            with watch("ltc_projector"):
                projected = self._ltc_projector.run(
                    {"patches": features.patches[None], "patches_multi": features.patches_multi[None]}
                )
            answer = self._language.answer(
                projected["visual_tokens"][0], question, mode=mode, on_p_yes=told, on_text=on_text, stop=stepped
            )
            watch.add(answer.timings_ms)
            logits, stopped = None, answer.stopped
            if answer.h_seg is not None:
                on_step()
                while not embedding.done() and stopped is None:
                    wait([embedding], 0.02)
                    stopped = stop()
            if answer.h_seg is not None and stopped is None:
                image_embeddings, covered, took_ms = embedding.result()
                watch.add({"sam_encoder": took_ms})
                with watch("mask_decoder"):
                    decoded = self._mask_decoder.run({"image_embeddings": image_embeddings, "h_seg": answer.h_seg})
                    size = frame.pixels.shape[0], frame.pixels.shape[1]
                    logits = mask_logits(decoded["low_res_masks"][0, 0], covered, self._manifest.sam.size, size)
        mask = None if logits is None else logits > 0
        scores = token_scores(projected["visual_tokens"][0], self._semantic_normal, self._manifest.similarity)
        return Finding(answer.p_yes, answer.text, mask, answer.seg_forced, stopped, scores, logits)

    def _embed(self, frame: Frame, give_up: GiveUp) -> tuple[NDArray[np.float32], tuple[int, int], float]:
        """`image_embeddings`, what of them the frame covers, and milliseconds."""
        start = time.perf_counter()
        covered = sam_covered(frame.pixels.shape[0], frame.pixels.shape[1], self._manifest.sam)
        return self._sam_encoder(frame, give_up), covered, (time.perf_counter() - start) * 1e3

    def close(self) -> None:
        self._beside.shutdown()
        self._language.close()


def _sam_encoder(engines: Engines, spec: SamInput) -> Callable[[Frame, GiveUp], NDArray[np.float32]]:
    """A frame to its `image_embeddings`: on the GPU, where that can be, as a whole (and then to the end)."""
    if engines.on_gpu:
        with suppress(VmadError, RuntimeError):  # `_opened` has said so of the screen
            on_gpu = CudaSamEncoder(engines.open_on("sam_encoder", DeviceThread()), spec)
            return lambda frame, give_up: on_gpu.run(frame)
    encoder = engines.open("sam_encoder")
    return lambda frame, give_up: encoder.run({"sam_pixels": sam_pixels(frame, spec)[0]}, give_up)["image_embeddings"]
