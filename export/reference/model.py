"""The reference model: VMAD whole at toy size, its losses, and the writing of its checkpoint.

[ASSUME] VMAD publishes DSSL's idea and not its form. Ours: learnable unit features stand for the memory queue's
distilled normal (and abnormal) features; a patch's anomaly probability is the softmax between its largest cosine to
either at temperature τ, which is the runtime's own operator; in the LLM's space each visual token's cosine with one
learnable normal semantic token is high on normal cells and low on defective ones.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from vmad_edge.export.checkpoint import Config, LtcConfig
from vmad_edge.export.models.ltc import LtcProjector
from vmad_edge.export.models.seg_projection import SegProjection
from vmad_edge.export.reference.parts import KINDS
from vmad_edge.export.reference.text import QUESTION, SEG, TEMPLATE, YES, Reader
from vmad_edge.runtime.bundle import ClipInput, Conversation, SamInput, Similarity, Weights

WIDTH, LANGUAGE_WIDTH, PROMPT_WIDTH = 192, 256, 256
GRID, SCALE = 16, 2
FEATURES = 64
CLIP = ClipInput(
    size=14 * GRID,
    resize="exact",
    pad_to_square=False,
    resample="bicubic",
    rescale_factor=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
SAM = SamInput(size=256)


@dataclass
class Batch:
    clip_pixels: Tensor
    """[B,3,224,224] f32."""
    sam_pixels: Tensor
    """[B,3,256,256] f32."""
    mask: Tensor
    """[B,256,256] f32, 1 on the defect."""
    kind: Tensor
    """[B] i64: 0 good, else 1 + index into KINDS."""
    before: Tensor
    """[B,T0] i64: ids before the visual tokens."""
    after: Tensor
    """[B,T1] i64: ids after them, question's end and answer, padded with 0."""
    answer: Tensor
    """[B,T1] bool: which of `after` are the answer's."""


class ReferenceModel(nn.Module):
    """Every part in one module; `losses_see`, `losses_read`, `losses_mask` are the stages of training."""

    def __init__(self, reader: Reader, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.reader = reader
        self.config = _config(reader)
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=6, num_attention_heads=3,
                image_size=CLIP.size, patch_size=14, hidden_act="gelu",
            )
        )  # fmt: skip
        # transformers' 0.02 is lost beside the patches' embeddings: the visual tokens forgot where they are.
        nn.init.normal_(self.vision.embeddings.position_embedding.weight, std=0.2)
        self.projector = LtcProjector(WIDTH, len(self.config.levels), LANGUAGE_WIDTH, SCALE, self.config.ltc.heads)
        self.language = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=LANGUAGE_WIDTH, intermediate_size=3 * LANGUAGE_WIDTH, num_hidden_layers=4,
                num_attention_heads=4, vocab_size=len(reader.tokenizer), max_position_embeddings=512,
                rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        self.adapted: tuple[PeftModel] | None = None
        self.segmenter = SamModel(
            SamConfig(
                vision_config=SamVisionConfig(
                    hidden_size=128, mlp_dim=384, num_hidden_layers=6, num_attention_heads=4, image_size=SAM.size,
                    patch_size=16, window_size=8, global_attn_indexes=[2, 5], output_channels=PROMPT_WIDTH,
                ),
                prompt_encoder_config=SamPromptEncoderConfig(image_size=SAM.size, patch_size=16),
                mask_decoder_config=SamMaskDecoderConfig(mlp_dim=256, iou_head_hidden_dim=64),
            )
        )  # fmt: skip
        self.seg_projection = SegProjection(LANGUAGE_WIDTH, PROMPT_WIDTH)
        self.visual_normal = nn.Parameter(torch.randn(FEATURES, WIDTH))
        self.visual_abnormal = nn.Parameter(torch.randn(FEATURES, WIDTH))
        self.semantic_normal = nn.Parameter(torch.randn(1, LANGUAGE_WIDTH))
        # Scaffolds of the training, left out of the checkpoint.
        self.kind_head = nn.Linear(LANGUAGE_WIDTH, 1 + len(KINDS))
        self.place_head = nn.Linear(LANGUAGE_WIDTH, (GRID // SCALE) ** 2)
        self.sam_head = nn.Conv2d(PROMPT_WIDTH, 1, 1)

    def adapt(self) -> None:
        """From here on the LLM learns through a LoRA on q_proj and v_proj, beside its embeddings and lm_head."""
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        # In a tuple, so that nn.Module does not register the same weights twice.
        self.adapted = (cast(PeftModel, get_peft_model(cast(Any, self.language), lora)),)
        for module in (self.vision, self.projector, self.kind_head, self.place_head):
            module.requires_grad_(False)
        for parameter in (self.visual_normal, self.visual_abnormal, self.semantic_normal):
            parameter.requires_grad_(False)
        for name, parameter in self.language.named_parameters():
            parameter.requires_grad_("lora_" in name or "lm_head" in name or "embed_tokens" in name)

    def see(self, clip_pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`patches` [B,N,D] and `visual_tokens` [B,K,H]."""
        hidden = self.vision(pixel_values=clip_pixels, output_hidden_states=True).hidden_states
        patches = hidden[self.config.patches_level][:, 1:]
        multi = torch.stack([hidden[level][:, 1:] for level in self.config.levels], 1)
        return patches, self.projector(patches, multi)

    def patch_logits(self, patches: Tensor) -> Tensor:
        """Log odds [B,N] of the softmax between the nearest abnormal and the nearest normal feature."""
        query = F.normalize(patches.float(), dim=-1)
        normal, abnormal = (F.normalize(f, dim=-1) for f in (self.visual_normal, self.visual_abnormal))
        nearest_normal = (query @ normal.T).amax(-1)
        return ((query @ abnormal.T).amax(-1) - nearest_normal) / self.config.similarity.temperature

    def read(self, batch: Batch, visual_tokens: Tensor) -> Tensor:
        """States [B,T1,H] after the final norm, of the steps whose logits emit `batch.after`."""
        embed = self.language.get_input_embeddings()
        before, after = embed(batch.before), embed(batch.after)
        inputs = torch.cat([before, visual_tokens.to(before.dtype), after], 1)
        states: Tensor = self.language.model(inputs_embeds=inputs).last_hidden_state
        return states[:, -after.shape[1] - 1 : -1]

    def losses_see(self, batch: Batch) -> dict[str, Tensor]:
        """Dense losses of vision and LTC: what is wrong with each patch and with each visual token's cell."""
        return self._dense(batch, *self.see(batch.clip_pixels))

    def losses_read(self, batch: Batch) -> dict[str, Tensor]:
        """The same and the LLM's text."""
        patches, visual_tokens = self.see(batch.clip_pixels)
        return self._text(batch, self.read(batch, visual_tokens)) | self._dense(batch, patches, visual_tokens)

    def _dense(self, batch: Batch, patches: Tensor, visual_tokens: Tensor) -> dict[str, Tensor]:
        cover = F.adaptive_avg_pool2d(batch.mask[:, None], GRID).flatten(1)
        patch = F.binary_cross_entropy_with_logits(
            self.patch_logits(patches), (cover > 0.1).float(), pos_weight=torch.tensor(3.0)
        )
        cell = (F.adaptive_avg_pool2d(batch.mask[:, None], GRID // SCALE).flatten(1) > 0.05).float()
        cosine = F.cosine_similarity(visual_tokens.float(), self.semantic_normal, dim=-1)
        semantic = F.binary_cross_entropy_with_logits(
            -cosine / self.config.similarity.temperature, cell, pos_weight=torch.tensor(3.0)
        )
        kinds = (cell * batch.kind[:, None]).long().flatten()
        weight = torch.tensor([0.15] + [1.0] * len(KINDS))
        kind = F.cross_entropy(self.kind_head(visual_tokens).float().flatten(0, 1), kinds, weight)
        # So that the visual tokens keep where they are, for the LLM to say.
        where = self.place_head(visual_tokens).float()
        place = F.cross_entropy(where.flatten(0, 1), torch.arange(where.shape[1]).repeat(len(where)))
        return {"patch": patch, "semantic": semantic, "kind": 0.5 * kind, "place": 0.05 * place}

    def losses_mask(self, batch: Batch, short: Tensor) -> dict[str, Tensor]:
        """Text through the LoRA, and the mask branch on the defective parts.

        `short` [B] bool: take h_seg from the state after the forced `Yes` (answer mode "short"), not from the
        state that emits `<seg>`.
        """
        with torch.no_grad():
            _, visual_tokens = self.see(batch.clip_pixels)
        states = self.read(batch, visual_tokens)
        losses = self._text(batch, states)
        bad = batch.kind > 0
        position = torch.where(short, batch.answer.int().argmax(1) + 1, self._last(batch))
        h_seg = states[torch.arange(len(position)), position][bad]
        features = self.segmenter.vision_encoder(batch.sam_pixels[bad]).last_hidden_state
        target = batch.mask[bad][:, None]
        coarse = F.adaptive_avg_pool2d(target, features.shape[-1])
        losses["sam_patch"] = 0.5 * F.binary_cross_entropy_with_logits(
            self.sam_head(features).float(), (coarse > 0.1).float(), pos_weight=torch.tensor(3.0)
        )
        logits, iou = self.decode(features, h_seg)
        target = F.adaptive_avg_pool2d(target, logits.shape[-1])
        losses["mask"] = 2 * F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(2.0))
        p = logits.sigmoid()
        overlap = 2 * (p * target).sum((1, 2, 3)) + 1
        losses["dice"] = (1 - overlap / (p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)).mean()
        with torch.no_grad():
            found, true = logits > 0, target > 0.5
            real = (found & true).sum((1, 2, 3)) / (found | true).sum((1, 2, 3)).clamp(min=1)
        losses["iou"] = 0.1 * F.mse_loss(iou[:, 0], real)
        return losses

    def decode(self, features: Tensor, h_seg: Tensor) -> tuple[Tensor, Tensor]:
        """`image_embeddings` [n,256,16,16], `h_seg` [n,H] → `low_res_masks` [n,1,64,64], `iou` [n,1], f32."""
        n = len(features)
        prompt = self.seg_projection(h_seg)[:, None, None]
        dense = self.segmenter.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        position: Tensor = self.segmenter.get_image_wide_positional_embeddings()  # type: ignore[no-untyped-call]
        masks, iou = self.segmenter.mask_decoder(
            image_embeddings=features,
            image_positional_embeddings=position.expand(n, -1, -1, -1),
            sparse_prompt_embeddings=prompt,
            dense_prompt_embeddings=dense.expand_as(features),
            multimask_output=False,
        )[:2]
        return masks[:, 0].float(), iou[:, 0].float()

    def _text(self, batch: Batch, states: Tensor) -> dict[str, Tensor]:
        logits = self.language.lm_head(states[batch.answer]).float()
        token = F.cross_entropy(logits, batch.after[batch.answer], reduction="none")
        first = torch.zeros_like(batch.answer)
        first[torch.arange(len(first)), batch.answer.int().argmax(1)] = True
        return {"text": token.mean(), "decision": token[first[batch.answer]].mean()}

    @staticmethod
    def _last(batch: Batch) -> Tensor:
        """Column of `<seg>`, the answer's last token, in `batch.after`."""
        columns = torch.arange(batch.answer.shape[1])
        return (batch.answer * columns).argmax(1)

    def save(self, folder: Path) -> None:
        """Write the checkpoint: FP16, layout in export/checkpoint.py, no thresholds and no images yet."""
        if self.adapted is None:
            raise ValueError("adapt() first: the checkpoint carries a LoRA")
        half = copy.deepcopy(self).to(torch.float16)
        adapted = cast(Any, half.adapted)[0]
        # save_pretrained does not bring tokenizer.model along.
        shutil.copytree(self.reader.tokenizer.name_or_path, folder / "language")
        (folder / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")
        half.vision.save_pretrained(folder / "vision")
        CLIPImageProcessorPil(
            size={"height": CLIP.size, "width": CLIP.size},
            resample=3,
            do_center_crop=False,
            image_mean=list(CLIP.mean),
            image_std=list(CLIP.std),
        ).save_pretrained(folder / "vision")
        adapted.peft_config["default"].base_model_name_or_path = "language"
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink()  # an empty form
        adapted.unload().save_pretrained(folder / "language")
        half.segmenter.save_pretrained(folder / "segmenter")
        save_file(half.projector.state_dict(), folder / "projector.safetensors")
        save_file(half.seg_projection.state_dict(), folder / "seg_projection.safetensors")
        features = ("visual_normal", "visual_abnormal", "semantic_normal")
        unit = {name: F.normalize(getattr(self, name).detach(), dim=-1).half() for name in features}
        save_file(unit, folder / "similarity.safetensors")


def _config(reader: Reader) -> Config:
    return Config(
        model_type="vmad",
        weights=Weights(origin="vmad_edge.export.reference: trained on drawn parts", licence="Apache-2.0"),
        ltc=LtcConfig(scale_factor=SCALE, heads=4),
        conversation=Conversation(template=TEMPLATE, question=QUESTION, short_answer=YES),
        seg_token=SEG,
        seg_state="emitting",
        yes_token_ids=(reader.yes_id,),
        no_token_ids=(reader.no_id,),
        max_new_tokens=48,
        similarity=Similarity(score_rule="mean_top_1_percent", temperature=0.07),
    )
