"""Checkpoints of seeded random weights in the shapes of real models, for all that depends on shapes alone.

VMAD publishes no weights: memory, speed and engines at its sizes are measured on these. They find no defects.

The spread of each tensor keeps activations near one through every layer, so that they are finite in FP16 and rounding
is not amplified beyond what trained weights do: 1/√inputs, and for what ends a residual branch 1/√(2·layers) of that
(GPT-2's rule, Radford et al. 2019).
"""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamModel,
)

from vmad_edge.export.checkpoint import PROMPT_WIDTH, Config
from vmad_edge.export.models.ltc import LtcProjector
from vmad_edge.export.models.mobile_sam import DEPTHS, MobileSamConfig, mobile_sam, upstream_name
from vmad_edge.export.models.seg_projection import SegProjection
from vmad_edge.export.reference.parts import draw
from vmad_edge.export.reference.text import QUESTION, TEMPLATE, YES, Reader, make_tokenizer
from vmad_edge.runtime.bundle import Conversation, Weights
from vmad_edge.runtime.errors import CheckpointError
from vmad_edge.runtime.files import whole_folder

ADDED = ("<im_patch>", "<im_start>", "<im_end>")
"""LLaVA's; with `<seg>` an adapter's embedding has four rows more than its base."""
FEATURES = 64
ANSWER_TOKENS = 8
"""Random weights never say `<seg>`. Few tokens: parity reads all weights of the source again for each."""
SHARD = 5 * 10**8
"""Bytes of weights in a file. As many are in memory at once, and once more while safetensors writes them."""
_DRAWN_ALONGSIDE = 5 * 10**7
"""Bytes of tokenizer, configs and images, and some to spare."""


@dataclass(frozen=True)
class Scale:
    """Transformers' own configs; LTC's are `Config`'s defaults."""

    vision: CLIPVisionConfig
    language: LlamaConfig
    """Before the adapter adds its tokens."""
    segmenter: SamConfig | MobileSamConfig


def _clip_large(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        image_size=image_size, projection_dim=768,
    )  # fmt: skip


SCALES = {
    # VMAD's: CLIP ViT-L/14 at 336 px, LLaVA-7B-v1-1's LLaMA, SAM ViT-H.
    "paper": Scale(
        vision=_clip_large(336),
        language=LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, rms_norm_eps=1e-6,
        ),
        segmenter=SamConfig(
            vision_config={
                "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120,
                "global_attn_indexes": [7, 15, 23, 31],
            }
        ),
    ),
    # What an Orin has room and time for: TinyLlama-1.1B's LLaMA, MobileSAM.
    "edge": Scale(
        vision=_clip_large(224),
        language=LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5,
        ),
        segmenter=MobileSamConfig(model_type="mobile_sam"),
    ),
}  # fmt: skip


def make_checkpoint(
    folder: Path, scale: Scale, seed: int = 0, progress: Callable[[int, int], None] = lambda done, whole: None
) -> None:
    """Write a checkpoint of random FP16 weights to `folder`, whole or not at all; the same for the same seed.

    Never more than one file's weights are in memory: SHARD bytes, or the adapter's.

    Args:
        progress: gets the bytes that are written, and those that will be.

    Raises:
        CheckpointError: `folder` has something in it, or its disk too little room.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists: expected a new path or an empty folder. Remove it, or name another")
    parts = list(_parts(scale))
    whole = sum(part.size for part in parts)
    _check_room(folder, whole + _DRAWN_ALONGSIDE)
    done = 0
    with whole_folder(folder) as target:
        for part in parts:
            for size in part.write(target, seed):
                done += size
                progress(done, whole)
        _write_configs(target, scale)


def _check_room(folder: Path, size: int) -> None:
    there = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise CheckpointError(
            f"{there} has {free / 1e9:.1f} GB free; the checkpoint takes {size / 1e9:.1f} GB. Make room, or name a "
            "folder on another disk"
        )


@dataclass(frozen=True)
class _Part:
    file: str
    """Of the checkpoint; `{suffix}` becomes the shard's number."""
    tensors: dict[str, Tensor]
    """On the meta device: shapes and dtypes without values."""
    layers: int = 1

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path, seed: int) -> Iterator[int]:
        """Write the part as transformers' save_pretrained does; gives the bytes of each shard once it is there."""
        path = folder / self.file
        path.parent.mkdir(exist_ok=True)
        shards = split_torch_state_dict_into_shards(
            self.tensors, filename_pattern=path.name, max_shard_size=SHARD if "{suffix}" in path.name else self.size + 1
        )
        for file, names in shards.filename_to_tensors.items():
            drawn = {name: self._draw(name, seed) for name in names}
            save_file(drawn, path.with_name(file), metadata={"format": "pt"})
            yield sum(tensor.nbytes for tensor in drawn.values())
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            path.with_name("model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))

    def _draw(self, name: str, seed: int) -> Tensor:
        """A stream of random numbers for each tensor: none depends on what was drawn before it."""
        tensor = self.tensors[name]
        if not tensor.is_floating_point():  # batch norms count what they have seen
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        mean, spread = self._spread(name)
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.file} {name}".encode()))
        drawn = torch.empty(tensor.shape).normal_(mean, spread, generator=stream)
        return drawn.to(tensor.dtype)

    def _spread(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation."""
        shape = self.tensors[name].shape
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):  # a norm's
            return 1, 0.1
        if len(shape) == 1:
            return 0, 0.02
        if "embed_tokens" in name or name.endswith(("_normal", "_abnormal")):
            return 0, 1
        spread = float((shape.numel() / shape[0]) ** -0.5)
        if _ENDS_A_BRANCH.search(name):
            spread *= (2 * self.layers) ** -0.5
        if "lora_B" in name:  # which starts at zero, and stays small
            spread *= 0.1
        return 0, spread


_ENDS_A_BRANCH = re.compile(r"(o_proj|down_proj|out_proj|fc2|lin2|attn\.proj)\.weight$")


def _parts(scale: Scale) -> Iterator[_Part]:
    weights = "model{suffix}.safetensors"
    width, language_width = scale.vision.hidden_size, scale.language.hidden_size
    ltc, levels = Config.model_fields["ltc"].default, Config.model_fields["levels"].default
    with torch.device("meta"):
        vision = CLIPVisionModel(scale.vision)
        language = LlamaForCausalLM(copy.deepcopy(scale.language))  # _adapter resizes it, and its config
        projector = LtcProjector(width, len(levels), language_width, ltc.scale_factor, ltc.heads)
        seg_projection = SegProjection(language_width, PROMPT_WIDTH)
        features = {
            "visual_normal": torch.empty(FEATURES, width, dtype=torch.float16),
            "visual_abnormal": torch.empty(FEATURES, width, dtype=torch.float16),
            "semantic_normal": torch.empty(1, language_width, dtype=torch.float16),
        }
    layers = scale.language.num_hidden_layers
    yield _Part(f"vision/{weights}", _half(vision), scale.vision.num_hidden_layers)
    yield _Part(f"language/{weights}", _half(language), layers)
    yield _Part("adapter/adapter_model.safetensors", _adapter(language), layers)
    yield _Part("projector.safetensors", _half(projector))
    yield _segmenter(scale.segmenter, f"segmenter/{weights}")
    yield _Part("seg_projection.safetensors", _half(seg_projection))
    yield _Part("similarity.safetensors", features)


def _half(module: torch.nn.Module) -> dict[str, Tensor]:
    return module.half().state_dict()


_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
_LORA |= {"modules_to_save": ["lm_head", "embed_tokens"]}
"""LISA's (train_ds.py): the vocabulary is trained whole."""


def _adapter(language: LlamaForCausalLM) -> dict[str, Tensor]:
    language.resize_token_embeddings(_vocabulary(language.config), mean_resizing=False)
    adapted = get_peft_model(cast(Any, language), LoraConfig(**cast(Any, _LORA)))
    tensors: dict[str, Tensor] = get_peft_model_state_dict(adapted)
    return {name: tensor.half() for name, tensor in tensors.items()}


def _vocabulary(language: Any) -> int:
    rows: int = language.vocab_size
    return rows + len(ADDED) + 1


def _segmenter(config: SamConfig | MobileSamConfig, file: str) -> _Part:
    if isinstance(config, MobileSamConfig):
        with torch.device("meta"):
            mobile = mobile_sam(config)
        return _Part(file, {upstream_name(name): tensor for name, tensor in _half(mobile).items()}, sum(DEPTHS[1:]))
    with torch.device("meta"):
        sam: Any = SamModel(config)
    tensors = {name: tensor for name, tensor in _half(sam).items() if name not in sam.all_tied_weights_keys}
    return _Part(file, tensors, sam.config.vision_config.num_hidden_layers)


def _write_configs(folder: Path, scale: Scale) -> None:
    """All but the weights."""
    size = cast(int, scale.vision.image_size)
    scale.vision.save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder / "vision"
    )
    scale.language.save_pretrained(folder / "language")
    LoraConfig(**cast(Any, _LORA), inference_mode=True).save_pretrained(str(folder / "adapter"))
    if isinstance(scale.segmenter, MobileSamConfig):
        (folder / "segmenter" / "config.json").write_text(scale.segmenter.model_dump_json(indent=2) + "\n")
    else:
        scale.segmenter.save_pretrained(folder / "segmenter")
    vocab_size = scale.language.vocab_size
    reader = Reader(make_tokenizer(folder / "language", vocab_size, _gibberish(vocab_size), ADDED))
    config = Config(
        model_type="vmad",
        weights=Weights(origin="random weights, for measurements: they find no defects", licence="Apache-2.0"),
        conversation=Conversation(
            template=TEMPLATE.replace("<image>", "<im_start><image><im_end>"), question=QUESTION, short_answer=YES
        ),
        yes_token_ids=(reader.yes_id,),
        no_token_ids=(reader.no_id,),
        max_new_tokens=ANSWER_TOKENS,
    )
    (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
    (folder / "parity_images").mkdir()
    for name, defects in (("good", ()), ("crack", ("crack",))):
        part = draw(np.random.default_rng(0), "casting", cast(Any, defects), size=512)
        Image.fromarray(part.image).save(folder / "parity_images" / f"{name}.png")


def _gibberish(vocab_size: int) -> Iterator[str]:
    """Text with enough to merge for a vocabulary of this size."""
    letters = random.Random(0)
    for _ in range(vocab_size // 4):
        yield "".join(letters.choices(string.ascii_lowercase, k=9))
