"""What a trained model looks like on disk.

    checkpoint/
      config.json                 the Config below
      vision/                     CLIPVisionModel + preprocessor_config.json
      language/                   LlamaForCausalLM + tokenizer
      adapter/                    PEFT LoRA
      projector.safetensors       LTC (models/ltc.py)
      segmenter/                  SamModel
      seg_projection.safetensors  Γ (models/seg_projection.py)
      similarity.safetensors      visual_normal [P,D], optional visual_abnormal [P',D], semantic_normal [1,H]
      parity_images/              optional: real images to compare source and export on
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vmad_edge.runtime.bundle import Answer, Conversation, Record, Similarity, Weights


class LtcConfig(Record):
    scale_factor: Annotated[int, Field(gt=0)] = 2
    heads: Annotated[int, Field(gt=0)] = 8


class Config(Record):
    """`config.json`. Defaults are this project's assumptions where VMAD publishes nothing. [ASSUME]"""

    model_type: Literal["vmad"]
    weights: Weights
    image_aspect_ratio: Literal["pad"] | None = None
    """LLaVA's: "pad" pads to a square with the mean colour before CLIP's preprocessing."""
    patches_level: int = -2
    levels: tuple[int, ...] = (-1, -2, -3, -4)
    """hidden_states that LTC takes; VMAD's figure names layer-1 (last) to layer-4 (fourth from last)."""
    ltc: LtcConfig = LtcConfig()
    conversation: Conversation
    seg_token: str = "<seg>"
    seg_state: Literal["emitting", "token"] = "emitting"
    yes_token_ids: tuple[int, ...]
    no_token_ids: tuple[int, ...]
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    answer: Answer = "full"
    similarity: Similarity = Similarity()
