"""`vmad export`, `vmad parity`, `vmad export-features`, `vmad make-checkpoint`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from vmad_edge.runtime.bundle import Bundle, ClipInput, Language, Precision, Similarity, Weights, first_fault
from vmad_edge.runtime.cli import add_reading, reading
from vmad_edge.runtime.console import steps
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.errors import VmadError

if TYPE_CHECKING:
    from vmad_edge.export.parity import Parity

_QUANTIZATIONS = get_args(Language.model_fields["quantization"].annotation)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_export(subcommands: Any) -> None:
    """Register `vmad export` with argparse's subparsers."""
    parser = subcommands.add_parser(
        "export",
        help="make a bundle out of a trained checkpoint",
        description="Make a bundle, which `vmad inspect` runs without torch, out of a trained checkpoint: four ONNX "
        "graphs, the language model as GGUF with its LoRA merged, the normal features, and a manifest. The export is "
        "then compared with the checkpoint, stage by stage, on real images: past a limit nothing is written. The "
        "figures are printed and kept in the bundle, in parity.json and, with pictures, in parity.html.",
        epilog="Example: vmad export my-checkpoint my-bundle --llm q4_k_m --parity-images photographs",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder in the layout that docs/export.md gives"
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", nargs="?", help="folder to write; a bundle that is there is replaced"
    )
    parser.add_argument(
        "--llm",
        choices=_QUANTIZATIONS,
        default="q8_0",
        help="weights of the language model: f16, q8_0 at half its size (the default), q4_k_m at less than a third; "
        "what each costs in fidelity is printed at the end",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of the graphs (default: %(default)s). One that is moved too far stays FP32, and the figures say so; int8 "
        "is for the encoders and needs --calibrate",
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="DIR", help="frames of the line that int8 takes its ranges from: 16 or more"
    )
    parser.add_argument(
        "--parity-images", type=Path, metavar="DIR", help="compare on these images (default: the checkpoint's own)"
    )
    _add_images(parser)
    add_reading(parser)
    parser.add_argument("--check", action="store_true", help="only read and validate CHECKPOINT; write nothing")
    parser.set_defaults(run=lambda args: _run(parser, args))


def add_parity(subcommands: Any) -> None:
    """Register `vmad parity` with argparse's subparsers."""
    parser = subcommands.add_parser(
        "parity",
        help="compare a bundle with the checkpoint that it was made of",
        description="Compare a bundle, on this machine, with the checkpoint that it was made of: stage by stage, on "
        "real images, as `vmad export` does.",
        epilog="Exit status: 0 within all limits; 1 past one; 2 usage, bundle or checkpoint error. Example: "
        "vmad parity my-bundle my-checkpoint --images 300 (where none of 300 decisions flips, less than 1% of all do, "
        "with 95% confidence)",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder made by `vmad export`")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what it was made of")
    parser.add_argument(
        "folder", type=Path, metavar="DIR", nargs="?", help="real images (default: the checkpoint's own)"
    )
    _add_images(parser)
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the figures and pictures of both sides as HTML"
    )
    add_reading(parser)
    parser.set_defaults(run=lambda args: _with_extra("parity", _parity, args))


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=_count,
        metavar="N",
        help="count flipped decisions on N images: DIR's, or the checkpoint's own and drawn parts. 16 of them are "
        "compared on all stages (default: every image there is, on all stages)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of images, found {text!r}")
    return int(text)


def add_export_features(subcommands: Any) -> None:
    """Register `vmad export-features` with argparse's subparsers."""
    parser = subcommands.add_parser(
        "export-features",
        help="make a bundle that screens only out of any feature graph",
        description="Make a bundle that screens only, PatchCore's way, out of any network whose ONNX graph gives out "
        "feature maps: the levels are averaged over 3×3 places, resized to the finest grid and joined. Parts are then "
        "compared with enrolled references, or with --references.",
        epilog="Example: vmad export-features efficientnet.onnx my-bundle --levels reduction_3,reduction_4",
    )
    parser.add_argument(
        "onnx", type=Path, metavar="ONNX", help="takes [B,3,S,S]; its outputs are [B,C,h,h] or [B,h²,C]"
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="folder to write; a bundle that is there is replaced"
    )
    parser.add_argument("--levels", required=True, metavar="NAME[,NAME]", help="outputs of the graph to join")
    parser.add_argument("--size", type=int, metavar="S", help="of the input in pixels (default: what the graph says)")
    for name, values, what in (("mean", _IMAGENET_MEAN, "taken off"), ("std", _IMAGENET_STD, "divided by, after that")):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            default=values,
            help=f"{what}, of pixels from 0 to 1 (default: ImageNet's)",
        )
    for name, field, record in (
        ("resize", "resize", ClipInput),
        ("resample", "resample", ClipInput),
        ("score-rule", "score_rule", Similarity),
    ):
        choices = get_args(record.model_fields[field].annotation)
        parser.add_argument(f"--{name}", choices=choices, default=choices[0], help="default: %(default)s")
    parser.add_argument("--pad-to-square", action="store_true", help="pad the shorter side first")
    parser.add_argument(
        "--smoothing-sigma", type=float, default=4.0, metavar="PX", help="of the map, in input pixels; %(default)s"
    )
    parser.add_argument(
        "--coreset", type=float, default=1.0, metavar="SHARE", help="of enrolled patches to keep (default: all)"
    )
    parser.add_argument("--origin", help="of the weights (default: the file's name)")
    parser.add_argument("--licence", default="not stated", help="of the weights (default: %(default)s)")
    parser.set_defaults(run=lambda args: _with_extra("export-features", _export_features, args))


def add_make_checkpoint(subcommands: Any) -> None:
    """Register `vmad make-checkpoint` with argparse's subparsers."""
    parser = subcommands.add_parser(
        "make-checkpoint",
        help="make a checkpoint of random weights in a real model's shapes",
        description="Make a checkpoint of seeded random weights in the shapes of real models, to measure memory, speed "
        "and engines on: it finds no defects. paper (16 GB): CLIP ViT-L/14 at 336 px, LLaVA-7B's LLaMA with a LoRA, "
        "SAM ViT-H. edge (3 GB): CLIP ViT-L/14 at 224 px, TinyLlama-1.1B's LLaMA with a LoRA, MobileSAM.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; nothing may be in it")
    parser.add_argument("--scale", choices=("paper", "edge"), required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.set_defaults(run=lambda args: _with_extra("make-checkpoint", _make_checkpoint, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.bundle is None and not args.check:
        parser.error("BUNDLE is missing: name the folder to write, or --check to write nothing")
    return _with_extra("export", _check if args.check else _export, args)


def _with_extra(command: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        return run(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vmad_edge"):
            raise
        raise VmadError(
            f"vmad {command} needs {error.name}: in vmad-edge's checkout run pip install -e '.[cpu,export]'"
        ) from None


def _check(args: argparse.Namespace) -> int:
    from vmad_edge.export.checkpoint import Checkpoint

    path = args.checkpoint
    checkpoint = Checkpoint.open(path)
    checkpoint.check_weights()
    config = checkpoint.config
    adapter = "with the LoRA in adapter/" if checkpoint.adapter else "merged already: there is no adapter/"
    print(
        f"{path} can be exported.\n"
        f"  CLIP       {checkpoint.clip.size} px ({checkpoint.clip.resize}), {checkpoint.grid}×{checkpoint.grid} "
        f"patches × {checkpoint.width}, levels {', '.join(map(str, config.levels))}\n"
        f"  LTC        {checkpoint.visual_tokens} visual tokens × {checkpoint.language_width}\n"
        f"  LLM        {checkpoint.vocabulary} tokens, {config.seg_token} = {checkpoint.seg_token_id}, "
        f"context {checkpoint.context_length}, {adapter}\n"
        f"  SAM        {checkpoint.sam.size} px\n"
        f"  weights    {config.weights.origin} ({config.weights.licence})"
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from vmad_edge.export.parity import Parity, ParityError
    from vmad_edge.export.pipeline import export

    _silence_transformers()
    try:
        with steps() as tell:
            export(
                args.checkpoint,
                args.bundle,
                quantization=args.llm,
                precision=args.precision,
                calibrate=args.calibrate,
                parity_images=args.parity_images,
                parity_count=args.images,
                reading=reading(args),
                progress=lambda step: tell(f"export: {step}"),
            )
    except ParityError as error:
        _print(error.parity, sys.stderr)
        raise
    bundle = Bundle.open(args.bundle)
    parity = Parity.model_validate_json(bundle.file("parity.json").read_bytes())
    _print(parity, sys.stdout)
    size = sum(path.stat().st_size for path in args.bundle.iterdir())
    print(f"{args.bundle}: {size / 1e6:.1f} MB, hash {bundle.hash[:16]}…")
    return 0


def _parity(args: argparse.Namespace) -> int:
    from vmad_edge.export.checkpoint import Checkpoint
    from vmad_edge.export.parity import measure
    from vmad_edge.export.parity_page import ParityPage
    from vmad_edge.export.pipeline import images_to_compare

    _silence_transformers()
    bundle = Bundle.open(args.bundle)
    checkpoint = Checkpoint.open(args.checkpoint)
    images, more = images_to_compare(checkpoint, args.folder, args.images, reading(args))
    page = ParityPage()
    with steps() as tell:
        parity = measure(
            checkpoint,
            bundle,
            images,
            more,
            device=args.device,
            reading=reading(args),
            progress=tell,
            each=page.add,
        )
    if args.page is not None:
        page.write(args.page, parity)
    _print(parity, sys.stdout)
    print(parity.failure or "within all limits")
    return 1 if parity.failure else 0


def _export_features(args: argparse.Namespace) -> int:
    from vmad_edge.export.features import export_features, input_size

    fields = {name: getattr(args, name) for name in ("resize", "resample", "pad_to_square", "mean", "std")}
    try:
        clip = ClipInput(size=args.size or input_size(args.onnx), rescale_factor=1 / 255, **fields)
        similarity = Similarity(score_rule=args.score_rule, smoothing_sigma=args.smoothing_sigma, coreset=args.coreset)
    except ValidationError as error:
        where, what = first_fault(error)
        raise VmadError(f"--{where.partition('.')[0].replace('_', '-')}: {what}") from None
    manifest = export_features(
        args.onnx,
        args.bundle,
        args.levels.split(","),
        clip=clip,
        similarity=similarity,
        weights=Weights(origin=args.origin or args.onnx.name, licence=args.licence),
    )
    vision = manifest.vision
    print(f"{args.bundle}: {clip.size} px, {vision.grid}×{vision.grid} patches of width {vision.width}")
    return 0


def _make_checkpoint(args: argparse.Namespace) -> int:
    from vmad_edge.export.scales import SCALES, make_checkpoint

    _silence_transformers()
    columns = BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        make_checkpoint(
            args.folder,
            SCALES[args.scale],
            args.seed,
            lambda done, whole: bar.update(task, completed=done, total=whole),
        )
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{args.folder}: {size / 1e9:.2f} GB; `vmad export` takes it")
    return 0


def _print(parity: Parity, file: TextIO) -> None:
    console = Console(file=file, width=None if file.isatty() else 160)
    console.print(parity.table())
    console.print(parity.flips_in_words, highlight=False)


def _silence_transformers() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # to itself
