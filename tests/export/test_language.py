"""LoRA merge against peft; the GGUF file against llama.cpp's own converter; what cannot be exported is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tiny_language import SEG, WIDTH, write_adapter, write_language, write_llama_bpe, write_smollm
from transformers import AddedToken, AutoTokenizer, LlamaForCausalLM, LlamaTokenizer

from vmad_edge.export.language import export_language, merged_tensors, read_tokenizer, read_vocabulary, type_mix
from vmad_edge.runtime.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"tie_word_embeddings": True}
ROWS = {"modules_to_save": None}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def merged_by_peft(language: Path, adapter: Path, rows: int | None = None) -> LlamaForCausalLM:
    base = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    if rows:
        base.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_language(folder / "language")
    write_adapter(folder / "adapter")
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        pytest.param({}, {}, id="q, v, and three modules in full"),
        pytest.param({}, {"modules_to_save": None}, id="nothing in full"),
        pytest.param(
            {}, {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 8}}, id="ranks"
        ),
        pytest.param({}, {"alpha_pattern": {r"model.layers.0.self_attn.q_proj": 3, "v_proj": 5}}, id="alphas"),
        pytest.param({}, {"use_rslora": True, "alpha_pattern": {"v_proj": 5}}, id="rsLoRA"),
        pytest.param({}, {"fan_in_fan_out": True}, id="fan_in_fan_out"),
        pytest.param({}, {"target_modules": "all-linear"}, id="every linear module"),
        pytest.param({}, {"target_modules": r".*layers\.1\..*(up|down)_proj"}, id="a regular expression"),
        pytest.param({}, {"target_modules": ATTENTION, "exclude_modules": ["o_proj"]}, id="some excluded"),
        pytest.param({}, {"layers_to_transform": [1]}, id="one layer"),
        pytest.param({}, {"target_modules": ["embed_tokens", "lm_head"], "modules_to_save": None}, id="vocabulary"),
        pytest.param({"dtype": torch.bfloat16}, {}, id="bfloat16"),
        pytest.param({"max_shard_size": "1MB"}, {}, id="shards"),
        pytest.param({"attention_bias": True, "mlp_bias": True}, {}, id="biases"),
        pytest.param(TIED, {"modules_to_save": None}, id="tied"),
        pytest.param(TIED, {"modules_to_save": ["lm_head"]}, id="tied, lm_head trained"),
        pytest.param(TIED, {"modules_to_save": ["embed_tokens"]}, id="tied, embedding trained"),
        pytest.param(TIED, {"ensure_weight_tying": True}, id="tied, both trained as one"),
        pytest.param({}, {**ROWS, "trainable_token_indices": [7, 3]}, id="two rows of the embedding"),
        pytest.param(
            {}, {**ROWS, "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}}, id="rows of both"
        ),
        pytest.param(
            {}, {"modules_to_save": ["lm_head"], "trainable_token_indices": [7]}, id="rows beside a whole lm_head"
        ),
        pytest.param(TIED, {**ROWS, "trainable_token_indices": [7, 3]}, id="tied, rows of both as one"),
    ],
)
def test_merge_equals_peft(tmp_path: Path, model: dict[str, Any], lora: dict[str, Any]) -> None:
    language, adapter = tmp_path / "language", tmp_path / "adapter"
    write_language(language, **model)
    write_adapter(adapter, **lora)
    merged = dict(merged_tensors(language, adapter))
    expected = merged_by_peft(language, adapter).state_dict()
    base = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32).state_dict()
    assert any(not torch.equal(base[name], expected[name]) for name in expected)
    merged.setdefault(HEAD, merged[EMBEDDING])  # where nothing untied it
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(merged[name], tensor.numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("model", [{}, TIED], ids=["", "tied"])
def test_without_an_adapter_the_model_is_taken_as_it_is(tmp_path: Path, model: dict[str, Any]) -> None:
    expected = write_language(tmp_path / "language", **model).state_dict()
    found = dict(merged_tensors(tmp_path / "language", tmp_path / "adapter"))
    assert found.keys() == expected.keys() - ({HEAD} if model else set())
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name].numpy(), err_msg=name)


def test_tied_head_is_written_once(tmp_path: Path) -> None:
    write_language(tmp_path / "language", tie_word_embeddings=True)
    write_adapter(tmp_path / "adapter", modules_to_save=None)
    assert HEAD not in dict(merged_tensors(tmp_path / "language", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"trainable_token_indices": [7, 3, 9]}, r"expected \(3, 256\), found \(2, 256\)"),
        ({"trainable_token_indices": [7, 9999]}, "9999.*resized"),
        ({"trainable_token_indices": None}, "matches no trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [1]}}, "lm_head"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], names: str) -> None:
    write_language(tmp_path / "language")
    write_adapter(tmp_path / "adapter", **ROWS, trainable_token_indices=[7, 3])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=names):
        next(merged_tensors(tmp_path / "language", tmp_path / "adapter"))


def test_lora_on_one_of_two_tied_tensors_is_refused(tmp_path: Path) -> None:
    """peft trains the embedding alone and merges into both."""
    write_language(tmp_path / "language", tie_word_embeddings=True)
    write_adapter(tmp_path / "adapter", target_modules=["embed_tokens"], modules_to_save=None)
    with pytest.raises(CheckpointError, match="untie"):
        next(merged_tensors(tmp_path / "language", tmp_path / "adapter"))


def test_resized_vocabulary_of_the_adapter_wins(tmp_path: Path) -> None:
    """LISA's way: the base knows no `<seg>`, the adapter brings the grown embedding and head."""
    language, adapter = tmp_path / "language", tmp_path / "adapter"
    write_language(language, spare_rows=-1)
    rows = len(AutoTokenizer.from_pretrained(language))
    write_adapter(adapter, rows=rows)
    merged = dict(merged_tensors(language, adapter))
    for name, tensor in merged_by_peft(language, adapter, rows).state_dict().items():
        np.testing.assert_allclose(merged[name], tensor.numpy(), rtol=0, atol=1e-6, err_msg=name)
    assert merged[EMBEDDING].shape == merged[HEAD].shape == (rows, WIDTH)
    export_language(language, adapter, tmp_path / "llm.gguf", "f32")
    assert _value(gguf.GGUFReader(tmp_path / "llm.gguf"), "tokenizer.ggml.tokens")[rows - 1] == SEG


def test_file_equals_llama_cpps_converter(checkpoint: Path, converter: Path, tmp_path: Path) -> None:
    ours, theirs, merged = tmp_path / "ours.gguf", tmp_path / "theirs.gguf", tmp_path / "merged"
    export_language(checkpoint / "language", checkpoint / "adapter", ours, "f16")
    merged_by_peft(checkpoint / "language", checkpoint / "adapter").save_pretrained(merged)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(checkpoint / "language" / name, merged)
    seg_id = AutoTokenizer.from_pretrained(checkpoint / "language").convert_tokens_to_ids(SEG)
    (merged / "added_tokens.json").write_text(json.dumps({SEG: seg_id}))  # it does not read tokenizer.json's
    subprocess.run(
        [sys.executable, converter, merged, "--outfile", theirs, "--outtype", "f16"], check=True, timeout=300
    )

    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors = {tensor.name: tensor for tensor in b.tensors}
    assert {tensor.name for tensor in a.tensors} == tensors.keys()
    for tensor in a.tensors:
        assert tensor.tensor_type == tensors[tensor.name].tensor_type, tensor.name
        np.testing.assert_array_equal(tensor.data, tensors[tensor.name].data, err_msg=tensor.name)
    described = {key for key in b.fields if key.startswith(("llama.", "tokenizer."))} | {"general.file_type"}
    for key in described:
        assert _value(a, key) == _value(b, key), key


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize(
    ("quantization", "kind", "error", "kinds"),
    [
        ("q8_0", gguf.GGMLQuantizationType.Q8_0, 0.01, {"Q8_0", "F32"}),
        ("q4_k_m", gguf.GGMLQuantizationType.Q4_K, 0.1, {"Q4_K", "Q6_K", "F32"}),  # it gives some tensors more bits
    ],
)
def test_quantized(
    checkpoint: Path, tmp_path: Path, quantization: Any, kind: Any, error: float, kinds: set[str]
) -> None:
    """llama.cpp's quantization of what peft merged; the F16 file in between is gone."""
    target = tmp_path / "llm.gguf"
    export_language(checkpoint / "language", checkpoint / "adapter", target, quantization)
    assert [path.name for path in tmp_path.iterdir()] == ["llm.gguf"]
    mix = type_mix(target)
    assert mix.keys() == kinds
    assert mix["F32"] == 5 and sum(mix.values()) == 21  # norms; 2 × 7 matrices, embedding and head
    expected = merged_by_peft(checkpoint / "language", checkpoint / "adapter").state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == kind
    for ours, theirs in {"blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight", "output.weight": HEAD}.items():
        found, right = dequantize(tensors[ours].data, tensors[ours].tensor_type), expected[theirs].numpy()
        assert 0 < np.linalg.norm(found - right) < error * np.linalg.norm(right)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, r"merge_and_unload\(\).*into language/, and remove adapter/"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),  # and the file has none
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"a_key_of_next_year": 1}, "a_key_of_next_year"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 8}, "expected A"),
        ({"rank_pattern": {"v_proj": 2}}, "expected A"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "k_proj"),  # trained, and not in the file
        ({"target_modules": ["q_proj"]}, "v_proj"),  # in the file, and ignored by peft
        ({"modules_to_save": ["o_proj"]}, "o_proj"),
    ],
    ids=str,
)
def test_adapter_config_that_would_be_ignored_is_refused(copy: Path, change: dict[str, Any], names: str) -> None:
    path = copy / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=names):
        next(merged_tensors(copy / "language", copy / "adapter"))


@pytest.mark.parametrize("change", [{"target_modules": "(.?.?.?)+#"}, {"alpha_pattern": {"(.?.?.?)+#": 2}}], ids=str)
def test_expressions_that_take_for_ever_are_refused(
    copy: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmad_edge.export.language._PATIENCE_S", 1)
    path = copy / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="to be matched with the modules' names"):
        next(merged_tensors(copy / "language", copy / "adapter"))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(lambda t: t.update({"base_model.model.vision.weight": torch.ones(1)}), "vision", id="unknown key"),
        pytest.param(lambda t: t.pop(f"{Q}.lora_B.weight"), "one half", id="half a pair"),
        pytest.param(
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(1)}), "magnitude", id="DoRA's vector"
        ),
        pytest.param(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(9, WIDTH)}), "rows", id="rows"),
        pytest.param(
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(3)}), "norm.weight", id="shape"
        ),
    ],
)
def test_adapter_file_that_does_not_fit_is_refused(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], object], names: str
) -> None:
    _change_tensors(copy / "adapter" / "adapter_model.safetensors", change)
    with pytest.raises(CheckpointError, match=names):
        next(merged_tensors(copy / "language", copy / "adapter"))


def _change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"intermediate_size": 1024}, "1024"),
        ({"attention_bias": True}, "bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
    ids=str,
)
def test_model_config_that_does_not_fit_is_refused(copy: Path, change: dict[str, Any], names: str) -> None:
    path = copy / "language" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=names):
        next(merged_tensors(copy / "language", copy / "adapter"))


def _without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _overflow(folder: Path) -> None:
    _change_tensors(folder / "model.safetensors", lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(1e6))


def _other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {"X" if k == "▁the" else k: v for k, v in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["merges"] = [
        pair for pair in tokenizer["model"]["merges"] if "▁the" not in ("".join(pair), *pair)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _forget_bos(folder: Path) -> None:
    LlamaTokenizer.from_pretrained(folder, add_bos_token=False).save_pretrained(folder)


def _takes_spaces(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<more>", lstrip=True)])
    tokenizer.save_pretrained(folder)


def _of_transformers_4(folder: Path) -> None:
    """▁ by a normalizer, which transformers 5 rebuilds for LlamaTokenizer and else takes as it is."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    tokenizer["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    _config("tokenizer_class", "PreTrainedTokenizerFast")(folder)


def _change_json(name: str, *keys: str | int, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return change


def _json(*keys: str | int, value: Any) -> Callable[[Path], None]:
    return _change_json("tokenizer.json", *keys, value=value)


def _config(key: str, value: Any) -> Callable[[Path], None]:
    return _change_json("tokenizer_config.json", key, value=value)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(_without("config.json"), "config.json is missing", id="no config"),
        pytest.param(_without("model.safetensors"), "model.safetensors is missing", id="no weights"),
        pytest.param(_pickle_instead, "pickle", id="a pickle"),
        pytest.param(_overflow, "float16 cannot hold", id="too large for F16"),
        pytest.param(_without("tokenizer.model"), "SentencePiece", id="another kind of tokenizer"),
        pytest.param(_forget_bos, "adds no BOS", id="BOS forgotten by transformers 5"),
        pytest.param(_other_tokenizer, "▁the", id="tokenizer files that differ"),
        pytest.param(_takes_spaces, "lstrip", id="a token that takes spaces"),
        pytest.param(_of_transformers_4, "no normalizer", id="another way to put ▁"),
        pytest.param(_json("post_processor", "single", value=[]), "makes no token", id="a template of nothing"),
        pytest.param(_json("post_processor", "special_tokens", value={}), "cannot be read", id="tokenizers panics"),
    ],
)
def test_language_folder_that_cannot_be_exported(copy: Path, change: Callable[[Path], None], names: str) -> None:
    change(copy / "language")
    with pytest.raises(CheckpointError, match=names):
        export_language(copy / "language", copy / "adapter", copy / "llm.gguf", "f16")


def _of_2023(folder: Path, **change: Any) -> None:
    """tokenizer_config.json as conversions of that time wrote it, and no tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"add_bos_token": True} | change))
    (folder / "added_tokens.json").write_text(json.dumps({SEG: 400}))


TEXT = f"USER: the gear{SEG}No.{SEG}Yes"


def test_without_legacy_a_tokenizer_of_transformers_4_is_read_as_4_read_it(copy: Path) -> None:
    """▁ before each text between added tokens: SentencePiece's own ids of each."""
    language = copy / "language"
    _of_2023(language)
    with pytest.warns(UserWarning, match=r'tokenizer_config.json does not say "legacy": taken as true'):
        vocabulary = read_vocabulary(language)
    assert vocabulary.space_prefix == "always"
    pieces = SentencePieceProcessor(model_file=str(language / "tokenizer.model"))
    expected = [pieces.bos_id()]
    for part in re.split(f"({SEG})", TEXT):
        expected += [400] if part == SEG else pieces.encode(part)
    with pytest.warns(UserWarning):
        assert read_tokenizer(language).encode(TEXT) == expected


@pytest.mark.parametrize(("said", "prefix"), [({"legacy": True}, "always"), ({"legacy": False}, "first")], ids=str)
def test_legacy_that_is_said_is_obeyed(copy: Path, said: dict[str, bool], prefix: str) -> None:
    _of_2023(copy / "language", **said)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert read_vocabulary(copy / "language").space_prefix == prefix


def test_what_transformers_5_saved_is_read_as_5_reads_it(copy: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert read_vocabulary(copy / "language").space_prefix == "first"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bos_token": "", "eos_token": "", "unk_token": ""}, r'empty.*"bos_token": "<s>", "eos_token": "</s>", "unk'),
        ({"eos_token": ""}, r"eos_token is an empty text"),
    ],
    ids=str,
)
def test_special_tokens_that_are_none_are_refused_with_what_to_write(
    copy: Path, change: dict[str, str], says: str
) -> None:
    _of_2023(copy / "language", legacy=True, **change)
    with pytest.raises(CheckpointError, match=says) as error:
        read_vocabulary(copy / "language")
    assert "recursion" not in str(error.value)


def test_empty_special_tokens_of_another_file_are_refused_too(copy: Path) -> None:
    language = copy / "language"
    _of_2023(language, legacy=True)
    said = json.loads((language / "tokenizer_config.json").read_text())
    tokens = {name: said.pop(name) for name in ("bos_token", "eos_token", "unk_token")}
    (language / "tokenizer_config.json").write_text(json.dumps(said))
    (language / "special_tokens_map.json").write_text(json.dumps(dict.fromkeys(tokens, "")))
    with pytest.raises(CheckpointError, match=r'"bos_token": "<s>"') as error:
        read_vocabulary(language)
    assert "recursion" not in str(error.value)


@pytest.mark.parametrize("write", [write_smollm, write_llama_bpe])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(_without("tokenizer.json"), "tokenizer", id="no tokenizer"),
        pytest.param(_json("model", "type", value="XYZ"), "cannot be read", id="no tokenizer.json that there is"),
        pytest.param(_json("pre_tokenizer", value=None), "pre_tokenizer", id="no pre-tokenizer"),
        pytest.param(
            _json("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True), "pre_tok", id="prefix"
        ),
        pytest.param(_json("pre_tokenizer", value={"type": "Whitespace"}), "Whitespace", id="another pre-tokenizer"),
        pytest.param(_json("normalizer", value={"type": "NFC"}), "normalizer NFC", id="a normalizer"),
        pytest.param(_json("model", "dropout", value=0.1), "dropout", id="dropout"),
        pytest.param(_json("model", "vocab", "a b", value=500), "'a b'", id="not bytes"),
        pytest.param(_json("model", "vocab", "a", value=10**9), "'a' has id 1000000000", id="an id without reason"),
        pytest.param(_json("added_tokens", 1, "lstrip", value=True), "lstrip", id="a token that takes spaces"),
        pytest.param(_config("eos_token", None), "no EOS", id="no EOS"),
        pytest.param(_config("tokenizer_class", "GPT2Tokenizer"), "does not apply", id="rebuilt by transformers"),
    ],
)
def test_bpe_tokenizer_that_cannot_be_exported(
    write: Callable[[Path], object], change: Callable[[Path], None], names: str, tmp_path: Path
) -> None:
    write(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=names):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("write", "change", "names"),
    [
        pytest.param(write_smollm, _json("model", "ignore_merges", value=True), "ignore_merges", id="no merges"),
        pytest.param(write_llama_bpe, _json("model", "ignore_merges", value=False), "ignore_merges", id="merges"),
        pytest.param(write_smollm, _config("add_bos_token", True), "no BOS", id="BOS in the config alone"),
        pytest.param(write_llama_bpe, _config("add_bos_token", False), "BOS", id="BOS in tokenizer.json alone"),
    ],
)
def test_bpe_tokenizer_that_contradicts_itself(
    write: Callable[[Path], object], change: Callable[[Path], None], names: str, tmp_path: Path
) -> None:
    write(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=names):
        read_vocabulary(tmp_path)


def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_language(tmp_path / "language", spare_rows=-1)
    write_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="rows"):
        export_language(tmp_path / "language", tmp_path / "adapter", tmp_path / "llm.gguf", "f16")
