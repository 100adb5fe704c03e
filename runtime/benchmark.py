"""`vmad bench`: what a bundle costs on this machine, in milliseconds, frames a second and MiB.

Everything is timed through the inspector, from the frame that is handed in to the Inspection that comes back, copies
between the processes included. The things compared take turns, each turn on another frame and in another order, so
that what the machine does beside falls on all alike.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from vmad_edge.runtime.bundle import Answer, Bundle, ClipInput, Manifest, Record, first_fault
from vmad_edge.runtime.engines import Device, Engine
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.frame import AS_STORED, Frame, FrameSource, Reading
from vmad_edge.runtime.inspection import Inspection
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import Run, RunInProgress, peak_mib
from vmad_edge.runtime.stages.preprocess import clip_pixels
from vmad_edge.runtime.stages.similarity import References
from vmad_edge.runtime.stages.vocabulary import prompt_lengths
from vmad_edge.runtime.station import Fallback, Station

Times = dict[str, float]
"""Milliseconds of one run: `WHOLE`, each stage, and what was reached when: "to P(yes)", …"""
Thing: TypeAlias = Callable[[FrameSource], Times]
Progress = Callable[[Sequence[int], str], Iterable[int]]
"""Gives the numbers on, one by one, with a description to show."""

WHOLE = "whole"
_REACHED = "to "
BATCHES = (1, 2, 4, 8)
_ENROLLED = 8
"""Frames that are really enrolled; larger banks repeat them, which costs the search the same."""


class Spread(Record):
    """Of one thing's times, in milliseconds."""

    runs: int
    p50: float
    p95: float | None
    """None under 20 runs, as p99 under 100: no run lies beyond it then."""
    p99: float | None
    max: float
    jitter: float
    """The mean of |a run − the one before|."""

    @staticmethod
    def of(times_ms: Sequence[float]) -> Spread:
        """Percentiles are interpolated between neighbours (NumPy's default)."""
        runs = len(times_ms)
        p50, p95, p99 = (float(value) for value in np.percentile(times_ms, (50, 95, 99)))
        return Spread(
            runs=runs,
            p50=p50,
            p95=p95 if runs >= 20 else None,
            p99=p99 if runs >= 100 else None,
            max=max(times_ms),
            jitter=float(np.abs(np.diff(times_ms)).mean()) if runs > 1 else 0.0,
        )


class Lane(Record):
    first_ms: float
    """The first run; the review's starts its process and loads its models."""
    whole: Spread
    stages: dict[str, Spread]
    """`verdict` (screen): thresholds and regions. `transfer` (review): messages between the processes. SAM's encoder
    runs beside the language model, so a review's stages exceed its whole."""
    reached: dict[str, Spread] = Field(default_factory=dict)
    """When P(yes), the last word and the mask were with the inspector, counted as `whole` is; of the reviews that had
    them."""
    times_ms: tuple[float, ...]
    """Of the whole, in the order measured."""

    @staticmethod
    def of(first_ms: float, runs: Sequence[Times]) -> Lane:
        names = dict.fromkeys(name for run in runs for name in run if name != WHOLE)
        spreads = {name: Spread.of([run[name] for run in runs if name in run]) for name in names}
        return Lane(
            first_ms=first_ms,
            whole=Spread.of([run[WHOLE] for run in runs]),
            stages={name: spread for name, spread in spreads.items() if not name.startswith(_REACHED)},
            reached={name: spread for name, spread in spreads.items() if name.startswith(_REACHED)},
            times_ms=tuple(round(run[WHOLE], 3) for run in runs),
        )


class Prefill(Record):
    tokens: int
    """Visual ones and those after them: of what comes before, keys and values are copied."""
    tokens_per_second: float
    """At the p50."""


class BankSize(Record):
    """The screen against so many enrolled frames."""

    frames: int
    patches: int
    screen: Spread
    similarity: Spread | None
    """None on a GPU, where it is a part of one graph."""


class Batch(Record):
    """Frames through preprocessing and CLIP encoder together, copies included. The screen takes them one by one."""

    frames: int
    frames_per_second: float


class Memory(Record):
    """Peak resident memory in MiB, frames of the measurement included; None where the system does not tell."""

    inspector: float | None
    """Of the process that screens, before banks were made."""
    with_banks: float | None
    review: float | None
    """Of the review's own process."""


class Target(Record):
    """Whether the screen holds a line's time at p99."""

    ms: float
    holds: bool
    late: int
    """Runs that took longer."""
    blame: str
    """The stage to look at, see `judge`."""


class Settings(Record):
    bundle: str
    """Its hash."""
    provider: str
    frames: str
    object: str
    compared_with: str
    answer: Answer | None
    """None: reviews were not measured."""
    repeats: int


class Benchmark(Record):
    """`bench.json`."""

    run: Run
    settings: Settings
    open_ms: float
    """Checking the bundle's hashes and making the screen ready."""
    screen: Lane
    review: Lane | None
    prefill: Prefill | None = None
    """None without reviews."""
    banks: tuple[BankSize, ...]
    batches: tuple[Batch, ...]
    memory: Memory
    target: Target | None

    def spreads(self) -> dict[str, Spread]:
        """Everything that has one, by name: what a table shows and two benchmarks are compared by."""
        found: dict[str, Spread] = {}
        for name, lane in (("screen", self.screen), ("review", self.review)):
            if lane is not None:
                parts = lane.stages | lane.reached
                found |= {name: lane.whole, **{f"{name}: {part}": spread for part, spread in parts.items()}}
        for bank in self.banks:
            name = f"screen, {bank.frames} enrolled"
            found[name] = bank.screen
            if bank.similarity is not None:
                found[f"{name}: similarity"] = bank.similarity
        return found


class Ratio(Record):
    """Now over before: above 1 is slower."""

    p50: float
    p99: float | None


def benchmark(
    bundle: Bundle,
    station: Station,
    frames: Sequence[FrameSource] | None,
    *,
    run: RunInProgress,
    object: str | None = None,
    fallback: Fallback | None = None,
    review: bool = True,
    answer: Answer | None = None,
    repeats: int = 100,
    banks: Sequence[int] = (1, 10, 50, 200),
    target_ms: float | None = None,
    device: Device = "auto",
    reading: Reading = AS_STORED,
    progress: Progress = lambda turns, _: turns,
) -> Benchmark:
    """Time the screen and the review of `frames`, the screen over bank sizes, and the CLIP encoder in batches.

    Args:
        station: where `object`'s references are, if it has any. Nothing is written to it.
        frames: taken in turn, paths read anew each time; None: eight drawn ones.
        run: made before anything was loaded.
        fallback: see `Inspector.open`.
        review: False measures the screen alone, as for a bundle that screens only.
        repeats: runs of each thing that count.
        banks: numbers of enrolled frames.
        target_ms: the time that the screen must hold at p99.
        reading: how the frames are read.

    Raises:
        BundleError: the station knows other objects but not `object`.
        VmadError: a frame is not inspected, a review fails, or `repeats` are too few for `target_ms`, or frames for
            reviews.
    """
    if repeats < 1 or any(bank < 1 for bank in banks):
        raise VmadError(f"expected repeats and bank sizes of at least 1, got {repeats} and {list(banks)}")
    if target_ms is not None and repeats < 100:
        raise VmadError(f"expected at least 100 repeats to tell a p99 from, got {repeats}")
    frames_are = "8 drawn frames, 1280×1024" if frames is None else f"{len(frames)} given frames"
    frames = drawn_frames(8) if frames is None else frames
    manifest = bundle.manifest
    name = manifest.object if object is None else object
    if fallback is None:
        station.check_known(name)
    mode = (answer or manifest.language.answer) if review and isinstance(manifest, Manifest) else None
    if mode is not None and len(frames) < 2:
        raise VmadError(
            "expected at least two frames, got one: the same frame's next review finds its prompt done. Give more of "
            "them, or --no-review"
        )
    with tempfile.TemporaryDirectory() as scratch:
        own = Station(Path(scratch), bundle)
        start = time.perf_counter()
        with Inspector.open(bundle.path, scratch, device) as inspector:
            open_ms = _since(start)
            compared_with = _take_references(inspector, station, name, frames, reading)
            things = {"screen": _screen_of(inspector, name, reading)}
            if mode is not None:
                things["review"] = lambda frame: reviewed(inspector, frame, name, mode, reading)
            first = {lane: thing(frames[0])[WHOLE] for lane, thing in things.items()}
            for number in progress(range(len(frames)), "warming up"):
                take_turns(things, [frames[number]], 1)
            inspector_mib = peak_mib(os.getpid())

            few = inspector.enroll(frames[:_ENROLLED], object=_bank(0), keep=False, **reading)
            patches = {}
            for size in sorted(set(banks)):
                references = repeated(few, size)
                patches[size] = len(references.features)
                own.save_references(_bank(size), references)
                things[_bank(size)] = _screen_of(inspector, _bank(size), reading)
                things[_bank(size)](frames[0])
            runs = take_turns(things, frames, repeats, progress)
            memory = Memory(
                inspector=inspector_mib, with_banks=peak_mib(os.getpid()), review=peak_mib(inspector.review_pid)
            )
            provider, engines = inspector.provider, inspector.engines
    sizes = [size for size in BATCHES if size <= manifest.dynamic_axes.get("batch", 1)]
    batches = _batches(
        engines.open("clip_encoder"), sizes, manifest.clip, frames, reading, max(3, repeats // 10), progress
    )
    return Benchmark(
        run=run.end(),
        settings=Settings(
            bundle=bundle.hash,
            provider=provider,
            frames=frames_are,
            object=name,
            compared_with=compared_with,
            answer=mode,
            repeats=repeats,
        ),
        open_ms=open_ms,
        screen=Lane.of(first["screen"], runs["screen"]),
        review=None if mode is None else Lane.of(first["review"], runs["review"]),
        prefill=None if mode is None else _prefill(bundle, name, runs["review"]),
        banks=tuple(
            BankSize(
                frames=size,
                patches=count,
                screen=Spread.of([times[WHOLE] for times in runs[_bank(size)]]),
                similarity=Spread.of(alone) if (alone := _stage(runs[_bank(size)], "similarity")) else None,
            )
            for size, count in patches.items()
        ),
        batches=batches,
        memory=memory,
        target=None if target_ms is None else judge(runs["screen"], target_ms),
    )


def screened(
    inspector: Inspector, frame: FrameSource, object: str, reading: Reading = AS_STORED
) -> tuple[Inspection, Times]:
    """One screen, timed from outside.

    Raises:
        VmadError: the frame was not inspected.
    """
    start = time.perf_counter()
    inspection = inspector.inspect(frame, object=object, review=False, **reading)
    whole = _since(start)
    if inspection.score is None:
        raise VmadError(f"{inspection.frame.id} cannot be measured with: {inspection.reason}")
    stages = {stage: ms for stage, ms in inspection.timings_ms.items() if stage != "screen"}
    return inspection, {WHOLE: whole, **stages, "verdict": whole - inspection.timings_ms["screen"]}


def reviewed(
    inspector: Inspector, frame: FrameSource, object: str, answer: Answer, reading: Reading = AS_STORED
) -> Times:
    """One review, whatever the verdict, timed from the finished screen on.

    Raises:
        VmadError: the frame was not inspected, or its review failed.
    """
    inspection, _ = screened(inspector, frame, object, reading)
    start = time.perf_counter()
    handle = inspector.review(inspection, answer=answer)
    after = handle.wait()
    whole = _since(start)
    if after.reason is not None:
        raise VmadError(f"{inspection.frame.id} cannot be measured with: {after.reason}")
    own = after.timings_ms.keys() - inspection.timings_ms.keys() - {"review"}
    stages = {stage: ms for stage, ms in after.timings_ms.items() if stage in own}
    reached = {f"{_REACHED}{milestone}": ms for milestone, ms in handle.reached_ms.items()}
    return {WHOLE: whole, **stages, "transfer": whole - after.timings_ms["review"], **reached}


def take_turns(
    things: dict[str, Thing],
    frames: Sequence[FrameSource],
    turns: int,
    progress: Progress = lambda turns, _: turns,
) -> dict[str, list[Times]]:
    """Each thing's times over `turns`. In a turn all take one frame, in an order of chance, the same each time."""
    names, chance = list(things), random.Random(0)
    found: dict[str, list[Times]] = {name: [] for name in names}
    for turn in progress(range(turns), "measuring"):
        for name in chance.sample(names, len(names)):
            found[name].append(things[name](frames[turn % len(frames)]))
    return found


def judge(runs: Sequence[Times], target_ms: float) -> Target:
    """Does p99 of the whole stay within `target_ms`, and which stage is to look at.

    If the usual run (p50) is too long, that is its longest stage; else the one that is most above its own p50 in the
    runs that were late or, if none was, in the longest.
    """
    whole = Spread.of([run[WHOLE] for run in runs])
    late = [run for run in runs if run[WHOLE] > target_ms]
    usual = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0] if stage != WHOLE}
    if whole.p50 > target_ms:
        excess = usual
    else:
        looked_at = late or [max(runs, key=lambda run: run[WHOLE])]
        excess = {stage: statistics.fmean(run[stage] - ms for run in looked_at) for stage, ms in usual.items()}
    return Target(
        ms=target_ms,
        holds=whole.p99 is not None and whole.p99 <= target_ms,
        late=len(late),
        blame=max(excess, key=lambda stage: excess[stage]),
    )


def compare(now: Benchmark, before: Benchmark) -> dict[str, Ratio]:
    """`now` over `before`, of all that both measured."""
    earlier = before.spreads()
    return {name: _ratio(spread, earlier[name]) for name, spread in now.spreads().items() if name in earlier}


def _ratio(now: Spread, before: Spread) -> Ratio:
    p99 = None if now.p99 is None or before.p99 is None else now.p99 / before.p99
    return Ratio(p50=now.p50 / before.p50, p99=p99)


def read_benchmark(path: Path) -> Benchmark:
    """What `vmad bench` wrote.

    Raises:
        VmadError: it is something else, or of another version.
    """
    try:
        return Benchmark.model_validate_json(path.read_bytes())
    except ValidationError as error:
        where, what = first_fault(error)
        raise VmadError(f"{path}: expected a bench.json of `vmad bench`; {where}: {what}") from None


def drawn_frames(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """`count` frames [1024,1280,3] of a machine-vision camera's size: noise, a few shapes, a scratch."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        frame = rng.normal(rng.uniform(60, 180), 12, (1024, 1280, 3)).clip(0, 255).astype(np.uint8)
        for _ in range(6):
            centre, colour = rng.integers(0, (1280, 1024)).tolist(), rng.integers(0, 256, 3).tolist()
            cv2.circle(frame, centre, int(rng.integers(20, 200)), colour, -1)
        cv2.polylines(frame, [rng.integers(0, (1280, 1024), (5, 2)).astype(np.int32)], False, (20, 20, 20), 3)
        frames.append(frame)
    return frames


def repeated(few: References, frames: int) -> References:
    """A bank of `frames` frames: those of `few`, over and over."""
    chosen = [few.frames[number % len(few.frames)] for number in range(frames)]
    rows = np.concatenate([np.arange(frame.start, frame.stop) for frame in chosen])
    ends = np.cumsum([frame.stop - frame.start for frame in chosen]).tolist()
    placed = tuple(
        replace(frame, start=start, stop=end) for frame, start, end in zip(chosen, [0, *ends], ends, strict=False)
    )
    return References(few.features[rows], few.patch[rows], placed, few.thresholds, few.beside, few.dtype, few.fitness)


def _stage(runs: Sequence[Times], stage: str) -> list[float]:
    return [run[stage] for run in runs if stage in run]


def _screen_of(inspector: Inspector, object: str, reading: Reading) -> Thing:
    return lambda frame: screened(inspector, frame, object, reading)[1]


def _prefill(bundle: Bundle, object: str, runs: Sequence[Times]) -> Prefill:
    manifest = bundle.for_review
    _, after, _ = prompt_lengths(bundle.file("llm.gguf"), manifest.language, manifest.conversation, object)
    tokens = manifest.language.visual_tokens + after
    seconds = statistics.median(run["prefill"] for run in runs) / 1e3
    return Prefill(tokens=tokens, tokens_per_second=tokens / seconds)


def _bank(frames: int) -> str:
    """The object that a bank of so many frames is enrolled for."""
    return f"{frames} frames"


def _take_references(
    inspector: Inspector, station: Station, object: str, frames: Sequence[FrameSource], reading: Reading
) -> str:
    """Put what `object` is compared with on the device into the inspector's own station; says what it is."""
    references = station.load_references(object)
    if references is not None:
        inspector.station.save_references(object, references)
        return f"{len(references.features)} enrolled patches of {object!r}"
    if "similarity.safetensors" in inspector.bundle.manifest.files:
        return "the bundle's normal features"
    count = len(inspector.enroll(frames[:_ENROLLED], object=object, keep=False, **reading).features)
    return f"{count} patches of the first frames: this bundle has no normal features, and {object!r} is not enrolled"


def _batches(
    engine: Engine,
    sizes: Sequence[int],
    clip: ClipInput,
    frames: Sequence[FrameSource],
    reading: Reading,
    turns: int,
    progress: Progress,
) -> tuple[Batch, ...]:
    read = [Frame.read(frames[number % len(frames)], **reading) for number in range(max(sizes))]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in progress(range(turns + 1), "batches"):
        for size in sizes:
            start = time.perf_counter()
            pixels = [clip_pixels(frame, clip)[0] for frame in read[:size]]
            engine.run({"clip_pixels": np.concatenate(pixels)})
            if turn:  # the first warms up
                seconds[size].append(time.perf_counter() - start)
    return tuple(Batch(frames=size, frames_per_second=size / statistics.median(s)) for size, s in seconds.items())


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
