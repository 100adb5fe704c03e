"""`vmad export`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from vmad_edge.runtime.bundle import Bundle, Language
from vmad_edge.runtime.errors import VmadError

_QUANTIZATIONS = get_args(Language.model_fields["quantization"].annotation)


def add_export(subcommands: Any) -> None:
    """Register `vmad export` with argparse's subparsers."""
    parser = subcommands.add_parser(
        "export",
        help="make a bundle out of a trained checkpoint",
        description="Make a bundle, which `vmad inspect` runs without torch, out of a trained checkpoint: four ONNX "
        "graphs, the language model as GGUF with its LoRA merged, the normal features, and a manifest. The export is "
        "then compared with the checkpoint, stage by stage, on real images; the figures are printed and kept in the "
        "bundle's parity.json.",
        epilog="Example: vmad export my-checkpoint my-bundle --llm q4_k_m --parity-images photographs",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder in the layout that the README gives"
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
        "--parity-images", type=Path, metavar="DIR", help="compare on these images (default: the checkpoint's own)"
    )
    parser.add_argument("--check", action="store_true", help="only read and validate CHECKPOINT; write nothing")
    parser.set_defaults(run=lambda args: _run(parser, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.bundle is None and not args.check:
        parser.error("BUNDLE is missing: name the folder to write, or --check to write nothing")
    try:
        if args.check:
            _check(args.checkpoint)
        else:
            _export(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vmad_edge"):
            raise
        raise VmadError(f"vmad export needs {error.name}: pip install 'vmad-edge[cpu,export]'") from None
    return 0


def _check(path: Path) -> None:
    from vmad_edge.export.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    print(
        f"{path} can be exported.\n"
        f"  CLIP       {checkpoint.clip.size} px ({checkpoint.clip.resize}), {checkpoint.grid}×{checkpoint.grid} "
        f"patches × {checkpoint.width}, levels {', '.join(map(str, config.levels))}\n"
        f"  LTC        {checkpoint.visual_tokens} visual tokens × {checkpoint.language_width}\n"
        f"  LLM        {checkpoint.vocabulary} tokens, {config.seg_token} = {checkpoint.seg_token_id}, "
        f"context {checkpoint.context_length}\n"
        f"  SAM        {checkpoint.sam.size} px\n"
        f"  weights    {config.weights.origin} ({config.weights.licence})"
    )


def _export(args: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    from vmad_edge.export.parity import Parity
    from vmad_edge.export.pipeline import export

    disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # of transformers to itself
    with Console(stderr=True).status("") as status:
        export(
            args.checkpoint,
            args.bundle,
            quantization=args.llm,
            parity_images=args.parity_images,
            progress=lambda step: status.update(f"export: {step}"),
        )
    bundle = Bundle.open(args.bundle)
    parity = Parity.model_validate_json(bundle.file("parity.json").read_bytes())
    Console().print(parity.table())
    size = sum(path.stat().st_size for path in args.bundle.iterdir())
    print(f"{args.bundle}: {size / 1e6:.1f} MB, hash {bundle.hash[:16]}…")
