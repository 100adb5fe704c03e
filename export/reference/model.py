"""The reference model: VMAD whole at toy size, its losses, and the writing of its checkpoint.

[ASSUME] VMAD publishes DSSL's idea and not its form. Ours, with s the largest cosine to a set of features:

- Vision: a memory queue holds patches of normal cells, pooled as LTC pools them (RoI pooling on its grid). It is
  distilled into the global normal features, each queued feature drawing the nearest one. A patch's anomaly odds are
  (s_abnormal − s_normal) / τ, the runtime's own operator.
- Language: a visual token's odds are −cosine(token, normal semantic token) / τ.
- Alignment: both odds, as distributions over the cells (softmax), are drawn together: KL(vision ‖ language), through
  the language side alone.
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
from safetensors.torch import load_file, save_file
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

from vmad_edge.export.checkpoint import Checkpoint, Config, LtcConfig
from vmad_edge.export.models.ltc import LtcProjector
from vmad_edge.export.models.seg_projection import SegProjection
from vmad_edge.export.reference.parts import KINDS
from vmad_edge.export.reference.teacher import WIDTH as TAUGHT
from vmad_edge.export.reference.teacher import Teacher
from vmad_edge.export.reference.text import QUESTION, SEG, TEMPLATE, YES, Reader
from vmad_edge.runtime.bundle import ClipInput, Conversation, SamInput, Similarity, Weights

WIDTH, LANGUAGE_WIDTH, PROMPT_WIDTH = 192, 256, 256
GRID, SCALE = 16, 2
FINE = 4
"""Of a cell's side, in the scaffold that makes a visual token say where in its cell the defect is."""
TEXT_SHARE = 0.05
"""Of the text's gradient in what teaches vision and LTC; with all of it, a round left the screen worse than it was."""
FEATURES = 64
QUEUE = 4096
# On a CPU torch's fused attention is slower: CLIP's whole step took 1.4 times as long.
ATTENTION: dict[str, Any] = {"attn_implementation": "eager"}
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
    """Fields that a stage does not use are empty."""

    clip_pixels: Tensor
    """[B,3,224,224] f32."""
    sam_pixels: Tensor
    """[B,3,256,256] f32."""
    kinds: Tensor
    """[B,256,256] i64: 0 normal, 1 + index into KINDS on a defect."""
    before: Tensor
    """[A,T0] i64: ids before the visual tokens, of the first A parts: those that have an answer."""
    after: Tensor
    """[A,T1] i64: ids after them, question's end and answer, padded with 0."""
    answer: Tensor
    """[A,T1] bool: which of `after` are the answer's."""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class ReferenceModel(nn.Module):
    """Every part in one module; `losses_see`, `_read`, `_join`, `_segment`, `_mask` are the stages of training.

    Args:
        ltc: False puts pooled patches through a plain MLP in LTC's place (ablation; cannot be saved).
        dssl: False keeps the similarity losses from vision and tokens: only the features are fitted (ablation).
    """

    queue: Tensor

    def __init__(self, reader: Reader, seed: int, ltc: bool = True, dssl: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.reader = reader
        self.config = _config(reader)
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=6, num_attention_heads=3,
                image_size=CLIP.size, patch_size=14, hidden_act="gelu", **ATTENTION,
            )
        )  # fmt: skip
        # transformers' 0.02 is lost beside the patches' embeddings: the visual tokens forgot where they are.
        nn.init.normal_(self.vision.embeddings.position_embedding.weight, std=0.2)
        self.dssl = dssl
        self.projector = (
            LtcProjector(WIDTH, len(self.config.levels), LANGUAGE_WIDTH, SCALE, self.config.ltc.heads)
            if ltc
            else _PooledProjector()
        )
        self.language = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=LANGUAGE_WIDTH, intermediate_size=3 * LANGUAGE_WIDTH, num_hidden_layers=4,
                num_attention_heads=4, vocab_size=len(reader.tokenizer), max_position_embeddings=512,
                rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
                **ATTENTION,
            )
        )  # fmt: skip
        self.adapted: tuple[PeftModel] | None = None
        self.segmenter = SamModel(
            SamConfig(
                vision_config=SamVisionConfig(
                    hidden_size=WIDTH, mlp_dim=4 * WIDTH, num_hidden_layers=4, num_attention_heads=3,
                    image_size=SAM.size, patch_size=16, window_size=8, global_attn_indexes=[0, 1, 2, 3],
                    output_channels=PROMPT_WIDTH, **ATTENTION,
                ),
                prompt_encoder_config=SamPromptEncoderConfig(image_size=SAM.size, patch_size=16),
                mask_decoder_config=SamMaskDecoderConfig(mlp_dim=256, iou_head_hidden_dim=64),
                **ATTENTION,
            )
        )  # fmt: skip
        self.seg_projection = SegProjection(LANGUAGE_WIDTH, PROMPT_WIDTH)
        self.visual_normal = nn.Parameter(torch.randn(FEATURES, WIDTH))
        self.visual_abnormal = nn.Parameter(torch.randn(FEATURES, WIDTH))
        self.semantic_normal = nn.Parameter(torch.randn(1, LANGUAGE_WIDTH))
        # Scaffolds of the training, left out of the checkpoint.
        self.register_buffer("queue", F.normalize(torch.randn(QUEUE, WIDTH), dim=-1))
        self.teacher_head = nn.Linear(WIDTH, TAUGHT)
        self.kind_head = nn.Linear(LANGUAGE_WIDTH, 1 + len(KINDS))
        self.place_head = nn.Linear(LANGUAGE_WIDTH, (GRID // SCALE) ** 2)
        self.fine_head = nn.Linear(LANGUAGE_WIDTH, FINE**2)
        self.centre_head = nn.Linear(LANGUAGE_WIDTH, 2)
        self.sam_head = nn.Conv2d(PROMPT_WIDTH, 1, 1)

    def begin_from(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's parts, its LoRA merged. Scaffolds begin at zero: they push nothing before they know."""
        self.vision.load_state_dict(checkpoint.vision().state_dict())
        self.projector.load_state_dict(checkpoint.projector().state_dict())
        self.language.load_state_dict(checkpoint.language().state_dict())
        self.segmenter.load_state_dict(checkpoint.segmenter().state_dict())
        self.seg_projection.load_state_dict(checkpoint.seg_projection().state_dict())
        for name, feature in load_file(checkpoint.path / "similarity.safetensors").items():
            # Unit length lets the features turn faster than those that the training began with, sqrt(width) long.
            getattr(self, name).data.copy_(feature * feature.shape[-1] ** 0.5)
        for head in self._scaffolds():
            nn.init.zeros_(head.weight)
        nn.init.zeros_(self.sam_head.weight)

    def _scaffolds(self) -> tuple[nn.Linear, ...]:
        return self.teacher_head, self.kind_head, self.place_head, self.fine_head, self.centre_head

    def adapt(self) -> None:
        """From here on the LLM learns through a LoRA on q_proj and v_proj, beside its embeddings and lm_head."""
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        # In a tuple, so that nn.Module does not register the same weights twice.
        self.adapted = (cast(PeftModel, get_peft_model(cast(Any, self.language), lora)),)
        for module in (self.vision, self.projector, *self._scaffolds()):
            module.requires_grad_(False)
        for parameter in (self.visual_normal, self.visual_abnormal, self.semantic_normal):
            parameter.requires_grad_(False)
        for name, parameter in self.language.named_parameters():
            parameter.requires_grad_("lora_" in name or "lm_head" in name or "embed_tokens" in name)

    def see(self, clip_pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`patches` [B,N,D] and `visual_tokens` [B,K,H]."""
        return self._project(self.vision(pixel_values=clip_pixels, output_hidden_states=True).hidden_states)

    def _project(self, hidden: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
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

    def losses_see(self, batch: Batch, teacher: Teacher | None) -> dict[str, Tensor]:
        """Of vision and LTC: what is wrong with each patch and each visual token's cell; how parts rank by score."""
        return self._seen(batch, teacher, *self.see(batch.clip_pixels))

    def losses_join(self, batch: Batch, teacher: Teacher | None) -> dict[str, Tensor]:
        """Those of "see", and the text of the first parts, a share of whose gradient goes through LTC into vision."""
        patches, visual_tokens = self.see(batch.clip_pixels)
        told = visual_tokens[: len(batch.after)]
        states = self.read(batch, told.detach() + TEXT_SHARE * (told - told.detach()))
        return self._seen(batch, teacher, patches, visual_tokens) | self._text(batch, states)

    def _seen(self, batch: Batch, teacher: Teacher | None, patches: Tensor, visual_tokens: Tensor) -> dict[str, Tensor]:
        cell = self._pool(_mask(batch), GRID // SCALE)
        self._remember(patches, cell == 0)
        cover = self._pool(_mask(batch), GRID)
        odds = self.patch_logits(patches if self.dssl else patches.detach())
        losses = {"patch": _defects(odds, cover > 0.1)}
        drawn = self.queue[torch.randint(QUEUE, (512,), device=patches.device)]
        losses["queue"] = 0.2 * (1 - (drawn @ F.normalize(self.visual_normal, dim=-1).T).amax(-1)).mean()
        losses["image"] = 0.5 * _ranking(odds.topk(odds.shape[1] // 100).values.mean(1), cover.amax(1) > 0)
        losses |= self._cells(batch, visual_tokens, odds)
        if teacher is not None:
            half = batch.clip_pixels[: len(patches) // 2]  # the teacher's time is a fifth of a step's
            losses["teacher"] = 0.5 * F.mse_loss(
                self.teacher_head(patches[: len(half)]).float(), _taught(teacher, half)
            )
        return losses

    def losses_read(self, batch: Batch) -> dict[str, Tensor]:
        """The LLM's text and LTC's dense losses, with vision at rest."""
        with torch.no_grad():
            hidden = self.vision(pixel_values=batch.clip_pixels, output_hidden_states=True).hidden_states
        patches, visual_tokens = self._project(hidden)
        text = self._text(batch, self.read(batch, visual_tokens))
        return text | self._cells(batch, visual_tokens, self.patch_logits(patches))

    def _remember(self, patches: Tensor, normal: Tensor) -> None:
        """Put the pooled patches [B,N,D] of normal cells [B,K] into the queue, before the oldest."""
        grid = patches.detach().float().transpose(1, 2).reshape(-1, WIDTH, GRID, GRID)
        pooled = F.adaptive_avg_pool2d(grid, GRID // SCALE).flatten(2).transpose(1, 2)[normal]
        new = F.normalize(pooled[torch.randperm(len(pooled), device=pooled.device)[:256]], dim=-1)
        self.queue = torch.cat([new, self.queue])[:QUEUE]

    def _cells(self, batch: Batch, visual_tokens: Tensor, odds: Tensor) -> dict[str, Tensor]:
        """DSSL in the LLM's space, and the scaffolds that make the visual tokens say what is where."""
        cell = self._pool(_mask(batch), GRID // SCALE) > 0.05
        tokens = visual_tokens if self.dssl else visual_tokens.detach()
        cosine = F.cosine_similarity(tokens.float(), self.semantic_normal, dim=-1)
        spoken = -cosine / self.config.similarity.temperature
        seen = F.adaptive_max_pool2d(odds.detach().reshape(-1, GRID, GRID), GRID // SCALE).flatten(1)
        align = F.kl_div(spoken.log_softmax(-1), seen.log_softmax(-1), reduction="batchmean", log_target=True)
        area = F.one_hot(batch.kinds[:, 2::4, 2::4], 1 + len(KINDS)).movedim(3, 1)[:, 1:].float()
        kind = 1 + F.adaptive_avg_pool2d(area, GRID // SCALE).argmax(1).flatten(1)
        weight = torch.tensor([0.15] + [1.0] * len(KINDS), device=cell.device)
        named = self.kind_head(visual_tokens).float().flatten(0, 1)
        where = self.place_head(visual_tokens).float().flatten(0, 1)
        fine = self.fine_head(visual_tokens).float().unflatten(1, (GRID // SCALE,) * 2).unflatten(3, (FINE, FINE))
        fine = fine.transpose(2, 3).flatten(1)  # the frame's rows, each of all the cells beside each other
        return {
            "semantic": _defects(spoken, cell),
            "align": 0.1 * align,
            "kind": 2 * F.cross_entropy(named, (kind * cell.long()).flatten(), weight),
            "fine": 0.5 * _defects(fine, self._pool(_mask(batch), FINE * GRID // SCALE) > 0.1),
            # So that the visual tokens keep where they are, for the LLM to say.
            "place": 0.3 * F.cross_entropy(where, torch.arange(cell.shape[1], device=cell.device).repeat(len(cell))),
        }

    @torch.no_grad()
    def lend_vision(self, clip_pixels: Tensor) -> None:
        """Start SAM's encoder from CLIP's first layers: a patch covers the same sixteenth of the frame in both.

        The kernel is resampled; CLIP's LayerNorm before its layers is folded in at its mean over `clip_pixels`.
        """
        clip, sam = cast(Any, self.vision.embeddings), cast(Any, self.segmenter.vision_encoder)
        kernel = F.interpolate(clip.patch_embedding.weight, (16, 16), mode="bicubic") * (14 / 16) ** 2
        # CLIP's and SAM's pixels differ by an affine map a channel: (x·std_s + mean_s − mean_c) / std_c.
        device = clip_pixels.device
        std_s, mean_s = (torch.tensor(v, device=device) / 255 for v in (SAM.std, SAM.mean))
        std_c, mean_c = (torch.tensor(v, device=device) for v in (CLIP.std, CLIP.mean))
        bias = (kernel * ((mean_s - mean_c) / std_c)[:, None, None]).sum((1, 2, 3))
        kernel = kernel * (std_s / std_c)[:, None, None]
        norm = self.vision.pre_layrnorm
        spread = norm.weight / clip(clip_pixels)[:, 1:].std(-1).mean()
        sam.patch_embed.projection.weight.copy_(kernel * spread[:, None, None, None])
        sam.patch_embed.projection.bias.copy_(bias * spread)
        position = clip.position_embedding.weight[1:] * spread + norm.bias
        sam.pos_embed.copy_(position.reshape(1, GRID, GRID, WIDTH))
        for mine, lent in zip(sam.layers, cast(Any, self.vision.encoder.layers), strict=False):
            attention = (lent.self_attn.q_proj, lent.self_attn.k_proj, lent.self_attn.v_proj)
            mine.attn.qkv.weight.copy_(torch.cat([part.weight for part in attention]))
            mine.attn.qkv.bias.copy_(torch.cat([part.bias for part in attention]))
            for to, source in (
                (mine.attn.proj, lent.self_attn.out_proj),
                (mine.mlp.lin1, lent.mlp.fc1),
                (mine.mlp.lin2, lent.mlp.fc2),
                (mine.layer_norm1, lent.layer_norm1),
                (mine.layer_norm2, lent.layer_norm2),
            ):
                to.load_state_dict(source.state_dict())

    def losses_segment(self, batch: Batch) -> dict[str, Tensor]:
        """The mask branch by itself: every defect of the frame, from a prompt that says nothing (h_seg = 0)."""
        silent = torch.zeros(len(batch.kinds), LANGUAGE_WIDTH, device=batch.kinds.device)
        return self._masks(batch.sam_pixels, _mask(batch), silent)

    def losses_mask(self, batch: Batch, short: Tensor) -> dict[str, Tensor]:
        """Text through the LoRA, and the mask branch on the defective parts.

        `short` [B] bool: take h_seg from the state after the forced `Yes` (answer mode "short"), not from the
        state that emits `<seg>`.
        """
        with torch.no_grad():
            _, visual_tokens = self.see(batch.clip_pixels)
        states = self.read(batch, visual_tokens)
        mask = _mask(batch)
        bad = mask.amax((1, 2)) > 0
        position = torch.where(short, batch.answer.int().argmax(1) + 1, self._last(batch))
        h_seg = states[torch.arange(len(position), device=position.device), position][bad]
        return self._text(batch, states) | self._masks(batch.sam_pixels[bad], mask[bad], h_seg)

    def _masks(self, sam_pixels: Tensor, mask: Tensor, h_seg: Tensor) -> dict[str, Tensor]:
        features = self.segmenter.vision_encoder(sam_pixels).last_hidden_state
        target = mask[:, None]
        coarse = F.adaptive_avg_pool2d(target, features.shape[-1])
        logits, iou = self.decode(features, h_seg)
        target = F.adaptive_avg_pool2d(target, logits.shape[-1])
        cross = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(2.0, device=target.device))
        p = logits.sigmoid()
        overlap = 2 * (p * target).sum((1, 2, 3)) + 1
        dice = 1 - overlap / (p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)
        with torch.no_grad():
            found, true = logits > 0, target > 0.5
            real = (found & true).sum((1, 2, 3)) / (found | true).sum((1, 2, 3)).clamp(min=1)
        return {
            "sam_patch": 0.5 * _defects(self.sam_head(features).float(), coarse > 0.1),
            "mask": 2 * cross,
            "dice": (dice * (target.amax((1, 2, 3)) > 0)).mean(),  # good parts have no mask to overlap
            "iou": 0.1 * F.mse_loss(iou[:, 0], real),
        }

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
        columns = torch.arange(batch.answer.shape[1], device=batch.answer.device)
        first = columns == batch.answer.int().argmax(1, keepdim=True)
        mask = _mask(batch)[: len(states)]
        along = torch.linspace(0, 1, mask.shape[-1], device=mask.device)
        sums = torch.stack([(mask.sum(1) * along).sum(1), (mask.sum(2) * along).sum(1), mask.sum((1, 2))], 1)
        sums = sums[batch.answer.nonzero()[:, 0]]
        bad = sums[:, 2] > 0
        said = self.centre_head(states[batch.answer][bad]).float()
        off = F.smooth_l1_loss(said, sums[bad, :2] / sums[bad, 2:], beta=0.05, reduction="sum")
        # Most tokens of an answer follow from the ones before; kind and place are one or two of twenty-five.
        return {
            "text": 6 * token.mean(),
            "decision": token[first[batch.answer]].mean(),
            # A field is right or wrong; a centroid is nearly right.
            "centre": 2 * off / bad.sum().clamp(min=1),
        }

    @staticmethod
    def _last(batch: Batch) -> Tensor:
        """Column of `<seg>`, the answer's last token, in `batch.after`."""
        columns = torch.arange(batch.answer.shape[1], device=batch.answer.device)
        return (batch.answer * columns).argmax(1)

    def save(self, folder: Path) -> None:
        """Write the checkpoint: FP16, layout in export/checkpoint.py, no thresholds and no images yet."""
        if self.adapted is None:
            raise ValueError("adapt() first: the checkpoint carries a LoRA")
        half = copy.deepcopy(self).to("cpu", torch.float16)
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

    @staticmethod
    def _pool(mask: Tensor, grid: int) -> Tensor:
        return F.adaptive_avg_pool2d(mask[:, None], grid).flatten(1)


class _PooledProjector(nn.Module):
    """What LTC is measured against: the patches of a cell averaged, then LTC's MLP (LLaVA's projector)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, LANGUAGE_WIDTH), nn.GELU(), nn.Linear(LANGUAGE_WIDTH, LANGUAGE_WIDTH))

    def forward(self, patches: Tensor, patches_multi: Tensor) -> Tensor:
        """`patches` [B,N,D] → visual tokens [B,K,H]."""
        grid = patches.transpose(1, 2).reshape(-1, WIDTH, GRID, GRID)
        tokens: Tensor = self.mlp(F.avg_pool2d(grid, SCALE).flatten(2).transpose(1, 2))
        return tokens


def _defects(odds: Tensor, there: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(odds, there.float(), pos_weight=torch.tensor(3.0, device=odds.device))


def _ranking(score: Tensor, bad: Tensor) -> Tensor:
    """A smooth count of the pairs that AUROC counts: a good part that scores higher than a bad one."""
    return F.softplus(score[~bad, None] - score[bad]).mean()


def _mask(batch: Batch) -> Tensor:
    return (batch.kinds > 0).float()


@torch.no_grad()
def _taught(teacher: Teacher, clip_pixels: Tensor) -> Tensor:
    """The teacher's features [B,N,C] on the patches' grid, each channel standardised over the batch."""
    std, mean = (torch.tensor(v, device=clip_pixels.device)[:, None, None] for v in (CLIP.std, CLIP.mean))
    rgb = (clip_pixels * std + mean).contiguous(memory_format=torch.channels_last)
    features = F.interpolate(teacher.features(rgb).float(), (GRID, GRID), mode="bilinear").flatten(2).transpose(1, 2)
    deviation, middle = torch.std_mean(features, (0, 1))
    return (features - middle) / (deviation + 1e-3)


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
        # The weight: benchmarks/reference_weight.py, made-up defects on enrolled photographs.
        similarity=Similarity(score_rule="mean_top_1_percent", temperature=0.07, reference_weight=0.97),
    )
