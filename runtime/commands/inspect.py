"""`vmad inspect`: frames in, verdicts, pictures and maps out."""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import cast

from PIL import Image
from rich.progress import track
from rich.table import Table

from vmad_edge.runtime.bundle import Answer
from vmad_edge.runtime.cli import Subcommands, _add_bundle, _add_frames, _err, _open, _out
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.frame import list_images
from vmad_edge.runtime.inspection import Inspection, Verdict
from vmad_edge.runtime.report import Report, write_map

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
        epilog="Exit status: 0 all GOOD; 1 a DEFECT; 2 usage or bundle error; "
        "3 UNCERTAIN or NOT_INSPECTED but no DEFECT.",
    )
    _add_bundle(parser)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image files, or folders of them (recursive)")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--references", metavar="DIR", help="compare with the normal parts in DIR, for this run alone")
    sources.add_argument(
        "--unlabelled",
        action="store_true",
        help="compare the frames with each other, whatever they are: the screen ranks them and leaves all UNCERTAIN",
    )
    parser.add_argument(
        "--stream", metavar="N", type=int, default=0, help="find, too, what is unusual among the last N frames"
    )
    _add_frames(parser)
    parser.add_argument("--question", metavar="TEXT", help="ask this instead; {object} is replaced by the name")
    parser.add_argument("--answer", choices=["full", "short"], help="a whole sentence, or yes/no and the mask")
    parser.add_argument("--no-review", action="store_true", help="the screen alone: no sentence, no mask")
    parser.add_argument("--deadline-ms", type=float, metavar="N", help="per frame; late screens are NOT_INSPECTED")
    parser.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="write a page for people (index.html) and a picture for each frame into DIR",
    )
    parser.add_argument(
        "--maps",
        metavar="DIR",
        type=Path,
        help="write each frame's map (.tiff, float32: what MVTec AD's evaluation reads), a review's language map and "
        "its mask (.png) into DIR, in the frames' own folders",
    )
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    if args.stream and args.unlabelled:
        raise VmadError("expected --stream or --unlabelled, got both")
    paths = list_images(args.paths)
    if args.maps is not None and len(places := set(map(_in_folders, paths))) < len(paths):
        raise VmadError(
            f"--maps: {len(paths)} frames would write {len(places)} maps: some differ by their ending alone"
        )
    done: list[Inspection] = []
    with _open(args, args.stream) as inspector:
        if args.unlabelled:
            frames = track(paths, "reading all", console=_err, transient=True)
            inspector.compare_unlabelled(frames, object=args.object, bit_depth=args.bit_depth)
        if args.references is not None:
            references = track(list_images([args.references]), "enrolling", console=_err, transient=True)
            inspector.enroll(references, object=args.object, keep=False, bit_depth=args.bit_depth)
        report = None if args.report is None else Report(args.report, inspector.heat_top(args.object))
        for path in track(paths, "inspecting", console=_err, transient=True, disable=len(paths) == 1):
            inspection = inspector.inspect(
                path,
                object=args.object,
                question=args.question,
                answer=cast("Answer | None", args.answer),
                review=not args.no_review,
                deadline_ms=args.deadline_ms,
                bit_depth=args.bit_depth,
            )
            if report is not None:
                report.add(inspection)
            if args.maps is not None:
                _write_maps(inspection, args.maps)
            done.append(inspection.without_arrays())
    if report is not None:
        report.write(_report_facts(done, args))
    if args.json:
        print(json.dumps([inspection.to_json() for inspection in done], indent=2, allow_nan=False))
    else:
        _out.print(_table(done))
    verdicts = {inspection.verdict for inspection in done}
    if Verdict.DEFECT in verdicts:
        return 1
    return 0 if verdicts == {Verdict.GOOD} else 3


def _write_maps(inspection: Inspection, folder: Path) -> None:
    if inspection.map is None:  # not inspected
        return
    place = folder / _in_folders(inspection.frame.path or inspection.frame.id)
    place.parent.mkdir(parents=True, exist_ok=True)
    for name, heat in ((place.name, inspection.map), (f"{place.name}_language", inspection.language_map)):
        if heat is not None:
            write_map(place.with_name(f"{name}.tiff"), heat)
    if inspection.mask is not None:
        Image.fromarray(inspection.mask).save(place.with_name(f"{place.name}_mask.png"))


def _in_folders(path: str) -> Path:
    """A frame's path as given, without its ending, to be put into another folder."""
    return Path(*(part for part in Path(path).with_suffix("").parts if part not in ("/", "..")))


def _report_facts(done: list[Inspection], args: argparse.Namespace) -> list[str]:
    counts = [f"{sum(i.verdict is verdict for i in done)} {verdict.value}" for verdict in Verdict]
    when = time.strftime("%Y-%m-%d %H:%M")
    return [
        f"{len(done)} frames: {', '.join(counts)}.",
        f"Bundle {args.bundle}, {when}, vmad-edge {version('vmad-edge')}.",
    ]


def _table(done: list[Inspection]) -> Table:
    table = Table("frame", "verdict", "score", "P(yes)", "ms screen + review", "explanation or reason")
    for inspection in done:
        table.add_row(
            Path(inspection.frame.path or inspection.frame.id).name,
            f"[{_STYLE[inspection.verdict]}]{inspection.verdict.value}[/]",
            "" if inspection.score is None else f"{inspection.score:.3f}",
            "" if inspection.p_yes is None else f"{inspection.p_yes:.2f}",
            f"{inspection.timings_ms.get('screen', 0):.0f} + {inspection.timings_ms.get('review', 0):.0f}",
            " ".join(filter(None, (inspection.explanation, inspection.reason))),
        )
    return table
