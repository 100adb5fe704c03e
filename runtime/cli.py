"""The `vmad` command. Its subcommands are entry points in the group `vmad.commands`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points, version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from vmad_edge.kernels import cuda
from vmad_edge.runtime.benchmark import benchmark, read_benchmark
from vmad_edge.runtime.benchmark import compare as compare_benchmarks
from vmad_edge.runtime.benchmark_page import facts as benchmark_facts
from vmad_edge.runtime.benchmark_page import table as benchmark_table
from vmad_edge.runtime.benchmark_page import write as write_benchmark
from vmad_edge.runtime.bundle import Answer, Bundle, Manifest, ScreenManifest, first_fault
from vmad_edge.runtime.calibrate import Targets, calibrate
from vmad_edge.runtime.console import err as _err
from vmad_edge.runtime.console import out as _out
from vmad_edge.runtime.console import printable, track
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.engines.gpu import gpu
from vmad_edge.runtime.engines.tensorrt import build_plans
from vmad_edge.runtime.errors import BundleError, VmadError
from vmad_edge.runtime.evaluate import Evaluation, Figures, Shots, compare, evaluate, read_evaluation
from vmad_edge.runtime.evaluate_page import warnings, write_page
from vmad_edge.runtime.floors import chain_of, floors
from vmad_edge.runtime.floors import facts as floors_facts
from vmad_edge.runtime.floors import table as floors_table
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Colour, Frame, Reading
from vmad_edge.runtime.hardware import HARDWARE
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.masks import read_mask
from vmad_edge.runtime.release import Standing
from vmad_edge.runtime.stages.scope import in_words
from vmad_edge.runtime.stages.tiles import LEAST_OVERLAP, MOST_OVERLAP, MOST_TILES, WHOLE, Layout, Tiles
from vmad_edge.runtime.station import Calibration, Fallback, Station, same_frames
from vmad_edge.runtime.system import check_system

Subcommands = Any  # argparse's type for this is private
_USAGE = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. What goes wrong is one line on standard error.

    Returns:
        The subcommand's exit status; 2 for a VmadError, a system that is not Linux, or a path that cannot be used; 4
        for what nobody expected; 130 and 143 after SIGINT and SIGTERM; 141 if nobody reads standard output any more.
    """
    if sys.stdout is None:  # closed by whoever started this: nobody wants to read it
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that knows ASCII alone is no reason to end
            stream.reconfigure(errors="backslashreplace")
    try:
        check_system()
    except VmadError as error:
        return _failed(error, debug=False)
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    # A Ctrl-C and a polite kill unwind like an error, so that what was half written goes.
    interrupted = threading.Event()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, partial(_interrupt, interrupted))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush complains
        return 141
    except Exception as error:
        if interrupted.is_set():  # a library that was being loaded made another error of it
            return 130
        return _failed(error, args.debug)


def _interrupt(interrupted: threading.Event, *_: object) -> None:
    interrupted.set()
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmad", description="Find and explain defects on parts never seen before, on the edge."
    )
    parser.add_argument("--version", action="version", version=f"vmad-edge {version('vmad-edge')}")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in sorted(entry_points(group="vmad.commands"), key=lambda found: found.name):
        add = cast(Callable[[Subcommands], None], command.load())
        add(subcommands)
    for subcommand in subcommands.choices.values():  # behind the command too; there it must not undo the one before it
        subcommand.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _failed(error: Exception, debug: bool) -> int:
    """Say it; the exit status."""
    if debug:
        traceback.print_exc()
    known = isinstance(error, VmadError | OSError)
    lines = "\n".join(map(printable, str(error).splitlines()))
    if known:
        print(f"vmad: {lines}", file=sys.stderr)
    else:
        advice = "" if debug else " (run again with --debug for the traceback)"
        kind, what = type(error).__name__, " ".join(lines.split())
        print(f"vmad: unexpected {kind}{what and f': {what}'}{advice}", file=sys.stderr)
    return 2 if isinstance(error, VmadError | _USAGE) else 4


def add_enroll(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "enroll",
        help="make normal parts the references of later inspections",
        description="Store the patch features of normal parts in the station and set thresholds from their own "
        "leave-one-out scores. Earlier references of the same object are replaced.",
    )
    _add_bundle(parser)
    parser.add_argument("folder", metavar="DIR", nargs="?", help="images of normal parts (recursive)")
    parser.add_argument(
        "--from-station",
        metavar="OLD",
        help="in place of DIR: the frames that were enrolled with another bundle, read again from where they lay; OLD "
        "is the beginning of that bundle's hash, or its station's folder; region, mask and tiles stay as they were",
    )
    parser.add_argument(
        "--roi",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="inspect this part of each frame alone, in its pixels; right and bottom are the first beyond it",
    )
    parser.add_argument(
        "--ignore",
        metavar="MASK.png",
        type=Path,
        help="do not inspect what is white in this picture of the frames' size: a clamp, a printed date",
    )
    parser.add_argument(
        "--tiles",
        metavar="N",
        type=int,
        help=f"for defects too small to be seen in the whole: look at the part in squares, N (up to {MOST_TILES}) "
        "along its longer side; takes as many times as long as there are squares, and more against their larger bank",
    )
    parser.add_argument(
        "--overlap",
        metavar="SHARE",
        type=float,
        help=f"of a tile that the next one shows too, {LEAST_OVERLAP} to {MOST_OVERLAP}; default: {Tiles().overlap}",
    )
    _add_frames(parser)
    parser.set_defaults(run=_enroll, usage_error=parser.error)


def add_info(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "info", help="what a bundle is, what is enrolled for it, and what this machine runs it with"
    )
    _add_bundle(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)


def add_evaluate(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "evaluate",
        help="measure a bundle on a labelled data set, or compare two such measurements",
        description="Inspect the test frames of a data set as it is distributed (MVTec AD, AD 2 and LOCO, VisA, BTAD, "
        "MPDD, Real-IAD, WFDD), or of folders called normal and abnormal; measure AUROC, AP, F1 and AUPRO. What an "
        "interrupted run left in --out is not inspected again.",
        epilog="Exit status: 0 done; 2 usage, bundle or data set error; 3 done, but some frames were NOT_INSPECTED.",
    )
    _add_bundle(parser, nargs="?")
    parser.add_argument("dataset", metavar="DATASET", nargs="?", type=Path, help="a category's folder, or one of them")
    parser.add_argument(
        "--shots",
        metavar="N",
        type=_shots,
        default=0,
        help="normal frames to enroll a category, or all; default: 0, the bundle's own normal features",
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="enroll nothing; compare a category's test frames with each other"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of those frames; default: %(default)s")
    parser.add_argument("--categories", nargs="+", metavar="NAME", default=[], help="these only")
    parser.add_argument(
        "--review",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="ask the language model about every frame too and measure P(yes); default: the screen alone",
    )
    add_reading(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="results and page; default: in the station")
    parser.add_argument(
        "--submission",
        action="store_true",
        help="write the maps of frames without labels to submission in --out, as MVTec AD 2's server takes them",
    )
    parser.add_argument("--compare", nargs=2, metavar="OUT", type=Path, help="two finished --out folders, nothing else")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_evaluate, usage_error=parser.error)


def add_calibrate(subcommands: Subcommands) -> None:
    targets = Targets()
    parser = subcommands.add_parser(
        "calibrate",
        help="set what an object is judged by from frames of the line",
        description="Set the thresholds of GOOD and DEFECT and keep them in the station, with what they promise. From "
        "good frames alone: --overkill and --suspects are promised for all parts with --confidence, of the screen; "
        "nothing is known of defects, so a review explains what is UNCERTAIN and settles nothing. With --defects: "
        "--escape and --overkill are met on these frames, and where the review's P(yes) tells apart what the screen "
        "leaves UNCERTAIN, it gets thresholds of its own from the same frames; else it settles nothing. The promise "
        "names what it is of (the screen alone, or screen and review), and `vmad inspect` says where it runs something "
        "else. Its counts are cross-validated: each frame is judged by what other frames set. Equal pictures count "
        "once. Frames of one part, or of one minute, are no independent parts, which nobody can see but you: give "
        "frames of many parts. The object is released if its defects show that of all of them at most --missed are "
        "called GOOD: five at least, none of them missed.",
        epilog="Only real defects: drawn ones say little. Thresholds that found half of the drawn defects (0.49) found "
        "0.01 of the real ones on one set of parts, 0.20 and 0.59 on another.",
    )
    _add_bundle(parser)
    parser.add_argument("--good", required=True, metavar="DIR", help="frames of normal parts, none of them enrolled")
    parser.add_argument("--defects", metavar="DIR", help="frames of parts with real defects")
    parser.add_argument("--object", metavar="NAME", help="the part's name, as it was enrolled")
    _add_fallback(parser)
    for name, meaning in (
        ("escape", "at most this share of the given defective frames called GOOD"),
        ("overkill", "of good parts: called DEFECT"),
        ("suspects", "of good parts: not called GOOD (without --defects)"),
        ("missed", "to be released: at most this share of all defective parts called GOOD"),
        ("confidence", "that a promise for all parts holds"),
    ):
        parser.add_argument(
            f"--{name}", type=float, metavar="SHARE", default=getattr(targets, name), help=f"{meaning}; %(default)s"
        )
    parser.add_argument(
        "--no-review",
        action="store_true",
        help="the screen alone: faster, and no review settles anything of this object",
    )
    add_reading(parser)
    parser.add_argument("--by", metavar="NAME", help="who answers for it; default: this account and machine")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_calibrate)


def add_build(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "build",
        help="build TensorRT plans of a bundle's graphs for this device",
        description="Build a TensorRT plan of each graph, for this GPU, driver and TensorRT, and keep it in the "
        "station. Plans that fit are left alone; of the others it is said what changed.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by `vmad export`")
    parser.add_argument("--station", metavar="DIR", help="the device's own folder (default: your user data folder)")
    parser.add_argument(
        "--workspace-mib", type=int, metavar="N", help="memory that a plan may work in; default: all there is"
    )
    parser.set_defaults(run=_build)


def add_bench(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "bench",
        help="measure how fast and how large a bundle is on this machine",
        description="Time screen and review, stage by stage, the screen over bank sizes and the CLIP encoder in "
        "batches; measure memory. Writes bench.json and bench.png.",
        epilog="Exit status: 0 done; 1 the screen does not hold --target-ms; 2 usage, bundle or frame error.",
    )
    _add_bundle(parser)
    parser.add_argument(
        "--plan",
        choices=list(HARDWARE),
        help="measure nothing: the least time on this hardware, from the bundle's counted operations and bytes; "
        "of the other options --banks and --json count",
    )
    parser.add_argument("--frames", nargs="+", metavar="PATH", help="images, or folders of them; default: drawn ones")
    add_reading(parser)
    parser.add_argument("--object", metavar="NAME", help="compare with what is enrolled for it in the station")
    _add_fallback(parser)
    parser.add_argument("--no-review", action="store_true", help="measure the screen alone")
    parser.add_argument("--answer", choices=["full", "short"], help="of the reviews; default: the bundle's")
    parser.add_argument("--repeats", type=int, metavar="N", default=100, help="runs of each thing; %(default)s")
    parser.add_argument(
        "--banks",
        nargs="*",
        type=int,
        metavar="N",
        default=[1, 10, 50, 200],
        help="numbers of enrolled frames to screen against; default: 1 10 50 200",
    )
    parser.add_argument("--target-ms", type=float, metavar="N", help="the time that the screen must hold at p99")
    parser.add_argument("--against", metavar="FILE", type=Path, help="an earlier bench.json to compare with")
    parser.add_argument("--out", metavar="DIR", type=Path, help="bench.json, bench.png; default: in the station")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_bench)


def _shots(text: str) -> Shots:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or all, got {text!r}")
    return "all" if text == "all" else int(text)


def _add_bundle(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", nargs=nargs, help="a folder made by `vmad export`")
    parser.add_argument("--station", metavar="DIR", help="the device's own folder (default: your user data folder)")
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="default: %(default)s")


def _add_fallback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fallback",
        choices=get_args(Fallback),
        help="compare with the bundle's own features where the station knows other objects but not --object",
    )


def _add_frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--object", metavar="NAME", help="the part's name, as in “screw”; references are kept by it")
    add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The options that `reading` takes."""
    parser.add_argument("--bit-depth", type=int, metavar="N", help="of 16-bit images: how many bits their values use")
    parser.add_argument(
        "--colour",
        choices=get_args(Colour),
        default="rgb",
        help="bgr: the channels were written swapped, as OpenCV's arrays are by other programs; default: %(default)s",
    )


def reading(args: argparse.Namespace) -> Reading:
    return {"bit_depth": args.bit_depth, "colour": args.colour}


def _open(args: argparse.Namespace, stream: int = 0, fallback: Fallback | None = None) -> Inspector:
    return Inspector.open(args.bundle, args.station, cast(Device, args.device), stream=stream, fallback=fallback)


def _enroll(args: argparse.Namespace) -> int:
    if (args.folder is None) == (args.from_station is None):
        args.usage_error("expected DIR, or --from-station OLD in its place")
    laid_out = (args.roi, args.ignore, args.tiles, args.overlap) != (None,) * 4
    if laid_out and args.from_station is not None:
        args.usage_error("--from-station takes region, mask and tiles over; enroll from DIR to choose others")
    paths = [] if args.folder is None else list_images([args.folder])
    layout = _layout(args, paths) if laid_out else WHOLE
    with _open(args) as inspector:
        if args.from_station is not None:
            name = inspector.bundle.manifest.object if args.object is None else args.object
            enrolled, layout = inspector.station.enrolled_with(args.from_station, name)
            frames = same_frames(track(enrolled, "enrolling"), reading(args))
            references = inspector.enroll(frames, object=args.object, layout=layout)
        else:
            given = track(paths, "enrolling")
            references = inspector.enroll(given, object=args.object, layout=layout, **reading(args))
        thresholds = references.thresholds
        facts = {
            "frames": len(references.frames),
            "patches": len(references.features),
            "thresholds": None if thresholds is None else thresholds.model_dump(),
            "inspected": layout.in_words(),
            "scope": in_words(references.scope),
            **_standing_facts(inspector.standing(args.object)),
            "station": str(inspector.station.path),
        }
        outdated = [why for why in inspector.station.calibrated().values() if isinstance(why, str)]
    _print_facts(facts, args.json)
    for why in outdated:
        _err.print(f"warning: {why}", markup=False)
    if (copies := len(paths) - len(references.frames)) > 0:
        _err.print(f"warning: {copies} of {len(paths)} frames are copies of others and were left out")
    if thresholds is None:
        _err.print("fewer than three frames: no thresholds, so every verdict is UNCERTAIN until more are enrolled")
    return 0


def _layout(args: argparse.Namespace, paths: list[str]) -> Layout:
    """Of --roi, --ignore, --tiles and --overlap.

    Raises:
        VmadError: they are no possible one.
        FrameError: the mask, or the first frame, whose size it must have, cannot be read.
    """
    region, ignored = None, None
    if args.roi is not None:
        try:
            left, top, right, bottom = map(int, args.roi.split(","))
        except ValueError:
            raise VmadError(
                f"--roi: expected LEFT,TOP,RIGHT,BOTTOM in pixels, as in 100,50,900,650, got {args.roi!r}"
            ) from None
        region = left, top, right, bottom
    if args.ignore is not None:
        height, width = Frame.read(paths[0], **reading(args)).pixels.shape[:2]
        ignored, doubt = read_mask(args.ignore, (height, width))
        if doubt is not None:
            _err.print(f"warning: {printable(f'{args.ignore}: {doubt}')}", markup=False)
    if args.overlap is not None and (args.tiles or 1) == 1:
        raise VmadError("--overlap says how far tiles overlap; expected --tiles N beside it, of at least 2")
    try:
        tiles = Tiles(**{n: v for n, v in (("count", args.tiles), ("overlap", args.overlap)) if v is not None})
    except ValidationError as error:
        where, what = first_fault(error)
        raise VmadError(f"--{'tiles' if where == 'count' else where}: {what}") from None
    return Layout(region, ignored, tiles)


def _info(args: argparse.Namespace) -> int:
    with _open(args) as inspector:
        manifest = inspector.bundle.manifest
        banks = {name: _of_bank(inspector.station, name) for name in inspector.station.enrolled()}
        facts = {
            "bundle": str(inspector.bundle.path),
            "hash": inspector.bundle.hash,
            "weights": f"{manifest.weights.origin} ({manifest.weights.licence})",
            "clip": f"{manifest.clip.size} px, {manifest.vision.grid}×{manifest.vision.grid} patches of width "
            f"{manifest.vision.width}, levels {list(manifest.vision.levels)}",
            **_review_facts(manifest, inspector.engines.on_gpu),
            "thresholds": manifest.similarity.thresholds and manifest.similarity.thresholds.model_dump(),
            "made_with": manifest.made_with,
            "station": str(inspector.station.path),
            "enrolled": inspector.station.enrolled(),
            "inspected": {name: seen for name, (seen, _) in banks.items()},
            "scope": {name: scope for name, (_, scope) in banks.items()} or "no scope check: nothing is enrolled",
            "enrolled_with_other_bundles": inspector.station.enrolled_elsewhere(),
            "calibrated": {n: _calibration_facts(found) for n, found in inspector.station.calibrated().items()},
            "release": _releases(inspector),
            "device": inspector.engines.device,
            "provider": inspector.provider,
            "similarity": inspector.similarity,
            "passed_over": inspector.engines.passed_over,
            "cuda_kernels": _cuda_kernels(),
        }
    _print_facts(facts, args.json)
    if manifest.clip.resize == "shortest_edge":
        _err.print("warning: this checkpoint crops the centre of each frame; what lies outside counts as not inspected")
    return 0


def _of_bank(station: Station, object: str) -> tuple[str, str]:
    """What is inspected of an enrolled object's frames, and which are in scope; or why its bank is refused."""
    try:
        references = station.load_references(object)
    except BundleError as error:
        return str(error), str(error)
    if references is None:
        return WHOLE.in_words(), in_words(None)
    scope, calibration = references.scope, station.calibrated().get(object)
    if scope is not None and isinstance(calibration, Calibration) and calibration.scope is not None:
        scope = replace(scope, limit=calibration.scope)
    return references.layout.in_words(), in_words(scope)


def _releases(inspector: Inspector) -> dict[str, dict[str, Any]]:
    """By object."""
    found, station, device = {}, inspector.station, inspector.engines.device
    for name in sorted({inspector.bundle.manifest.object, *station.enrolled(), *station.calibrated()}):
        try:
            bank = station.bank_hash(name)
            standing = station.standing(name, bank, station.load_calibration(name, bank), device)
        except BundleError as error:
            standing = Standing(False, f"not released: {error}")
        found[name] = _standing_facts(standing)
    return found


def _standing_facts(standing: Standing) -> dict[str, Any]:
    return {"released": standing.released, "release": standing.told}


def _cuda_kernels() -> str:
    try:
        return cuda.targets() or "none: this was installed without a GPU that has an nvcc, and without CUDACXX"
    except RuntimeError as error:  # of another build
        return f"none: {error}"


def _review_facts(manifest: ScreenManifest, gpu: bool) -> dict[str, str]:
    if not isinstance(manifest, Manifest):
        return {"review": "none: this bundle screens only"}
    from vmad_edge.runtime.stages.language import placement  # llama.cpp: not where frames are screened

    language = manifest.language
    return {
        "language": f"width {language.width}, {language.visual_tokens} visual tokens, {language.quantization}, "
        f"answers {language.answer}, context {language.context_length}; {placement(language, gpu)}",
        "sam": f"{manifest.sam.size} px",
    }


def _build(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    plans = Station(None if args.station is None else Path(args.station), bundle).plans
    chip = gpu()
    with Progress(console=_err, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(graph: str, phase: str, share: float) -> None:
            if graph not in tasks:
                tasks[graph] = bar.add_task(graph, total=1.0)
            bar.update(tasks[graph], description=f"{graph}: {phase}", completed=share)

        workspace = None if args.workspace_mib is None else args.workspace_mib << 20
        built = build_plans(bundle, plans, chip, workspace=workspace, progress=tell)
    for graph, reason in built.items():
        print(f"{graph}: built, for {reason}")
    print(f"{len(built)} plans built in {plans.folder}; every plan fits now")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    if args.compare is not None:
        return _compare(args.compare[0], args.compare[1], args.json)
    if args.dataset is None:
        args.usage_error("expected BUNDLE and DATASET, or --compare with two --out folders")
    bundle = Bundle.open(args.bundle)
    station = Station(None if args.station is None else Path(args.station), bundle)
    out = args.out or station.path / "results" / args.dataset.resolve().name
    evaluation = evaluate(
        bundle,
        args.dataset,
        out,
        shots=args.shots,
        seed=args.seed,
        review=args.review,
        unlabelled=args.unlabelled,
        categories=args.categories,
        submit=args.submission,
        device=cast(Device, args.device),
        reading=reading(args),
        progress=track,
    )
    page = write_page(evaluation, out)
    for warning in warnings(evaluation):
        _err.print(f"warning: {warning}", markup=False)
    if args.json:
        facts = {
            category.name: {
                **category.figures.model_dump(),
                "enrolled": category.enrolled,
                "frames": len(category.frames),
                "not_inspected": category.not_inspected,
                "unfit_good": category.unfit(False),
                "unfit_defective": category.unfit(True),
                "out_of_scope_good": category.out_of_scope(False),
                "out_of_scope_defective": category.out_of_scope(True),
                "without_mask": category.unmarked,
            }
            for category in evaluation.categories
        }
        whole = {
            "settings": evaluation.settings.model_dump(),
            "page": str(page),
            "warnings": warnings(evaluation),
        }
        print(json.dumps({"categories": facts, "mean": evaluation.mean.model_dump(), **whole}, indent=2))
    else:
        _out.print(_figures(evaluation))
        _err.print(f"{'with reviews' if args.review else 'the screen alone'}; page: {page}", soft_wrap=True)
    return 3 if any(category.not_inspected or category.not_submitted for category in evaluation.categories) else 0


def _bench(args: argparse.Namespace) -> int:
    if args.plan is not None:
        return _plan(args)
    run = RunInProgress()
    before = None if args.against is None else read_benchmark(args.against)
    bundle = Bundle.open(args.bundle)
    station = Station(None if args.station is None else Path(args.station), bundle)
    paths = None if args.frames is None else list_images(args.frames)
    found = benchmark(
        bundle,
        station,
        paths,
        run=run,
        object=args.object,
        review=not args.no_review,
        fallback=args.fallback,
        answer=cast("Answer | None", args.answer),
        repeats=args.repeats,
        banks=args.banks,
        target_ms=args.target_ms,
        device=cast(Device, args.device),
        reading=reading(args),
        progress=track,
    )
    ratios = {} if before is None else compare_benchmarks(found, before)
    out = write_benchmark(found, args.out or station.path / "results" / "bench")
    if args.json:
        against = {} if before is None else {"against": {name: ratio.model_dump() for name, ratio in ratios.items()}}
        print(json.dumps({**found.model_dump(), **against}, indent=2))
    else:
        _out.print(benchmark_table(found, ratios))
        _print_facts(benchmark_facts(found, before), False)
        _err.print(f"written: {out}", soft_wrap=True)
    return 0 if found.target is None or found.target.holds else 1


def _plan(args: argparse.Namespace) -> int:
    found = floors(chain_of(Bundle.open(args.bundle), args.banks), HARDWARE[args.plan])
    if args.json:
        print(found.model_dump_json(indent=2))
    else:
        _out.print(floors_table(found))
        _print_facts(floors_facts(found), False)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    targets = Targets(args.escape, args.overkill, args.suspects, args.missed, args.confidence)
    good = list_images([args.good])
    defects = [] if args.defects is None else list_images([args.defects])
    device = cast(Device, args.device)
    with Inspector.open(args.bundle, args.station, device, calibrated=False, fallback=args.fallback) as inspector:
        calibration = calibrate(
            inspector,
            good,
            defects,
            object=args.object,
            targets=targets,
            review=not args.no_review,
            by=args.by,
            reading=reading(args),
            progress=track,
        )
        standing = inspector.station.standing(
            calibration.object, calibration.bank, calibration, inspector.engines.device
        )
        facts = {
            **_calibration_facts(calibration),
            **_standing_facts(standing),
            "station": str(inspector.station.path),
        }
    _print_facts(facts, args.json)
    return 0


def _calibration_facts(calibration: Calibration | str) -> dict[str, Any]:
    if isinstance(calibration, str):
        return {"refused": calibration}
    return {
        **calibration.model_dump(
            include={"object", "thresholds", "review", "scope", "promise", "by", "when", "device"}
        ),
        "bank": calibration.bank or "the bundle's normal features",
        "frames": len(calibration.frames),
    }


def _figures(evaluation: Evaluation) -> Table:
    unfit = ("unfit, good", "unfit, defective")
    table = Table("%", *(name.replace("_", " ") for name in Figures.model_fields), *unfit, box=None)
    rows = [(c.name, c.figures, (str(c.unfit(False)), str(c.unfit(True)))) for c in evaluation.categories]
    for name, figures, counts in [*rows, ("mean", evaluation.mean, ("", ""))]:
        values = figures.model_dump().values()
        cells = ("–" if value is None else f"{100 * value:.1f}" for value in values)
        table.add_row(printable(name), *cells, *counts)
    return table


def _compare(first: Path, second: Path, as_json: bool) -> int:
    compared = compare(read_evaluation(first), read_evaluation(second))
    if as_json:
        print(json.dumps({"categories": {c.name: c.model_dump(mode="json") for c in compared}}, indent=2))
        return 0
    table = Table("change, %", *(name.replace("_", " ") for name in Figures.model_fields), "flipped", box=None)
    for c in compared:
        changes = ("–" if value is None else f"{100 * value:+.2f}" for value in c.difference.values())
        table.add_row(printable(c.name), *changes, f"{len(c.flipped)} of {c.frames}")
    _out.print(table)
    for c in compared:
        for flip in c.flipped:
            kind = "defective" if flip.defective else "good"
            print(f"{printable(c.name)}: {printable(flip.frame)} ({kind}): {flip.before.value} → {flip.after.value}")
    return 0


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(printable(name), "bold"), printable(str(value)))
    _out.print(table)


if __name__ == "__main__":
    sys.exit(main())
