"""What a language model's file says of itself, without llama.cpp, which ends its process at some damaged files.

The process that screens never imports llama.cpp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from vmad_edge.runtime.bundle import Conversation, Language
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.headers import read_gguf

_TAKEN_WHOLE = (2, 3, 4)
"""GGUF's types of tokens that are found in a text before it is cut: unknown, control, user-defined."""


def check_model(gguf: Path, language: Language) -> None:
    """The file's header is that of the model which the manifest describes.

    Raises:
        BundleError: it is another's, or none.
    """
    header = read_gguf(gguf)
    family, tokens = header.metadata.get("general.architecture"), header.tokens
    width, context = (header.metadata.get(f"{family}.{name}") for name in ("embedding_length", "context_length"))
    if (len(tokens), width) != (language.vocabulary, language.width):
        raise BundleError(
            f"{gguf}: vocabulary {len(tokens)} and width {width}, but the manifest says {language.vocabulary} and "
            f"{language.width}. Export the bundle again."
        )
    if not isinstance(context, int) or context < language.context_length:
        raise BundleError(
            f"{gguf}: context {context}, but the manifest says {language.context_length}. Export the bundle again."
        )
    named = [token for token in tokens if token]
    if len(set(named)) < len(named):
        raise BundleError(f"{gguf}: expected every token once, found one twice. Export the bundle again.")
    seg = tokens[language.seg_token_id].decode("utf-8", "replace")
    if seg != language.seg_token or header.token_types[language.seg_token_id] not in _TAKEN_WHOLE:
        raise BundleError(
            f"{gguf}: token {language.seg_token_id} is {seg!r}, but the manifest says {language.seg_token!r}, taken "
            "whole. Export the bundle again."
        )


def prompt_lengths(gguf: Path, language: Language, conversation: Conversation, object: str) -> tuple[int, int, int]:
    """Tokens before and after `<image>` of the default question about `object`, and of the short answer.

    llama.cpp counts them, in a process of its own; it reads no weights.

    Raises:
        BundleError: it cannot read the file; the question is one that the model cannot be asked.
    """
    asked = [str(gguf), language.model_dump_json(), conversation.model_dump_json(), object]
    counted = subprocess.run(
        [sys.executable, "-m", "vmad_edge.runtime.stages.language", *asked],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if counted.returncode:
        said = (counted.stderr.strip().splitlines() or ["it says nothing"])[-1]
        if counted.returncode > 0:
            raise BundleError(said)
        where = said.rpartition("/")[2]
        raise BundleError(
            f"{gguf}: llama.cpp ends with signal {-counted.returncode} ({where}). Export the bundle again."
        )
    before, after, short = json.loads(counted.stdout)
    return before, after, short
