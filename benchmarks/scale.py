"""A checkpoint of random weights at a real model's scale, all the way: made, exported, inspected with, built as plans.

    python benchmarks/scale.py edge FOLDER [--steps export inspect] [--precision fp16]

Every step runs in a process of its own, whose stages are watched from outside: time, and peak memory of the process and
its children, resident (with mapped files) and anonymous. FOLDER gets the checkpoint (paper: 16 GB) and the bundle; a
step that was left out finds there what an earlier run wrote. results/SCALE.json keeps the steps that are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from record import load, save

from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.machine import RunInProgress

TARGET = (8, 9)
"""An RTX 4090's compute capability."""
_SAMPLE_S = 0.02


def make_checkpoint(args: argparse.Namespace, stage: Callable[[str], None]) -> dict[str, Any]:
    from vmad_edge.export import scales

    stage("write")
    scales.make_checkpoint(args.folder / "checkpoint", scales.SCALES[args.scale])
    return {"bytes": _size(args.folder / "checkpoint")}


def export(args: argparse.Namespace, stage: Callable[[str], None]) -> dict[str, Any]:
    from vmad_edge.export import pipeline

    manifest = pipeline.export(
        args.folder / "checkpoint",
        args.folder / "bundle",
        quantization=args.llm,
        precision=args.precision,
        progress=stage,
    )
    parity = json.loads((args.folder / "bundle" / "parity.json").read_text())
    return {
        "llm": args.llm,
        "precision": manifest.precision or args.precision,
        "bytes": {path.name: path.stat().st_size for path in sorted((args.folder / "bundle").iterdir())},
        "tensor_types": parity["tensor_types"],
        "parity": {
            row["stage"]: {measure: row[measure] for measure in ("max_relative_error", "cosine", "iou")}
            for row in parity["stages"]
        },
    }


def language_model(args: argparse.Namespace, stage: Callable[[str], None]) -> dict[str, Any]:
    """That part of the export by itself, where no graph's weights are in memory."""
    from vmad_edge.export.language import export_language

    checkpoint, target = args.folder / "checkpoint", args.folder / "llm.gguf"
    stage("write and quantize")
    export_language(checkpoint / "language", checkpoint / "adapter", target, args.llm)
    size = target.stat().st_size
    target.unlink()
    return {"llm": args.llm, "bytes": size}


def inspect(args: argparse.Namespace, stage: Callable[[str], None]) -> dict[str, Any]:
    from vmad_edge.runtime.inspector import Inspector

    frames = list_images([str(args.folder / "checkpoint" / "parity_images")])
    found = {}
    stage("open")
    with Inspector.open(args.folder / "bundle", args.folder / "station", device="cpu") as inspector:
        for name in ("first", "second"):
            stage(f"{name} inspection")
            result = inspector.inspect(frames[0], answer="full")
            found[name] = {
                "verdict": result.verdict.value,
                "reason": result.reason,
                "p_yes": result.p_yes,
                "explanation": result.explanation,
                "mask": result.mask is not None,
                "timings_ms": result.timings_ms,
            }
    return found


def build(args: argparse.Namespace, stage: Callable[[str], None]) -> dict[str, Any]:
    from vmad_edge.runtime.bundle import Bundle
    from vmad_edge.runtime.engines import tensorrt

    bundle, trt = Bundle.open(args.folder / "bundle"), tensorrt.tensorrt()
    found: dict[str, Any] = {"tensorrt": str(trt), "compute_capability": TARGET, "plan_bytes": {}}
    for graph in tensorrt.graphs(bundle):
        stage(graph)
        plan, _ = tensorrt.build(trt, bundle.file(f"{graph}.onnx"), bundle.manifest.dynamic_axes, TARGET)
        found["plan_bytes"][graph] = len(plan)
    return found


STEPS = {step.__name__: step for step in (make_checkpoint, export, language_model, inspect, build)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=("edge", "paper"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--llm", default="q4_k_m")
    parser.add_argument("--precision", default="fp32", help="of the graphs; default: %(default)s")
    parser.add_argument("--alone", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone is not None:
        with redirect_stdout(sys.stderr):  # whatever libraries print is none of what is told
            _tell("found", STEPS[args.alone](args, lambda name: _tell("stage", name)))
        return
    steps = (load(args.scale) or {"steps": {}})["steps"]
    for step in args.steps:
        run = RunInProgress()
        stages, found = _watch(subprocess.Popen([sys.executable, *sys.argv, "--alone", step], stdout=subprocess.PIPE))
        ended = run.end(["torch", "transformers", "tensorrt-rtx"])
        steps[step] = {"others": ended.others, "stages": stages, "found": found}
        save(args.scale, ended, {"steps": steps})
        for name, figures in stages.items():
            print(f"{step}: {name}: " + ", ".join(f"{what} {value}" for what, value in figures.items()))


def _tell(kind: str, what: Any) -> None:
    print(json.dumps({kind: what}), file=sys.__stdout__, flush=True)


def _watch(child: subprocess.Popen[bytes]) -> tuple[dict[str, dict[str, float]], Any]:
    """Time and peak memory of each stage that `child` tells of, and what it found."""
    stages: dict[str, dict[str, float]] = {"start": {"resident_mib": 0.0, "anonymous_mib": 0.0}}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            now = _memory(child.pid)
            stage = list(stages.values())[-1]
            stage |= {what: max(value, stage[what]) for what, value in now.items()}

    sampler = threading.Thread(target=sample)
    sampler.start()
    found, begun = None, (time.perf_counter(), 0.0)
    assert child.stdout is not None
    for line in child.stdout:
        told = json.loads(line)
        now = time.perf_counter(), _processor_seconds(child.pid)
        seconds, processor = (round(after - before, 1) for after, before in zip(now, begun, strict=True))
        list(stages.values())[-1].update(seconds=seconds, processor_seconds=processor)
        begun = now
        if "found" in told:
            found = told["found"]
        else:
            stages[told["stage"]] = {"resident_mib": 0.0, "anonymous_mib": 0.0}
    ended.set()
    sampler.join()
    if child.wait() or found is None:
        raise SystemExit(f"{child.args!r} failed")
    return stages, found


def _memory(pid: int) -> dict[str, float]:
    """Of a process and its children now, MiB."""
    found = {"resident_mib": 0.0, "anonymous_mib": 0.0}
    for process in _family(pid):
        fields = dict(line.split(":", 1) for line in _read(process, "status").splitlines())
        for what, field in zip(found, ("VmRSS", "RssAnon"), strict=True):
            found[what] += round(int(fields.get(field, "0 kB").split()[0]) / 1024)
    return found


def _processor_seconds(pid: int) -> float:
    """Of a process and its children until now."""
    stats = (_read(process, "stat").rpartition(")")[2].split()[11:15] for process in _family(pid))
    return sum(int(ticks) for stat in stats for ticks in stat) / os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> list[int]:
    children = _read(pid, f"task/{pid}/children").split()
    return [pid, *(member for child in children for member in _family(int(child)))]


def _read(pid: int, name: str) -> str:
    """A file of /proc; empty of a process that ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
