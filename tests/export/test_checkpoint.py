"""Checkpoint.open: what it reads, and the one clear error for each thing that is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import LAYERS, SAM_SIZE, WIDTH
from transformers import CLIPImageProcessorPil

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.runtime.errors import CheckpointError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import clip_pixels

Fault = Callable[[Path], None]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def edit(path: Path, change: dict[str, Any]) -> None:
    """Set JSON values by dotted names; ... removes one."""
    data = json.loads(path.read_text())
    for name, value in change.items():
        *parents, last = name.split(".")
        inner = data
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        if value is ...:
            del inner[last]
    path.write_text(json.dumps(data))


def test_reads_what_the_runtime_needs(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    rows = len(load_file(tiny / "language" / "model.safetensors")["model.embed_tokens.weight"])
    assert checkpoint.clip.model_dump() == {
        "size": 56,
        "resize": "exact",
        "pad_to_square": False,
        "resample": "bicubic",
        "rescale_factor": 1 / 255,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    }
    assert (checkpoint.sam.size, checkpoint.sam.mean) == (SAM_SIZE, (123.675, 116.28, 103.53))
    assert (checkpoint.grid, checkpoint.width, checkpoint.visual_tokens) == (4, WIDTH, 4)
    assert (checkpoint.vocabulary, checkpoint.context_length) == (rows, 512)
    assert checkpoint.seg_token_id == rows - 4  # tiny_language: three spare rows follow it


def test_vocabulary_is_the_adapter_s_where_it_is_larger(copy: Path) -> None:
    path = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = torch.cat([tensor, tensor[:5]])
            rows = len(tensors[name])
    save_file(tensors, path)
    assert Checkpoint.open(copy).vocabulary == rows


def test_weights_with_the_prefix_of_transformers_4_load(tiny: Path, copy: Path) -> None:
    path = copy / "vision" / "model.safetensors"
    tensors = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}, path, {"format": "pt"})
    old, new = Checkpoint.open(copy).vision().state_dict(), Checkpoint.open(tiny).vision().state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new)


PREPROCESSORS = {
    "shortest edge and centre crop": {"size": {"shortest_edge": 56}, "do_center_crop": True, "crop_size": 56},
    "sizes as plain numbers": {"size": 56, "do_center_crop": True, "crop_size": 56, "rescale_factor": ...},
    "crop that takes nothing": {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}},
    "bilinear": {"resample": 2},
    "lanczos": {"resample": 1},
    "bookkeeping of transformers 4.38 to 4.41": {"_valid_processor_keys": ["images", "size"], "use_square_size": False},
    "bookkeeping of fast processors": {
        "image_processor_type": "CLIPImageProcessorFast",
        "data_format": "channels_first",
        "default_to_square": True,
        "input_data_format": "channels_last",
        "device": "cpu",
        "rescale_factor": 1 / 255,
    },
    "a number, for both sides": {"size": 56, "default_to_square": True},
    "a number, for the shorter side": {
        "size": 56,
        "default_to_square": False,
        "do_center_crop": True,
        "crop_size": 56,
    },
    "other statistics": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 127},
}


@pytest.mark.parametrize("change", PREPROCESSORS.values(), ids=PREPROCESSORS)
def test_preprocessing_is_the_checkpoint_s(copy: Path, change: dict[str, Any]) -> None:
    """The runtime's pixels, from what was read, are those of transformers' processor."""
    path = copy / "vision" / "preprocessor_config.json"
    edit(path, change)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 101, 3), np.uint8)
    found, _ = clip_pixels(Frame.read(pixels), Checkpoint.open(copy).clip)
    edit(path, dict.fromkeys(("data_format", "input_data_format", "device"), None))  # of the oracle's output alone
    expected = CLIPImageProcessorPil.from_pretrained(path.parent)(pixels, return_tensors="np").pixel_values
    assert np.array_equal(found, expected)


def test_pad_to_square_is_llava_s_setting(copy: Path) -> None:
    edit(copy / "config.json", {"image_aspect_ratio": "pad"})
    edit(copy / "vision" / "preprocessor_config.json", {"size": {"shortest_edge": 56}})
    assert Checkpoint.open(copy).clip.pad_to_square


def test_sam_statistics_are_the_segmenter_s(copy: Path) -> None:
    settings = {
        "size": {"longest_edge": SAM_SIZE},
        "resample": 2,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (copy / "segmenter" / "preprocessor_config.json").write_text(json.dumps(settings))
    sam = Checkpoint.open(copy).sam
    assert sam.mean == pytest.approx([25.5, 51, 76.5])
    assert sam.std == pytest.approx([102, 127.5, 153])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "file",
    ["vision/model", "segmenter/model", "language/model", "adapter/adapter_model", "projector", "seg_projection"],
)
def test_a_weight_that_overflowed_is_named(copy: Path, file: str, value: float) -> None:
    path = copy / f"{file}.safetensors"
    held = load_file(path)
    name = sorted(held)[-1]
    held[name].view(-1)[-1] = value
    save_file(held, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {name}: expected finite numbers")):
        Checkpoint.open(copy).check_weights()


def test_a_merged_model_needs_no_adapter(tiny: Path, copy: Path) -> None:
    merged = Checkpoint.open(tiny).language()
    for path in (copy / "language").glob("*.safetensors"):
        path.unlink()
    merged.save_pretrained(copy / "language")
    shutil.rmtree(copy / "adapter")
    checkpoint = Checkpoint.open(copy)
    assert checkpoint.adapter is None
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = merged(ids).logits
        for found in (checkpoint.language()(ids).logits, checkpoint.streamed_language()(ids).logits):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "name",
    [
        "vision/model.safetensors",
        "language/tokenizer.model",
        "language/tokenizer.json",
        "config.json",
        "vision/preprocessor_config.json",
        "adapter/adapter_model.safetensors",
        "similarity.safetensors",
    ],
)
def test_a_pointer_of_git_lfs_is_told(copy: Path, name: str) -> None:
    (copy / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match=r"git-LFS pointer.*git lfs pull") as error:
        Checkpoint.open(copy)
    assert str(copy / name) in str(error.value)


Broken = tuple[str, Fault]
"""The file that the error names, and what breaks it."""


def lost(name: str) -> Broken:
    return name, lambda folder: (folder / name).unlink()


def added(name: str) -> Broken:
    def fault(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"[]")

    return name, fault


def edited(name: str, **change: Any) -> Broken:
    """JSON values by names whose dots are written __."""
    dotted = {key.replace("__", "."): value for key, value in change.items()}
    return name, lambda folder: edit(folder / name, dotted)


def config(**change: Any) -> Broken:
    return edited("config.json", **change)


def vision(**change: Any) -> Broken:
    return edited("vision/config.json", **change)


def segmenter(**change: Any) -> Broken:
    return edited("segmenter/config.json", **change)


def processor(**change: Any) -> Broken:
    return edited("vision/preprocessor_config.json", **change)


def tensors(name: str, **change: tuple[int, ...] | None) -> Broken:
    """Other shapes, by names whose dots are written __; None removes one."""

    def fault(folder: Path) -> None:
        held = load_file(folder / name)
        for key, shape in change.items():
            held.pop(key.replace("__", "."), None)
            if shape is not None:
                held[key.replace("__", ".")] = torch.zeros(shape)
        save_file(held, folder / name, {"format": "pt"})

    return name.removesuffix("/model.safetensors"), fault


def nested(name: str) -> Fault:
    return lambda folder: (folder / name).write_text("[" * 100_000) and None


def garbage(name: str) -> Fault:
    return lambda folder: (folder / name).write_bytes(b"no model" * 500) and None


def index_without_files(folder: Path) -> None:
    (folder / "vision" / "model.safetensors.index.json").write_text("{}")


def shards_elsewhere(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../vision/model.safetensors"}}
    (folder / "language" / "model.safetensors.index.json").write_text(json.dumps(index))


LTC, GAMMA, SIMILARITY = "projector.safetensors", "seg_projection.safetensors", "similarity.safetensors"
FAULTS: dict[str, tuple[Broken, str]] = {
    # what is wrong: (how to bring it about, what the error says)
    "no config": (lost("config.json"), "missing"),
    "no vision config": (lost("vision/config.json"), "missing"),
    "no vision weights": (lost("vision/model.safetensors"), "missing"),
    "no preprocessor": (lost("vision/preprocessor_config.json"), "missing"),
    "no projector": (lost(LTC), "missing"),
    "no Γ": (lost(GAMMA), "missing"),
    "no similarity": (lost(SIMILARITY), "missing"),
    "no SAM": (lost("segmenter/model.safetensors"), "missing"),
    "no adapter": (lost("adapter/adapter_model.safetensors"), "missing"),
    "no tokenizer": (("language/tokenizer.json", lost("language/tokenizer.model")[1]), "needs its tokenizer.model"),
    "a pickle": (added("vision/pytorch_model.bin"), "pickle.*run whatever program.*safetensors"),
    "a pickle, in capitals": (added("adapter/adapter_model.PT"), "pickle"),
    "a pickle deep inside": (added("old/best.ckpt"), "pickle"),
    "config is no object": (added("config.json"), "expected a JSON object, found list"),
    "no safetensors inside": (added(LTC), "expected a safetensors file"),
    "another model": (config(model_type="llava"), "model_type.*'vmad'.*found 'llava'"),
    "an unknown setting": (config(temprature=1), "temprature"),
    "no place for the image": (config(conversation__template="{question}"), "<image>"),
    "a level too deep": (config(levels=[-1, LAYERS + 1]), f"-4 to {LAYERS}.*found {LAYERS + 1}"),
    "a level too far back": (config(patches_level=-5), "-4 to 3.*found -5"),
    "no levels": (config(levels=[]), "levels.*at least 1 item"),
    "grid not divisible": (config(ltc__scale_factor=3), "a divisor of CLIP's grid 4, found 3"),
    "heads do not divide": (config(ltc__heads=5), "a divisor of CLIP's width 48, found 5"),
    "seg token unknown": (config(seg_token="[SEG]"), r"one token.*found '\[SEG\]'"),
    "yes id beyond the vocabulary": (config(yes_token_ids=[99999]), "yes_token_ids.*99999"),
    "no yes ids": (config(yes_token_ids=[]), r"yes_token_ids.*found \(\)"),
    "an id both yes and no": (config(yes_token_ids=[7], no_token_ids=[7, 8]), r"no id in both, found \[7\]"),
    "another encoder": (vision(model_type="siglip"), "\"clip_vision_model\", found 'siglip'"),
    "a config that makes no model": (vision(num_attention_heads=5), "multiple of the number of attention heads"),
    "another segmenter": (segmenter(model_type="sam2"), "\"sam\", found 'sam2'"),
    "SAM's two sizes differ": (segmenter(prompt_encoder_config__image_size=1024), f"{SAM_SIZE}, found 1024"),
    "processor of another model": (processor(image_processor_type="Bit"), "CLIPImageProcessor, found 'Bit'"),
    "processor at another size": (processor(size={"height": 48, "width": 48}), "size: expected 56"),
    "processor that is not square": (processor(size={"height": 56, "width": 48}), "size: expected 56"),
    "crop at another size": (processor(do_center_crop=True, crop_size=48), "crop_size: expected 56.*found 48"),
    "frames of all shapes": (processor(size={"shortest_edge": 56}), "do_center_crop"),
    "nearest neighbour": (processor(resample=0), "resample: expected one of.*found 0"),
    "no normalisation": (processor(do_normalize=False), "do_normalize: expected true, found False"),
    "a step unknown here": (processor(do_grayscale=True), "do_grayscale.*found True"),
    "no statistics": (processor(image_mean="none"), "mean: .*found 'none'"),
    "lists without end": (("config.json", nested("config.json")), "nested too deeply"),
    "an index without files": (("model.safetensors.index.json", index_without_files), "weight_map: expected"),
    "no SentencePiece": (("language/tokenizer.model", garbage("language/tokenizer.model")), "expected a SentencePiece"),
    "a value missing": (processor(image_mean=...), "image_mean"),
    "levels that LTC was not trained on": (
        (LTC, config(levels=[-1, -2])[1]),
        r"k_proj.0.weight: expected shape \[48, 96\].*2 levels.*found \[48, 144\]",
    ),
    "projector of another LLM": (
        tensors(LTC, mlp__2__weight=(64, 64)),
        r"mlp.2.weight: expected shape \[256, 256\].*LLM's width 256.*found \[64, 64\]",
    ),
    "Γ to another width": (tensors(GAMMA, layers__2__bias=(128,)), r"expected shape \[256\].*found \[128\]"),
    "normal features of another CLIP": (tensors(SIMILARITY, visual_normal=(5, 32)), r"found \[5, 32\]"),
    "two semantic normals": (tensors(SIMILARITY, semantic_normal=(2, 256)), r"found \[2, 256\]"),
    "no normal features": (tensors(SIMILARITY, visual_normal=None), "visual_normal.*found none"),
    "a set of features unknown here": (tensors(SIMILARITY, visual_strange=(5, 48)), "visual_strange"),
    "layers without end": (
        ("vision/config.json", vision(num_hidden_layers=10**9)[1]),
        r"num_hidden_layers: expected at",
    ),
    "masks without end": (
        segmenter(mask_decoder_config__num_multimask_outputs=10**9),
        "num_multimask_outputs: expected",
    ),
    "a setting of another type": (vision(attention_dropout="much"), "attention_dropout"),
    "an LLM's layers without end": (
        ("language", edited("language/config.json", num_hidden_layers=10**9)[1]),
        "more than tensors",
    ),
    "LoRA's settings of another type": (edited("adapter/adapter_config.json", r="four"), "r: .*found 'four'"),
    "no expression for LoRA's targets": (
        edited("adapter/adapter_config.json", target_modules="q_proj("),
        r"'q_proj\(' is no regular expression",
    ),
    "shards of another folder": (("language", shards_elsewhere), "expected names of files in"),
    "fewer layers than the config says": (("vision", vision(num_hidden_layers=4)[1]), "layers.3.*found none"),
    "more layers than the config says": (("vision", vision(num_hidden_layers=2)[1]), "another model's"),
    "another CLIP resolution": (("vision", vision(image_size=84)[1]), r"\[37, 48\].*found \[17, 48\]"),
    "LLM with a tensor missing": (
        tensors("language/model.safetensors", model__layers__1__mlp__up_proj__weight=None),
        "model.layers.1.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize(("broken", "says"), FAULTS.values(), ids=FAULTS)
def test_fault_is_one_error_that_names_it(copy: Path, broken: Broken, says: str) -> None:
    where, fault = broken
    fault(copy)
    with pytest.raises(CheckpointError, match=says) as error:
        Checkpoint.open(copy)
    assert str(copy) in str(error.value) and where in str(error.value)
    assert "\n" not in str(error.value)
    assert not re.search(r"0x[0-9a-f]{6}|recursion|pydantic|<class|\.cc\(", str(error.value))
