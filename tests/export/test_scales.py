"""`vmad make-checkpoint`: random weights in real shapes, written shard by shard."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, SamConfig, SamModel

from vmad_edge.export import scales
from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.models.mobile_sam import MobileSamConfig
from vmad_edge.export.reading import read_shapes
from vmad_edge.export.scales import SCALES, Scale, make_checkpoint
from vmad_edge.runtime.errors import CheckpointError

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
LANGUAGE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SAM: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "mlp_dim": 64,
        "global_attn_indexes": [1],
    },
    "prompt_encoder_config": {"image_size": 64},
}


def tiny_scale(segmenter: SamConfig | MobileSamConfig | None = None) -> Scale:
    return Scale(CLIPVisionConfig(**VISION), LlamaConfig(**LANGUAGE), segmenter or SamConfig(**SAM))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scales, "SHARD", 1_000_000)  # several shards of the language model
        make_checkpoint(folder, tiny_scale())
    return folder


def test_the_export_accepts_it(made: Path) -> None:
    checkpoint = Checkpoint.open(made)
    assert (checkpoint.grid, checkpoint.width, checkpoint.language_width) == (4, 64, 256)
    assert (checkpoint.vocabulary, checkpoint.seg_token_id) == (1028, 1027)


def test_transformers_finds_all_weights_and_no_others(made: Path) -> None:
    index = json.loads((made / "language" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for model_class, part in ((CLIPVisionModel, "vision"), (LlamaForCausalLM, "language"), (SamModel, "segmenter")):
        loaded: Any = model_class.from_pretrained(made / part, output_loading_info=True)  # type: ignore[attr-defined]
        model, report = loaded
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert next(model.parameters()).dtype == torch.float16
    total = sum(tensor.nbytes for file in made.glob("language/*.safetensors") for tensor in load_file(file).values())
    assert index["metadata"]["total_size"] == total


def test_activations_are_finite_in_fp16_and_stay_near_one(made: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(made / "language", dtype=torch.float16)
    with torch.inference_mode():
        states = model(torch.arange(64)[None], output_hidden_states=True).hidden_states
    assert all(0.3 < float(state.float().std()) < 3 for state in states)


def test_a_seed_makes_the_same_weights_again_and_another_one_others(made: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        make_checkpoint(tmp_path / str(seed), tiny_scale(), seed)
    name = "projector.safetensors"
    before, same, other = (load_file(folder / name) for folder in (made, tmp_path / "0", tmp_path / "1"))
    weights = [key for key, tensor in before.items() if tensor.ndim > 1]
    assert all(torch.equal(before[key], same[key]) and not torch.equal(before[key], other[key]) for key in weights)


def test_mobile_sam_has_the_published_names(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "made", tiny_scale(MobileSamConfig(model_type="mobile_sam", image_size=256)))
    checkpoint = Checkpoint.open(tmp_path / "made")
    with torch.inference_mode():
        embeddings = checkpoint.segmenter().get_image_embeddings(torch.zeros(1, 3, 256, 256))
    assert embeddings.shape == (1, 256, 16, 16) and bool(embeddings.isfinite().all())


@pytest.mark.parametrize(
    ("scale", "part", "parameters"),
    [
        # CLIP's model card: 304 million, both sizes but for the positions
        ("paper", "vision", 303_507_456),
        ("edge", "vision", 303_179_776),
        # Meta's LLaMA-7B: 6,738,415,616; TinyLlama's card: 1.1 B
        ("paper", "language", 6_738_415_616),
        ("edge", "language", 1_100_048_384),
        # segment-anything's ViT-H: 641,090,608, where the 256 numbers of the positions' encoding are a buffer
        ("paper", "segmenter", 641_090_608 + 256),
    ],
)
def test_scales_have_as_many_parameters_as_the_models_published(scale: str, part: str, parameters: int) -> None:
    config: Any = getattr(SCALES[scale], part)
    model_class: Any = {"vision": CLIPVisionModel, "language": LlamaForCausalLM, "segmenter": SamModel}[part]
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert found == parameters


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a new path or an empty folder"):
        make_checkpoint(tmp_path, tiny_scale())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_little_room_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**7))
    with pytest.raises(CheckpointError, match=r"0\.0 GB free; the checkpoint takes 0\.1 GB"):
        make_checkpoint(tmp_path / "made", tiny_scale())
    assert not list(tmp_path.iterdir())


def test_stopped_halfway_nothing_stays(tmp_path: Path) -> None:
    def stop(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "made", tiny_scale(), progress=stop)
    assert not list(tmp_path.iterdir())


def test_shards_are_bounded(made: Path) -> None:
    for shard in made.glob("language/*.safetensors"):
        shapes = read_shapes(shard)
        assert len(shapes) == 1 or sum(2 * int(np.prod(shape)) for shape in shapes.values()) <= 1_000_000
