"""Language stage: prompt and visual tokens → P(yes), the answer's text, h_seg. llama.cpp's low-level API, no torch.

One prompt is three decodes: the ids before `<image>` (kept as KV between answers), the visual tokens as embeddings,
the ids after `<image>`. llama.cpp makes every token of a batch an output once embeddings are on, so they are on only
from the last prompt token onward.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import ArrayLike, NDArray

from vmad_edge.kernels.processors import processors
from vmad_edge.runtime import bundle
from vmad_edge.runtime.engines import Stopped, ran_out_of_memory
from vmad_edge.runtime.errors import BundleError, VmadError
from vmad_edge.runtime.stages.vocabulary import check_model

Array = NDArray[np.float32]

_PREFILL_BATCH = 128
"""Tokens: between two batches of a prompt a deadline is heeded."""
_KEPT, _WORKING = 0, 1  # llama.cpp sequences: the prompt's part before <image>, and the answer at hand
_KV_TYPES = {"f32": llama.GGML_TYPE_F32, "f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}
_FLASH_ATTENTION = {
    None: llama.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_SPECIAL = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_USER_DEFINED | llama.LLAMA_TOKEN_ATTR_UNKNOWN

# Where ▁ goes is for the manifest to say: llama.cpp's own way is none of transformers'. An empty entry ends the list.
_NO_SPACE_PREFIX = (llama.llama_model_kv_override * 2)(
    llama.llama_model_kv_override(
        tag=llama.LLAMA_KV_OVERRIDE_TYPE_BOOL,
        key=b"tokenizer.ggml.add_space_prefix",
        value=llama.llama_model_kv_override_value(val_bool=False),
    )
)

os.environ["GGML_NO_BACKTRACE"] = "1"  # where llama.cpp gives up it starts a debugger otherwise
_messages: deque[str] = deque(maxlen=8)


def _keep_message(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level >= 3:  # GGML_LOG_LEVEL_WARN
        _messages.append(text.decode("utf-8", "replace").strip())


# llama.cpp writes to stderr otherwise; its words are wanted only in an error.
_log_callback = llama.llama_log_callback(_keep_message)
llama.llama_log_set(_log_callback, ctypes.c_void_p(0))


def llama_messages() -> str:
    """llama.cpp's latest warnings and errors, for an error message; forgotten afterwards."""
    text = "; ".join(_messages)
    _messages.clear()
    return text


@dataclass(frozen=True)
class Answer:
    """What the language model said about one frame."""

    text: str
    """Without the seg token, stripped."""
    p_yes: float
    h_seg: Array | None
    """[1,H], after the final norm; None if P(yes) < mask_from or the answer was stopped before `<seg>`."""
    token_ids: tuple[int, ...]
    """All ids of the answer, `<seg>` included."""
    seg_forced: bool
    """The answer reached max_new_tokens without `<seg>`."""
    stopped: str | None
    """The reason that `stop` gave."""
    timings_ms: dict[str, float]
    """"prefill" (up to P(yes)) and "decode"."""


def _model_params() -> Any:
    """What every load of a model begins with."""
    params = llama.llama_model_default_params()
    # Repacked weights. llama.cpp built for this very processor (-march=native, as pip builds it) would use AMX where
    # it is, and crashes on Q8_0.
    params.use_extra_bufts = False
    params.kv_overrides = _NO_SPACE_PREFIX
    return params


@contextmanager
def _vocabulary(gguf: Path) -> Iterator[Any]:
    params = _model_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(os.fsencode(gguf), params)
    if not model:
        raise BundleError(f"{gguf}: llama.cpp cannot load it ({llama_messages()}). Export the bundle again.")
    try:
        yield llama.llama_model_get_vocab(model)
    finally:
        llama.llama_model_free(model)


def _token(vocab: Any, token_id: int) -> str:
    text: bytes = llama.llama_vocab_get_text(vocab, token_id)
    return text.decode()


class Tokenizer:
    """Text → ids and back, as transformers makes them, and the conversation's prompt. `vocab` is llama.cpp's."""

    def __init__(self, vocab: Any, language: bundle.Language, conversation: bundle.Conversation) -> None:
        self._vocab = vocab
        self._bpe = llama.llama_vocab_type(vocab) == llama.LLAMA_VOCAB_TYPE_BPE
        ids = range(language.vocabulary)
        self._special = {_token(vocab, i) for i in ids if llama.llama_vocab_get_attr(vocab, i) & _SPECIAL}
        self._prefixed = _prefixed(self._special, language.space_prefix)
        self._before, self._after = conversation.template.split("<image>")

    def prompt_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and after `<image>`, as LLaVA makes them: each part tokenised apart, BOS before the first.

        Raises:
            VmadError: the question holds a special token of this model, or cannot be written as UTF-8.
        """
        for token in sorted(self._special | {"<image>"}):
            if token in question:
                raise VmadError(f"the question holds {token!r}, which is a special token of the model. Leave it out.")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise VmadError(f"the question is not text: {error}.") from None
        if self._bpe and b"".join(map(self.piece, self.tokenize(question))) != question.encode():
            raise VmadError("the question holds a character that the model has no token for. Use plain text.")
        before, after = (part.replace("{question}", question) for part in (self._before, self._after))
        return self.tokenize(before, first=True), self.tokenize(after)

    def tokenize(self, text: str, *, first: bool = False) -> list[int]:
        """Ids; BOS, where the model has it, only with `first`."""
        data = self._prefixed.sub(r"\1 ", text).encode()
        ids = (ctypes.c_int32 * (len(data) + 1))()  # at most one a byte, and BOS
        n = llama.llama_tokenize(self._vocab, data, len(data), ids, len(ids), first, True)
        return ids[:n]

    def piece(self, token_id: int) -> bytes:
        """The token's text: "" for control tokens, one byte for byte tokens."""
        buffer = ctypes.create_string_buffer(256)
        n = llama.llama_token_to_piece(self._vocab, token_id, buffer, len(buffer), 0, False)
        return buffer.raw[:n]


class LanguageModel:
    """The bundle's GGUF in llama.cpp. A context manager. Not thread-safe: one call at a time.

    Args:
        gguf: the model file.
        language: what the manifest says about it; a file that differs is refused.
        conversation: the manifest's template and short answer.
        threads: of llama.cpp; None: one less than the processors allowed to the process. Its threads spin while they
            wait for each other: one that has to share its processor makes all of them slow.
        gpu: put the manifest's `gpu_layers` on the GPU; else it is left alone.
        exact: F32 KV and no flash attention, for parity with the source (F16 KV costs about 1e-3 relative). Else
            as the manifest says.

    Raises:
        BundleError: a file that llama.cpp cannot load, or that is not the one the manifest describes.
        VmadError: more than this machine's memory, or its GPU's, holds.
    """

    def __init__(
        self,
        gguf: Path,
        language: bundle.Language,
        conversation: bundle.Conversation,
        *,
        threads: int | None = None,
        gpu: bool = False,
        exact: bool = False,
    ) -> None:
        self._language = language
        self._model = self._context = None
        self._kept: list[int] | None = None
        self._prompt: tuple[list[int], bytes, list[int]] | None = None
        llama.llama_backend_init()
        params = _model_params()
        params.n_gpu_layers = language.llama.gpu_layers if gpu else 0
        if params.n_gpu_layers != -1:
            _refuse_larger_than_memory(gguf)
        self._model = llama.llama_model_load_from_file(os.fsencode(gguf), params)
        if not self._model:
            said = llama_messages()
            if ran_out_of_memory(said):
                raise VmadError(f"{gguf}: no memory left for it ({said}). {_SMALLER}")
            raise BundleError(f"{gguf}: llama.cpp cannot load it ({said}). Export the bundle again.")
        try:
            self._vocab = llama.llama_model_get_vocab(self._model)
            check_model(gguf, language)
            self._context = self._open_context(threads or max(1, processors() - 1), gpu, exact)
        except BaseException:
            self.close()
            raise
        self._tokenizer = Tokenizer(self._vocab, language, conversation)
        self._yes_no = language.yes_token_ids, language.no_token_ids
        self._end_ids = [i for i in range(language.vocabulary) if llama.llama_vocab_is_eog(self._vocab, i)]
        self._short_ids = self._tokenizer.tokenize(conversation.short_answer)

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free llama.cpp's memory. May be called again."""
        if self._context:
            llama.llama_free(self._context)
        if self._model:
            llama.llama_model_free(self._model)
        self._model = self._context = None

    def prompt_ids(self, question: str) -> tuple[list[int], list[int]]:
        """See Tokenizer.

        Raises:
            VmadError: see Tokenizer.
            ValueError: the model is closed.
        """
        if self._model is None:
            raise ValueError("the language model is closed")
        return self._tokenizer.prompt_ids(question)

    def answer(
        self,
        visual_tokens: ArrayLike,
        question: str,
        *,
        mode: bundle.Answer,
        mask_from: float = 0.5,
        on_p_yes: Callable[[float], None] = lambda p_yes: None,
        on_text: Callable[[str], None] = lambda text: None,
        stop: Callable[[], str | None] = lambda: None,
    ) -> Answer:
        """Ask `question` about the part that `visual_tokens` show; greedy decoding.

        P(yes) = Σp(yes ids) / (Σp(yes ids) + Σp(no ids)) at the first answer token.
        `full`: decode until `<seg>`; end-of-text is banned until then, and `<seg>` is forced as the last of
        max_new_tokens. `short`: if P(yes) ≥ mask_from, the manifest's short answer is taken as given and
        `<seg>` follows.
        After an answer to the same question about the same visual tokens the prompt is there, but for its last token.
        h_seg is the state of the step whose logits emit `<seg>` (LISA, model/LISA.py) or of `<seg>` itself, as the
        manifest says.

        Args:
            visual_tokens: [K,H], float32.
            question: the whole question, the object's name filled in.
            mask_from: the P(yes) from which there is a mask, and so an h_seg; parity wants one on every image.
            on_p_yes: gets P(yes) after the prefill.
            on_text: gets the answer's text in pieces as it grows; together they are `Answer.text`.
            stop: asked before each step; a reason ends the answer there.

        Raises:
            Stopped: `stop` gave a reason before P(yes) was known.
            VmadError: the question is refused (see prompt_ids) or too long for the context.
            BundleError: the model's numbers are not finite.
            ValueError: visual_tokens of another shape, or not finite.
        """
        start = time.perf_counter()
        before, after = self.prompt_ids(question)
        visual = self._check_visual(visual_tokens)
        position = self._prefill(before, visual, after, stop)
        p_yes = self._p_yes()
        prefilled = time.perf_counter()
        on_p_yes(p_yes)

        text, ids = _Text(on_text), list[int]()
        seg, seg_forced = self._language.seg_token_id, False
        stopped = stop()
        if mode == "short" and stopped is None and p_yes >= mask_from:
            position = self._decode(self._short_ids, position, outputs=True)
            for token in self._short_ids:
                text.add(self._tokenizer.piece(token))
            ids = [*self._short_ids, seg]
        while mode == "full" and stopped is None:
            token = self._greedy()
            if token != seg and len(ids) + 1 == self._language.max_new_tokens:
                token, seg_forced = seg, True
            ids.append(token)
            if token == seg:
                break
            position = self._decode([token], position, outputs=True)
            text.add(self._tokenizer.piece(token))
            stopped = stop()

        h_seg = None
        if p_yes >= mask_from and ids and ids[-1] == seg:
            if self._language.seg_state == "token":
                self._decode([seg], position, outputs=True)
            h_seg = self._state(-1)[None]
        timings_ms = {"prefill": (prefilled - start) * 1e3, "decode": (time.perf_counter() - prefilled) * 1e3}
        return Answer(text.end(), p_yes, h_seg, tuple(ids), seg_forced, stopped, timings_ms)

    def hidden_states(
        self, visual_tokens: ArrayLike, question: str, answer_ids: Sequence[int] = ()
    ) -> tuple[Array, Array]:
        """States after the final norm [T,H] and logits [T,V] at every position: prompt, visual tokens, `answer_ids`.

        Raises:
            VmadError, ValueError: as answer.
        """
        before, after = self.prompt_ids(question)
        visual = self._check_visual(visual_tokens)
        self._check_length(len(before), len(after), new_tokens=len(answer_ids))
        self._forget()
        position, states, logits = 0, [], []
        for part in (before, visual, [*after, *answer_ids]):
            position = self._decode(part, position, outputs=True)
            states += [self._state(i) for i in range(len(part))]
            logits += [self._logits(i) for i in range(len(part))]
        return np.stack(states), np.stack(logits)

    # ------------------------------------------------------------------------------------------ prompt

    def _prefill(self, before: list[int], visual: Array, after: list[int], stop: Callable[[], str | None]) -> int:
        """Decode the prompt, with outputs at its last position alone. Returns the next position.

        The prompt of the answer before is there but for that position: a full answer may follow a short one.
        """
        self._check_length(len(before), len(after), max(self._language.max_new_tokens, len(self._short_ids) + 1))
        memory = llama.llama_get_memory(self._context)
        prompt, last = (before, visual.tobytes(), after), len(before) + len(visual) + len(after) - 1
        if prompt == self._prompt:
            llama.llama_memory_seq_rm(memory, _WORKING, last, -1)
        else:
            self._prompt = None
            if before != self._kept:
                self._forget()
                self._decode_in_batches(before, 0, stop, _KEPT)
                self._kept = before
            llama.llama_memory_seq_rm(memory, _WORKING, -1, -1)
            llama.llama_memory_seq_cp(memory, _KEPT, _WORKING, 0, len(before))
            position = self._decode_in_batches(visual if after else visual[:-1], len(before), stop)
            self._decode_in_batches(after[:-1], position, stop)
            self._prompt = prompt
        return self._decode(after[-1:] or visual[-1:], last, outputs=True)

    def _check_visual(self, visual_tokens: ArrayLike) -> Array:
        visual = np.ascontiguousarray(visual_tokens, np.float32)
        expected = (self._language.visual_tokens, self._language.width)
        if visual.shape != expected:
            raise ValueError(f"visual_tokens: expected {expected}, found {visual.shape}")
        if not np.isfinite(visual).all():
            raise ValueError("visual_tokens: expected finite numbers, found NaN or infinity")
        return visual

    def _check_length(self, before: int, after: int, new_tokens: int) -> None:
        visual, context = self._language.visual_tokens, self._language.context_length
        if (total := before + visual + after + new_tokens) > context:
            raise VmadError(
                f"the prompt is too long: {before + after} text tokens, {visual} visual tokens and {new_tokens} for "
                f"the answer are {total}, and the model's context holds {context}. Ask a shorter question."
            )

    # ------------------------------------------------------------------------------------------ outputs

    def _p_yes(self) -> float:
        logits = self._logits(-1).astype(np.float64)
        yes, no = (np.logaddexp.reduce(logits[list(ids)]) for ids in self._yes_no)
        p_yes = float(np.exp(yes - np.logaddexp(yes, no)))
        if np.isnan(p_yes):
            raise BundleError("the language model's logits are not finite. Export the bundle again.")
        return p_yes

    def _greedy(self) -> int:
        logits = self._logits(-1)
        logits[self._end_ids] = -np.inf
        return int(logits.argmax())

    def _state(self, index: int) -> Array:
        """[H] at `index` of the latest decode."""
        pointer = llama.llama_get_embeddings_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, (self._language.width,)).copy()

    def _logits(self, index: int) -> Array:
        """[V] at `index` of the latest decode."""
        pointer = llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, (self._language.vocabulary,)).copy()

    # ------------------------------------------------------------------------------------------ llama.cpp

    def _open_context(self, threads: int, gpu: bool, exact: bool) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = self._language.context_length
        params.n_seq_max = 2
        params.kv_unified = True  # the kept sequence and its copy share cells
        params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        params.n_threads = params.n_threads_batch = threads
        params.offload_kqv = params.op_offload = gpu
        settings = bundle.Llama(kv_type="f32", flash_attention=False) if exact else self._language.llama
        params.flash_attn_type = _FLASH_ATTENTION[settings.flash_attention]
        params.type_k = params.type_v = _KV_TYPES[settings.kv_type]
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise VmadError(
                f"llama.cpp cannot open a context of {self._language.context_length} tokens ({llama_messages()}). "
                f"{_SMALLER}"
            )
        return context

    def _decode(self, part: list[int] | Array, position: int, *, outputs: bool, sequence: int = _WORKING) -> int:
        """Append token ids, or embeddings [n,H], to a sequence; returns the next position.

        With `outputs` every position of `part` has its state and logits afterwards, without it none has.
        """
        n = len(part)
        if n == 0:
            return position
        llama.llama_set_embeddings(self._context, outputs)
        batch = llama.llama_batch_init(n, self._language.width if isinstance(part, np.ndarray) else 0, 1)
        try:
            batch.n_tokens = n
            if isinstance(part, np.ndarray):
                ctypes.memmove(batch.embd, part.ctypes.data, part.nbytes)
            for i in range(n):
                if isinstance(part, list):
                    batch.token[i] = part[i]
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = outputs
            if status := llama.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {status} ({llama_messages()})")
        finally:
            llama.llama_batch_free(batch)
        return position + n

    def _decode_in_batches(
        self, part: list[int] | Array, position: int, stop: Callable[[], str | None], sequence: int = _WORKING
    ) -> int:
        """As _decode, without outputs; `stop` is asked before each batch."""
        for start in range(0, len(part), _PREFILL_BATCH):
            if reason := stop():
                raise Stopped(reason)
            batch = part[start : start + _PREFILL_BATCH]
            position = self._decode(batch, position, outputs=False, sequence=sequence)
        return position

    def _forget(self) -> None:
        self._kept = self._prompt = None
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)


def _prefixed(special: set[str], where: bundle.SpacePrefix) -> re.Pattern[str]:
    """What a ▁ follows: a text's beginning, or a special token, with more text than one, and no space, behind it.

    tokenizers' Metaspace by its prepend_scheme.
    """
    token = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))  # the longest that fits
    place = {"first": r"(\A)", "always": rf"(\A|{token})", "never": "((?!))"}[where]
    return re.compile(rf"{place}(?![ ▁]|{token}|\Z)")


_SMALLER = (
    "Stop what else uses memory, or export a smaller one: --llm q4_k_m, or max_prompt_tokens, llama.kv_type or (on a "
    "GPU) llama.gpu_layers in the checkpoint's config.json"
)


def _refuse_larger_than_memory(gguf: Path) -> None:
    """llama.cpp would map it, and the machine would stand still, reading it over and over."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if gguf.exists() and (size := gguf.stat().st_size) > memory:
        raise VmadError(
            f"{gguf} has {size / 2**30:.1f} GiB and this machine {memory / 2**30:.1f} GiB of memory. {_SMALLER}."
        )


def placement(language: bundle.Language, gpu: bool) -> str:
    """Where LanguageModel(…, gpu=gpu) computes, for people."""
    if not gpu or language.llama.gpu_layers == 0:
        return "llama.cpp, CPU"
    if not llama.llama_supports_gpu_offload():
        return "llama.cpp, CPU: this llama-cpp-python was built without CUDA"
    layers = "all" if language.llama.gpu_layers == -1 else language.llama.gpu_layers
    return f"llama.cpp, {layers} layers on the GPU"


class _Text:
    """The answer's text as it grows. Whole characters only; outer white space stays out."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._raw = self._shown = ""

    def add(self, piece: bytes) -> None:
        self._show(self._decoder.decode(piece))

    def end(self) -> str:
        self._show(self._decoder.decode(b"", final=True))
        return self._shown

    def _show(self, text: str) -> None:
        self._raw += text
        shown = self._raw.strip()
        if new := shown[len(self._shown) :]:
            self._on_text(new)
        self._shown = shown


def _print_prompt_lengths(gguf: str, language: str, conversation: str, object: str) -> None:
    """For vocabulary.prompt_lengths."""
    asked, described = (
        bundle.Conversation.model_validate_json(conversation),
        bundle.Language.model_validate_json(language),
    )
    with _vocabulary(Path(gguf)) as vocab:
        tokenizer = Tokenizer(vocab, described, asked)
        before, after = tokenizer.prompt_ids(asked.question.replace("{object}", object))
        print(json.dumps([len(before), len(after), len(tokenizer.tokenize(asked.short_answer))]))


if __name__ == "__main__":
    try:
        _print_prompt_lengths(*sys.argv[1:])
    except VmadError as _error:
        sys.exit(str(_error))
