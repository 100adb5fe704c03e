"""A tiny random language model as a checkpoint's language/ and adapter/, made by transformers, peft, SentencePiece."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

torch.set_num_threads(1)  # more are slower on models as small as this

SEG = "<seg>"
WIDTH = 256  # a multiple of 256, so that K-quants apply
SENTENCES = [
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful answers.",
    "USER: Would you identify any irregularities present on the surface of the screw? ASSISTANT: Yes.",
    "Yes. There is a scratch at the upper left of the gear. Check the tool.",
    "No. The tile shows no irregularities.",
]


def write_language(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    spare_rows: int = 3,
    write_tokenizer: Callable[[Path], Any] | None = None,
    **config: Any,
) -> LlamaForCausalLM:
    """Write a LlamaForCausalLM with tokenizer (added token `<seg>`, `spare_rows` embedding rows that it lacks)."""
    tokenizer = (write_tokenizer or write_sentencepiece)(folder)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + spare_rows,
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.08,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings | config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_sentencepiece(folder: Path) -> LlamaTokenizer:
    """LLaMA's kind: SentencePiece BPE, byte fallback, no normalisation, a space before the text; plus `<seg>`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.add_tokens([AddedToken(SEG, special=False, normalized=False)])
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_smollm(folder: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's kind: BPE over bytes, digits apart, no BOS; plus `<seg>`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return _write_bpe(folder, tokenizer)


def write_llama_bpe(folder: Path) -> PreTrainedTokenizerFast:
    """LLaMA 3's kind: BPE over bytes, up to three digits together, whole words before merges, BOS; plus `<seg>`."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    bytes_alone = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(split), "isolated"), bytes_alone])
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return _write_bpe(folder, tokenizer)


def _write_bpe(folder: Path, tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    unk, bos, eos = special
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos)
    saved.add_tokens([AddedToken(SEG, special=False, normalized=False)])
    saved.save_pretrained(folder)
    return saved


def write_adapter(
    folder: Path, language: Path | None = None, *, rows: int | None = None, seed: int = 1, **lora: Any
) -> None:
    """Write a PEFT LoRA of `language` (default: the folder of that name beside it).

    Every tensor is random (peft starts B at zero); `rows` resizes the vocabulary first.
    """
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    settings |= {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}
    base = LlamaForCausalLM.from_pretrained(language or folder.parent / "language", dtype=torch.float32)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if rows:
            base.resize_token_embeddings(rows)
        model = get_peft_model(base, LoraConfig(**settings | lora))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
