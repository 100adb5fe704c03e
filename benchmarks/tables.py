"""Remake a page's tables from results/*.json: what stands between `<!-- results: NAME -->` and `<!-- end -->`.

python benchmarks/tables.py README.md docs/measured/*.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from record import load

from vmad_edge.runtime.benchmark import Benchmark
from vmad_edge.runtime.benchmark_page import in_ms
from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.machine import Run, busy_elsewhere

Figures = dict[str, Any]


def speed_and_memory(benched: Figures, small: Figures, edge: Figures, paper: Figures) -> list[str]:
    """The front page's one table: the demo's chain, an edge device's and the paper's."""
    rows = []
    for chained, name in ((small, "`demo/bundle`"), (edge, "edge")):
        for row, precision in (("vmad-edge f32", "FP32"), ("vmad-edge bf16", "bf16, OpenVINO")):
            figures = chained["rows"][row]
            times = [
                f"{in_ms(figures[lane]['p50'])} ({figures['times_faster_than_torch_f32'][lane]:.1f} ×)"
                for lane in ("screen", "review")
            ]
            rows.append([f"{name}, {precision}", *times, f"{figures['peak_mib']:.0f}"])
    inspected = paper["steps"]["inspect"]
    taken = inspected["found"]["second"]["timings_ms"]
    peak = max(at["resident_mib"] for at in inspected["stages"].values())
    rows.append(
        ["paper, FP32, one frame without a mask", in_ms(taken["screen"]), in_ms(taken["review"]), f"{peak:.0f}"]
    )
    found = Benchmark.model_validate(benched)
    assert found.review is not None
    return [
        *_table(["ms, p50 (times as fast as plain torch, FP32)", "screen", "review", "peak MiB"], rows),
        "",
        f"Of `demo/bundle` one screen in 100 takes longer than {in_ms(found.screen.whole.p99)} ms, one review in 100 "
        f"than {in_ms(found.review.whole.p99)} ms; opening takes {found.open_ms:.0f} ms.",
    ]


def patchcore(figures: Figures) -> list[str]:
    rows = [
        [
            name,
            *(f"{row[figure]:.3f}" for figure in ("image_auroc", "pixel_auroc", "aupro")),
            f"{row['enroll_s']:.0f}",
            f"{row['frame_ms']:.0f}",
        ]
        for name, row in figures["rows"].items()
    ]
    title = f"{figures['dataset'].replace('_', ' ')}, {figures['enrolled']} enrolled, {figures['tested']} tested"
    return _table([title, "image AUROC", "pixel AUROC", "AUPRO", "s to enroll", "ms a frame"], rows)


def bench(figures: Figures) -> list[str]:
    found = Benchmark.model_validate(figures)
    review = [] if found.review is None else [("review", found.review)]
    rows = []
    for name, lane in (("screen", found.screen), *review):
        rows.append([f"**{name}**", *map(in_ms, (lane.whole.p50, lane.whole.p95, lane.whole.p99, lane.whole.max))])
        parts = lane.stages | lane.reached
        rows += [[part, *map(in_ms, (s.p50, s.p95, s.p99, s.max))] for part, s in parts.items()]
    for bank in found.banks:
        name = f"**screen**, {bank.frames} frame{'s' * (bank.frames > 1)} enrolled"
        rows.append([name, *map(in_ms, (bank.screen.p50, bank.screen.p95, bank.screen.p99, bank.screen.max))])
    batches = "; ".join(f"{batch.frames}: {batch.frames_per_second:.0f}" for batch in found.batches)
    first = [
        f"opening takes {found.open_ms:.0f} ms",
        *(f"the first review {lane.first_ms:.0f} ms" for _, lane in review),
    ]
    if found.prefill is not None:
        first.append(f"prefill {found.prefill.tokens} tokens at {found.prefill.tokens_per_second:.0f} a second")
    memory = [f"screen {found.memory.inspector or 0:.0f}", f"review’s process {found.memory.review or 0:.0f}"]
    return [
        *_table(["ms", "p50", "p95", "p99", "max"], rows),
        "",
        f"{found.settings.repeats} runs of each; {found.settings.frames}; {found.settings.provider}; "
        f"{', '.join(first)}; CLIP encoder in batches, frames/s: {batches}; peak memory in MiB: {', '.join(memory)}.",
    ]


def chain(figures: Figures) -> list[str]:
    rows = []
    for name, row in figures["rows"].items():
        if row is None:
            rows.append([name, *[""] * 7])
            continue
        faster, agrees = row["times_faster_than_torch_f32"], row["agreement"]
        rows.append(
            [
                f"{name} ({row['with']})",
                in_ms(row["screen"]["p50"]),
                f"{faster['screen']:.2f}",
                in_ms(row["review"]["p50"]),
                f"{faster['review']:.2f}",
                "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                f"{agrees['p_yes_max_error']:.4f}",
                f"{agrees['mask_iou_mean']:.3f}",
            ]
        )
    bars = ", ".join(
        f"{lane} {bar['reached']:.2f} × (bar {bar['bar']} ×: {'holds' if bar['holds'] else 'missed'})"
        for lane, bar in figures["bars"].items()
    )
    columns = ["", "screen p50, ms", "×", "review p50, ms", "×", "peak MiB", "P(yes) max. error", "mask IoU"]
    return [
        *_table(columns, rows),
        "",
        f"{figures['turns']} turns over {figures['frames']} frames; ×, P(yes) and masks: against torch f32. "
        f"At f32: {bars}.",
    ]


def real_images(figures: Figures) -> list[str]:
    rows = [
        [
            f"{name.replace('_', ' ')}, {found['enrolled']} enrolled, {found['tested']} tested",
            f"{found['image_auroc_normal_features']:.3f}",
            f"{found['image_auroc_enrolled']:.3f}",
        ]
        for name, found in figures["datasets"].items()
    ]
    return _table(["image AUROC of the screen", "normal features of the bundle", "enrolled"], rows)


def reference_weight(figures: Figures) -> list[str]:
    columns = ["image AUROC, weight of references", *map(str, figures["weights"])]
    reached = figures["image_auroc"]
    means = [sum(each) / len(reached) for each in zip(*reached.values(), strict=True)]
    rows = [
        [name.replace("_", " "), *(f"{auroc:.3f}" for auroc in each)]
        for name, each in (reached | {"mean": means}).items()
    ]
    return _table(columns, rows)


def answer_modes(figures: Figures) -> list[str]:
    modes = figures["modes"]
    rows = [
        ["ms a review, p50", *(in_ms(found["review"]["p50"]) for found in modes.values())],
        ["mask IoU with the truth", *(f"{found['mask_iou_with_truth']:.3f}" for found in modes.values())],
    ]
    return [
        *_table(["", *modes], rows),
        "",
        f"{figures['parts']} unseen drawn parts; same decision on {figures['same_decision']}; IoU of the two modes’ "
        f"masks {figures['mask_iou_of_the_two']:.3f} over {figures['parts_with_a_mask']} parts; `<seg>` forced in "
        f"{figures['seg_forced']} full answers.",
    ]


def decisions(figures: Figures) -> list[str]:
    parts, bundles = figures["parts"], figures["bundles"].values()
    columns = [
        f"{'/'.join(sorted({*b['precision'].values()} or {'fp32'}))} graphs, {b['quantization']}" for b in bundles
    ]
    words = {"screen": "the screen’s verdict", "review": "the review’s Yes or No", "verdict": "the settled verdict"}
    rows = [
        [
            words[stage],
            *(f"{b['decisions'][stage]['flips']} (≤ {100 * b['decisions'][stage]['at_most']:.3g}%)" for b in bundles),
        ]
        for stage in words
    ]
    rows += [
        [f"largest error of {word}", *(f"{b['largest_error'][name]:.1e}" for b in bundles)]
        for name, word in (("score", "the score"), ("p_yes", "P(yes)"))
    ]
    return [
        *_table([f"flips on {parts} drawn parts", *columns], rows),
        "",
        f"Against the checkpoint in torch at FP32, parts from number {figures['first']} on; in brackets the share of "
        f"all such parts, with {figures['confidence']:.0%} confidence.",
    ]


def similarity(figures: Figures) -> list[str]:
    sizes = figures["sizes"]
    rows = [
        [name, *(f"{found['gflops'][name]:.0f} ({found['peak_mib'][name]:.0f})" for found in sizes.values())]
        for name in next(iter(sizes.values()))["gflops"]
    ]
    for dtype in next(iter(sizes.values()))["accuracy"]:
        accuracy = (found["accuracy"][dtype] for found in sizes.values())
        rows.append([f"{dtype}: error, same row", *(f"{a['max_error']:.0e}, {a['same_argmax']:.2f}" for a in accuracy)])
    notes = [f"Threads: {figures['threads']}; path {figures['path']}; time {figures['time']}"]
    for name, bar in (figures["bars"] or {}).items():
        notes.append(f"{name}: {bar['reached']:.2f}" + (f" (bar {bar['bar']})" if bar["bar"] else ""))
    gained = ", ".join(f"{name} {ms:.1f}" for name, ms in figures["screen_ms"].items())
    notes.append(f"patch similarity of the demo's screen with 200 frames enrolled, ms: {gained}")
    return [
        *_table([f"GFLOP/s (MiB more at its peak), D={figures['width']}", *sizes], rows),
        "",
        "; ".join(notes) + ".",
    ]


def similarity_cuda(figures: Figures) -> list[str]:
    taken = figures["microseconds"]
    names = list(next(iter(taken.values())))
    rows = [[name, *(f"{times[name]:.1f}" for times in taken.values())] for name in names]
    notes = []
    for bar, found in figures["bars"].items():
        wanted = ", ".join(f"{word} {value}" for word, value in found.items() if word != "reached")
        notes.append(f"{bar}: {found['reached']:.2f} ({wanted}).")
    return [*_table([f"µs, D=1024, {figures['gpu']}", *taken], rows), "", " ".join(notes)]


def musc(figures: Figures) -> list[str]:
    rows = [
        [name, f"{seconds:.0f}", f"{figures['peak_mib'][name]:.0f}", f"{figures['max_error'][name]:.0e}"]
        for name, seconds in figures["seconds"].items()
    ]
    title = f"MuSc: {figures['frames']} frames × {figures['patches']} patches × {figures['levels']} levels"
    return _table([title, "s", "MiB more at its peak", "error"], rows)


def clip_large(figures: Figures) -> list[str]:
    rows = [
        [
            f"{name} ({row['with']})",
            in_ms(row["ms"]["p50"]),
            f"{row['times_faster_than_torch_f32']:.2f}",
            f"{row['error']:.4f}",
        ]
        for name, row in figures["rows"].items()
    ]
    return _table([f"{figures['layers']} layers, {figures['size']} px", "p50, ms", "×", "error"], rows)


def scale(figures: Figures) -> list[str]:
    steps = figures["steps"]
    rows = [
        [
            f"{step}: {stage}",
            *(f"{at[what]:.0f}" for what in ("seconds", "processor_seconds", "resident_mib", "anonymous_mib")),
        ]
        for step, taken in steps.items()
        for stage, at in taken["stages"].items()
    ]
    found = {step: taken["found"] for step, taken in steps.items()}
    notes = []
    if exported := found.get("export"):
        sizes = {name: size for name, size in exported["bytes"].items() if name.endswith((".onnx", ".gguf"))}
        errors = {stage: row["max_relative_error"] for stage, row in exported["parity"].items()}
        told = ", ".join(f"{stage} {error:.1e}" for stage, error in errors.items() if error is not None)
        notes.append(f"Bundle in {exported['precision']} and {exported['llm']}, MB: {_megabytes(sizes)}.")
        notes.append(f"Parity's largest relative errors: {told}; mask IoU {exported['parity']['mask']['iou']:.3f}.")
    if inspected := found.get("inspect"):
        taken = inspected["second"]["timings_ms"].items()
        notes.append("A second inspection on the CPU, ms: " + ", ".join(f"{s} {in_ms(ms)}" for s, ms in taken) + ".")
    if built := found.get("build"):
        chip = ".".join(map(str, built["compute_capability"]))
        notes.append(f"Plans of {built['tensorrt']} for {chip}, MB: {_megabytes(built['plan_bytes'])}.")
    return [*_table(["", "s", "processor s", "peak MiB", "of it not mapped files"], rows), "", " ".join(notes)]


def _megabytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e6:.0f}" for name, size in sizes.items())


TABLES: dict[str, Callable[..., list[str]]] = {
    **{
        function.__name__: function
        for function in (
            bench,
            chain,
            real_images,
            reference_weight,
            answer_modes,
            decisions,
            similarity,
            similarity_cuda,
            musc,
            clip_large,
            speed_and_memory,
        )
    },
    "chain_edge": chain,
    "edge": scale,
    "paper": scale,
    "patchcore_cookies": patchcore,
    "patchcore_magnetic_tile": patchcore,
}
SOURCES = {"speed_and_memory": ("bench", "chain", "chain_edge", "paper")}
"""The results that a table is of, where they are not the one of its name."""


def remake(page: str) -> str:
    """`page` with its tables made anew; one of a result that is not there stays as it is."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        sources = SOURCES.get(name, (name,))
        results = [figures for source in sources if (figures := load(source)) is not None]
        if len(results) < len(sources):
            return match[0]
        measured = _measured(results[0]["run"]) if len(results) == 1 else _all_measured(results)
        return "\n".join([f"<!-- results: {name} -->", *TABLES[name](*results), "", measured, "<!-- end -->"])

    return re.sub(r"<!-- results: (\w+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def _measured(fields: Figures) -> str:
    run = Run.model_validate(fields)
    warning = busy_elsewhere(run)
    return f"`{run.command}`, {run.date}, {_where(run)}" + (f"; {warning}." if warning else ".")


def _all_measured(results: Iterable[Figures]) -> str:
    """When and where alone: the commands stand with the results' own tables."""
    runs = [Run.model_validate(figures["run"]) for figures in results]
    return "; ".join(dict.fromkeys(f"{run.date}, {_where(run)}" for run in runs)) + "."


def _where(run: Run) -> str:
    machine = run.machine
    cores = f"{machine.processor}, {machine.cores} core{'s' * (machine.cores > 1)}"
    return f"{cores}, {machine.accelerator}" if machine.accelerator else cores


def _table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+")
    for page in parser.parse_args().pages:
        write_whole(page, remake(page.read_text("utf-8")))


if __name__ == "__main__":
    main()
