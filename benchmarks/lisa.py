"""VMAD's chain in plain transformers and torch, as one writes it after LISA's repository (dvlab-research/LISA).

Each module is called as its library has it, the whole SAM and the whole CLIP in torch; the answer is decoded greedily
without a KV cache, as in LISA's chat.py (use_cache=False), so that each step runs over all tokens again. Not slower
than that on purpose: logits are computed of the last token alone, and there is none of generate()'s bookkeeping.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.parity import Source
from vmad_edge.runtime.frame import Frame


class LisaChain(Source):
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, checkpoint.language())
        self._dtype = dtype
        for module in (self._vision, self._projector, self._language, self._sam, self._seg_projection):
            module.to(dtype)

    @torch.inference_mode()
    def screen(self, frame: Frame) -> tuple[float, tuple[Tensor, Tensor]]:
        """The score, and `patches`, `patches_multi` for the review; the map is made too."""
        image = Image.fromarray(frame.pixels)
        pixels = self._clip_processor(self._squared(image), return_tensors="pt").pixel_values.to(self._dtype)
        hidden = self._vision(pixels, output_hidden_states=True).hidden_states
        patches = hidden[self._config.patches_level][:, 1:]
        multi = torch.stack([hidden[level][:, 1:] for level in self._config.levels], 1)
        return float(self._screen(patches[0].float(), image.size)["score"]), (patches, multi)

    @torch.inference_mode()
    def review(
        self, frame: Frame, features: tuple[Tensor, Tensor], question: str
    ) -> tuple[float, str, NDArray[np.bool_] | None]:
        """P(yes), the answer, and the mask where P(yes) ≥ 0.5: what the runtime's review gives."""
        before, after = (p.replace("{question}", question) for p in self._config.conversation.template.split("<image>"))
        first, last = self._embed(self._tokenizer(before).input_ids), self._embed(self._ids(after))
        p_yes, ids, h_seg = self._generate(torch.cat([first, self._projector(*features), last], 1))
        image = Image.fromarray(frame.pixels)
        pixels = self._sam_processor(image, return_tensors="pt").pixel_values.to(self._dtype)
        embeddings = self._sam.get_image_embeddings(pixels)
        mask = (self._masks(embeddings, h_seg, image.size)["mask"] > 0).numpy() if p_yes >= 0.5 else None
        return p_yes, self._tokenizer.decode(ids[:-1]).strip(), mask

    def _generate(self, sequence: Tensor) -> tuple[float, list[int], Tensor]:
        """P(yes), ids up to `<seg>`, and h_seg [1,H]."""
        ids, p_yes = list[int](), 0.0
        while True:
            out = self._language(inputs_embeds=sequence, use_cache=False, output_hidden_states=True, logits_to_keep=1)
            scores = out.logits[0, -1].float()
            if not ids:
                yes, no = (
                    scores.softmax(-1)[list(some)].sum()
                    for some in (self._config.yes_token_ids, self._config.no_token_ids)
                )
                p_yes = float(yes / (yes + no))
            elif ids[-1] == self._seg_token_id:
                break
            scores[self._tokenizer.eos_token_id] = -torch.inf
            last = len(ids) + 1 == self._config.max_new_tokens
            ids.append(self._seg_token_id if last else int(scores.argmax()))
            if ids[-1] == self._seg_token_id and self._config.seg_state == "emitting":
                break
            sequence = torch.cat([sequence, self._embed(ids[-1:])], 1)
        return p_yes, ids, out.hidden_states[-1][0, -1:]
