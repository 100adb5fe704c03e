"""A benchmark for people: a table, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from rich.text import Text

from vmad_edge.runtime.benchmark import Benchmark, Lane, Ratio, Spread
from vmad_edge.runtime.files import whole_file, write_whole
from vmad_edge.runtime.machine import busy_elsewhere

_WIDTH, _HEIGHT, _GAP = 1280, 960, 40
_BLUE, _ORANGE, _RED, _GREY = "#4e79a7", "#f28e2b", "#c81e1e", "#888888"
_BESIDE = "sam_encoder"
"""Begins with its review, beside the other stages."""
_LAST = ("transfer", "verdict")
"""What ends a lane."""
Box = tuple[int, int, int, int]


def table(benchmark: Benchmark, ratios: dict[str, Ratio]) -> Table:
    """Every spread, in ms; beside it how it compares with an earlier one, where `ratios` says."""
    columns = ["ms", "runs", "p50", "p95", "p99", "max", "jitter"]
    found = Table(*columns, *(["p50 × before", "p99 × before"] if ratios else []), box=None)
    for name, spread in benchmark.spreads().items():
        cells = [str(spread.runs), *map(in_ms, (spread.p50, spread.p95, spread.p99, spread.max, spread.jitter))]
        if ratios:
            ratio = ratios.get(name)
            cells += ["", ""] if ratio is None else [f"{ratio.p50:.2f}", f"{ratio.p99:.2f}" if ratio.p99 else ""]
        stage = ":" in name
        found.add_row(f"  {name.partition(': ')[2]}" if stage else Text(name, "bold"), *cells)
    return found


def in_ms(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def write(benchmark: Benchmark, folder: Path) -> Path:
    """`folder`/bench.json and bench.png; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "bench.json", benchmark.model_dump_json(indent=2) + "\n")
    with whole_file(folder / "bench.png") as scratch:
        picture(benchmark).save(scratch, "PNG")
    return folder


def facts(benchmark: Benchmark, before: Benchmark | None = None) -> dict[str, str]:
    """All else that was measured, on what, and what it was compared with."""
    run, settings, memory = benchmark.run, benchmark.settings, benchmark.memory
    machine = run.machine
    first = [f"open {in_ms(benchmark.open_ms)}", f"screen {in_ms(benchmark.screen.first_ms)}"]
    if benchmark.review is not None:
        first.append(f"review {in_ms(benchmark.review.first_ms)} (starts its process)")
    found = {
        "first run, ms": ", ".join(first),
        "batches of CLIP encoder": ", ".join(
            f"{b.frames}: {b.frames_per_second:.1f} frames/s" for b in benchmark.batches
        ),
        **_prefill_facts(benchmark),
        "peak memory, MiB": f"screen {_mib(memory.inspector)}, with the banks above {_mib(memory.with_banks)}, "
        f"review's process {_mib(memory.review)}",
        "measured with": f"{settings.frames}; screen against {settings.compared_with}; {settings.provider}",
        "machine": f"{machine.processor}, {machine.cores} core{'s' * (machine.cores > 1)}, {machine.system}",
    }
    named = {"accelerator": machine.accelerator, "power mode": machine.power_mode}
    found |= {name: value for name, value in named.items() if value is not None}
    if machine.clocks is not None:
        found["clocks, MHz"] = ", ".join(f"{name} {clock.now:.0f}" for name, clock in machine.clocks.items())
    if (warning := busy_elsewhere(run)) is not None:
        found["warning"] = warning
    if before is not None:
        same = [
            f"{'the same' if a == b else 'ANOTHER'} {what}"
            for what, a, b in (
                ("bundle", settings.bundle, before.settings.bundle),
                ("processor", machine.processor, before.run.machine.processor),
                ("engine", settings.provider, before.settings.provider),
                ("choice of frames", settings.frames, before.settings.frames),
            )
        ]
        found["before"] = f"{before.run.date}, {', '.join(same)}"
    if (target := benchmark.target) is not None:
        p99 = in_ms(benchmark.screen.whole.p99)
        found["target"] = (
            f"{target.ms:g} ms at p99 {'holds' if target.holds else 'does NOT hold'}: p99 {p99} ms, {target.late} of "
            f"{benchmark.screen.whole.runs} late; look at {target.blame} first"
        )
    return found


def _prefill_facts(benchmark: Benchmark) -> dict[str, str]:
    if (prefill := benchmark.prefill) is None:
        return {}
    return {"prefill": f"{prefill.tokens} tokens, {prefill.tokens_per_second:.0f} a second"}


def picture(benchmark: Benchmark) -> Image.Image:
    """Histograms of both lanes above their waterfalls, and the screen over bank sizes below."""
    sheet = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    half, third = _WIDTH // 2, _HEIGHT // 3
    target = None if benchmark.target is None else benchmark.target.ms
    for column, (name, lane) in enumerate((("screen", benchmark.screen), ("review", benchmark.review))):
        if lane is not None:
            left = column * half + _GAP
            right = left + half - 2 * _GAP
            _histogram(draw, (left, _GAP, right, third - _GAP), name, lane, target if name == "screen" else None)
            _waterfall(draw, (left, third + _GAP, right, 2 * third - _GAP), name, lane)
    if len(benchmark.banks) > 1:
        _growth(draw, (_GAP + 60, 2 * third + _GAP, _WIDTH - 2 * _GAP, _HEIGHT - _GAP), benchmark)
    return sheet


def _histogram(draw: ImageDraw.ImageDraw, box: Box, name: str, lane: Lane, target: float | None) -> None:
    left, top, right, bottom = box
    marks = {"p50": lane.whole.p50, "p95": lane.whole.p95, "p99": lane.whole.p99, "target": target}
    low, high = min([*lane.times_ms, target or np.inf]), 1.01 * max([*lane.times_ms, target or 0.0])
    counts, edges = np.histogram(lane.times_ms, np.geomspace(low, high, 41))

    def place(ms: float) -> float:
        return left + math.log(ms / low) / math.log(high / low) * (right - left)

    _title(draw, left, top, f"{name}: {lane.whole.runs} runs, ms (logarithmic)")
    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        draw.rectangle((place(start), bottom - count / counts.max() * (bottom - top - 20), place(end), bottom), _BLUE)
    for row, (mark, value) in enumerate(marks.items()):
        if value is not None:
            x = place(value)
            draw.line((x, top, x, bottom), _RED if mark == "target" else _ORANGE, 2)
            anchor = "ra" if x > (left + right) / 2 else "la"
            draw.text(
                (x + (-4 if anchor == "ra" else 4), top + 14 * row), f"{mark} {in_ms(value)}", "black", _font(), anchor
            )
    draw.text((left, bottom + 4), in_ms(low), _GREY, _font())
    draw.text((right, bottom + 4), in_ms(high), _GREY, _font(), "ra")


def _waterfall(draw: ImageDraw.ImageDraw, box: Box, name: str, lane: Lane) -> None:
    left, top, right, bottom = box
    stages = sorted(lane.stages.items(), key=lambda item: item[0] in _LAST)
    starts, end = {}, 0.0
    for stage, spread in stages:
        if stage == "mask_decoder":  # waits for both
            end = max(end, lane.stages[_BESIDE].p50)
        starts[stage] = 0.0 if stage == _BESIDE else end
        end = end if stage == _BESIDE else end + spread.p50
    reached = [spread.p50 for spread in lane.reached.values()]
    whole = max([end, *(starts[stage] + spread.p50 for stage, spread in stages), *reached])
    _title(draw, left, top, f"{name}: its stages' p50, ms")
    height = (bottom - top) / len(stages)
    for row, (mark, spread) in enumerate(lane.reached.items()):
        x = left + 110 + spread.p50 / whole * (right - left - 170)
        draw.line((x, top, x, bottom + 4 + 13 * row), _ORANGE, 1)
        draw.text((x - 4, bottom + 4 + 13 * row), f"{mark} {in_ms(spread.p50)}", "black", _font(), "ra")
    for row, (stage, spread) in enumerate(stages):
        y = top + row * height
        x0, x1 = (
            left + 110 + place / whole * (right - left - 170) for place in (starts[stage], starts[stage] + spread.p50)
        )
        draw.text((left, y + height / 2), stage, "black", _font(), "lm")
        draw.rectangle((x0, y + 3, max(x1, x0 + 1), y + height - 3), _BLUE)
        draw.text((max(x1, x0 + 1) + 4, y + height / 2), in_ms(spread.p50), "black", _font(), "lm")


def _growth(draw: ImageDraw.ImageDraw, box: Box, benchmark: Benchmark) -> None:
    left, top, right, bottom = box
    most = benchmark.banks[-1].frames
    curves: list[tuple[str, str, list[Spread]]] = [("screen", _BLUE, [bank.screen for bank in benchmark.banks])]
    if all(bank.similarity for bank in benchmark.banks):
        curves.append(("similarity alone", _ORANGE, [bank.similarity for bank in benchmark.banks if bank.similarity]))
    highest = max(spread.p95 or spread.p50 for _, _, spreads in curves for spread in spreads)
    _title(draw, left, top, "over enrolled frames, ms: p50, and p95 above it")
    draw.line((left, top, left, bottom, right, bottom), _GREY)
    draw.text((left - 6, top), in_ms(highest), _GREY, _font(), "rm")
    draw.text((left - 6, bottom), "0", _GREY, _font(), "rm")

    def places(values: Sequence[float | None]) -> list[tuple[float, float]]:
        return [
            (left + bank.frames / most * (right - left), bottom - value / highest * (bottom - top))
            for bank, value in zip(benchmark.banks, values, strict=True)
            if value is not None
        ]

    for name, colour, spreads in curves:
        usual = places([spread.p50 for spread in spreads])
        draw.line(usual, colour, 3)
        draw.line(places([spread.p95 for spread in spreads]), colour, 1)
        for x, y in usual:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        above = name == "screen"
        draw.text((right - 12, usual[-1][1] + (-8 if above else 12)), name, colour, _font(), "rb" if above else "ra")
    last = -100.0
    for bank in benchmark.banks:
        x = left + bank.frames / most * (right - left)
        if x - last > 30:
            draw.text((x, bottom + 4), str(bank.frames), _GREY, _font(), "ma")
            last = x


def _title(draw: ImageDraw.ImageDraw, left: float, top: float, text: str) -> None:
    draw.text((left, top - 8), text, "black", _font(16), "ls")


def _font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
