"""How many decisions a bundle's precision turns: checkpoint and bundles on the same unseen drawn parts, part by part.

    python benchmarks/decisions.py demo/checkpoint FP16 Q4 --parts 10000 --rows ROWS.csv

The checkpoint runs in torch at FP32, a bundle as the runtime runs it (its own KV type and flash attention). Each part
is a line of ROWS as soon as all have seen it, so that a run that was stopped goes on behind its last line.
"""

from __future__ import annotations

import argparse
import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from record import save
from rich.progress import track

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.parity import CONFIDENCE, DECISIONS, Exported, Figures, Source, decisions, runtime_decisions
from vmad_edge.export.reference.evaluate import unseen
from vmad_edge.runtime.bundle import Bundle, Thresholds
from vmad_edge.runtime.calibrate import largest_share
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress

FIRST = 30_000
"""Number of the first part: neither a training nor a choice nor another figure has seen them."""


def decide(checkpoint: Checkpoint, bundles: list[Bundle], rows: Path, parts: int) -> list[list[Figures]]:
    """Of each part what the checkpoint and each bundle say; those that `rows` lacks are run, and appended."""
    sides = ["source", *(bundle.hash[:16] for bundle in bundles)]
    header = ["part", *(f"{side} {figure}" for side in sides for figure in ("score", "P(yes)"))]
    found = _read(rows, header)
    if len(found) < parts:
        _append(checkpoint, bundles, rows, range(FIRST + len(found), FIRST + parts))
        found = _read(rows, header)
    return found[:parts]


def _append(checkpoint: Checkpoint, bundles: list[Bundle], rows: Path, numbers: range) -> None:
    source = Source(checkpoint, checkpoint.language())
    with ExitStack() as stack, rows.open("a", buffering=1) as file:
        sides = [source, *(stack.enter_context(Exported(bundle, "cpu", exact=False)) for bundle in bundles)]
        write = csv.writer(file, lineterminator="\n").writerow
        for number in track(numbers, "deciding"):
            (part,) = unseen(1, first=number)
            question = checkpoint.config.conversation.question.replace("{object}", part.object)
            frame = Frame(part.image, part.object)
            found = [side.figures(frame, question) for side in sides]
            write([number, *(figure for side in found for figure in (side.score, side.p_yes))])


def _read(rows: Path, header: list[str]) -> list[list[Figures]]:
    """A line that was cut off is taken off the file; one without lines gets its header."""
    lines = rows.read_text().splitlines(keepends=True) if rows.exists() else []
    whole = [line for line in lines if line.endswith("\n")] or [",".join(header) + "\n"]
    if whole != lines:
        rows.write_text("".join(whole))
    first, *rest = csv.reader(whole)
    if first != header:
        raise SystemExit(f"{rows} is of {', '.join(first)}; expected {', '.join(header)}")
    return [_pairs(list(map(float, values))) for _, *values in rest]


def _pairs(values: list[float]) -> list[Figures]:
    return [Figures(*pair) for pair in zip(values[::2], values[1::2], strict=True)]


def flips(source: list[Figures], exported: list[Figures], thresholds: Thresholds | None) -> dict[str, Any]:
    """Of each decision: parts that one bundle decides otherwise, and the bound on the share of all such parts."""
    ours = [decisions(one, thresholds) for one in source]
    theirs = [runtime_decisions(one, thresholds) for one in exported]
    counts = {stage: sum(a[stage] != b[stage] for a, b in zip(ours, theirs, strict=True)) for stage in DECISIONS}
    return {
        stage: {"flips": count, "at_most": largest_share(count, len(source), CONFIDENCE)}
        for stage, count in counts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path, nargs="+")
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--rows", type=Path, required=True, help="CSV to write, or to go on with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = RunInProgress()
    checkpoint, bundles = Checkpoint.open(args.checkpoint), [Bundle.open(path) for path in args.bundle]
    found = decide(checkpoint, bundles, args.rows, args.parts)
    source, *exported = (list(side) for side in zip(*found, strict=True))
    figures: dict[str, Any] = {"parts": len(found), "first": FIRST, "confidence": CONFIDENCE, "bundles": {}}
    for path, bundle, side in zip(args.bundle, bundles, exported, strict=True):
        figures["bundles"][path.name] = {
            "hash": bundle.hash,
            "precision": bundle.manifest.precision,
            "quantization": bundle.for_review.language.quantization,
            "decisions": flips(source, side, checkpoint.config.similarity.thresholds),
            "largest_error": {
                name: max(abs(getattr(a, name) - getattr(b, name)) for a, b in zip(source, side, strict=True))
                for name in ("score", "p_yes")
            },
        }
    save("decisions", run.end(["torch", "transformers"]), figures)


if __name__ == "__main__":
    main()
