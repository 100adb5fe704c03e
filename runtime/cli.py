"""The `vmad` command. Its subcommands are entry points in the group `vmad.commands`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, cast, get_args

from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID, track
from rich.table import Table

from vmad_edge.kernels import cuda
from vmad_edge.runtime.benchmark import benchmark, read_benchmark
from vmad_edge.runtime.benchmark import compare as compare_benchmarks
from vmad_edge.runtime.benchmark_page import facts as benchmark_facts
from vmad_edge.runtime.benchmark_page import table as benchmark_table
from vmad_edge.runtime.benchmark_page import write as write_benchmark
from vmad_edge.runtime.bundle import Answer, Bundle, Manifest, ScreenManifest
from vmad_edge.runtime.calibrate import Targets, calibrate
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.engines.gpu import gpu
from vmad_edge.runtime.engines.tensorrt import build_plans
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.evaluate import Figures, Shots, compare, evaluate, read_evaluation
from vmad_edge.runtime.evaluate_page import warnings, write_page
from vmad_edge.runtime.floors import chain_of, floors
from vmad_edge.runtime.floors import facts as floors_facts
from vmad_edge.runtime.floors import table as floors_table
from vmad_edge.runtime.folders import find_images, list_images
from vmad_edge.runtime.hardware import HARDWARE
from vmad_edge.runtime.inspection import Inspection, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.report import Report, write_map
from vmad_edge.runtime.stages.language import placement
from vmad_edge.runtime.station import Calibration, Station

Subcommands = Any  # argparse's type for this is private
_STYLE = {
    Verdict.GOOD: "green",
    Verdict.DEFECT: "bold red",
    Verdict.UNCERTAIN: "yellow",
    Verdict.NOT_INSPECTED: "magenta",
}
_err = Console(stderr=True)
_out = Console(width=None if sys.stdout.isatty() else 160)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; a VmadError becomes one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="vmad", description="Find and explain defects on parts never seen before, on the edge."
    )
    parser.add_argument("--version", action="version", version=f"vmad-edge {version('vmad-edge')}")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in sorted(entry_points(group="vmad.commands"), key=lambda found: found.name):
        add = cast(Callable[[Subcommands], None], command.load())
        add(subcommands)
    args = parser.parse_args(argv)
    # A polite kill unwinds like an error, so that what was half written goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return int(args.run(args))
    except (VmadError, OSError) as error:
        print(f"vmad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def add_inspect(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "inspect",
        help="inspect images: verdict, heat map, mask, explanation",
        description="Inspect images. Every frame is screened; suspects are reviewed by the language model.",
        epilog="Exit status: 0 all GOOD; 1 a DEFECT; 2 usage or bundle error; "
        "3 UNCERTAIN or NOT_INSPECTED, or a file left out that may be an image, but no DEFECT. Left out of folders are "
        "names that begin with a dot, folders of NAS systems and notebooks, and files that are no images: all are "
        "named, and those with endings such as .txt, .json, .csv or .db leave the status as it is.",
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


def add_enroll(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "enroll",
        help="make normal parts the references of later inspections",
        description="Store the patch features of normal parts in the station and set thresholds from their own "
        "leave-one-out scores. Earlier references of the same object are replaced.",
    )
    _add_bundle(parser)
    parser.add_argument("folder", metavar="DIR", help="images of normal parts (recursive)")
    _add_frames(parser)
    parser.set_defaults(run=_enroll)


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
        help="set an object's two thresholds from frames of the line",
        description="Set the thresholds of GOOD and DEFECT and keep them in the station. From good frames alone: "
        "--overkill and --suspects are promised for all parts with --confidence. With --defects: --escape and "
        "--overkill are met on these frames, and what that promises for all parts is said.",
    )
    _add_bundle(parser)
    parser.add_argument("--good", required=True, metavar="DIR", help="frames of normal parts, none of them enrolled")
    parser.add_argument("--defects", metavar="DIR", help="frames of defective parts")
    parser.add_argument("--object", metavar="NAME", help="the part's name, as it was enrolled")
    for name, meaning in (
        ("escape", "of defective parts: called GOOD"),
        ("overkill", "of good parts: called DEFECT"),
        ("suspects", "of good parts: not called GOOD (without --defects)"),
        ("confidence", "that a promise for all parts holds"),
    ):
        parser.add_argument(
            f"--{name}", type=float, metavar="SHARE", default=getattr(targets, name), help=f"{meaning}; %(default)s"
        )
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
    parser.add_argument("--object", metavar="NAME", help="compare with what is enrolled for it in the station")
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


def _add_frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--object", metavar="NAME", help="the part's name, as in “screw”; references are kept by it")
    parser.add_argument("--bit-depth", type=int, metavar="N", help="of 16-bit images: how many bits their values use")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _open(args: argparse.Namespace, stream: int = 0) -> Inspector:
    return Inspector.open(args.bundle, args.station, cast(Device, args.device), stream=stream)


def _inspect(args: argparse.Namespace) -> int:
    if args.stream and args.unlabelled:
        raise VmadError("expected --stream or --unlabelled, got both")
    found = find_images(args.paths)
    paths = found.paths
    if found.left_out:
        _err.print(found.said, markup=False, soft_wrap=True)
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
    return 0 if verdicts == {Verdict.GOOD} and not found.missed else 3


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


def _enroll(args: argparse.Namespace) -> int:
    paths = list_images([args.folder])
    with _open(args) as inspector:
        references = inspector.enroll(track(paths, "enrolling", console=_err, transient=True), object=args.object)
        thresholds = references.thresholds
        facts = {
            "frames": len(references.frames),
            "patches": len(references.features),
            "thresholds": None if thresholds is None else thresholds.model_dump(),
            "station": str(inspector.station.path),
        }
        outdated = [why for why in inspector.station.calibrated().values() if isinstance(why, str)]
    _print_facts(facts, args.json)
    for why in outdated:
        _err.print(f"warning: {why}", markup=False)
    if thresholds is None:
        _err.print("fewer than three frames: no thresholds, so every verdict is UNCERTAIN until more are enrolled")
    return 0


def _info(args: argparse.Namespace) -> int:
    with _open(args) as inspector:
        manifest = inspector.bundle.manifest
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
            "calibrated": {n: _calibration_facts(found) for n, found in inspector.station.calibrated().items()},
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


def _cuda_kernels() -> str:
    try:
        return cuda.targets() or "none: no nvcc was found when this was installed"
    except RuntimeError as error:  # of another build
        return f"none: {error}"


def _review_facts(manifest: ScreenManifest, gpu: bool) -> dict[str, str]:
    if not isinstance(manifest, Manifest):
        return {"review": "none: this bundle screens only"}
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
        progress=lambda frames, name: track(frames, name, console=_err, transient=True),
    )
    page = write_page(evaluation, out)
    for warning in warnings(evaluation):
        _err.print(f"warning: {warning}", markup=False)
    rows = {category.name: category.figures for category in evaluation.categories}
    if args.json:
        facts = {
            category.name: {
                **category.figures.model_dump(),
                "enrolled": category.enrolled,
                "frames": len(category.frames),
                "not_inspected": category.not_inspected,
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
        _out.print(_figures({**rows, "mean": evaluation.mean}))
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
        answer=cast("Answer | None", args.answer),
        repeats=args.repeats,
        banks=args.banks,
        target_ms=args.target_ms,
        device=cast(Device, args.device),
        progress=lambda turns, what: track(turns, what, console=_err, transient=True),
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
    targets = Targets(args.escape, args.overkill, args.suspects, args.confidence)
    good = list_images([args.good])
    defects = [] if args.defects is None else list_images([args.defects])
    with Inspector.open(args.bundle, args.station, cast(Device, args.device), calibrated=False) as inspector:
        calibration = calibrate(
            inspector,
            track(good, "good frames", console=_err, transient=True),
            track(defects, "defects", console=_err, transient=True, disable=not defects),
            object=args.object,
            targets=targets,
            by=args.by,
        )
        facts = {**_calibration_facts(calibration), "station": str(inspector.station.path)}
    _print_facts(facts, args.json)
    return 0


def _calibration_facts(calibration: Calibration | str) -> dict[str, Any]:
    if isinstance(calibration, str):
        return {"refused": calibration}
    return {
        **calibration.model_dump(include={"object", "thresholds", "promise", "by", "when"}),
        "bank": calibration.bank or "the bundle's normal features",
        "frames": len(calibration.frames),
    }


def _figures(rows: dict[str, Figures]) -> Table:
    table = Table("%", *(name.replace("_", " ") for name in Figures.model_fields), box=None)
    for name, figures in rows.items():
        values = figures.model_dump().values()
        table.add_row(name, *("–" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def _compare(first: Path, second: Path, as_json: bool) -> int:
    compared = compare(read_evaluation(first), read_evaluation(second))
    if as_json:
        print(json.dumps({"categories": {c.name: c.model_dump(mode="json") for c in compared}}, indent=2))
        return 0
    table = Table("change, %", *(name.replace("_", " ") for name in Figures.model_fields), "flipped", box=None)
    for c in compared:
        changes = ("–" if value is None else f"{100 * value:+.2f}" for value in c.difference.values())
        table.add_row(c.name, *changes, f"{len(c.flipped)} of {c.frames}")
    _out.print(table)
    for c in compared:
        for flip in c.flipped:
            kind = "defective" if flip.defective else "good"
            print(f"{c.name}: {flip.frame} ({kind}): {flip.before.value} → {flip.after.value}")
    return 0


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/]", str(value))
    _out.print(table)


if __name__ == "__main__":
    sys.exit(main())
