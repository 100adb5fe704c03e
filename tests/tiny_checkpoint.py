"""A complete checkpoint with random weights, small enough to export in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from tiny_language import write_adapter, write_language
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, SamConfig, SamModel

from vmad_edge.export.models.ltc import LtcProjector
from vmad_edge.export.models.seg_projection import SegProjection

WIDTH, LAYERS = 48, 3
SAM_SIZE = 64


def write_checkpoint(
    folder: Path,
    *,
    image_size: int = 56,
    levels: tuple[int, ...] = (-1, -2, 1),
    scale_factor: int = 2,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a checkpoint whose LLM is `tiny_language`'s; returns `folder`."""
    folder.mkdir(parents=True)
    write_language(folder / "language")
    write_adapter(folder / "adapter")
    language_width: int = json.loads((folder / "language" / "config.json").read_text())["hidden_size"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=3,
                image_size=image_size,
                patch_size=14,
            )
        )
        sam = SamModel(
            SamConfig(
                vision_config={
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": SAM_SIZE,
                    "mlp_dim": 64,
                    "window_size": 3,
                    "global_attn_indexes": [1],
                },
                prompt_encoder_config={"image_size": SAM_SIZE},
                mask_decoder_config={"mlp_dim": 64, "layer_norm_eps": 1e-5},  # segment-anything's
            )
        )
        projector = LtcProjector(WIDTH, len(levels), language_width, scale_factor, heads=4)
        seg_projection = SegProjection(language_width, 256)
        for module in (vision, sam, projector, seg_projection):
            _randomise(module)
        similarity = {
            "visual_normal": torch.randn(5, WIDTH),
            "visual_abnormal": torch.randn(4, WIDTH),
            "semantic_normal": torch.randn(1, language_width),
        }
    vision.to(dtype).save_pretrained(folder / "vision")
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder / "vision")
    sam.to(dtype).save_pretrained(folder / "segmenter")
    save_file(projector.to(dtype).state_dict(), folder / "projector.safetensors")
    save_file(seg_projection.to(dtype).state_dict(), folder / "seg_projection.safetensors")
    save_file(similarity, folder / "similarity.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder / "language")
    config: dict[str, Any] = {
        "model_type": "vmad",
        "weights": {"origin": "random", "licence": "none"},
        "levels": levels,
        "ltc": {"scale_factor": scale_factor, "heads": 4},
        "conversation": {"template": "USER: <image>\n{question} ASSISTANT:", "question": "Is the {object} good?"},
        "yes_token_ids": tokenizer.encode("Yes", add_special_tokens=False)[-1:],
        "no_token_ids": tokenizer.encode("No", add_special_tokens=False)[-1:],
        "max_new_tokens": 8,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_images(folder / "parity_images")
    return folder


def write_images(folder: Path) -> None:
    """Two drawn parts, one wide and one high."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name, (height, width) in {"wide.png": (60, 90), "high.png": (100, 70)}.items():
        image = noise.integers(90, 130, (height, width, 3)).astype(np.uint8)
        cv2.circle(image, (width // 2, height // 2), 20, (200, 180, 40), -1)
        cv2.imwrite(str(folder / name), image)


def _randomise(module: nn.Module) -> None:
    """No weight stays at the zero or one that it starts with, which would hide what is done with it."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(std=0.2 if weight.ndim == 1 else weight[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
