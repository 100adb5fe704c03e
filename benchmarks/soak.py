"""Many screens, or many reviews, by one inspector: what its two processes hold stays flat.

    nice python benchmarks/soak.py screens demo/bundle demo/parts --count 100000
    nice python benchmarks/soak.py reviews demo/bundle demo/parts --count 5000

Writes results/soak_screens.md or soak_reviews.md, anew at each interval: a run that is ended has told what it did.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, get_args

from record import RESULTS

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.folders import find_images
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import Run, RunInProgress, busy_elsewhere

Lane = Literal["screens", "reviews"]
ROWS = 20


class Held(NamedTuple):
    """What a process holds of the system."""

    mib: float
    """Resident memory that is no file's."""
    files: int
    threads: int


class Row(NamedTuple):
    done: int
    inspector: Held
    review: Held
    ms: float
    """Of the clock, for a frame since the last row."""


def held(process: int) -> Held:
    """What the system says of a process now."""
    folder = Path(f"/proc/{process}")
    lines = (line.partition(":") for line in (folder / "status").read_text().splitlines())
    said = {name: value.split() for name, _, value in lines}
    files = len(list((folder / "fd").iterdir()))
    return Held(int(said["RssAnon"][0]) / 1024, files, int(said["Threads"][0]))


def soak(inspector: Inspector, frames: Sequence[Path], lane: Lane, count: int, rows: int = ROWS) -> Iterator[Row]:
    """Screen `count` times one of `frames`, in turn, and review each where that is the lane; `rows` rows on the way.

    Raises:
        RuntimeError: a frame was not inspected, its review did not end well, or the review process was replaced.
    """
    turn, done = itertools.cycle(frames), 0
    inspector.review(inspector.inspect(frames[0], review=False)).wait()  # everything is loaded now
    process = inspector.review_pid
    for part in range(1, rows + 1):
        start, before = time.perf_counter(), done
        while done < count * part // rows:
            found = inspector.inspect(next(turn), review=False)
            if lane == "reviews" and found.features is not None:
                found = inspector.review(found, answer="short").wait()
            if found.reason is not None:
                raise RuntimeError(f"{found.frame.id}: {found.reason}")
            done += 1
        if process is None or process != inspector.review_pid:
            raise RuntimeError(f"expected review process {process}, found {inspector.review_pid}")
        ms = (time.perf_counter() - start) * 1e3 / max(1, done - before)
        yield Row(done, held(os.getpid()), held(process), ms)


def write(lane: Lane, rows: Sequence[Row], run: Run, bundle: Bundle) -> None:
    """Replace results/soak_`lane`.md."""
    also = {"screens": "The review process has loaded and waits.", "reviews": "Short answers."}[lane]
    busy = busy_elsewhere(run)
    lines = [
        f"# Soak: {rows[-1].done:,} {lane} by one inspector",
        "",
        f"Of bundle {bundle.hash[:8]}…, frames read from their files. {also} MiB: resident memory that is no file's.",
        "",
        f"| {lane} | inspector: MiB | handles | threads | review process: MiB | handles | threads | ms a frame |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (f"{each.mib:.1f} | {each.files} | {each.threads}" for each in (row.inspector, row.review))
        lines.append(f"| {row.done:,} | {' | '.join(cells)} | {row.ms:.1f} |")
    about = [f"`{run.command}`, {run.date}", run.machine.processor, f"{run.machine.cores} cores"]
    about += [f"{name} {version}" for name, version in run.versions.items()]
    text = "\n".join([*lines, "", ", ".join(about) + (f"; {busy}" if busy else "") + ".", ""])
    write_whole(RESULTS / f"soak_{lane}.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lane", choices=get_args(Lane))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("frames", type=Path, help="a folder of images")
    parser.add_argument("--count", type=int, required=True)
    args = parser.parse_args()
    run, rows = RunInProgress(), list[Row]()
    frames = [Path(path) for path in find_images([args.frames]).paths]
    with TemporaryDirectory() as station, Inspector.open(args.bundle, station, "cpu") as inspector:
        for row in soak(inspector, frames, args.lane, args.count):
            rows.append(row)
            print(row, flush=True)
            write(args.lane, rows, run.end(), inspector.bundle)
    write(args.lane, rows, run.end(), inspector.bundle)  # the review process's time is our own, now that it ended


if __name__ == "__main__":
    main()
