"""Train the reference model: `python -m vmad_edge.export.reference.train --out DIR`. Resumes where DIR left off.

Stage "see" trains vision, LTC and LLM on good parts and parts with one or several defects, "segment" SAM by itself
(started from CLIP's layers), "mask" SAM and Γ with the LLM learning through its LoRA. Then DIR/checkpoint is written.
Parts and first weights follow from the seed.
With the packages of EfficientNet-lite0 installed (see teacher.py), vision also learns to give its features.

It uses a GPU where torch finds one, else the CPU, as several processes that average their gradients once a step: on a
CPU that others use too, processes of one thread each were measured four times faster than one whose threads wait for
one another in every operator.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice, takewhile
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.reference.evaluate import thresholds, unseen
from vmad_edge.export.reference.model import CLIP, DEVICE, Batch, ReferenceModel
from vmad_edge.export.reference.muon import Muon
from vmad_edge.export.reference.parts import ODDITY, SYMMETRIES, Kind, Part, draw, random_kind, resized, turned
from vmad_edge.export.reference.teacher import Teacher, installed
from vmad_edge.export.reference.text import Reader, answer, load_tokenizer, make_tokenizer, question, what_to_call
from vmad_edge.runtime.files import whole_folder

# bf16 where it is computed: a processor without it imitates it, a hundred times as slowly.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
SIDE = 256  # of the parts, in pixels
SHELF = 64  # threes that a worker keeps
SAVE_EVERY = 60  # seconds
# AdamW's peak learning rates: of the LLM (at 1e-3 its loss was seen to jump) and of all else.
PEAKS = {"see": (7e-4, 1e-3), "segment": (0.0, 7e-4), "mask": (3e-4, 5e-4)}
MUON = 10  # times AdamW's rate; 2, 5 and 12 were tried for 150 steps of "see", each better than the one before
SAMPLES = {"see": 300_000, "segment": 70_000, "mask": 30_000}
HIDDEN = re.compile(r"(\.layers\.\d+|^projector|\.final_attn\w*)\..*weight$")


def collate(parts: list[Part], reader: Reader, rng: np.random.Generator) -> Batch:
    """Parts of one size; a question and an answer for each of the first that have at most one defect."""
    told = list(takewhile(lambda part: part.kind is not None or not part.mask.any(), parts))
    names = [what_to_call(part, rng) for part in told]
    prompts = [reader.prompt(question(rng).replace("{object}", called)) for called in names]
    answers = [reader.answer(answer(part, called, rng)) for part, called in zip(told, names, strict=True)]
    length = max(len(asked) + len(a) for (_, asked), a in zip(prompts, answers, strict=True))
    after = torch.zeros(len(told), length, dtype=torch.long)
    said = torch.zeros(len(told), length, dtype=torch.bool)
    for row, ((_, asked), a) in enumerate(zip(prompts, answers, strict=True)):
        after[row, : len(asked) + len(a)] = torch.tensor(asked + a)
        said[row, len(asked) : len(asked) + len(a)] = True
    return Batch(
        torch.from_numpy(np.stack([part.image for part in parts])),
        torch.from_numpy(np.stack([part.kinds for part in parts])),
        torch.tensor([before for before, _ in prompts]),
        after,
        said,
    )


class Stream(IterableDataset[Batch]):
    """The seed's endless stream of parts, in threes: a good one, one with one defect, one with two or three.

    A worker keeps SHELF threes. A batch shows some of them, at random and in another of the frame's symmetries each
    time; when a three was shown in all of them, the next is drawn. Missing features come about twice as often as the
    other kinds: nothing there looks wrong by itself. Oddities come among several defects alone.

    Args:
        first: number of the first three.
        size: of the batches, in parts.
        told: whether the third of the three has one defect too, so that all have an answer.
        share: (i, n): every n-th three from the i-th on, among the loader's workers.
    """

    def __init__(
        self, reader: Reader, seed: int, first: int, size: int, told: bool = False, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.reader, self.seed, self.first, self.size, self.told, self.share = reader, seed, first, size, told, share

    def __iter__(self) -> Iterator[Batch]:
        cv2.setNumThreads(1)
        _keep_memory()
        worker, (own, shares) = get_worker_info(), self.share
        if worker is not None:
            own, shares = own * worker.num_workers + worker.id, shares * worker.num_workers
        numbers = count(self.first + own, shares)
        rng = np.random.default_rng([self.seed, next(numbers)])
        shelf = [self._shown(number) for number in islice(numbers, SHELF)]
        while True:
            threes = []
            for place in rng.choice(SHELF, self.size // 3, replace=False):
                three = next(shelf[place], None)
                if three is None:
                    shelf[place] = self._shown(next(numbers))
                    three = next(shelf[place])
                threes.append(three)
            yield collate([part for alike in zip(*threes, strict=True) for part in alike], self.reader, rng)

    def _shown(self, number: int) -> Iterator[list[Part]]:
        """A three in each of the symmetries."""
        rng, three = np.random.default_rng([self.seed, number]), []
        for defects in (0, 1, 1 if self.told else int(rng.integers(2, 4))):
            kinds = [ODDITY if defects > 1 and rng.random() < 0.3 else _kind(rng) for _ in range(defects)]
            three.append(resized(draw(rng, None, kinds, int(rng.choice([SIDE] * 7 + [352]))), SIDE))
        for ways in zip(*(rng.permutation(SYMMETRIES) for _ in three), strict=True):
            yield [turned(part, way) for part, way in zip(three, ways, strict=True)]


def _keep_memory() -> None:
    """Have glibc keep what arrays give back: else the system zeroes it anew each time, a quarter of drawing's time."""
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _kind(rng: np.random.Generator) -> Kind:
    return "missing feature" if rng.random() < 0.12 else random_kind(rng)


def rate(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: 200 steps of warm-up (or a tenth of all), then half a cosine to 2%."""
    warm = min(1.0, (step + 1) / min(200, steps / 10))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_stage(
    model: ReferenceModel, stage: str, saved: Path, steps: int, first: int, args: argparse.Namespace
) -> None:
    """Run one stage to its end, or on from the state in `saved`. `first` is the number of its first step overall."""
    seed, size = args.seed, args.batch
    rank, processes = dist.get_rank(), dist.get_world_size()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = _optimizers(named, stage)
    start = _resume(saved, model, optimizers, named) if saved.exists() else 0
    if start >= steps:
        return
    began_with = (first + start) * size * processes // (3 * SYMMETRIES)  # of the threes, so many were shown by then
    batches = DataLoader(
        Stream(model.reader, seed, began_with, size, stage == "mask", (rank, processes)),
        batch_size=None,
        num_workers=max(1, len(os.sched_getaffinity(0)) * 7 // 8 // processes),
        multiprocessing_context="fork",
    )
    model.train()
    if DEVICE.type == "cpu":  # elsewhere compiling takes longer than it saves
        model.vision.compile()
    taught = stage == "see" and installed() and "teacher" not in args.without
    teacher = Teacher(CLIP.size).to(DEVICE) if taught else None
    mean: dict[str, Tensor] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank > 0) as progress, saved.with_name("curve.jsonl").open("a") as curve:
        bar = progress.add_task(stage, total=steps, completed=start)
        began = kept = time.monotonic()
        for step, drawn in zip(range(start, steps), batches, strict=False):
            batch = drawn.to(DEVICE)
            torch.manual_seed((seed * 1_000_003 + first + step) * processes + rank)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * args.rate * rate(step, steps)
            with torch.autocast(DEVICE.type, DTYPE, enabled=torch.bfloat16 == DTYPE):
                if stage == "see":
                    losses = model.losses_see(batch, teacher)
                elif stage == "segment":
                    losses = model.losses_segment(batch)
                else:
                    losses = model.losses_mask(batch, torch.rand(size, device=DEVICE) < 0.25)
            model.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            if processes > 1:
                _average_gradients(list(named.values()))
            for module in model.children():  # each by itself: a spike in the LLM must not still the vision
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if rank > 0:
                continue
            for name, value in losses.items():
                mean[name] = torch.lerp(mean.get(name, value.detach()), value.detach(), 0.03)
            progress.update(bar, advance=1)
            if (step + 1) % 50 == 0 or step + 1 == steps:
                speed = (step + 1 - start) * size * processes / (time.monotonic() - began)
                row = {"stage": stage, "step": step + 1, "samples_per_s": round(speed, 1)}
                row |= {name: round(value.item(), 4) for name, value in mean.items()}
                curve.write(json.dumps(row) + "\n")
                curve.flush()
            if time.monotonic() > kept + SAVE_EVERY or step + 1 == steps:
                _save(saved, step + 1, model, optimizers, named)
                kept = time.monotonic()
    dist.barrier()  # the next stage of every process begins from the same files


def _optimizers(named: dict[str, torch.nn.Parameter], stage: str) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for all else; one group for each rate, for each steps through a group at once."""
    matrices: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    others: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in named.items():
        peak = PEAKS[stage][0 if name.startswith("language.") else 1]
        if parameter.ndim == 2 and HIDDEN.search(name) and "lora_" not in name:
            matrices[MUON * peak].append(parameter)
        else:
            others[peak].append(parameter)
    groups = [[{"params": alike, "peak": peak} for peak, alike in of.items()] for of in (others, matrices)]
    return [
        torch.optim.AdamW(groups[0], weight_decay=0.05, betas=(0.9, 0.98)),
        Muon(groups[1], lr=0.0, weight_decay=0.05, dtype=DTYPE),
    ]


def _average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]).cpu()
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _save(
    path: Path,
    step: int,
    model: ReferenceModel,
    optimizers: list[torch.optim.Optimizer],
    named: dict[str, torch.nn.Parameter],
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for optimizer in optimizers:
        for name, parameter in named.items():
            tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state.get(parameter, {}).items()}
    scratch = path.with_suffix(".new")
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, scratch, {"step": str(step)})
    scratch.replace(path)


def _resume(
    path: Path, model: ReferenceModel, optimizers: list[torch.optim.Optimizer], named: dict[str, torch.nn.Parameter]
) -> int:
    with safe_open(path, "pt") as file:
        keys = [key.split(".", 1) for key in file.keys()]  # noqa: SIM118
        saved = {kind: {n: file.get_tensor(f"{k}.{n}") for k, n in keys if k == kind} for kind, _ in keys}
        model.load_state_dict(saved.pop("model"))
        for optimizer in optimizers:
            mine = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for moment, values in saved.items():
                for name, value in values.items():
                    if named[name] in mine:
                        # AdamW counts its steps on the CPU.
                        optimizer.state[named[name]][moment] = value.to(named[name].device) if value.ndim else value
        return int(file.metadata()["step"])


def run(rank: int, meeting: str, args: argparse.Namespace) -> None:
    """One process of the group: every stage that has samples, and a checkpoint if the last one has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=args.processes)
    reader = Reader(load_tokenizer(args.out / "tokenizer"))
    model = ReferenceModel(reader, args.seed, ltc="ltc" not in args.without, dssl="dssl" not in args.without)
    if args.start:
        model.begin_from(Checkpoint.open(args.start))
    model.to(DEVICE)
    first = 0
    for stage in PEAKS:
        steps = getattr(args, f"{stage}_samples") // (args.batch * args.processes)
        if steps == 0:
            continue
        if stage == "segment" and not args.start:
            model.lend_vision(next(iter(Stream(reader, args.seed, 0, 15))).clip_pixels.to(DEVICE))
        if stage == "mask":
            model.adapt()
        train_stage(model, stage, args.out / f"{stage}.safetensors", steps, first, args)
        first += steps
    dist.destroy_process_group()
    if rank == 0 and model.adapted is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        write_checkpoint(model, args.out / "checkpoint")


def write_checkpoint(model: ReferenceModel, folder: Path) -> None:
    """The checkpoint with 16 unseen parts to compare exports on, and thresholds measured on its FP16 weights."""
    with whole_folder(folder) as new:
        model.save(new)
        (new / "parity_images").mkdir()
        for i, part in enumerate(unseen(16, first=2_000_000)):
            name = f"{i:02d}_{part.object}_{(part.kind or 'good').replace(' ', '_')}.jpg"
            Image.fromarray(part.image).save(new / "parity_images" / name, quality=92)
        similarity = model.config.similarity.model_copy(update={"thresholds": thresholds(Checkpoint.open(new))})
        config = model.config.model_copy(update={"similarity": similarity})
        (new / "config.json").write_text(config.model_dump_json(indent=2) + "\n")


def train(args: argparse.Namespace) -> None:
    """Every process; `args` are those of the command."""
    make_tokenizer(args.out / "tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (f"{folder}/meeting", args), nprocs=args.processes)  # type: ignore[no-untyped-call]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for states, curve and checkpoint")
    for stage, samples in SAMPLES.items():
        parser.add_argument(f"--{stage}-samples", type=int, default=samples)
    parser.add_argument("--batch", type=int, default=126 if DEVICE.type == "cuda" else 15, help="of a process; threes")
    parser.add_argument("--processes", type=int, default=1 if DEVICE.type == "cuda" else 2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.0, help="times the learning rates")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, its LoRA merged; without: from nothing")
    parser.add_argument("--without", choices=["ltc", "dssl", "teacher"], action="append", default=[])
    return parser


if __name__ == "__main__":
    parser = arguments()
    asked = parser.parse_args()
    if asked.batch % 3 or asked.batch > 3 * SHELF:
        parser.error(f"--batch: expected a multiple of 3, {3 * SHELF} at most, got {asked.batch}")
    train(asked)
