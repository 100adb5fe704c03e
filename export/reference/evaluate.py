"""How good a checkpoint, and the bundles made of it, are on drawn parts that it never saw.

`python -m vmad_edge.export.reference.evaluate CHECKPOINT [BUNDLE …] [--parts N] [--first I]`. A checkpoint runs in
torch at FP32, a bundle in its runtime: greedy answers, the screen's score and map, masks from h_seg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs.clip_encoder import ClipEncoder
from vmad_edge.export.graphs.mask_decoder import MaskDecoder
from vmad_edge.export.reference.parts import FAMILIES, KINDS, UNSEEN_FAMILIES, UNSEEN_KINDS, Part, draw
from vmad_edge.export.reference.text import Reader, load_tokenizer
from vmad_edge.runtime.bundle import Bundle, Thresholds
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.metrics import measure, pixel_scores
from vmad_edge.runtime.stages.preprocess import clip_pixels, sam_pixels
from vmad_edge.runtime.stages.segmentation import mask_logits
from vmad_edge.runtime.stages.similarity import NormalFeatures, anomaly_map, image_score
from vmad_edge.runtime.systems.vmad import Review, Screen
from vmad_edge.runtime.timing import Stopwatch

SEED = 1_000_003
"""Of the parts here; the training draws with other seeds."""
SIZE = 256
NO_MASK = -100.0
"""Logits of a part that was answered with No."""
BATCH = 16


Group = Literal["trained", "unseen families", "unseen kinds"]


def unseen(count: int, first: int, group: Group = "trained", good_only: bool = False) -> list[Part]:
    """Parts number `first`… of SEED: the group's families in turn, every other part with one defect."""
    families = list(UNSEEN_FAMILIES if group == "unseen families" else FAMILIES)
    kinds = UNSEEN_KINDS if group == "unseen kinds" else KINDS
    parts = []
    for i in range(first, first + count):
        rng = np.random.default_rng([SEED, i])
        defects = [] if good_only or i % 2 == 0 else [kinds[rng.integers(len(kinds))]]
        parts.append(draw(rng, families[i // 2 % len(families)], defects, SIZE))
    return parts


@dataclass(frozen=True)
class Found:
    """What a model says of one part."""

    p_yes: float
    text: str
    score: float
    map: NDArray[np.float32]
    """[S,S]: the screen's."""
    logits: NDArray[np.float32] | None
    """[S,S] of the mask; None where P(yes) < 0.5."""


Find = Callable[[Sequence[Part], str], list[Found]]
"""Parts of one family, asked for by this name → what was found, for each."""


class Evaluation:
    """A checkpoint's stages in torch at FP32, in batches."""

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

    def find(self, parts: Sequence[Part], name: str) -> list[Found]:
        """`parts` as at run time, with the full answer."""
        visual_tokens, patches = self.see(parts)
        p_yes, texts, h_seg, _ = self.answer(visual_tokens, name)
        similarity, found = self.checkpoint.config.similarity, []
        for part, yes, text, state, scores in zip(parts, p_yes, texts, h_seg, patches.numpy(), strict=True):
            frame = Frame(part.image, part.object)
            _, view = clip_pixels(frame, self.checkpoint.clip)
            heat = anomaly_map(scores, view, similarity, self.checkpoint.clip.size, part.mask.shape)
            logits = self._mask(frame, state) if yes >= 0.5 else None
            found.append(Found(float(yes), text, image_score(scores, similarity), heat, logits))
        return found

    def _mask(self, frame: Frame, h_seg: Tensor) -> NDArray[np.float32]:
        pixels, covered = sam_pixels(frame, self.checkpoint.sam)
        logits, _ = self.mask_decoder(self.sam.get_image_embeddings(torch.from_numpy(pixels)), h_seg[None])
        size = frame.pixels.shape[0], frame.pixels.shape[1]
        return mask_logits(logits[0, 0].numpy(), covered, self.checkpoint.sam.size, size)


class Deployed:
    """A bundle in its runtime, one part after the other."""

    def __init__(self, bundle: Bundle) -> None:
        self.screen, self.review = Screen(bundle, "cpu"), Review(bundle, "cpu")
        self.normal = NormalFeatures(bundle.file("similarity.safetensors"), bundle.manifest.similarity)
        self.question = bundle.for_review.conversation.question

    def find(self, parts: Sequence[Part], name: str) -> list[Found]:
        """`parts` with the full answer."""
        question, found = self.question.replace("{object}", name), []
        for part in parts:
            frame, watch = Frame(part.image, part.object), Stopwatch()
            seen = self.screen.run(frame, self.normal, watch)
            said = self.review.run(
                frame, seen.features, question, "full", lambda p: None, lambda text: None, lambda: None, watch
            )
            found.append(Found(said.p_yes, said.text, seen.score, seen.map, said.mask_logits))
        return found


@torch.no_grad()
def thresholds(checkpoint: Checkpoint, count: int = 300) -> Thresholds:
    """0.8 and 0.995 quantile of the screen's score over `count` good parts that no figure below is measured on.

    The lower one is low on purpose: what lies between is settled by the review, which a line can afford for a fifth.
    """
    evaluation = Evaluation(checkpoint)
    scores: list[float] = []
    for parts in batches(iter(unseen(count, first=1_000_000, good_only=True))):
        scores += [image_score(p.numpy(), checkpoint.config.similarity) for p in evaluation.see(parts)[1]]
    low, high = np.quantile(scores, (0.8, 0.995))
    return Thresholds(good_below=float(low), defect_above=float(high))


@torch.no_grad()
def evaluate(find: Find, bounds: Thresholds | None, count: int, group: Group, first: int = 0) -> dict[str, float]:
    """Figures on `count` unseen parts of `group` from number `first` on, half of them defective."""
    parts = sorted(unseen(count, first, group), key=lambda part: part.object)
    groups = [(name, batch) for name, members in groupby(parts, lambda part: part.object) for batch in batches(members)]
    defects, kind, place, forms = [], [], [], []
    p_yes, score, overlap = [], [], []
    maps, masks = [], []
    for name, batch in track(groups, group):
        for part, found in zip(batch, find(batch, name), strict=True):
            defects.append(part.kind)
            p_yes.append(found.p_yes)
            score.append(found.score)
            forms.append(found.text.startswith(("Yes. There is a ", "No. The ")))
            logits = np.full(part.mask.shape, NO_MASK, np.float32) if found.logits is None else found.logits
            maps.append(pixel_scores(found.map.astype(np.float16), part.mask)[0])
            masks.append(pixel_scores(logits.astype(np.float16), part.mask)[0])
            if part.kind is not None:
                kind.append(f" a {part.kind} at " in found.text)
                place.append(f" at the {part.place} of " in found.text)
                overlap.append(_iou(logits > 0, part.mask))
    bad = np.array([defect is not None for defect in defects])
    figures: dict[str, Any] = {
        "image AUROC of P(yes)": auroc(np.array(p_yes), bad),
        "image AUROC of the screen": auroc(np.array(score), bad),
        "pixel AUROC of the map": measure(maps).auroc,
        "pixel AUROC of the mask": measure(masks).auroc,
        "mask IoU, defective parts": np.mean(overlap),
        "kind named right": np.mean(kind),
        "place named right": np.mean(place),
        "answers in form": np.mean(forms),
        "good parts answered Yes": (np.array(p_yes)[~bad] >= 0.5).mean(),
        "defective parts answered Yes": (np.array(p_yes)[bad] >= 0.5).mean(),
    }
    if group == "unseen kinds":
        del figures["kind named right"]  # it has no word for them
    scores = np.array(score)
    for one in sorted({defect for defect in defects if defect is not None}):
        of_one = ~bad | np.array([defect == one for defect in defects])
        figures[f"image AUROC of the screen, {one}"] = auroc(scores[of_one], bad[of_one])
    if bounds is not None:
        figures["good parts screened GOOD"] = (scores[~bad] < bounds.good_below).mean()
        figures["defective parts screened GOOD"] = (scores[bad] < bounds.good_below).mean()
        figures["defective parts screened DEFECT"] = (scores[bad] >= bounds.defect_above).mean()
    return {name: round(float(value), 4) for name, value in figures.items()}


def auroc(score: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, ties counted half (Mann-Whitney)."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def _iou(found: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    return float((found & true).sum() / (found | true).sum())


def batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    iterator = iter(parts)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="+", help="checkpoints and bundles")
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first part (default: 0)")
    parser.add_argument("--group", choices=get_args(Group), action="append", help="default: all three")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for path in args.model:
        find: Find
        if (path / "manifest.json").exists():
            bundle = Bundle.open(path)
            find, bounds = Deployed(bundle).find, bundle.manifest.similarity.thresholds
        else:
            checkpoint = Checkpoint.open(path)
            find, bounds = Evaluation(checkpoint).find, checkpoint.config.similarity.thresholds
        for group in args.group or get_args(Group):
            figures.setdefault(group, {})[str(path)] = evaluate(find, bounds, args.parts, group, args.first)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
