"""Train the reference model: `python -m vmad_edge.export.reference.train --out DIR`. Resumes where DIR left off.

Stage "see" trains vision and LTC by dense losses on parts with several defects, "join" vision, LTC and LLM on text as
well, "read" the LLM and LTC on one defect a part, "segment" SAM by itself (started from CLIP's layers), "mask" SAM
and Γ with the LLM learning through its LoRA. Each round goes on from the last with the rates raised again, to less each
time; "join" keeps its rate and ends with the mean of its second half's weights, from a checkpoint (--start) halfway
between it and that mean. Then DIR/checkpoint is written. Batch number i always holds the same parts: they and the first
weights follow from the seed.
With the packages of EfficientNet-lite0 installed (see teacher.py), vision also learns to give its features.

It uses a GPU where torch finds one (tried in an earlier form), else the CPU, as several processes that average their
gradients once a step: on a CPU that others use too, processes of one thread each were measured four times faster than
one whose threads wait for one another in every operator.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
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
from vmad_edge.export.reference.model import CLIP, SAM, Batch, ReferenceModel
from vmad_edge.export.reference.muon import Muon
from vmad_edge.export.reference.parts import Kind, Part, draw, random_kind
from vmad_edge.export.reference.teacher import Teacher, installed
from vmad_edge.export.reference.text import Reader, answer, load_tokenizer, make_tokenizer, question, what_to_call
from vmad_edge.kernels.processors import processors
from vmad_edge.runtime.files import whole_folder
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import clip_pixels, sam_pixels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bf16 where it is computed: a processor without it imitates it, tens of times as slowly.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
BATCH = 16  # a process
SAVE_EVERY = 200  # steps
# AdamW's peak learning rates: of the LLM (at 1e-3 its loss was seen to jump) and of all else.
PEAKS = {"see": (0.0, 1e-3), "join": (8e-4, 8e-4), "read": (7e-4, 3e-4), "segment": (0.0, 7e-4), "mask": (3e-4, 5e-4)}
# Times PEAKS.
ROUNDS = (1.0, 0.71, 0.58, 0.2)
SCAFFOLDS = 1e-3  # in every round: a run from a checkpoint begins without them
MUON = 10  # times AdamW's rate; 2, 5 and 12 were tried for 150 steps of "see", each better than the one before
AVERAGED_EVERY = 100  # steps
SAMPLES = {
    "see": (112_000, 64_000, 104_000),
    "join": (0, 0, 0, 211_200),
    "read": (36_000, 32_000, 40_000, 12_800),
    "segment": (24_000, 24_000, 32_000),
    "mask": (0, 0, 0, 8_000),
}
HIDDEN = re.compile(r"(\.layers\.\d+|^projector|\.final_attn\w*)\..*weight$")
SEES_CLIP, SEES_SAM = ("see", "read", "join", "mask"), ("segment", "mask")
TOLD = {"see": 0, "read": BATCH, "join": 9, "segment": 0, "mask": BATCH}
"""How many parts of a batch, its first, have one defect at most and so an answer."""


def collate(stage: str, parts: list[Part], reader: Reader, rng: np.random.Generator) -> Batch:
    """Parts → what `stage` needs of them, with a question and an answer each."""
    frames = [Frame(part.image, part.object) for part in parts]
    none = torch.zeros(0)
    kinds = [cv2.resize(part.kinds, (SAM.size, SAM.size), interpolation=cv2.INTER_NEAREST) for part in parts]
    before, after, said = _texts(parts[: TOLD[stage]], reader, rng) if TOLD[stage] else (none, none, none)
    return Batch(
        torch.from_numpy(np.concatenate([clip_pixels(f, CLIP)[0] for f in frames])) if stage in SEES_CLIP else none,
        torch.from_numpy(np.concatenate([sam_pixels(f, SAM)[0] for f in frames])) if stage in SEES_SAM else none,
        torch.from_numpy(np.stack(kinds)).long(),
        before,
        after,
        said,
    )


def _texts(parts: list[Part], reader: Reader, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    names = [what_to_call(part, rng) for part in parts]
    prompts = [reader.prompt(question(rng).replace("{object}", called)) for called in names]
    answers = [reader.answer(answer(part, called, rng)) for part, called in zip(parts, names, strict=True)]
    length = max(len(asked) + len(a) for (_, asked), a in zip(prompts, answers, strict=True))
    after = torch.zeros(len(parts), length, dtype=torch.long)
    said = torch.zeros(len(parts), length, dtype=torch.bool)
    for row, ((_, asked), a) in enumerate(zip(prompts, answers, strict=True)):
        after[row, : len(asked) + len(a)] = torch.tensor(asked + a)
        said[row, len(asked) : len(asked) + len(a)] = True
    return torch.tensor([before for before, _ in prompts]), after, said


class Stream(IterableDataset[Batch]):
    """Some of the batches of the seed's endless stream of parts, by number; a loader's workers draw them in turn.

    A third is good, for a No says the same of all; the others have one defect where a text is told, elsewhere one to
    four. Missing features come about twice as often as the other kinds: nothing there looks wrong by itself.
    """

    def __init__(self, stage: str, reader: Reader, seed: int, numbers: range) -> None:
        self.stage, self.reader, self.seed, self.numbers = stage, reader, seed, numbers

    def __iter__(self) -> Iterator[Batch]:
        cv2.setNumThreads(1)
        _keep_memory()
        worker = get_worker_info()
        for number in self.numbers if worker is None else self.numbers[worker.id :: worker.num_workers]:
            rng = np.random.default_rng([self.seed, number])
            parts = []
            for i in range(BATCH):
                count = i % 3 and (1 if i < TOLD[self.stage] else int(rng.integers(1, 4 + (self.stage == "join"))))
                kinds = [_kind(rng) for _ in range(count)]
                parts.append(draw(rng, None, kinds, int(rng.choice([256] * 7 + [352]))))
            yield collate(self.stage, parts, self.reader, rng)


def _keep_memory() -> None:
    """Have glibc keep what arrays give back: else the system zeroes it anew each time, a quarter of drawing's time."""
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _kind(rng: np.random.Generator) -> Kind:
    return "missing feature" if rng.random() < 0.12 else random_kind(rng)


def rate(step: int, steps: int, falls: bool) -> float:
    """Learning rate as a share of its peak: 200 steps (or a tenth) of warm-up, then half a cosine to 2% or no fall."""
    warm = min(1.0, (step + 1) / min(200, steps / 10))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))) if falls else warm


def averaged(step: int, steps: int) -> int:
    """The how-manieth of the weights in the mean are this step's, 0 if not in it: the second half's every hundredth."""
    done = step + 1
    taken = done > steps // 2 and (done % AVERAGED_EVERY == 0 or done == steps)
    return math.ceil(done / AVERAGED_EVERY) - steps // 2 // AVERAGED_EVERY if taken else 0


def train_stage(model: ReferenceModel, stage: str, saved: Path, steps: int, first: int, peak: float, seed: int) -> None:
    """Run one stage to its end, or on from the state in `saved`.

    Args:
        first: the number of its first step overall.
        peak: of its learning rates, as a share of PEAKS.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = _optimizers(named, stage, peak)
    start = _resume(saved, model, optimizers, named) if saved.exists() else 0
    numbers = range((first + start) * processes + rank, (first + steps) * processes, processes)
    workers = max(1, processors() // processes - 1)
    batches = DataLoader(
        Stream(stage, model.reader, seed, numbers), batch_size=None, num_workers=workers, multiprocessing_context="fork"
    )
    model.train()
    model.vision.compile()
    teacher = Teacher(CLIP.size).to(DEVICE) if stage in ("see", "join") and installed() else None
    mean: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank > 0) as progress, saved.with_name("curve.jsonl").open("a") as curve:
        bar = progress.add_task(saved.stem, total=steps, completed=start)
        began = time.monotonic()
        for step, drawn in enumerate(batches, start):
            batch = drawn.to(DEVICE)
            torch.manual_seed((seed * 1_000_003 + first + step) * processes + rank)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * rate(step, steps, falls=stage != "join")
            with torch.autocast(DEVICE.type, DTYPE, enabled=torch.bfloat16 == DTYPE):
                if stage == "see":
                    losses = model.losses_see(batch, teacher)
                elif stage == "read":
                    losses = model.losses_read(batch)
                elif stage == "join":
                    losses = model.losses_join(batch, teacher)
                elif stage == "segment":
                    losses = model.losses_segment(batch)
                else:
                    losses = model.losses_mask(batch, torch.rand(BATCH, device=DEVICE) < 0.25)
            model.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            _average_gradients(list(named.values()))
            for module in model.children():  # each by itself: a spike in the LLM must not still the vision
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            ends = step + 1 == steps
            if stage == "join" and (count := averaged(step, steps)):
                _average_weights(optimizers, count, ends)
            if rank > 0:
                continue
            for name, value in losses.items():
                mean[name] = 0.97 * mean.get(name, value.item()) + 0.03 * value.item()
            progress.update(bar, advance=1)
            if (step + 1) % 50 == 0 or ends:
                speed = (step + 1 - start) * BATCH * processes / (time.monotonic() - began)
                row = {"stage": saved.stem, "step": step + 1, "samples_per_s": round(speed, 1)}
                row |= {name: round(value, 4) for name, value in mean.items()}
                curve.write(json.dumps(row) + "\n")
                curve.flush()
            if (step + 1) % SAVE_EVERY == 0 or ends:
                _save(saved, step + 1, model, optimizers, named)
    dist.barrier()  # the next stage of every process begins from the same files


def _optimizers(named: dict[str, torch.nn.Parameter], stage: str, share: float) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for all else; one group for each rate, for each steps through a group at once."""
    matrices: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    others: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in named.items():
        part = name.split(".")[0]
        peak = SCAFFOLDS if part.endswith("_head") else share * PEAKS[stage][0 if part == "language" else 1]
        if parameter.ndim == 2 and HIDDEN.search(name) and "lora_" not in name:
            matrices[MUON * peak].append(parameter)
        else:
            others[peak].append(parameter)
    groups = [[{"params": alike, "peak": peak} for peak, alike in of.items()] for of in (others, matrices)]
    return [
        torch.optim.AdamW(groups[0], weight_decay=0.05, betas=(0.9, 0.98)),
        Muon(groups[1], lr=0.0, weight_decay=0.05, dtype=DTYPE),
    ]


@torch.no_grad()
def _average_weights(optimizers: list[torch.optim.Optimizer], count: int, ends: bool) -> None:
    """Take the weights, the `count`-th, into the mean in the optimizers' states; at the stage's end put it in place."""
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            mean = optimizer.state[parameter].setdefault("mean", torch.zeros_like(parameter))
            mean.lerp_(parameter, 1 / count)
            if ends:
                parameter.copy_(mean)


@torch.no_grad()
def go_half_back(model: torch.nn.Module, begun: dict[str, Tensor]) -> None:
    """Put the weights halfway between those that a run began with and its own (WiSE-FT, Wortsman et al. 2022).

    The scaffolds stay: they began from nothing.
    """
    for name, parameter in model.named_parameters():
        if not name.split(".")[0].endswith("_head"):
            parameter.lerp_(begun[name], 0.5)


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
    begun = {name: parameter.detach().clone() for name, parameter in model.named_parameters()} if args.start else {}
    first = 0
    rounds = list(enumerate(zip_longest(*(getattr(args, f"{stage}_samples") for stage in PEAKS), fillvalue=0), 1))
    for number, counts in rounds[-1:] if args.start else rounds:
        for stage, count in zip(PEAKS, counts, strict=True):
            steps = count // (BATCH * args.processes)
            if steps == 0:
                continue
            if stage == "segment" and number == 1:
                model.lend_vision(next(iter(Stream("see", reader, args.seed, range(1)))).clip_pixels.to(DEVICE))
            if stage == "mask":
                model.adapt()
            saved = args.out / f"{stage}{number}.safetensors"
            train_stage(model, stage, saved, steps, first, ROUNDS[min(number, len(ROUNDS)) - 1], args.seed)
            first += steps
            if stage == "join" and begun:
                go_half_back(model, begun)
    dist.destroy_process_group()
    if rank == 0 and model.adapted is not None:
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
        said = "of each round" + (", 0 but for the last" if stage == "mask" else "")
        parser.add_argument(f"--{stage}-samples", type=int, nargs="+", default=samples, help=said)
    parser.add_argument("--start", type=Path, help="a checkpoint to run the last round from, its LoRA merged")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", choices=["ltc", "dssl"], action="append", default=[], help="for the ablation")
    return parser


if __name__ == "__main__":
    train(arguments().parse_args())
