"""`vmad inspect`: frames in, verdicts, pictures and maps out."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol, cast

from PIL import Image
from rich.table import Table
from rich.text import Text

from vmad_edge.kernels.processors import processors
from vmad_edge.runtime.bundle import Answer, Manifest
from vmad_edge.runtime.cli import Subcommands, _add_bundle, _add_fallback, _add_frames, _open, reading
from vmad_edge.runtime.console import err, out, printable, progress, track, warn
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.folders import find_images, list_images
from vmad_edge.runtime.inspection import Inspection, Verdict
from vmad_edge.runtime.inspector import Inspector, ReviewHandle
from vmad_edge.runtime.names import Names, in_folders
from vmad_edge.runtime.objects import listed
from vmad_edge.runtime.pictures import write_map, write_png
from vmad_edge.runtime.report import Report, in_words
from vmad_edge.runtime.rows import Csv, JsonArray, JsonLines, Row, file_facts, read_rows, take_up
from vmad_edge.runtime.run import Stage, Stop, in_order

_MAPS = (".tiff", "_language.tiff", "_mask.png")
"""How the names of what --maps writes end."""
_STYLE = {
    Verdict.GOOD: "green",
    Verdict.DEFECT: "bold red",
    Verdict.UNCERTAIN: "yellow",
    Verdict.NOT_INSPECTED: "magenta",
}


def add_inspect(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "inspect",
        help="inspect images: verdict, heat map, mask, explanation",
        description="Inspect images. Every frame is screened; suspects are reviewed by the language model.",
        epilog="Exit status: 0 all GOOD, and the object is released: somebody showed that this bundle sees its defects "
        "(`vmad calibrate --defects`), or answers for it (`vmad release`); 1 a DEFECT; 2 usage or bundle error; "
        "3 UNCERTAIN or NOT_INSPECTED, or not released, or a file left out that may be an image, but no DEFECT; 4 an "
        "unexpected error; "
        "130, 143 stopped by a signal: what was done until then is written, and the next run can go on with "
        "it (--resume). Left out of folders are names that begin with a dot, folders of NAS systems and notebooks, and "
        "files that are no images: all are named, and those with endings such as .txt, .json, .csv or .db "
        "leave the status as it is.",
    )
    _add_bundle(parser)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, or folders of them (with all below; links are followed)"
    )
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--references", metavar="DIR", help="compare with the normal parts in DIR, for this run alone")
    sources.add_argument(
        "--unlabelled",
        action="store_true",
        help="compare the frames with each other, whatever they are: the table and --json tell the most unusual ones "
        "first (--jsonl and --csv as they come); all stay UNCERTAIN, and a review explains, it settles nothing",
    )
    parser.add_argument(
        "--stream", metavar="N", type=int, default=0, help="find, too, what is unusual among the last N frames"
    )
    _add_fallback(parser)
    _add_frames(parser)
    parser.add_argument(
        "--question",
        metavar="TEXT",
        help="ask this instead, which explains and settles nothing; {object} is replaced by the name",
    )
    parser.add_argument("--answer", choices=["full", "short"], help="a whole sentence, or yes/no and the mask")
    parser.add_argument("--no-review", action="store_true", help="the screen alone: no sentence, no mask")
    parser.add_argument(
        "--deadline-ms", type=_milliseconds, metavar="N", help="per frame; late screens are NOT_INSPECTED"
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="write a page for people (index.html) and pictures of each frame into DIR",
    )
    parser.add_argument(
        "--maps",
        metavar="DIR",
        type=Path,
        help="write each frame's map (.tiff, float32: what MVTec AD's evaluation reads), a review's language map and "
        "its mask (.png) into DIR, in the frames' own folders",
    )
    parser.add_argument(
        "--jsonl",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write one JSON object a line for each frame, as it comes, to FILE or (-, or no FILE) standard output",
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a row for each frame, as it comes")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with --jsonl FILE: frames whose rows it has, by path, size and SHA-256, are not inspected again",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_positive,
        help="frames in the screen at once, while others are reviewed or written; default: the processors, up to 4; 1 "
        "with --stream, whose frames have an order, and with --deadline-ms",
    )
    parser.set_defaults(run=_inspect)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def _milliseconds(text: str) -> float:
    """Finite: rows tell it, and JSON has no infinity."""
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number of milliseconds, got {text!r}")


def _inspect(args: argparse.Namespace) -> int:
    _check(args)
    found = find_images(args.paths)
    paths = found.paths if args.maps is None else _without_maps(found.paths, args.maps.absolute())
    if found.left_out:
        err.print(printable(found.said), soft_wrap=True)
    with _open(args, args.stream, args.fallback) as inspector:
        if not (args.unlabelled or args.references):
            if args.fallback is None:
                _check_object(inspector, args.object)
            _note_left_behind(inspector, args.object)
        if args.unlabelled:
            frames = track(paths, "reading all")
            inspector.compare_unlabelled(frames, object=args.object, **reading(args))
        if args.references is not None:
            references = track(list_images([args.references]), "enrolling")
            inspector.enroll(references, object=args.object, keep=False, **reading(args))
        if not (standing := inspector.standing(args.object)).released:
            warn(standing.told)
        settings = _settings(inspector, args)
        jobs = args.jobs or (1 if args.stream or args.deadline_ms else min(4, processors()))
        resumed = args.resume and Path(args.jsonl).exists()
        done = take_up(Path(args.jsonl), paths, settings, jobs) if resumed else set()
        results = _Results(args, paths, inspector)
        if resumed:
            results.take_over(Path(args.jsonl))
        left = [path for path in paths if path not in done]
        with Stop() as stop:
            try:
                _run(inspector, args, settings, left, jobs, results, stop)
            finally:
                results.close()
    if stop.signal is None or results.new == len(left):
        return results.status or (3 if found.missed else 0)
    _say_how_to_go_on(args, f"{stop.signal.name} after {results.new} of {len(left)} frames")
    return 128 + stop.signal


def _note_left_behind(inspector: Inspector, object: str | None) -> None:
    """The bundle's own object is compared with its features, although it is enrolled with an earlier bundle."""
    own = inspector.bundle.manifest.object
    if object in (None, own) and (left_behind := inspector.station.left_behind(own)) is not None:
        err.print(printable(f"note: {left_behind}"), soft_wrap=True)


def _without_maps(paths: list[str], maps: Path) -> list[str]:
    """Without what an earlier run like this wrote of the others into `maps`. Reports nobody finds, see `folders`."""
    inside = {path for path in paths if Path(path).absolute().is_relative_to(maps)}
    written = set()
    for frames in ([path for path in paths if path not in inside], paths):  # frames may lie there, too
        names = Names(frames, in_folders, _MAPS)
        written |= {f"{maps / names.of(path)}{ending}" for path in frames for ending in _MAPS}
    return [path for path in paths if path not in inside or str(Path(path).absolute()) not in written]


def _check_object(inspector: Inspector, object: str | None) -> None:
    """That no name was forgotten: where others are known, the bundle's own object has to be meant.

    Raises:
        VmadError: it may not be.
    """
    own, station = inspector.bundle.manifest.object, inspector.station
    if object is None and not station.knows(own) and (known := {*station.enrolled(), *station.calibrated()}):
        raise VmadError(
            f"expected --object, as the station {station.path} knows {listed(known, own)}; "
            f"with --object {shlex.quote(own)} the frames are compared with the bundle's own features"
        )


def _check(args: argparse.Namespace) -> None:
    """What the parser cannot.

    Raises:
        VmadError: options that exclude each other, or files with results that would be lost.
    """
    for option, folder in (("--report", args.report), ("--maps", args.maps)):
        for path in args.paths if folder is not None else ():
            if _lies_in(path, folder):
                raise VmadError(f"{path} lies in {folder}, where {option} writes: name another folder for {option}")
        if folder is not None and _lies_in(folder, args.bundle):
            raise VmadError(f"{folder} lies in the bundle, which stays as it is: name another folder for {option}")
    if args.stream and args.unlabelled:
        raise VmadError("expected --stream or --unlabelled, got both")
    if args.stream and (args.jobs or 1) > 1:
        raise VmadError(f"--stream compares each frame with those before it; expected --jobs 1, got {args.jobs}")
    if args.json and args.jsonl == "-":
        raise VmadError("expected --json or --jsonl on standard output, got both; name a file for --jsonl")
    if args.csv and args.jsonl not in (None, "-") and args.csv.resolve() == Path(args.jsonl).resolve():
        raise VmadError(f"expected two files for --jsonl and --csv, got {args.csv} for both")
    if args.resume and args.jsonl in (None, "-"):
        raise VmadError("--resume goes on with the file of --jsonl; expected --jsonl FILE")
    if args.resume and (args.stream or args.unlabelled):
        raise VmadError("--resume: with --stream or --unlabelled a frame's score hangs on the others of its run")
    for option, file in (("--jsonl", args.jsonl), ("--csv", args.csv)):
        if file not in (None, "-") and not args.resume and Path(file).is_file() and Path(file).stat().st_size:
            advice = "go on with it (--resume)" if option == "--jsonl" else "remove it"
            raise VmadError(f"{option}: {file} is there already; {advice}, or name another file")


def _lies_in(path: str | Path, folder: str | Path) -> bool:
    """As it is written, or where its links lead."""
    return Path(path).absolute().is_relative_to(Path(folder).absolute()) or Path(os.path.realpath(path)).is_relative_to(
        os.path.realpath(folder)
    )


def _settings(inspector: Inspector, args: argparse.Namespace) -> Row:
    """What a frame's result hangs on beside its file: rows with equal settings can be told together."""
    named = ("question", "answer", "deadline_ms", "bit_depth", "colour")
    return {
        **inspector.compared_with(args.object),
        "device": inspector.engines.device,
        "review": not args.no_review,
        **{name: getattr(args, name) for name in named},
    }


def _run(
    inspector: Inspector,
    args: argparse.Namespace,
    settings: Row,
    paths: list[str],
    jobs: int,
    results: _Results,
    stop: Stop,
) -> None:
    """Inspect `paths` and hand what comes of them on, in order."""
    if not args.no_review:
        inspector.load_reviews()
    done = in_order(paths, _stages(inspector, args, jobs), jobs + 2, stop)
    quiet = len(paths) == 1 or (args.jsonl == "-" and out.is_terminal)
    with closing(done), progress(disable=quiet) as bar:
        task = bar.add_task("inspecting", total=len(paths))
        for inspection, facts in done:
            if results.table_is_full:
                bar.stop()
                results.print_table()
                bar.start()
            results.add(inspection, {**inspection.to_json(), **facts, "settings": settings})
            bar.advance(task)


def _stages(inspector: Inspector, args: argparse.Namespace, jobs: int) -> list[Stage]:
    """From a path to its Inspection and `file_facts`. While a review runs, the next frames are screened.

    With a deadline the first stage is all: screen and review share it.
    """
    asking: dict[str, Any] = {"question": args.question, "answer": cast("Answer | None", args.answer)}
    whole = args.deadline_ms is not None

    def screen(path: str) -> tuple[Inspection, Row]:
        facts = file_facts(path)  # first: a file that changes now is another one when the run is resumed
        inspection = inspector.inspect(
            path,
            object=args.object,
            review=whole and not args.no_review,
            deadline_ms=args.deadline_ms,
            **reading(args),
            **asking,
        )
        return inspection, facts

    def ask(screened: tuple[Inspection, Row]) -> tuple[Inspection | ReviewHandle, Row]:
        inspection, facts = screened
        suspect = inspection.verdict in (Verdict.DEFECT, Verdict.UNCERTAIN)
        return (inspector.review(inspection, **asking) if suspect else inspection), facts

    def answer(asked: tuple[Inspection | ReviewHandle, Row]) -> tuple[Inspection, Row]:
        found, facts = asked
        return (found if isinstance(found, Inspection) else found.wait()), facts

    review = not (args.no_review or whole) and isinstance(inspector.bundle.manifest, Manifest)
    return [(screen, jobs), *([(ask, 1), (answer, 1)] if review else [])]


def _say_how_to_go_on(args: argparse.Namespace, what: str) -> None:
    again = shlex.join(["vmad", *args.argv, *([] if args.resume else ["--resume"])])
    advice = f"go on with: {again}" if args.jsonl not in (None, "-") else "with --jsonl FILE, --resume could go on"
    if args.stream or args.unlabelled:
        advice = "such a run cannot go on; begin it anew"
    err.print(f"vmad: stopped by {what}, whose results stand; {printable(advice)}", soft_wrap=True)


class _Output(Protocol):
    def add(self, row: Row) -> None: ...
    def close(self) -> None: ...


class _Ranked:
    """Rows of frames that are compared with each other: the most unusual one first, once all are there."""

    def __init__(self, output: _Output) -> None:
        self._output = output
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def close(self) -> None:
        for row in sorted(self._rows, key=_unusual, reverse=True):
            self._output.add(row)
        self._output.close()


def _unusual(row: Row) -> float:
    return -math.inf if row["score"] is None else float(row["score"])


class _Results:
    """Where a run's results go: rows to files and standard output, and beside them pictures and maps.

    A picture or map that cannot be written is a warning. A row that cannot be written raises, after all other outputs
    have it.
    """

    def __init__(self, args: argparse.Namespace, paths: list[str], inspector: Inspector) -> None:
        asking: dict[str, Any] = {"review": not args.no_review, "question": args.question}
        self._args, self._about = args, inspector.about(args.object, **asking)
        self._counts: Counter[str] = Counter()
        self._released = True
        """Every frame's object, until now."""
        self.new = 0
        """Frames of this run; the others are an earlier one's."""
        self._beside = _Beside()
        self._maps = Names(paths, in_folders, _MAPS)
        self._report = None if args.report is None else Report(args.report, inspector.thresholds(args.object), paths)
        self._table = None if args.json or args.jsonl == "-" else _Table(inspector.told(args.object, **asking))
        self._lines = None if args.jsonl is None else JsonLines(None if args.jsonl == "-" else Path(args.jsonl))
        shown: _Output | None = self._table or (JsonArray() if args.json else None)
        made = _Ranked(shown) if shown is not None and args.unlabelled else shown, args.csv and Csv(args.csv)
        self._outputs = [output for output in made if output is not None]

    def take_over(self, file: Path) -> None:
        """The rows that an earlier run left in `file`."""
        for row in read_rows(file):
            self._add(row)
        if self._report is not None:
            shown = self._report.take_over(row["path"] for row in read_rows(file))
            if missing := self._counts.total() - shown:
                warn(f"{missing} frames of the earlier run are not on the page of {self._args.report}")

    def add(self, inspection: Inspection, row: Row) -> None:
        self.new += 1
        try:
            if self._lines is not None:
                self._lines.add(row)
        finally:
            self._add(row)
        name = row["path"]
        if self._report is not None:
            report = self._report
            self._beside(f"the report's picture of {name}", lambda: report.add(inspection))
        if self._args.maps is not None:
            place = self._args.maps / self._maps.of(name)
            self._beside(f"the maps of {name}", lambda: _write_maps(inspection, place))

    def _add(self, row: Row) -> None:
        self._counts[row["verdict"]] += 1
        self._released = self._released and row.get("released") is True
        for output in self._outputs:
            output.add(row)

    @property
    def table_is_full(self) -> bool:
        return self._table is not None and self._table.is_full

    def print_table(self) -> None:
        if self._table is not None:
            self._table.close()

    def close(self) -> None:
        """Make everything whole, whatever happened."""
        with ExitStack() as last:
            for output in (self._lines, *self._outputs):
                if output is not None:
                    last.callback(output.close)
            if self._report is not None:
                report, facts = self._report, _report_facts(self._counts, self._about)
                self._beside(f"the report {self._args.report}/index.html", lambda: report.write(facts))
            self._beside.close()

    @property
    def status(self) -> int:
        """The run's exit status."""
        if self._counts[Verdict.DEFECT]:
            return 1
        return 0 if set(self._counts) == {Verdict.GOOD} and self._released else 3


class _Beside:
    """Writes what is not the result itself: a failure is a warning, and never the run's end."""

    _SHOWN = 10

    def __init__(self) -> None:
        self._missing = 0

    def __call__(self, what: str, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            self._missing += 1
            if self._missing <= self._SHOWN:
                warn(f"{what} is missing: {getattr(error, 'strerror', None) or error or type(error).__name__}")

    def close(self) -> None:
        if self._missing > 1:
            warn(f"{self._missing} pictures, maps or pages are missing in all; every verdict is there")


class _Table:
    """The table for people. So that a long run's does not lie in memory, it is printed in pieces."""

    _ROWS = 500

    def __init__(self, compared: str) -> None:
        self._compared = compared
        self._table = self._fresh()

    def _fresh(self) -> Table:
        return Table(
            *("frame", "verdict", "score", "P(yes)", "compared with", "ms screen + review", "explanation or reason"),
            caption=f"compared with {self._compared}",
        )

    @property
    def is_full(self) -> bool:
        return self._table.row_count >= self._ROWS

    def add(self, row: Row) -> None:
        times = row["timings_ms"]
        self._table.add_row(
            printable(Path(row["path"]).name),
            Text(row["verdict"], _STYLE[Verdict(row["verdict"])]),
            "" if row["score"] is None else f"{row['score']:.3f}",
            "" if row["p_yes"] is None else f"{row['p_yes']:.2f}",
            row["compared_with"] or "",
            f"{times.get('screen', 0):.0f} + {times.get('review', 0):.0f}",
            in_words(row["explanation"], row["reason"]),
        )

    def close(self) -> None:
        if self._table.row_count:
            out.print(self._table)
            self._table = self._fresh()


def _write_maps(inspection: Inspection, place: Path) -> None:
    if inspection.map is None:  # not inspected
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    for name, heat in ((place.name, inspection.map), (f"{place.name}_language", inspection.language_map)):
        if heat is not None:
            write_map(place.with_name(f"{name}.tiff"), heat)
    if inspection.mask is not None:
        write_png(place.with_name(f"{place.name}_mask.png"), Image.fromarray(inspection.mask))


def _report_facts(counts: Counter[str], about: dict[str, str]) -> dict[str, str]:
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    return {"frames": f"{counts.total()}: {told}", "made": time.strftime("%Y-%m-%d %H:%M"), **about}
