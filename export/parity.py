"""Source against export, stage by stage, on real images; past its limit a stage fails the export.

Each side goes its own way from the frame to mask and verdict: transformers and the checkpoint's torch modules, with
the formulas of map and score written out, on one; the bundle's files through what the runtime runs on the other. Both
are asked the manifest's question. States are compared at every position of prompt and answer, where the export is
given the source's answer, so that one other token does not move all that follow.

What people act on is compared last: the screen's verdict, the review's Yes or No, the verdict that is settled of both,
and the mask. Rounding may turn a decision where the source itself was next to a threshold, a mask's pixel where its
logit was next to zero, each by what P(yes), score and logits may move; it may never turn one that was clear.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ConfigDict, Field
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessorPil, LlamaForCausalLM, SamImageProcessorPil

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.language import read_tokenizer, type_mix
from vmad_edge.runtime.bundle import MAKERS_RULE, Bundle, Manifest, Precision, Record, Thresholds, makers_rule
from vmad_edge.runtime.calibrate import largest_share
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.errors import CheckpointError
from vmad_edge.runtime.frame import AS_STORED, Frame, Reading
from vmad_edge.runtime.inspection import Verdict, settled, verdict_of
from vmad_edge.runtime.stages.language import LanguageModel
from vmad_edge.runtime.stages.preprocess import clip_pixels, sam_pixels
from vmad_edge.runtime.stages.segmentation import mask_logits
from vmad_edge.runtime.stages.similarity import NormalFeatures
from vmad_edge.runtime.station import Station
from vmad_edge.runtime.systems.vmad import Screen
from vmad_edge.runtime.timing import Stopwatch

Array = NDArray[Any]
Stages = dict[str, Array]
"""One frame's arrays by the name of their stage."""
Measure = Literal[
    "equal", "cosine", "max_abs_error", "max_relative_error", "iou", "clear_iou", "rank_correlation", "clear_flips"
]

LADDER = (
    "clip_pixels",
    "sam_pixels",
    "prompt_ids",
    "patches",
    "patches_multi",
    "image_embeddings",
    "visual_tokens",
    "hidden_states",
    "logits",
    "p_yes",
    "review",
    "answer",
    "h_seg",
    "h_seg_full",
    "low_res_masks",
    "mask",
    "score",
    "map",
    "screen",
    "verdict",
)
"""The stages in the order in which one needs another: the first that breaks is where the fault sits."""
DECISIONS = ("screen", "review", "verdict")
"""The screen's verdict, the review's Yes (1) or No (0), and the verdict that is settled of both."""
CONFIDENCE = 0.95
"""Of the bounds on flips."""

PRECISION_LIMITS = {
    # FP32 rounds at 6e-8; sums of thousands of terms in another order, layer upon layer, reach several 1e-6.
    "fp32": 1e-5,
    # Each graph was allowed 1e-2 when its precision was chosen (precision.py); two in a row are twice as far off.
    "fp16": 2e-2,
    # Likewise, of 1e-1 (int8.py).
    "int8": 2e-1,
}
"""Of the graphs' outputs: the largest max relative error that passes."""

QUANTIZATION_LIMITS = {
    # As FP32 in the graphs, and RoPE's sines come from another library.
    "f32": 2e-5,
    # FP16 rounds weights and, in llama.cpp's products, activations at 5e-4; layers add up and random weights amplify.
    "f16": 1e-2,
    # A block of 32 weights is rounded to 1/127 of its largest, and so are llama.cpp's activations: 0.5% of each.
    "q8_0": 0.15,
    # 4 bits a weight: about 7% of each (ggml's block_q4_K; block_q6_K in the most sensitive matrices).
    "q4_k_m": 0.8,
}
"""Of what the language model touches: the same.

Random weights amplify: after two layers of them the types' own errors are 2e-6, 2e-3, 0.06 and 0.5 (tests' checkpoint),
where q in another order of RoPE makes 1.5 and a LoRA without its alpha 1.0. Trained weights should stay well below.
"""

P_YES_LIMITS = {
    # Of the graphs: what the visual tokens bring along. Of the language model: its own weights. FP32 as above.
    "fp32": 2.5e-5,
    "fp16": 2e-2,
    "int8": 1e-1,
    "f32": 5e-5,
    "f16": 1e-2,
    "q8_0": 3e-2,
    "q4_k_m": 1e-1,
}
"""By how much P(yes) may move; a precision's and a quantization's add up.

The reference model's moves by 1e-3, 6e-2 (fp16, int8), 3e-3 (q8_0) and 1e-2 (q4_k_m) at the most on 16 images. The
largest sum, 0.2, is less than the 0.25 by which a 0.74 that becomes 0.49 moves.
"""

MASK_LIMITS = {"f32": 2e-5, "f16": 1e-2, "q8_0": 5e-2, "q4_k_m": 2e-1}
"""Of the masks' logits, beside the graphs': the largest max relative error that the language model may add.

The decoder damps what the language model does to h_seg: 1e-2 of trained weights in q4_k_m, 0.15 of random ones.
"""


def limits(manifest: Manifest) -> dict[str, dict[Measure, float]]:
    """What each stage of a bundle must keep; a measure of error is a largest value, any other a smallest one.

    Only what the language model touches is as loose as its quantization, only what a lowered graph touches as that.
    """

    def graphs(*names: str) -> float:
        return max(PRECISION_LIMITS[manifest.precision.get(name, "fp32")] for name in names)

    vision, tokens = graphs("clip_encoder"), graphs("clip_encoder", "ltc_projector")
    quantization = manifest.language.quantization
    # What the tokens bring along, and what the language model's own weights add. Nothing but zeros is 1 off.
    language = min(0.9, tokens + QUANTIZATION_LIMITS[quantization])
    masks = graphs("clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder") + MASK_LIMITS[quantization]
    # Rounding has no direction: of an error's length, 1/√D lies along a feature. Four times that may.
    cosine = min(0.125, vision * min(1.0, 4 / manifest.vision.width**0.5))
    # A score s is 1 − cosine, or a softmax of two over temperature: ds/s ≤ d(logit), ds ≤ d(logit) / 4. At most 0.5: a
    # score of 0.5 then moves by an eighth.
    logit = min(0.5, 2 * cosine / min(1.0, manifest.similarity.temperature))
    strict: dict[Measure, float] = {"max_relative_error": vision}
    loose = _loose(language)
    equal: dict[Measure, float] = {"equal": 1}
    p_yes = max(P_YES_LIMITS[manifest.precision.get(name, "fp32")] for name in ("clip_encoder", "ltc_projector"))
    decision: dict[Measure, float] = {"clear_flips": 0}
    return {
        "clip_pixels": equal,
        "sam_pixels": {"max_relative_error": PRECISION_LIMITS["fp32"]},
        "prompt_ids": equal,
        "patches": strict,
        "patches_multi": strict,
        "image_embeddings": {"max_relative_error": graphs("sam_encoder")},
        "visual_tokens": {"max_relative_error": tokens},
        # INT8 may move a visual token that lies between normal and abnormal, and its state with it, to the other side.
        "hidden_states": loose if tokens <= PRECISION_LIMITS["fp16"] else {"cosine": loose["cosine"]},
        "logits": loose,
        "h_seg": loose,
        "h_seg_full": loose,
        "p_yes": {"max_abs_error": p_yes + P_YES_LIMITS[quantization]},
        "review": decision,
        # Coarser weights may choose another word where two are as good; the report gives the share.
        "answer": equal if language <= 1e-4 else {},
        "low_res_masks": _loose(masks),
        # OpenCV and torch may place a pixel's edge on different sides.
        "mask": {"clear_iou": 0.999},
        "score": {"max_relative_error": logit, "max_abs_error": max(cosine, logit / 4)},
        # OpenCV places samples to 1/32 pixel.
        "map": {"max_relative_error": max(logit, 5e-3), "rank_correlation": min(0.999, 1 - vision**2 / 4)},
        "screen": decision,
        "verdict": decision,
    }


def _loose(error: float) -> dict[Measure, float]:
    """Where the largest error may be `error`, the mean one must be smaller: cos = 1 − ε² / 2."""
    return {"max_relative_error": error, "cosine": 1 - error**2 / 4}


class StageParity(Record):
    """The worst over all images; a measure that says nothing about a stage is None. NaN is past every limit."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    stage: str
    equal: float
    """Share of images on which both sides are equal to the last bit: text agreement, decisions that did not flip."""
    images: int = 1
    """How many it was compared on."""
    cosine: float | None = None
    """Of the two flattened arrays."""
    max_abs_error: float | None = None
    max_relative_error: float | None = None
    """max |source − export| / max |source|; infinite where the shapes differ or the export gave nothing."""
    iou: float | None = None
    """Of masks, all their pixels."""
    clear_iou: float | None = None
    """Of masks, over the pixels whose logits, in the source, are further from zero than `low_res_masks` may move."""
    rank_correlation: float | None = None
    """Spearman's, of maps, over their inspected pixels."""
    flips: int | None = None
    """Of a decision: images on which the export decides otherwise."""
    flips_at_most: float | None = None
    """The share of all such images that flips, by Clopper and Pearson's one-sided bound at CONFIDENCE."""
    clear: int | None = None
    """Images on which the source's decision stays as it is while score and P(yes) move as far as their limits allow."""
    clear_flips: int | None = None
    """Flips among those."""
    fault: str | None = None
    """Why the export gave nothing."""
    worst_image: str = ""
    limits: dict[Measure, float] = Field(default_factory=dict)

    @property
    def past(self) -> Measure | None:
        """The first measure past its limit."""
        for measure, limit in self.limits.items():
            value: float | None = getattr(self, measure)
            if value is None or not (value <= limit if measure in _ERRORS else value >= limit):
                return measure
        return None

    @property
    def broken(self) -> str | None:
        """The same in words."""
        measure = self.past
        if measure is None:
            return None
        value: float | None = getattr(self, measure)
        side = "at most" if measure in _ERRORS else "at least"
        found = self.fault or ("nothing" if value is None else f"{value:.3g}")
        return f"{measure.replace('_', ' ')} {found}, expected {side} {_limit(measure, self.limits[measure])}"


_ERRORS = ("max_abs_error", "max_relative_error", "clear_flips")


def _limit(measure: Measure, value: float) -> str:
    """Likenesses end in many nines."""
    return format(value, ".2g" if measure in _ERRORS else ".10g")


class Parity(Record):
    """`parity.json`."""

    images: tuple[str, ...]
    """Compared on all stages."""
    more_images: int = 0
    """Compared on score, P(yes) and decisions alone."""
    question: str
    precision: dict[str, Precision] = Field(default_factory=dict)
    """The manifest's."""
    quantization: str
    tensor_types: dict[str, int]
    """How many of the language model's tensors have each type: rows that do not fit a type's blocks keep another."""
    stages: tuple[StageParity, ...]

    @property
    def failure(self) -> str | None:
        """The first stage that broke, with its figure, its limit and its worst image; None within all limits."""
        for row in self.stages:
            if row.broken:
                return f"{row.stage} is the first stage that differs: {row.broken} (worst image: {row.worst_image})"
        return None

    @property
    def precision_in_words(self) -> str:
        """Of the graphs; those that stayed FP32 in a bundle of another precision are named."""
        kept = [name for name, precision in self.precision.items() if precision == "fp32"]
        lowered = next((precision for precision in self.precision.values() if precision != "fp32"), None)
        if lowered is None:
            return "graphs in fp32"
        return f"graphs in {lowered}" + (f" ({', '.join(kept)} in fp32)" if kept else "")

    @property
    def tensors_in_words(self) -> str:
        return ", ".join(f"{count} tensors {name}" for name, count in self.tensor_types.items())

    @property
    def flips_in_words(self) -> str:
        """How many decisions the export turned, and what that says of all images."""
        rows = {row.stage: row for row in self.stages if row.flips is not None}
        words = {"screen": "the screen’s verdict", "review": "the review’s Yes or No", "verdict": "the settled verdict"}
        flips = (f"{words[stage]} on {_flips(rows[stage])}" for stage in DECISIONS if stage in rows)
        return f"Flips, and with {CONFIDENCE:.0%} confidence their share of all such images: {', '.join(flips)}."

    def table(self) -> Table:
        title = (
            f"source against export, {self.precision_in_words}, {self.quantization} ({self.tensors_in_words}), "
            f"worst of {len(self.images)} images"
            + (f"; score, P(yes) and decisions of {self.more_images} more" if self.more_images else "")
        )
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("stage", no_wrap=True)
        for column in COLUMNS:
            table.add_column(column, justify="right", no_wrap=column != "limit")
        for row in self.stages:
            table.add_row(row.stage, *row_in_words(row), style="bold red" if row.broken else None)
        return table


_SHORT: dict[Measure, str] = {
    "equal": "equal",
    "cosine": "cosine",
    "max_abs_error": "max abs.",
    "max_relative_error": "max rel.",
    "iou": "IoU",
    "clear_iou": "clear IoU",
    "rank_correlation": "rank corr.",
    "clear_flips": "clear flips",
}
COLUMNS = ("equal", "cosine", "max abs.", "max rel.", "IoU", "clear IoU", "rank corr.", "flips", "clear flips", "limit")


def _flips(row: StageParity) -> str:
    return f"{row.flips} of {row.images} (≤ {100 * (row.flips_at_most or 0):.3g}%)"


def row_in_words(row: StageParity) -> list[str]:
    """`row` in words, a text for each of COLUMNS."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    sign = {measure: "≤" if measure in _ERRORS else "≥" for measure in row.limits}
    return [
        f"{round(row.equal * row.images)}/{row.images}",
        number(row.cosine, ".7f"),
        number(row.max_abs_error, ".1e"),
        number(row.max_relative_error, ".1e"),
        number(row.iou, ".4f"),
        number(row.clear_iou, ".4f"),
        number(row.rank_correlation, ".5f"),
        "" if row.flips is None else _flips(row),
        "" if row.clear_flips is None else f"{row.clear_flips} of {row.clear}",
        ", ".join(
            f"{_SHORT[measure]} {sign[measure]} {_limit(measure, limit)}" for measure, limit in row.limits.items()
        ),
    ]


class ParityError(CheckpointError):
    """The export computes something else than the checkpoint; `parity` says where and by how much."""

    def __init__(self, message: str, parity: Parity) -> None:
        super().__init__(message)
        self.parity = parity


def measure(
    checkpoint: Checkpoint,
    bundle: Bundle,
    images: Sequence[str],
    more: Sequence[Callable[[], Frame]] = (),
    *,
    device: Device = "cpu",
    reading: Reading = AS_STORED,
    progress: Callable[[str], None] = lambda step: None,
    each: Callable[[Frame, Stages, Stages], None] = lambda frame, source, exported: None,
) -> Parity:
    """Run `checkpoint` in torch on the CPU and `bundle` on `device` on `images`, side by side.

    The language model runs with F32 KV and without flash attention, so that its weights alone make the difference.
    Masks count where the source says Yes, as the runtime makes none elsewhere, and where one side's is clear somewhere.
    If there is none such, they have no row.

    Args:
        images: compared on all stages; both sides' arrays are kept meanwhile.
        more: give further frames, to compare score, P(yes) and decisions on. Each is called twice.
        reading: how the images are read.
        each: gets every frame of `images` with both sides' arrays.

    Raises:
        FrameError: an image that cannot be read.
        BundleError: a file of the bundle that its engine refuses.
    """
    manifest = bundle.for_review
    question = manifest.conversation.question.replace("{object}", manifest.conversation.object)
    thresholds = checkpoint.config.similarity.thresholds
    allowed = limits(manifest)
    found: dict[str, list[StageParity]] = {}
    expected, decided = _run_source(checkpoint, images, more, question, reading, progress)

    def note(frame: Frame, theirs: Stages, ours: Stages, fault: str | None) -> None:
        clear = _clear(theirs, thresholds, allowed)
        # By how much a mask's logits may move.
        doubt = allowed["low_res_masks"]["max_relative_error"] * np.abs(theirs.get("low_res_masks", 0)).max()
        for stage, array in theirs.items():
            if stage == "mask" and theirs["p_yes"] < 0.5:
                continue
            row = compare(stage, array, ours[stage], doubt) if stage in ours else _nothing(stage, fault)
            if stage in DECISIONS:
                flips = int(not row.equal)
                row = row.model_copy(
                    update={"flips": flips, "clear": int(clear[stage]), "clear_flips": flips * clear[stage]}
                )
            if stage == "mask" and row.clear_iou is None:
                continue
            found.setdefault(stage, []).append(row.model_copy(update={"worst_image": Path(frame.id).name}))

    with Exported(bundle, device) as exported:
        for number, (path, theirs) in enumerate(zip(images, expected, strict=True), 1):
            progress(f"parity: export, image {number} of {len(images)}")
            frame = Frame.read(path, **reading)
            ours, fault = _until_fault(exported.run(frame, question, theirs["answer"]))
            if not np.array_equal(theirs["answer"], ours.get("answer", theirs["answer"])):
                del theirs["h_seg_full"]  # after other words it is another state
            note(frame, theirs, ours, fault)
            each(frame, theirs, ours)
        for number, (read, theirs) in enumerate(zip(more, decided, strict=True), 1):
            progress(f"parity: export, decision {number} of {len(more)}")
            frame = read()
            note(frame, theirs, *_until_fault(exported.decide(frame, question)))
    return Parity(
        images=tuple(Path(path).name for path in images),
        more_images=len(more),
        question=question,
        precision=manifest.precision,
        quantization=manifest.language.quantization,
        tensor_types=type_mix(bundle.file("llm.gguf")),
        stages=tuple(_worst(found[stage], allowed[stage]) for stage in LADDER if stage in found),
    )


def _until_fault(stages: Iterator[tuple[str, Array]]) -> tuple[Stages, str | None]:
    """What came, and what stopped it: whatever it is, it is a difference from the source, at that stage."""
    ours: Stages = {}
    try:
        for stage, array in stages:
            ours[stage] = array
    except Exception as error:
        return ours, f"{type(error).__name__}: {error}"
    return ours, None


def _run_source(
    checkpoint: Checkpoint,
    images: Sequence[str],
    more: Sequence[Callable[[], Frame]],
    question: str,
    reading: Reading,
    progress: Callable[[str], None],
) -> tuple[list[Stages], list[Stages]]:
    """The source's stages of `images` and of `more`. It is gone before the export is opened: both are large."""
    source = Source(checkpoint, checkpoint.streamed_language())
    found, decided = [], []
    for number, path in enumerate(images, 1):
        progress(f"parity: source, image {number} of {len(images)}")
        found.append(source.run(Frame.read(path, **reading), question))
    for number, read in enumerate(more, 1):
        progress(f"parity: source, decision {number} of {len(more)}")
        decided.append(source.decide(read(), question))
    del source
    gc.collect()  # its modules hold one another
    return found, decided


def decisions(figures: Figures, thresholds: Thresholds | None) -> dict[str, int]:
    """What the figures decide, stage by stage: the source's own copy of the runtime's rules."""
    screen = Verdict.UNCERTAIN
    if thresholds is not None and figures.score < thresholds.good_below:
        screen = Verdict.GOOD
    elif thresholds is not None and figures.score >= thresholds.defect_above:
        screen = Verdict.DEFECT
    yes = figures.p_yes >= 0.5
    verdict = screen
    if screen is Verdict.UNCERTAIN and thresholds is not None:  # without, nobody says what is normal
        verdict = Verdict.DEFECT if yes else Verdict.GOOD
    return {"screen": _VERDICTS.index(screen), "review": int(yes), "verdict": _VERDICTS.index(verdict)}


def runtime_decisions(figures: Figures, thresholds: Thresholds | None) -> dict[str, int]:
    """The same by the runtime's."""
    screen = verdict_of(figures.score, thresholds) if np.isfinite(figures.score) else Verdict.NOT_INSPECTED
    yes = settled(Verdict.UNCERTAIN, figures.p_yes, MAKERS_RULE) is Verdict.DEFECT
    verdict = settled(screen, figures.p_yes, makers_rule(thresholds))
    return {"screen": _VERDICTS.index(screen), "review": int(yes), "verdict": _VERDICTS.index(verdict)}


def _clear(source: Stages, thresholds: Thresholds | None, allowed: dict[str, dict[Measure, float]]) -> dict[str, bool]:
    """Which decisions stay as they are while score and P(yes) move as far as they may."""
    score, p_yes = float(source["score"]), float(source["p_yes"])
    moved = allowed["score"]
    d_score = min(moved["max_abs_error"], moved["max_relative_error"] * abs(score))
    d_yes = allowed["p_yes"]["max_abs_error"]
    possible = [
        decisions(Figures(score + on_score * d_score, p_yes + on_yes * d_yes), thresholds)
        for on_score in (-1, 0, 1)
        for on_yes in (-1, 0, 1)
    ]
    return {stage: len({one[stage] for one in possible}) == 1 for stage in DECISIONS}


def compare(stage: str, source: Array, exported: Array, doubt: float = 0.0) -> StageParity:
    """One stage on one image. Ids (integers) are compared by being equal, masks' logits by their signs.

    Args:
        doubt: a mask's pixel is clear where the source's logit is further from zero.
    """
    if stage == "mask":
        return _compare_masks(source, exported, doubt)
    equal = float(np.array_equal(source, exported, equal_nan=source.dtype.kind == "f"))
    if source.dtype.kind == "i":
        return StageParity(stage=stage, equal=equal)
    if source.shape != exported.shape:
        return _nothing(stage, f"shape {exported.shape} instead of {source.shape}")
    a, b = source.astype(np.float64).ravel(), exported.astype(np.float64).ravel()
    rank = None
    if stage == "map":
        inspected = ~(np.isnan(a) & np.isnan(b))
        a, b = a[inspected], b[inspected]
        rank = _cosine(*(ranks - ranks.mean() for ranks in map(_ranks, (a, b))))
    error = float(np.abs(a - b).max())
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = float(error / np.abs(a).max()) if error else 0.0  # all zeros on both sides
    return StageParity(
        stage=stage,
        equal=equal,
        cosine=_cosine(a, b) if source.ndim else None,
        max_abs_error=error,
        max_relative_error=relative,
        rank_correlation=rank,
    )


def _compare_masks(source: Array, exported: Array, doubt: float) -> StageParity:
    """Logits [h,w]. `clear_iou` is None where no clear pixel lies in either mask."""
    if source.shape != exported.shape:
        return _nothing("mask", f"shape {exported.shape} instead of {source.shape}")
    a, b, clear = source > 0, exported > 0, np.abs(source) > doubt
    whole = _iou(a, b)
    return StageParity(
        stage="mask",
        equal=float(np.array_equal(a, b)),
        iou=1.0 if whole is None else whole,
        clear_iou=_iou(a & clear, b & clear),
    )


def _iou(a: Array, b: Array) -> float | None:
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else None


def _nothing(stage: str, fault: str | None) -> StageParity:
    """Of a stage that the export did not reach, or gave in another shape."""
    return StageParity(
        stage=stage,
        equal=0,
        cosine=0,
        max_abs_error=np.inf,
        max_relative_error=np.inf,
        iou=0,
        clear_iou=0,
        rank_correlation=0,
        fault=fault,
    )


def _cosine(a: Array, b: Array) -> float:
    if np.array_equal(a, b):  # all zeros too, which have none
        return 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _ranks(values: Array) -> Array:
    """Of each value among all; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _worst(rows: list[StageParity], allowed: dict[Measure, float]) -> StageParity:
    def values(measure: str) -> Array:
        return np.array([getattr(row, measure) for row in rows if getattr(row, measure) is not None], float)

    worst: dict[str, float | None] = {"equal": float(values("equal").mean()), "images": len(rows)}
    for measure, extreme in (
        ("cosine", np.min),
        ("max_abs_error", np.max),
        ("max_relative_error", np.max),
        ("iou", np.min),
        ("clear_iou", np.min),
        ("rank_correlation", np.min),
    ):
        worst[measure] = float(extreme(values(measure))) if values(measure).size else None
    for measure in ("flips", "clear", "clear_flips"):
        worst[measure] = int(values(measure).sum()) if values(measure).size else None
    if rows[0].flips is not None:
        worst["flips_at_most"] = largest_share(int(values("flips").sum()), len(rows), CONFIDENCE)
    fault = next((row.fault for row in rows if row.fault), None)
    row = StageParity.model_validate({"stage": rows[0].stage, **worst, "fault": fault, "limits": allowed})
    # NaN counts as the largest error, and as the smallest likeness.
    first: Measure = next(iter(allowed), "equal")
    decisive = first if row.past is None else row.past
    badness = values(decisive) if decisive in _ERRORS else -values(decisive)
    if decisive == "clear_flips":
        badness = badness + values("flips")  # where none was clear, one that was not
    return row.model_copy(update={"worst_image": rows[int(np.argmax(np.nan_to_num(badness, nan=np.inf)))].worst_image})


@dataclass(frozen=True)
class Figures:
    """What one frame's verdict hangs on."""

    score: float
    p_yes: float


class Source:
    """The checkpoint in torch, FP32, on the CPU."""

    def __init__(self, checkpoint: Checkpoint, language: LlamaForCausalLM) -> None:
        self._config = checkpoint.config
        self._clip_size, self._grid, self._sam_size = checkpoint.clip.size, checkpoint.grid, checkpoint.sam.size
        self._cuts = checkpoint.clip.resize == "shortest_edge"
        self._pads = self._config.image_aspect_ratio == "pad"
        self._seg_token_id = checkpoint.seg_token_id
        self._clip_processor = CLIPImageProcessorPil.from_pretrained(checkpoint.path / "vision")
        side = checkpoint.sam.size
        self._sam_processor = SamImageProcessorPil(
            size={"longest_edge": side},
            pad_size={"height": side, "width": side},
            image_mean=checkpoint.sam.mean,
            image_std=checkpoint.sam.std,
            do_rescale=False,
        )
        self._tokenizer = read_tokenizer(checkpoint.path / "language")
        self._vision = checkpoint.vision()
        self._projector = checkpoint.projector()
        self._language = language
        self._sam = checkpoint.segmenter()
        self._seg_projection = checkpoint.seg_projection()
        self._features = load_file(checkpoint.path / "similarity.safetensors")

    @torch.no_grad()
    def run(self, frame: Frame, question: str) -> Stages:
        image = Image.fromarray(frame.pixels)
        stages = self._seen(image)
        stages["sam_pixels"] = self._sam_processor(image, return_tensors="pt").pixel_values.float()
        stages["image_embeddings"] = self._sam.get_image_embeddings(stages["sam_pixels"])
        stages |= self._answers(stages["visual_tokens"], question)
        stages |= self._masks(stages["image_embeddings"], stages["h_seg"], image.size)
        stages |= self._screen(stages["patches"][0], image.size)
        figures = Figures(float(stages["score"]), float(stages["p_yes"]))
        return {name: tensor.numpy() for name, tensor in stages.items()} | self._decisions(figures)

    def decide(self, frame: Frame, question: str) -> Stages:
        """`score`, `p_yes` and DECISIONS of `run` alone."""
        figures = self.figures(frame, question)
        return {
            "score": np.array(figures.score, np.float32),
            "p_yes": np.array(figures.p_yes, np.float32),
            **self._decisions(figures),
        }

    def _decisions(self, figures: Figures) -> Stages:
        return {stage: np.array(code) for stage, code in decisions(figures, self._config.similarity.thresholds).items()}

    @torch.no_grad()
    def figures(self, frame: Frame, question: str) -> Figures:
        """What decides about the frame, without words and mask."""
        image = Image.fromarray(frame.pixels)
        seen = self._seen(image)
        _, prompt = self._prompt(seen["visual_tokens"], question)
        logits = self._language(inputs_embeds=prompt).logits[0, -1]
        score = self._screen(seen["patches"][0], image.size)["score"]
        return Figures(float(score), float(self._p_yes(logits)))

    def _seen(self, image: Image.Image) -> dict[str, Tensor]:
        pixels = self._clip_processor(self._squared(image), return_tensors="pt").pixel_values
        levels = self._vision(pixels, output_hidden_states=True).hidden_states
        patches = levels[self._config.patches_level][:, 1:]
        patches_multi = torch.stack([levels[i][:, 1:] for i in self._config.levels], 1)
        return {
            "clip_pixels": pixels,
            "patches": patches,
            "patches_multi": patches_multi,
            "visual_tokens": self._projector(patches, patches_multi),
        }

    # ------------------------------------------------------------------------------------------ screen

    def _screen(self, patches: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """`patches` [N,D] → score [], map [h,w]; `size` is (width, height)."""
        spec, side, grid = self._config.similarity, self._clip_size, self._grid
        normal = self._largest_cosine(patches, "visual_normal")
        score = 1 - normal
        if "visual_abnormal" in self._features:
            both = torch.stack([normal, self._largest_cosine(patches, "visual_abnormal")])
            score = (both / spec.temperature).softmax(0)[1]

        axes = [self._axis(length, size) for length in size]
        centres = (torch.arange(grid) + 0.5) * side / grid
        on_x, on_y = (
            ((centres - shift) / scale > 0) & ((centres - shift) / scale < length)
            for (scale, shift), length in zip(axes, size, strict=True)
        )
        inspected = score[(on_y[:, None] & on_x).flatten()]
        count = 1 if spec.score_rule == "max" else max(1, len(inspected) // 100)
        total = inspected.topk(count).values.mean()

        fine = functional.interpolate(score.reshape(1, 1, grid, grid), size=(side, side), mode="bilinear")
        x, y = ((torch.arange(length) + 0.5) * scale + shift for (scale, shift), length in zip(axes, size, strict=True))
        where = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None] * 2 / side - 1
        smooth = _gaussian(fine, spec.smoothing_sigma)
        heat = functional.grid_sample(smooth, where, padding_mode="border", align_corners=False)[0, 0]
        heat[(y < 0) | (y > side), :] = torch.nan
        heat[:, (x < 0) | (x > side)] = torch.nan
        return {"score": total, "map": heat}

    def _largest_cosine(self, patches: Tensor, name: str) -> Tensor:
        """[N,D] → [N]."""
        features = functional.normalize(self._features[name].float(), dim=-1)
        return (functional.normalize(patches, dim=-1) @ features.T).amax(1)

    def _axis(self, length: int, size: tuple[int, int]) -> tuple[float, float]:
        """(scale, shift) from a frame's place along an axis to `clip_pixels`': padded, resized, cut in the middle."""
        whole, shorter = (max(size),) * 2 if self._pads else (length, min(size))
        resized = int(self._clip_size * whole / shorter) if self._cuts else self._clip_size
        scale = resized / whole
        return scale, (whole - length) // 2 * scale - (resized - self._clip_size) // 2

    def _squared(self, image: Image.Image) -> Image.Image:
        """LLaVA's image_aspect_ratio "pad", which transformers' processor does not know."""
        if not self._pads:
            return image
        side = max(image.size)
        colour = tuple(int(value * 255) for value in self._clip_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    # ------------------------------------------------------------------------------------------ review

    def _answers(self, visual_tokens: Tensor, question: str) -> dict[str, Tensor]:
        ids, prompt = self._prompt(visual_tokens, question)
        answer, states, logits = self._greedy(prompt)
        short = self._embed([*self._ids(self._config.conversation.short_answer), self._seg_token_id])
        out = self._language(inputs_embeds=torch.cat([prompt, short], 1), output_hidden_states=True)
        return {
            "prompt_ids": torch.tensor(ids),
            "hidden_states": states,
            "logits": logits,
            "p_yes": self._p_yes(logits[prompt.shape[1] - 1]),
            "answer": torch.tensor(answer),
            "h_seg": self._h_seg(out.hidden_states[-1][0]),
            "h_seg_full": self._h_seg(states),
        }

    def _prompt(self, visual_tokens: Tensor, question: str) -> tuple[list[int], Tensor]:
        """Its text's ids, and all of it embedded [1,P,H]."""
        template = self._config.conversation.template
        before, after = (part.replace("{question}", question) for part in template.split("<image>"))
        first, last = self._tokenizer(before).input_ids, self._ids(after)
        return first + last, torch.cat([self._embed(first), visual_tokens, self._embed(last)], 1)

    def _p_yes(self, logits: Tensor) -> Tensor:
        """[V] of the prompt's last position → []."""
        yes, no = (
            logits.softmax(-1)[list(ids)].sum() for ids in (self._config.yes_token_ids, self._config.no_token_ids)
        )
        return yes / (yes + no)

    def _greedy(self, prompt: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """The full answer's ids up to `<seg>`, and states [T,H] and logits [T,V] of `prompt` [1,P,H] and answer."""
        ids, states, logits, cache, step = list[int](), [], [], None, prompt
        while True:
            out = self._language(inputs_embeds=step, past_key_values=cache, use_cache=True, output_hidden_states=True)
            states.append(out.hidden_states[-1][0])
            logits.append(out.logits[0])
            if ids and ids[-1] == self._seg_token_id:
                return ids, torch.cat(states), torch.cat(logits)
            scores = out.logits[0, -1].clone()
            scores[self._tokenizer.eos_token_id] = -torch.inf
            last = len(ids) + 1 == self._config.max_new_tokens
            ids.append(self._seg_token_id if last else int(scores.argmax()))
            cache, step = out.past_key_values, self._embed(ids[-1:])

    def _h_seg(self, states: Tensor) -> Tensor:
        """[T,H], `<seg>` at the last position → [1,H]: its state, or that of the step before, which emits it."""
        return states[-1:] if self._config.seg_state == "token" else states[-2:-1]

    def _masks(self, image_embeddings: Tensor, h_seg: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        dense = self._sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        masks, _ = self._sam.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self._sam.get_image_wide_positional_embeddings(),  # type: ignore[no-untyped-call]
            sparse_prompt_embeddings=self._seg_projection(h_seg)[None, :, None],
            dense_prompt_embeddings=dense.expand_as(image_embeddings),
            multimask_output=False,
        )
        scale = self._sam_size / max(size)
        width, height = (int(length * scale + 0.5) for length in size)
        full = functional.interpolate(masks[0], size=(self._sam_size,) * 2, mode="bilinear")[:, :, :height, :width]
        logits = functional.interpolate(full, size=size[::-1], mode="bilinear")
        return {"low_res_masks": masks[0], "mask": logits[0, 0]}

    def _embed(self, ids: list[int]) -> Tensor:
        """[1,n,H]."""
        embedded: Tensor = self._language.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        return embedded

    def _ids(self, text: str) -> list[int]:
        """Of a text that does not begin the prompt: no BOS."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


_VERDICTS = list(Verdict)


def _gaussian(image: Tensor, sigma: float) -> Tensor:
    """[1,1,h,w]; cut off at 4 sigma, borders repeated."""
    if sigma == 0:
        return image
    radius = round(sigma * 8 + 1) // 2
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = functional.pad(image, (radius,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])


class Exported:
    """The bundle through what the runtime runs: the screen whole, the review's engines and stages one by one.

    Args:
        exact: see `LanguageModel`.
    """

    def __init__(self, bundle: Bundle, device: Device, *, exact: bool = True) -> None:
        self._manifest = manifest = bundle.for_review
        plans = Station(None, bundle).plans
        self._screen = Screen(bundle, device, plans)
        self._normal = NormalFeatures(bundle.file("similarity.safetensors"), manifest.similarity)
        engines = Engines.choose(bundle, device, plans)
        self._engines = {name: engines.open(name) for name in ("ltc_projector", "sam_encoder", "mask_decoder")}
        self._language = LanguageModel(bundle.file("llm.gguf"), manifest.language, manifest.conversation, exact=exact)

    def __enter__(self) -> Exported:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._language.close()

    def run(self, frame: Frame, question: str, answer_ids: Array) -> Iterator[tuple[str, Array]]:
        """Each stage's name and array as it comes about. `answer_ids` are the source's, `<seg>` included."""
        manifest = self._manifest
        pixels, _ = clip_pixels(frame, manifest.clip)
        yield "clip_pixels", pixels
        pixels, covered = sam_pixels(frame, manifest.sam)
        yield "sam_pixels", pixels
        before, after = self._language.prompt_ids(question)
        yield "prompt_ids", np.array(before + after)

        screening = self._screen.run(frame, self._normal, Stopwatch())
        features = {
            "patches": screening.features.patches[None],
            "patches_multi": screening.features.patches_multi[None],
        }
        yield from features.items()
        yield "score", np.array(screening.score, np.float32)
        yield "map", screening.map

        image_embeddings = self._engines["sam_encoder"].run({"sam_pixels": pixels})["image_embeddings"]
        yield "image_embeddings", image_embeddings
        visual_tokens = self._engines["ltc_projector"].run(features)["visual_tokens"]
        yield "visual_tokens", visual_tokens

        states, logits = self._language.hidden_states(visual_tokens[0], question, answer_ids.tolist())
        yield "hidden_states", states
        yield "logits", logits
        full = self._language.answer(visual_tokens[0], question, mode="full", mask_from=0)
        yield "p_yes", np.array(full.p_yes, np.float32)
        yield "answer", np.array(full.token_ids)
        yield "h_seg_full", _given(full.h_seg)
        h_seg = _given(self._language.answer(visual_tokens[0], question, mode="short", mask_from=0).h_seg)
        yield "h_seg", h_seg

        decoded = self._engines["mask_decoder"].run({"image_embeddings": image_embeddings, "h_seg": h_seg})
        yield "low_res_masks", decoded["low_res_masks"]
        size = frame.pixels.shape[0], frame.pixels.shape[1]
        yield "mask", mask_logits(decoded["low_res_masks"][0, 0], covered, manifest.sam.size, size)
        yield from self._decisions(Figures(screening.score, full.p_yes))

    def decide(self, frame: Frame, question: str) -> Iterator[tuple[str, Array]]:
        """`score`, `p_yes` and DECISIONS of `run` alone."""
        figures = self.figures(frame, question)
        yield "score", np.array(figures.score, np.float32)
        yield "p_yes", np.array(figures.p_yes, np.float32)
        yield from self._decisions(figures)

    def _decisions(self, figures: Figures) -> Iterator[tuple[str, Array]]:
        for stage, code in runtime_decisions(figures, self._normal.thresholds).items():
            yield stage, np.array(code)

    def figures(self, frame: Frame, question: str) -> Figures:
        """What decides about the frame, without words and mask."""
        screening = self._screen.run(frame, self._normal, Stopwatch())
        seen = {
            "patches": screening.features.patches[None],
            "patches_multi": screening.features.patches_multi[None],
        }
        visual_tokens = self._engines["ltc_projector"].run(seen)["visual_tokens"]
        told: list[float] = []
        self._language.answer(
            visual_tokens[0],
            question,
            mode="short",
            on_p_yes=told.append,
            stop=lambda: "P(yes) is all" if told else None,
        )
        return Figures(screening.score, told[0])


def _given(h_seg: Array | None) -> Array:
    if h_seg is None:
        raise ValueError("the answer ended without an h_seg")
    return h_seg
