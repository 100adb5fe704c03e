"""Language model → GGUF: merge the LoRA tensor by tensor, write F32 or F16, quantize with llama.cpp.

The model is never in memory whole: each tensor is read, merged, written and forgotten. Everything that was trained
goes along: LoRA pairs, and the tensors that the adapter stores in full (lm_head, embed_tokens, norms).
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat, JsonValue, PositiveInt, model_validator
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer

from vmad_edge.export.reading import in_words, read_json, read_shapes, validated, weight_files
from vmad_edge.kernels.processors import processors
from vmad_edge.runtime.bundle import SpacePrefix
from vmad_edge.runtime.errors import CheckpointError
from vmad_edge.runtime.stages.language import llama_messages

Array = NDArray[np.float32]
Config = Any  # LlamaConfig, whose fields are annotated as optional and are not, once loaded
Quantization = Literal["f32", "f16", "q8_0", "q4_k_m"]

_FTYPE = {"q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama.LLAMA_FTYPE_MOSTLY_Q4_K_M}

_MOST_TOKENS = 1 << 22
"""Vocabularies that are published have a tenth of that; a damaged id must not fill the memory."""
_VOCABULARY = {"model.embed_tokens.weight", "lm_head.weight"}

# Keys of adapter_config.json that this merge obeys, or that leave the merged weights alone. Any other key that is on
# (DoRA, lora_bias, layer_replication, one that a later peft brings) would change the weights: refused by name.
_OBEYED = {"peft_type", "init_lora_weights", "layers_pattern"}  # and the fields of _Lora
_HARMLESS = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout"}
_HARMLESS |= {"megatron_core", "qalora_group_size", "peft_version", "ensure_weight_tying"}
_HARMLESS |= {"fan_in_fan_out"}  # of Conv1D, which LLaMA does not have; peft ignores it on Linear
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ) change the base weights before training.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal")
_MERGE_IT = (
    "Merge the adapter with peft (`model.merge_and_unload().save_pretrained(FOLDER)`), put what it saved into "
    "language/, and remove adapter/: a checkpoint without one is exported as it is."
)


def export_language(language: Path, adapter: Path, target: Path, quantization: Quantization) -> None:
    """Write `language` with `adapter` merged into the GGUF file `target`.

    Args:
        language: folder of a LlamaForCausalLM (safetensors, one file or shards) with its tokenizer: SentencePiece's
            tokenizer.model, or BPE over bytes in a tokenizer.json.
        adapter: folder of a PEFT LoRA; where there is none, `language` is taken as merged already.
        quantization: f32 and f16 are written directly (vectors stay F32); q8_0 and q4_k_m are made by llama.cpp from
            an F16 file beside `target`, which is removed. Rows that are no multiple of the block size get a type
            of llama.cpp's choice: `type_mix` tells which.

    Raises:
        CheckpointError: a missing or wrong part, or one that this export cannot carry over.
    """
    config = _read_config(language)
    vocabulary = read_vocabulary(language)
    tensors = _merge(language, adapter, config)
    if quantization in ("f32", "f16"):
        _write(target, config, vocabulary, tensors, half=quantization == "f16")
        return
    f16 = target.with_name(target.name + ".f16")
    try:
        _write(f16, config, vocabulary, tensors, half=True)
        _quantize(f16, target, _FTYPE[quantization])
    finally:
        f16.unlink(missing_ok=True)


def type_mix(path: Path) -> dict[str, int]:
    """How many tensors of the GGUF file at `path` have each type ("Q4_K", "F32"), the most frequent first."""
    return dict(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors).most_common())


def merged_tensors(language: Path, adapter: Path) -> Iterator[tuple[str, Array]]:
    """Names (of LlamaForCausalLM) and float32 values of the merged model, one tensor at a time.

    W' = W + s·B·A with s = alpha / r, or alpha / √r for rsLoRA (LoRA: arXiv 2106.09685, rsLoRA: arXiv 2312.03732),
    summed in float32; rows that the adapter trained alone (trainable_token_indices) take their place. A tied lm_head
    appears only where the adapter gave it, or the embedding, weights of its own.

    Raises:
        CheckpointError: as export_language.
    """
    for tensor in _merge(language, adapter, _read_config(language)):
        yield tensor.name, tensor.read()


def base_tensors(language: Path) -> dict[str, Callable[[], Array]]:
    """What reads the tensors of the LlamaForCausalLM in `language`, by name, as float32 arrays.

    Raises:
        CheckpointError: as export_language.
    """
    return {name: tensor.read for name, tensor in _read_base(language, _read_config(language)).items()}


# ---------------------------------------------------------------------------------------------- model


def _read_config(language: Path) -> Config:
    path = language / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: expected the folder of a LlamaForCausalLM.")
    try:
        config: Config = AutoConfig.from_pretrained(language, local_files_only=True)
    except Exception as error:  # transformers raises many kinds on a config that makes no model
        raise CheckpointError(f"{path}: expected a config of LlamaForCausalLM, found: {in_words(error)}") from None
    if config.model_type != "llama":
        raise CheckpointError(f"{path}: expected model_type 'llama', found {config.model_type!r}.")
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{path}: quantized weights; expected float ones. Save the model dequantized.")
    if config.hidden_act != "silu":
        raise CheckpointError(f"{path}: hidden_act {config.hidden_act!r}; llama.cpp's LLaMA has silu only.")
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: RoPE {rope}: only the types default and linear can be exported.")
    return config


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LlamaForCausalLM."""
    width, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (width,)
        for name, shape in linear.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


def _open(path: Path) -> dict[str, _Tensor]:
    """The tensors of a safetensors file, unread."""

    def reader(name: str) -> Callable[[], Array]:
        def read() -> Array:
            with safe_open(path, framework="pt") as file:  # one left open would keep all that was read mapped
                tensor: Array = file.get_tensor(name).float().numpy()
            return tensor

        return read

    return {name: _Tensor(name, shape, reader(name)) for name, shape in read_shapes(path).items()}


def _read_base(language: Path, config: Config) -> dict[str, _Tensor]:
    """The base model's tensors, exactly those that its config promises. A tied lm_head is the embedding."""
    found = {name: tensor for file in weight_files(language) for name, tensor in _open(file).items()}
    found = {name: t for name, t in found.items() if not name.endswith("rotary_emb.inv_freq")}  # computed, not learned
    if config.tie_word_embeddings and "lm_head.weight" in found:
        raise CheckpointError(f"{language}: weights hold lm_head.weight, but config.json has tie_word_embeddings on.")
    if config.tie_word_embeddings and "model.embed_tokens.weight" in found:
        found["lm_head.weight"] = replace(found["model.embed_tokens.weight"], name="lm_head.weight")
    if config.num_hidden_layers > len(found):
        raise CheckpointError(f"{language}: config.json has {config.num_hidden_layers} layers, more than tensors.")
    expected = _shapes(config)
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"{language}: weights lack {_some(missing)}. Save the whole LlamaForCausalLM.")
    if unknown := found.keys() - expected.keys():
        raise CheckpointError(f"{language}: weights hold {_some(unknown)}, which a LlamaForCausalLM does not have.")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{language}: {name}: expected {shape} by config.json, found {found[name].shape}.")
    return {name: found[name] for name in expected}


# ---------------------------------------------------------------------------------------------- LoRA


def _merge(language: Path, adapter: Path, config: Config) -> list[_Tensor]:
    """The merged model's tensors in the order of LlamaForCausalLM, each merged when it is read."""
    base = _read_base(language, config)
    if not adapter.exists():
        return [t for name, t in base.items() if name != "lm_head.weight" or not config.tie_word_embeddings]
    lora = _read_lora_config(adapter)
    stored = _open(adapter / "adapter_model.safetensors")
    rows_alone = {key: stored.pop(key) for key in list(stored) if key.endswith(_ROWS)}
    full, pairs = _sort_adapter(adapter, stored, base)
    _check_targets(adapter, lora, full, pairs, base)
    trained_rows = _trained_rows(adapter, lora, rows_alone, base)
    ranks, alphas = (_by_pattern(adapter, pattern, pairs) for pattern in (lora.rank_pattern, lora.alpha_pattern))
    tensors = {}
    for name, tensor in base.items():
        free = 1 if name in _VOCABULARY else 0  # the adapter may have grown it
        tensor = replace(full.get(name, tensor), name=name)
        if tensor.shape[free:] != base[name].shape[free:]:
            raise CheckpointError(f"{adapter}: {name}: expected {base[name].shape}, found {tensor.shape}.")
        if name in pairs:
            rank, alpha = int(ranks.get(name, lora.r)), alphas.get(name, lora.lora_alpha)
            tensor = _add_pair(adapter, bool(lora.use_rslora), rank, alpha, tensor, *pairs[name])
        tensors[name] = _put_rows(adapter, tensor, *trained_rows[name]) if name in trained_rows else tensor
    rows = {name: tensors[name].shape[0] for name in _VOCABULARY}
    if len(set(rows.values())) > 1:
        raise CheckpointError(f"{adapter}: rows of the vocabulary differ: {rows}. Save both after resizing.")
    if config.tie_word_embeddings:
        if both := _VOCABULARY & pairs.keys():
            raise CheckpointError(
                f"{adapter}: LoRA on {_some(both)} of a model that ties them: untie it before training."
            )
        if not _VOCABULARY & full.keys() and "lm_head.weight" not in trained_rows:
            del tensors["lm_head.weight"]
    return list(tensors.values())


class _Lora(BaseModel):
    """What this merge obeys of adapter_config.json; defaults are peft's."""

    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    use_rslora: bool | None = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: JsonValue = None
    layers_to_transform: JsonValue = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @model_validator(mode="after")
    def _patterns(self) -> _Lora:
        target = [self.target_modules] if isinstance(self.target_modules, str) else []
        for pattern in (*target, *(self.rank_pattern or {}), *(self.alpha_pattern or {})):
            if not _is_expression(_ending_in(pattern)):
                raise ValueError(f"{pattern!r:.80} is no regular expression")
        return self


def _read_lora_config(adapter: Path) -> _Lora:
    path = adapter / "adapter_config.json"
    lora = read_json(path)
    if lora.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: expected peft_type 'LORA', found {lora.get('peft_type')!r}. {_MERGE_IT}")
    known = _OBEYED | _HARMLESS | _Lora.model_fields.keys()
    on = {key: value for key, value in lora.items() if key not in known and value and value != "none"}
    if on:
        raise CheckpointError(f"{path}: {_some(on)} cannot be merged here. {_MERGE_IT}")
    if (init := lora.get("init_lora_weights")) not in _PLAIN_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights {init!r} changes the base weights; save the adapter with peft's "
            f"path_initial_model_for_weight_conversion, which makes a plain LoRA of it. Or: {_MERGE_IT}"
        )
    return validated(_Lora, path, lora)


def _sort_adapter(
    adapter: Path, stored: dict[str, _Tensor], base: dict[str, _Tensor]
) -> tuple[dict[str, _Tensor], dict[str, tuple[_Tensor, _Tensor]]]:
    """The adapter's tensors by the base tensor that they belong to: stored in full, and LoRA pairs (A, B)."""
    full: dict[str, _Tensor] = {}
    halves: dict[str, dict[str, _Tensor]] = {}
    for key, tensor in stored.items():
        if ".original_module." in key:  # the untrained twin, which peft stores after a resize
            continue
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        lora = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        name = f"{lora[1]}.weight" if lora else name
        if name not in base:
            raise CheckpointError(f"{adapter}: {key} matches nothing in the language model.")
        if lora:
            halves.setdefault(name, {})[lora[2]] = tensor
        else:
            full[name] = tensor
    for name, half in halves.items():
        if len(half) != 2:
            raise CheckpointError(f"{adapter}: {name} has only one half of its LoRA pair. Save the adapter again.")
    return full, {name: (half["A"], half["B"]) for name, half in halves.items()}


def _check_targets(
    adapter: Path,
    lora: _Lora,
    full: dict[str, _Tensor],
    pairs: dict[str, tuple[_Tensor, _Tensor]],
    base: dict[str, _Tensor],
) -> None:
    """What the adapter's config says was trained is there, and nothing else."""
    target = lora.target_modules or []
    modules = {name.removesuffix(".weight") for name in base if name.endswith(".weight")}
    if isinstance(target, str):
        targets = set(_first_matches(adapter, [target], modules))
    else:
        targets = {module for module in modules if any(f".{module}".endswith(f".{name}") for name in target)}
    expected = {f"{module}.weight" for module in targets}
    if extra := pairs.keys() - expected:
        raise CheckpointError(f"{adapter}: LoRA pairs for {_some(extra)}, which target_modules do not name.")
    some_left_out = lora.exclude_modules or lora.layers_to_transform is not None
    if (missing := expected - pairs.keys()) and not some_left_out:
        raise CheckpointError(f"{adapter}: target_modules name {_some(missing)}, but the file has no LoRA pair for it.")
    for module in lora.modules_to_save or []:
        if not any(name.rpartition(".")[0].endswith(module) for name in full):
            raise CheckpointError(f"{adapter}: modules_to_save names {module}, but the file does not hold it.")


_ROWS = ".token_adapter.trainable_tokens_delta"
"""How peft names rows that were trained alone: they are the rows themselves, not what is added to them."""


def _trained_rows(
    adapter: Path, lora: _Lora, stored: dict[str, _Tensor], base: dict[str, _Tensor]
) -> dict[str, tuple[list[int], _Tensor]]:
    """Which rows of which tensor were trained alone, and their values."""
    given = lora.trainable_token_indices or {}
    if isinstance(given, list):
        given = {"embed_tokens": given}
    found = {}
    for key, rows in stored.items():
        module = key.removeprefix("base_model.model.").removesuffix(_ROWS)
        name = f"{module}.weight"
        indices = next((i for target, i in given.items() if module == target or module.endswith(f".{target}")), None)
        if name not in _VOCABULARY & base.keys() or indices is None:
            raise CheckpointError(f"{adapter}: {key} matches no trainable_token_indices of the language model's.")
        if rows.shape != (len(indices), base[name].shape[1]):
            raise CheckpointError(
                f"{adapter}: {key}: expected {(len(indices), base[name].shape[1])}, found {rows.shape}."
            )
        found[name] = indices, rows
    if len(found) != len(given):
        raise CheckpointError(
            f"{adapter}: trainable_token_indices name rows of {_some(given)}, but the file holds those of "
            f"{_some(found) or 'none'}. Save the adapter again."
        )
    return found


def _put_rows(adapter: Path, base: _Tensor, indices: list[int], rows: _Tensor) -> _Tensor:
    if not all(0 <= index < base.shape[0] for index in indices):
        raise CheckpointError(
            f"{adapter}: trainable_token_indices {max(indices)}, but {base.name} has {base.shape[0]} rows. Save the "
            "language model after its vocabulary was resized."
        )

    def read() -> Array:
        whole = base.read().copy()
        whole[indices] = rows.read()
        return whole

    return _Tensor(base.name, base.shape, read)


def _add_pair(
    adapter: Path, use_rslora: bool, rank: int, alpha: float, base: _Tensor, a: _Tensor, b: _Tensor
) -> _Tensor:
    # An embedding's pair is that of its transpose: A [r,rows], B [width,r].
    embedding = base.name.endswith("embed_tokens.weight")
    rows, width = reversed(base.shape) if embedding else base.shape
    if a.shape != (rank, width) or b.shape != (rows, rank):
        raise CheckpointError(
            f"{adapter}: LoRA of {base.name}: expected A {(rank, width)} and B {(rows, rank)}, "
            f"found {a.shape} and {b.shape}."
        )
    scale = np.float32(alpha / math.sqrt(rank) if use_rslora else alpha / rank)

    def read() -> Array:
        delta = scale * (b.read() @ a.read())
        return base.read() + (delta.T if embedding else delta)

    return _Tensor(base.name, base.shape, read)


def _by_pattern(adapter: Path, pattern: Mapping[str, float] | None, names: Iterable[str]) -> dict[str, float]:
    """By tensor: the value whose key is first to match, as a regular expression, the end of its module's name.

    peft's rule. Tensors whose modules no key matches are left out.
    """
    values = {_ending_in(key): value for key, value in (pattern or {}).items()}
    found = _first_matches(adapter, list(values), (name.removesuffix(".weight") for name in names))
    return {f"{module}.weight": values[key] for module, key in found.items()}


_PATIENCE_S = 20
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
found = {name: next((p for p in patterns if re.fullmatch(p, name)), None) for name in names}
print(json.dumps({name: pattern for name, pattern in found.items() if pattern is not None}))
"""


def _first_matches(adapter: Path, patterns: list[str], names: Iterable[str]) -> dict[str, str]:
    """By name: the first of the regular expressions that matches all of it; names that none matches are left out.

    In a process of its own, which can be ended: some expressions take for ever.

    Raises:
        CheckpointError: these do.
    """
    if not patterns:
        return {}
    task = json.dumps([patterns, list(names)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _MATCH], input=task, stdout=subprocess.PIPE, text=True, timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{adapter}: {patterns[0]!r:.80} takes more than {_PATIENCE_S} s to be matched with the modules' names: "
            "expected simple expressions, or a list of names"
        ) from None
    return cast(dict[str, str], json.loads(done.stdout))


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _ending_in(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


# ---------------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms; the lists of tokens, scores and types are parallel."""

    model: Literal["llama", "gpt2"]
    """GGUF's name of the algorithm: "llama" is SentencePiece's BPE with byte fallback, "gpt2" is BPE over bytes."""
    pre: str
    """GGUF's name of the rule that splits a text before BPE."""
    tokens: list[str]
    """Perhaps fewer than the embedding has rows."""
    scores: list[float]
    """SentencePiece's; they mean nothing to gpt2."""
    types: list[gguf.TokenType]
    merges: list[str]
    """Of gpt2, the first to be applied first."""
    special_ids: dict[str, int]
    """Of "bos", "eos", "unk", "pad", those that there are."""
    add_bos: bool
    space_prefix: SpacePrefix


def read_vocabulary(language: Path) -> Vocabulary:
    """The tokenizer as transformers applies it, with SentencePiece's scores or BPE's merges.

    Special added tokens become CONTROL, other added tokens (`<seg>` of LISA's kind) USER_DEFINED, as in llama.cpp's
    converter: both get their id from text that is parsed for special tokens, as in transformers.

    Raises:
        CheckpointError: a tokenizer that llama.cpp does not have, or files that contradict each other.
    """
    tokenizer = read_tokenizer(language)
    path = language / "tokenizer.model"
    return _read_sentencepiece(path, tokenizer) if path.is_file() else _read_bpe(language / "tokenizer.json", tokenizer)


def read_tokenizer(language: Path) -> Any:
    """transformers' tokenizer of the language model, as the model was trained with it.

    Raises:
        CheckpointError: transformers cannot read it, or special tokens are empty.
    """
    path, options = language / "tokenizer_config.json", {}
    said = read_json(path) if path.is_file() else {}
    if empty := [name for name in ("bos_token", "eos_token", "unk_token") if said.get(name) == ""]:
        raise CheckpointError(
            f"{path}: {_some(empty)} is an empty text, which is no token{_suggested(language)}. transformers 4 took id "
            "0 for it, unless the training code set the tokens, as LLaVA's and LISA's do."
        )
    # Only transformers 5 writes "backend"; it has "legacy" off, and does not write it.
    if (language / "tokenizer.model").is_file() and not {"legacy", "backend"} & said.keys():
        options["legacy"] = True
        warnings.warn(
            f'{path} does not say "legacy": taken as true, as transformers 4 took it (▁ before every text after a '
            'special token). Write "legacy": true or false there to say which.',
            stacklevel=2,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(language, local_files_only=True, **options)
        tokenizer("a")  # settings of other types show only now
        return tokenizer
    except RecursionError:  # of a special token that the vocabulary does not have
        raise CheckpointError(
            f"{language}: the tokenizer cannot be read: its special tokens are not in its vocabulary"
            f"{_suggested(language)}."
        ) from None
    except BaseException as error:  # transformers raises many kinds, tokenizers Exception itself, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{language}: the tokenizer cannot be read ({in_words(error)}).") from None


def _suggested(language: Path) -> str:
    """What tokenizer_config.json should say, where SentencePiece's model knows it."""
    path = language / "tokenizer.model"
    if not path.is_file():
        return ""
    pieces = _pieces(path)
    ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    tokens = {name: pieces.id_to_piece(token_id) for name, token_id in ids.items() if token_id >= 0}
    return f". Write {json.dumps(tokens)[1:-1]} (those of tokenizer.model) into tokenizer_config.json"


def _pieces(path: Path) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):  # its words are of its own source's lines
        raise CheckpointError(f"{path}: expected a SentencePiece model, found something else. Copy it again.") from None


def _read_sentencepiece(path: Path, tokenizer: Any) -> Vocabulary:
    pieces = _pieces(path)
    tokens, scores, types = [], [], []
    for token_id in range(pieces.vocab_size()):
        tokens.append(pieces.id_to_piece(token_id))
        scores.append(pieces.get_score(token_id))
        types.append(_piece_type(pieces, token_id))
    if types.count(gguf.TokenType.BYTE) != 256:
        raise CheckpointError(f"{path}: no byte fallback: llama.cpp cannot tokenise text with it.")
    for token_id, added in sorted(tokenizer.added_tokens_decoder.items()):
        _refuse_greedy(path, added)
        if token_id < len(tokens) and tokens[token_id] == added.content:
            continue
        _put(tokens, scores, types, token_id, added.content, _added_type(added))
    for token_id in range(len(tokens)):
        if types[token_id] != gguf.TokenType.UNUSED and tokenizer.convert_ids_to_tokens(token_id) != tokens[token_id]:
            raise CheckpointError(
                f"{path}: token {token_id} is {tokens[token_id]!r}, but {tokenizer.convert_ids_to_tokens(token_id)!r} "
                "in the other tokenizer files. Copy tokenizer.model from the model that was trained."
            )
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        scores=scores,
        types=types,
        merges=[],
        special_ids=_special_ids(path, tokenizer),
        # transformers 4 adds BOS unless told otherwise; 5 forgets the setting when it saves, and then adds none.
        add_bos=_adds_bos(path, tokenizer, default=True),
        space_prefix=_space_prefix(path, tokenizer),
    )


def _space_prefix(path: Path, tokenizer: Any) -> SpacePrefix:
    """LLaMA's normalizer and pre-tokenizer do nothing but put ▁ for spaces and, by this scheme, before texts."""
    applied = json.loads(tokenizer.backend_tokenizer.to_str())
    scheme: SpacePrefix = (applied["pre_tokenizer"] or {}).get("prepend_scheme", "never")
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    if applied["normalizer"] is not None or applied["pre_tokenizer"] != metaspace:
        raise CheckpointError(
            f"{path}: expected LLaMA's tokenizer (no normalizer, pre_tokenizer Metaspace), found normalizer "
            f"{applied['normalizer']}, pre_tokenizer {applied['pre_tokenizer']}. "
            'With "tokenizer_class": "LlamaTokenizer" in tokenizer_config.json transformers builds it.'
        )
    return scheme


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        _byte_level(use_regex=False),
    ],
}
"""tokenizer.json's steps by llama.cpp's name for them (src/llama-vocab.cpp): those whose ids were seen to be equal."""


def _read_bpe(path: Path, tokenizer: Any) -> Vocabulary:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: expected it, or SentencePiece's tokenizer.model.")
    applied = json.loads(tokenizer.backend_tokenizer.to_str())
    stored = json.loads(Tokenizer.from_file(str(path)).to_str())
    for part in ("normalizer", "pre_tokenizer", "model"):
        if applied[part] != stored[part]:
            raise CheckpointError(
                f"{path}: transformers does not apply its {part}, but rebuilds it for {type(tokenizer).__name__}. "
                'With "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json it takes the file as it is.'
            )
    model, pre = applied["model"], _pre_tokenizer(path, applied)
    on = {"ignore_merges"} if pre == "llama-bpe" else set()
    for key in ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if bool(model[key]) != (key in on):
            raise CheckpointError(f"{path}: model.{key} is {model[key]!r}, which llama.cpp's {pre} does otherwise.")

    tokens: list[str] = []
    scores: list[float] = []
    types: list[gguf.TokenType] = []
    added = tokenizer.added_tokens_decoder
    alphabet = set(ByteLevel.alphabet())
    for token, token_id in model["vocab"].items():
        if token_id not in added and not alphabet.issuperset(token):
            raise CheckpointError(f"{path}: token {token_id} is {token!r}, which is no string of bytes.")
        _put(tokens, scores, types, token_id, token, gguf.TokenType.NORMAL)
    for token_id, token in added.items():
        _refuse_greedy(path, token)
        _put(tokens, scores, types, token_id, token.content, _added_type(token))
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        scores=scores,
        types=types,
        merges=[" ".join(pair) for pair in model["merges"]],
        special_ids=_special_ids(path, tokenizer),
        add_bos=_adds_bos(path, tokenizer, default=None),
        space_prefix="never",
    )


def _pre_tokenizer(path: Path, applied: dict[str, Any]) -> str:
    """llama.cpp's name of it."""
    found = applied["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in found.get("pretokenizers", [found])
    ]
    name = next((name for name, expected in _PRE_TOKENIZERS.items() if steps == expected), None)
    if name is None:
        raise CheckpointError(
            f"{path}: pre_tokenizer {json.dumps(found, ensure_ascii=False)} is none that can be exported "
            f"({', '.join(_PRE_TOKENIZERS)}). A SentencePiece tokenizer needs its tokenizer.model, which "
            "transformers 5 does not save: copy it from the base model."
        )
    if applied["normalizer"] is not None:
        raise CheckpointError(f"{path}: normalizer {applied['normalizer']['type']}, which llama.cpp's {name} has not.")
    if applied["model"]["type"] != "BPE":
        raise CheckpointError(f"{path}: expected a model of type 'BPE', found {applied['model']['type']!r}.")
    return name


def _special_ids(path: Path, tokenizer: Any) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    if ids["eos"] is None:  # llama.cpp would take some token for it
        raise CheckpointError(f"{path}: the tokenizer has no EOS token; name the model's: eos_token.")
    return {kind: token_id for kind, token_id in ids.items() if token_id is not None}


def _adds_bos(path: Path, tokenizer: Any, default: bool | None) -> bool:
    """Whether texts begin with BOS; tokenizer_config.json, or `default` where it is silent, must agree."""
    ids = tokenizer("a").input_ids
    if not ids:
        raise CheckpointError(f"{path}: the tokenizer makes no token of a text.")
    if ids[-1] == tokenizer.eos_token_id:
        raise CheckpointError(f"{path}: the tokenizer ends every text with EOS; set add_eos_token to false.")
    add_bos: bool = ids[0] == tokenizer.bos_token_id
    said = read_json(path.with_name("tokenizer_config.json")).get("add_bos_token", default)
    if said not in (None, add_bos):
        raise CheckpointError(
            f"{path}: the tokenizer adds {'a' if add_bos else 'no'} BOS, which tokenizer_config.json contradicts. "
            "Load it with add_bos_token=True and save it again; for a model trained without BOS write "
            '"add_bos_token": false into tokenizer_config.json.'
        )
    return add_bos


def _piece_type(pieces: SentencePieceProcessor, token_id: int) -> gguf.TokenType:
    if pieces.is_unknown(token_id):
        return gguf.TokenType.UNKNOWN
    if pieces.is_control(token_id):
        return gguf.TokenType.CONTROL
    if pieces.is_unused(token_id):
        return gguf.TokenType.UNUSED
    if pieces.is_byte(token_id):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _refuse_greedy(path: Path, token: Any) -> None:
    if token.lstrip or token.rstrip or token.single_word:
        raise CheckpointError(
            f"{path}: {token.content} has lstrip, rstrip or single_word on, which llama.cpp does not know."
        )


def _added_type(token: Any) -> gguf.TokenType:
    return gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED


def _put(
    tokens: list[str],
    scores: list[float],
    types: list[gguf.TokenType],
    token_id: int,
    token: str,
    kind: gguf.TokenType,
) -> None:
    """Set a token that SentencePiece does not know, after as many unused ones as its id asks for."""
    if not 0 <= token_id < _MOST_TOKENS:
        raise CheckpointError(f"the tokenizer: {token!r:.80} has id {token_id}, expected 0 to {_MOST_TOKENS - 1}.")
    while len(tokens) <= token_id:
        _append_unused(tokens, scores, types)
    tokens[token_id], scores[token_id], types[token_id] = token, -1000.0, kind


def _append_unused(tokens: list[str], scores: list[float], types: list[gguf.TokenType]) -> None:
    tokens.append(f"[PAD{len(tokens)}]")
    scores.append(-10000.0)
    types.append(gguf.TokenType.UNUSED)


# ---------------------------------------------------------------------------------------------- GGUF


def _write(target: Path, config: Config, vocabulary: Vocabulary, tensors: list[_Tensor], *, half: bool) -> None:
    """All of the header first, then the tensors one by one. Matrices are F16 or F32, vectors F32."""
    writer = gguf.GGUFWriter(target, "llama")
    _add_hyperparameters(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, vocabulary, rows=tensors[0].shape[0])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    types = [np.dtype(np.float16 if half and len(tensor.shape) == 2 else np.float32) for tensor in tensors]
    for tensor, dtype in zip(tensors, types, strict=True):
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        assert name is not None  # _read_base lets only LLaMA's tensors through
        writer.add_tensor_info(name, tensor.shape, dtype, math.prod(tensor.shape) * dtype.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, dtype in zip(tensors, types, strict=True):
            with np.errstate(over="ignore"):  # told apart below
                array = _permute(tensor.name, tensor.read(), config).astype(dtype)
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"{tensor.name} has values that {dtype} cannot hold (NaN, infinite or too large)."
                )
            writer.write_tensor_data(np.ascontiguousarray(array))
    finally:
        writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, rows: int) -> None:
    """Token list of exactly `rows` entries: what the embedding has beyond the tokenizer is UNUSED."""
    tokens, scores, types = list(vocabulary.tokens), list(vocabulary.scores), list(vocabulary.types)
    if len(tokens) > rows:
        raise CheckpointError(f"the tokenizer has {len(tokens)} tokens, the embedding {rows} rows. Resize the model.")
    while len(tokens) < rows:
        _append_unused(tokens, scores, types)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(scores)
    for kind, token_id in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_space_prefix(vocabulary.space_prefix != "never")


def _permute(name: str, array: Array, config: Config) -> Array:
    """Rows of q and k from transformers' RoPE (halves of a head rotate together) to llama.cpp's (neighbours do)."""
    if "self_attn.q_proj." in name:
        heads = config.num_attention_heads
    elif "self_attn.k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return array
    return array.reshape(heads, 2, config.head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _quantize(source: Path, target: Path, ftype: int) -> None:
    params = llama.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = processors()
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise CheckpointError(f"llama.cpp could not quantize {source}: {llama_messages()}")


def _some(names: Any) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
