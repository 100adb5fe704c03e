"""How good a checkpoint is on drawn parts that it never saw.

`python -m vmad_edge.export.reference.evaluate CHECKPOINT [--parts N]`. Everything is done as at run time, at FP32 from
the FP16 weights: greedy answers, the screen's score, masks from h_seg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs.clip_encoder import ClipEncoder
from vmad_edge.export.graphs.mask_decoder import MaskDecoder
from vmad_edge.export.reference.parts import FAMILIES, Part, draw
from vmad_edge.export.reference.text import Reader, load_tokenizer
from vmad_edge.runtime.bundle import Thresholds
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import clip_pixels, sam_pixels
from vmad_edge.runtime.stages.similarity import image_score

SEED = 1_000_003
"""Of the parts here; the training draws with other seeds."""
SIZE = 384
BATCH = 16


def unseen(count: int, first: int, good_only: bool = False) -> list[Part]:
    """Parts number `first`… of SEED: the families in turn, every other one defective unless `good_only`."""
    families = list(FAMILIES)
    return [
        draw(
            np.random.default_rng([SEED, i]),
            families[i // 2 % len(families)],
            None if good_only or i % 2 == 0 else "random",
            SIZE,
        )
        for i in range(first, first + count)
    ]


class Evaluation:
    """A checkpoint's stages in torch, in batches."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        config = checkpoint.config
        self.reader = Reader(load_tokenizer(checkpoint.path / "language"))
        self.vision = ClipEncoder(checkpoint.vision(), config.patches_level, config.levels)
        self.projector = checkpoint.projector()
        self.language = checkpoint.language()
        self.sam = checkpoint.segmenter()
        self.mask_decoder = MaskDecoder(checkpoint.seg_projection(), self.sam)
        features = load_file(checkpoint.path / "similarity.safetensors")
        self.normal, self.abnormal = (
            torch.nn.functional.normalize(features[name].float(), dim=-1)
            for name in ("visual_normal", "visual_abnormal")
        )

    def see(self, parts: Iterable[Part]) -> tuple[Tensor, Tensor]:
        """`visual_tokens` [B,K,H] and each patch's anomaly probability [B,N]."""
        frames = [Frame(part.image, part.object) for part in parts]
        pixels = np.concatenate([clip_pixels(frame, self.checkpoint.clip)[0] for frame in frames])
        patches, multi, _ = self.vision(torch.from_numpy(pixels))
        query = torch.nn.functional.normalize(patches, dim=-1)
        odds = (query @ self.abnormal.T).amax(-1) - (query @ self.normal.T).amax(-1)
        return self.projector(patches, multi), torch.sigmoid(odds / self.checkpoint.config.similarity.temperature)

    def answer(self, visual_tokens: Tensor, name: str) -> tuple[NDArray[np.float32], list[str], Tensor, Tensor]:
        """P(yes) [B], greedy answers, and h_seg [B,H] of the full and of the short answer, for parts called `name`."""
        config = self.checkpoint.config
        before, after = self.reader.prompt(config.conversation.question.replace("{object}", name))
        embed, n = self.language.get_input_embeddings(), len(visual_tokens)
        ids = [torch.tensor([chunk]).expand(n, -1) for chunk in (before, after)]
        inputs = torch.cat([embed(ids[0]), visual_tokens, embed(ids[1])], 1)
        cache = None
        said: list[Tensor] = []
        states: list[Tensor] = []
        p_yes = np.zeros(0, np.float32)
        for _ in range(config.max_new_tokens):
            out = self.language.model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            states.append(out.last_hidden_state[:, -1])
            logits = self.language.lm_head(states[-1])
            if not said:
                p_yes = logits[:, [self.reader.yes_id, self.reader.no_id]].softmax(-1)[:, 0].numpy()
            said.append(logits.argmax(-1))
            inputs = embed(said[-1])[:, None]
            tokens = torch.stack(said, 1)
            ends = (tokens == self.reader.seg_id).int()
            if ends.any(1).all():
                break
        end = torch.where(ends.any(1), ends.argmax(1), tokens.shape[1] - 1)
        texts = [str(self.reader.tokenizer.decode(row[:stop])) for row, stop in zip(tokens, end, strict=True)]
        return p_yes, texts, torch.stack(states, 1)[torch.arange(n), end], self._short(ids, visual_tokens)

    def _short(self, ids: list[Tensor], visual_tokens: Tensor) -> Tensor:
        embed, n = self.language.get_input_embeddings(), len(visual_tokens)
        forced = torch.tensor([self.reader.encode(self.checkpoint.config.conversation.short_answer)]).expand(n, -1)
        inputs = torch.cat([embed(ids[0]), visual_tokens, embed(ids[1]), embed(forced)], 1)
        state: Tensor = self.language.model(inputs_embeds=inputs).last_hidden_state[:, -1]
        return state

    def mask(self, part: Part, h_seg: Tensor) -> NDArray[np.bool_]:
        """[S,S] from one h_seg [H], in the part's pixels."""
        pixels, (height, width) = sam_pixels(Frame(part.image, part.object), self.checkpoint.sam)
        logits, _ = self.mask_decoder(self.sam.get_image_embeddings(torch.from_numpy(pixels)), h_seg[None])
        side = self.checkpoint.sam.size
        logits = torch.nn.functional.interpolate(logits, (side, side), mode="bilinear")[..., :height, :width]
        found = torch.nn.functional.interpolate(logits, part.mask.shape, mode="bilinear")[0, 0] > 0
        return np.asarray(found)


@torch.no_grad()
def thresholds(checkpoint: Checkpoint, count: int = 300) -> Thresholds:
    """0.95 and 0.995 quantile of the screen's score over `count` good parts that no figure below is measured on."""
    evaluation = Evaluation(checkpoint)
    scores: list[float] = []
    for parts in _batches(iter(unseen(count, first=1_000_000, good_only=True))):
        scores += [image_score(p.numpy(), checkpoint.config.similarity) for p in evaluation.see(parts)[1]]
    low, high = np.quantile(scores, (0.95, 0.995))
    return Thresholds(good_below=float(low), defect_above=float(high))


@torch.no_grad()
def evaluate(checkpoint: Checkpoint, count: int) -> dict[str, float]:
    """The model card's figures on `count` unseen parts, half of them defective."""
    evaluation = Evaluation(checkpoint)
    parts = sorted(unseen(count, first=0), key=lambda part: part.object)
    grid = checkpoint.grid
    defective = np.array([part.kind is not None for part in parts])
    p_yes: list[float] = []
    score: list[float] = []
    patch: list[NDArray[np.float32]] = []
    kind, place, full, short, forms = [], [], [], [], []
    groups = [(name, batch) for name, group in groupby(parts, lambda part: part.object) for batch in _batches(group)]
    for name, batch in track(groups, "evaluate"):
        visual_tokens, p = evaluation.see(batch)
        yes, texts, h_full, h_short = evaluation.answer(visual_tokens, name)
        p_yes += yes.tolist()
        score += [image_score(row.numpy(), checkpoint.config.similarity) for row in p]
        patch += list(p.numpy())
        for part, text, state, short_state in zip(batch, texts, h_full, h_short, strict=True):
            forms.append(text.startswith(("Yes. There is a ", "No. The ")))
            if part.kind is None:
                continue
            kind.append(f" a {part.kind} at " in text)
            place.append(f" at the {part.place} of " in text)
            full.append(_iou(evaluation.mask(part, state), part.mask))
            short.append(_iou(evaluation.mask(part, short_state), part.mask))
    labels = np.concatenate(
        [cv2.resize(part.mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA).ravel() for part in parts]
    )
    figures: dict[str, Any] = {
        "image AUROC of P(yes)": auroc(np.array(p_yes), defective),
        "image AUROC of the screen": auroc(np.array(score), defective),
        "patch AUROC": auroc(np.concatenate(patch), labels > 0.1),
        "kind named right": np.mean(kind),
        "place named right": np.mean(place),
        "mask IoU, full answer": np.mean(full),
        "mask IoU, short answer": np.mean(short),
        "answers in form": np.mean(forms),
    }
    if bounds := checkpoint.config.similarity.thresholds:
        good = np.array(score)[~defective]
        bad = np.array(score)[defective]
        figures["good parts screened GOOD"] = (good < bounds.good_below).mean()
        figures["defective parts screened GOOD"] = (bad < bounds.good_below).mean()
        figures["defective parts screened DEFECT"] = (bad >= bounds.defect_above).mean()
    return {name: round(float(value), 4) for name, value in figures.items()}


def auroc(score: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, ties counted half (Mann-Whitney)."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def _iou(found: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    return float((found & true).sum() / (found | true).sum())


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    iterator = iter(parts)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--parts", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(evaluate(Checkpoint.open(args.checkpoint), args.parts), indent=2))


if __name__ == "__main__":
    main()
