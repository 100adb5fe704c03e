"""How many verdicts a bundle's precision turns: checkpoint and bundles on the same unseen drawn parts, part by part.

    python benchmarks/decisions.py demo/checkpoint FP16 Q4 --parts 10000 --rows ROWS.csv

The checkpoint runs in torch at FP32, a bundle as the runtime runs it (its own KV type and flash attention). Each part
is a row of ROWS as soon as all have seen it, so that a run that was stopped goes on behind its last row; the figures
are of all whole rows that are there. `--parts 0` only counts them.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from record import save
from rich.progress import track

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.parity import Exported, Figures, Source
from vmad_edge.export.reference.evaluate import unseen
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress

FIRST = 30_000
"""Number of the first part: neither a training nor a choice nor another figure has seen them."""


def compare(checkpoint: Checkpoint, bundles: list[Bundle], rows: Path, parts: int) -> None:
    """Append to `rows` what each side says of the parts that it lacks: number, then score and P(yes) of each."""
    source = Source(checkpoint, checkpoint.language())
    seen = len(read(rows))
    with ExitStack() as stack, rows.open("a", buffering=1) as file:
        sides = [source, *(stack.enter_context(Exported(bundle, "cpu", exact=False)) for bundle in bundles)]
        write = csv.writer(file).writerow
        for number in track(range(FIRST + seen, FIRST + parts), "deciding"):
            (part,) = unseen(1, first=number)
            question = checkpoint.config.conversation.question.replace("{object}", part.object)
            frame = Frame(part.image, part.object)
            found = [side.figures(frame, question) for side in sides]
            write([number, *(figure for side in found for figure in (side.score, side.p_yes))])


def read(rows: Path) -> list[list[Figures]]:
    """Of each part what each side said. A line that was cut off ends it, and is taken off the file."""
    if not rows.exists():
        return []
    lines = rows.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        rows.write_text("".join(whole))
    return [[Figures(*pair) for pair in _pairs(values)] for _, *values in csv.reader(whole)]


def _pairs(values: list[str]) -> Iterator[tuple[float, float]]:
    figures = iter(map(float, values))
    return zip(figures, figures, strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path, nargs="+")
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--rows", type=Path, required=True, help="CSV to go on with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = RunInProgress()
    checkpoint, bundles = Checkpoint.open(args.checkpoint), [Bundle.open(path) for path in args.bundle]
    compare(checkpoint, bundles, args.rows, args.parts)


if __name__ == "__main__":
    main()
