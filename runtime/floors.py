"""`vmad bench --plan`: the least time that a bundle can take on hardware that one does not have. Arithmetic alone.

A pass (a graph's run, one decode) takes at least its operations at the peak, and at least its bytes at the memory's
bandwidth (the roofline of Williams et al. 2009). Preprocessing, map, copies, launches, and clocks that fall under load
come on top; so no line is faster than this, and a real one is slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from safetensors import SafetensorError, safe_open

from vmad_edge.runtime.bundle import Bundle, Manifest, Record
from vmad_edge.runtime.costs import Cost, GraphCost, LanguageCost, graph_cost, similarity_cost
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.hardware import Hardware
from vmad_edge.runtime.headers import read_gguf
from vmad_edge.runtime.stages.vocabulary import prompt_lengths

SUSPECTS = (0.0, 0.01, 0.1, 1.0)
"""Shares of frames that are reviewed, for which `Floors.frames_per_second` is told."""


class StageFloor(Record):
    stage: str
    gigaoperations: float
    megabytes: float
    compute_ms: float
    memory_ms: float
    ms: float
    """The floor. Of several passes the sum of theirs."""
    binds: Literal["compute", "memory"]
    """Which of the two is longer."""


class Floors(Record):
    kind: Literal["arithmetic, not measurement"] = "arithmetic, not measurement"
    hardware: Hardware
    stages: tuple[StageFloor, ...]
    totals_ms: dict[str, float]
    """Of the screen, and from a review's beginning to P(yes), to the mask (short answer), to the last word of the
    longest answer. SAM's encoder runs beside the language model, and both share the GPU."""
    memory_gib: dict[str, float]
    """What lies in memory as long as the bundle runs; the engines' working memory and the system are not counted."""
    fits: bool
    frames_per_second: dict[float, float]
    """At best, by the share of frames that are reviewed (short answer)."""


@dataclass(frozen=True)
class Dialogue:
    """What a review asks of the language model, in tokens."""

    model: LanguageCost
    kept: int
    """Before the visual tokens: their keys and values are there already."""
    visual: int
    after: int
    short: int
    """Of the short answer, which are given."""
    longest: int
    """Of the longest answer."""
    context: int
    """Positions that the KV cache has room for."""


@dataclass(frozen=True)
class Chain:
    """A bundle's costs, or those of one that is only planned."""

    graphs: dict[str, GraphCost]
    """clip_encoder and, with a dialogue, ltc_projector, sam_encoder and mask_decoder."""
    similarity: dict[str, Cost]
    """By stage's name; the first one is the screen's."""
    dialogue: Dialogue | None


def floors(chain: Chain, hardware: Hardware) -> Floors:
    """What `chain` takes on `hardware` at least."""

    def stage(name: str, *passes: Cost) -> StageFloor:
        compute = [sum(n / hardware.tflops[kind] for kind, n in cost.operations.items()) / 1e9 for cost in passes]
        memory = [cost.bytes / hardware.gigabytes / 1e6 for cost in passes]
        return StageFloor(
            stage=name,
            gigaoperations=sum(sum(cost.operations.values()) for cost in passes) / 1e9,
            megabytes=sum(cost.bytes for cost in passes) / 1e6,
            compute_ms=sum(compute),
            memory_ms=sum(memory),
            ms=sum(map(max, compute, memory)),
            binds="compute" if sum(compute) > sum(memory) else "memory",
        )

    graphs = {name: stage(name, cost.run) for name, cost in chain.graphs.items()}
    found = [graphs["clip_encoder"], *(stage(name, cost) for name, cost in chain.similarity.items())]
    totals = {"screen": found[0].ms + found[1].ms}
    memory = {"graphs": sum(cost.weights for cost in chain.graphs.values()) / 2**30}
    if (asked := chain.dialogue) is not None:
        model, end = asked.model, asked.kept + asked.visual + asked.after
        prefill = stage(
            "prefill",  # three decodes, as stages/language.py makes them: with the last token come logits and state
            model.decode(asked.visual, asked.kept, 0),
            model.decode(asked.after - 1, asked.kept + asked.visual, 0),
            model.decode(1, end - 1, 1),
        )
        short = stage("decode, short answer", model.decode(asked.short, end, asked.short))
        steps = [model.decode(1, end + token, 1) for token in range(asked.longest - 1)]
        longest = stage(f"decode, {asked.longest} tokens", *steps)
        ltc, sam, decoder = (graphs[name] for name in ("ltc_projector", "sam_encoder", "mask_decoder"))
        found += [ltc, prefill, short, longest, sam, decoder]
        totals |= {
            "P(yes)": ltc.ms + prefill.ms,
            "mask": _beside([ltc, prefill, short], sam) + decoder.ms,
            "last word": _beside([ltc, prefill, longest], sam),
        }
        memory |= {"language model": model.weights / 2**30, "KV cache": asked.context * model.kv_bytes / 2**30}
    review = totals.get("mask", 0.0)
    return Floors(
        hardware=hardware,
        stages=tuple(found),
        totals_ms=totals,
        memory_gib=memory,
        fits=sum(memory.values()) < hardware.memory_gib,
        frames_per_second={
            share: 1e3 / (totals["screen"] + share * review) for share in (SUSPECTS if asked else SUSPECTS[:1])
        },
    )


def _beside(chain: Sequence[StageFloor], other: StageFloor) -> float:
    """`chain`'s stages one after the other, `other` beside them on the same GPU."""
    together = [*chain, other]
    return max(
        sum(stage.ms for stage in chain),
        sum(stage.compute_ms for stage in together),
        sum(stage.memory_ms for stage in together),
    )


def chain_of(bundle: Bundle, banks: Sequence[int]) -> Chain:
    """Count a bundle's stages.

    Args:
        banks: numbers of enrolled frames to screen against, beside the bundle's own normal features.

    Raises:
        BundleError: a file whose shapes cannot be read.
    """
    manifest = bundle.manifest
    names = sorted(name.removesuffix(".onnx") for name in manifest.files if name.endswith(".onnx"))
    graphs = {name: graph_cost(bundle.file(f"{name}.onnx")) for name in names}
    query, width = manifest.vision.grid**2, manifest.vision.width
    similarity = {}
    if "similarity.safetensors" in manifest.files:
        rows = _feature_rows(bundle.file("similarity.safetensors"))
        similarity["similarity, normal features"] = similarity_cost(query, rows, width, "float32")
    for count in banks or ([] if similarity else [1]):
        rows = max(1, round(count * query * manifest.similarity.coreset))
        cost = similarity_cost(query, rows, width, manifest.similarity.bank_dtype)
        similarity[f"similarity, {count} enrolled"] = cost
    if not isinstance(manifest, Manifest):
        return Chain(graphs, similarity, None)
    language, gguf = manifest.language, bundle.file("llm.gguf")
    before, after, short = prompt_lengths(gguf, language, manifest.conversation, manifest.object)
    model = LanguageCost.of(read_gguf(gguf), language.llama.kv_type)
    tokens = (before, language.visual_tokens, after, short, language.max_new_tokens, language.context_length)
    return Chain(graphs, similarity, Dialogue(model, *tokens))


def _feature_rows(path: Path) -> int:
    try:
        with safe_open(path, "numpy") as file:
            names = [name for name in file.keys() if name.startswith("visual_")]  # noqa: SIM118 (it is no dict)
            return sum(file.get_slice(name).get_shape()[0] for name in names)
    except (OSError, SafetensorError, IndexError):
        raise BundleError(f"{path}: its shapes cannot be read. Export the bundle again.") from None


def table(found: Floors) -> Table:
    """For people."""
    columns = ["at least", "GFLOP", "MB", "ms compute", "ms memory", "ms", "bound by"]
    made = Table(*columns, box=None, title=f"{found.hardware.name}: {found.kind}", title_justify="left")
    for stage in found.stages:
        numbers = (stage.gigaoperations, stage.megabytes, stage.compute_ms, stage.memory_ms, stage.ms)
        made.add_row(stage.stage, *map(number, numbers), stage.binds)
    return made


def facts(found: Floors) -> dict[str, str]:
    """All else, for people."""
    hardware = found.hardware
    whole = sum(found.memory_gib.values())
    peaks = ", ".join(f"{kind} {peak:g}" for kind, peak in hardware.tflops.items())
    return {
        "totals, ms": ", ".join(f"{name} {number(ms)}" for name, ms in found.totals_ms.items()),
        "line speed at best": ", ".join(
            f"{number(speed)} frames/s with {share:.0%} reviewed" for share, speed in found.frames_per_second.items()
        ),
        "memory": f"{'fits' if found.fits else 'does NOT fit'}: at least {whole:.2f} GiB ("
        + ", ".join(f"{name} {gib:.2f}" for name, gib in found.memory_gib.items())
        + f") of {hardware.memory_gib:g}{', which the system shares' if hardware.shared else ''}",
        "peaks": f"{peaks} TFLOPS dense, {hardware.gigabytes:g} GB/s; {hardware.source}",
    }


def number(value: float) -> str:
    """Three digits that count, and none that are not whole above 1,000."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
