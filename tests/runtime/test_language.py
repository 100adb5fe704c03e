"""The language stage against transformers: token ids, hidden states, greedy answers, P(yes), h_seg."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_language import SEG, WIDTH, write_adapter, write_language, write_llama_bpe, write_sentencepiece, write_smollm
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, LlamaForCausalLM, LlamaTokenizer

from vmad_edge.export.language import export_language, read_vocabulary
from vmad_edge.runtime.bundle import Conversation, Language, Llama
from vmad_edge.runtime.engines import Stopped
from vmad_edge.runtime.errors import BundleError, VmadError
from vmad_edge.runtime.stages import language
from vmad_edge.runtime.stages.language import LanguageModel, placement

TEMPLATE = "A chat. USER: <image>\n{question} ASSISTANT:"
QUESTION = "Would you identify any irregularities on the surface of the screw?"
VISUAL = np.random.default_rng(0).standard_normal((7, WIDTH), dtype=np.float32) * 0.1


def conversation(template: str = TEMPLATE, short_answer: str = "Yes") -> Conversation:
    return Conversation(template=template, question="Is the {object} good?", short_answer=short_answer)


@dataclass
class Source:
    """The trained model in transformers, and what the manifest says about its export."""

    model: LlamaForCausalLM
    tokenizer: Any
    gguf: Path
    language: Language

    @staticmethod
    def write(folder: Path, **changes: Any) -> Source:
        write_language(folder / "language", **changes)
        write_adapter(folder / "adapter", modules_to_save=None)
        return Source.read(folder)

    @staticmethod
    def read(folder: Path) -> Source:
        base = LlamaForCausalLM.from_pretrained(folder / "language", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(folder / "language")
        language = Language(
            width=WIDTH,
            visual_tokens=len(VISUAL),
            context_length=256,
            vocabulary=model.config.vocab_size,
            space_prefix=read_vocabulary(folder / "language").space_prefix,
            quantization="f32",
            seg_token=SEG,
            seg_token_id=tokenizer.convert_tokens_to_ids(SEG),
            seg_state="emitting",
            yes_token_ids=(300, 301),
            no_token_ids=(302,),
            max_new_tokens=24,
        )
        export_language(folder / "language", folder / "adapter", folder / "llm.gguf", "f32")
        return Source(model, tokenizer, folder / "llm.gguf", language)

    def open(self, talk: Conversation | None = None, *, exact: bool = True, **changes: Any) -> LanguageModel:
        language = self.language.model_copy(update=changes)
        return LanguageModel(self.gguf, language, talk or conversation(), threads=1, exact=exact)

    def prompt_ids(self, template: str, question: str) -> tuple[list[int], list[int]]:
        """LLaVA's tokenizer_image_token: every part apart, BOS before the first only."""
        before, after = (part.replace("{question}", question) for part in template.split("<image>"))
        return self.tokenizer(before).input_ids, self.tokenizer(after, add_special_tokens=False).input_ids

    def run(self, answer_ids: list[int]) -> tuple[Tensor, Tensor]:
        """States after the final norm and logits of prompt, VISUAL and `answer_ids`."""
        before, after = self.prompt_ids(TEMPLATE, QUESTION)
        embed = self.model.get_input_embeddings()
        parts = [embed(torch.tensor(before)), torch.from_numpy(VISUAL), embed(torch.tensor(after + answer_ids).long())]
        with torch.no_grad():
            out = self.model(inputs_embeds=torch.cat(parts)[None], output_hidden_states=True)
        return out.hidden_states[-1][0], out.logits[0].double()

    def answer(self, length: int, banned: list[int]) -> tuple[list[int], Tensor, Tensor]:
        """Greedy ids up to `<seg>` or `length`, and each step's state and logits."""
        ids: list[int] = []
        while len(ids) < length and self.language.seg_token_id not in ids:
            states, logits = self.run(ids)
            logits[-1, banned] = -torch.inf
            ids.append(int(logits[-1].argmax()))
        return ids, states[-len(ids) :], logits[-len(ids) :]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model whose greedy answer would end in EOS at its third step and, past that, emits `<seg>` at its sixth."""
    folder = tmp_path_factory.mktemp("source")
    source = Source.write(folder)
    source.model.lm_head.weight.data[3:259] = 0  # no byte tokens, of which an untrained model makes no text
    for step, token in ((6, source.language.seg_token_id), (3, source.tokenizer.eos_token_id)):
        _, states, logits = source.answer(step, banned=[source.tokenizer.eos_token_id])
        row = states[-1] * (logits[-1].max() + 0.5) / states[-1].square().sum()
        source.model.lm_head.weight.data[token] = row
    weights = load_file(folder / "language" / "model.safetensors")
    weights["lm_head.weight"] = source.model.lm_head.weight.data
    save_file(weights, folder / "language" / "model.safetensors", metadata={"format": "pt"})
    return Source.read(folder)


def relative_error(found: np.ndarray, expected: Tensor) -> float:
    right = expected.numpy()
    return float(np.abs(found - right).max() / np.abs(right).max())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="grouped queries"),
        pytest.param({"num_key_value_heads": 4}, id="as many key heads as query heads"),
        pytest.param({"head_dim": 32}, id="heads narrower than the width"),
        pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
        pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, id="another RoPE base"),
        pytest.param({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, id="linear RoPE"),
    ],
)
def test_hidden_states_equal_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    source = Source.write(tmp_path, **config)
    answer_ids = [300, 17, source.language.seg_token_id]
    with source.open() as model:
        states, logits = model.hidden_states(VISUAL, QUESTION, answer_ids)
    expected_states, expected_logits = source.run(answer_ids)
    assert relative_error(states, expected_states) <= 1e-5
    assert relative_error(logits, expected_logits) <= 1e-5


QUESTIONS = [
    pytest.param(QUESTION, id="plain"),
    pytest.param("", id="empty"),
    pytest.param("Is  the   screw good?", id="double spaces"),
    pytest.param(" Is it good? ", id="outer spaces"),
    pytest.param("First line\nsecond\n\n\tthird", id="lines and a tab"),
    pytest.param("Schraube M8×40 défectueuse? 螺丝有缺陷吗", id="other scripts"),
    pytest.param("a 😀 and 👩‍🔧 part", id="emoji"),
    pytest.param("▁under ▁ score", id="SentencePiece's own space"),
    pytest.param("<0x0A> [INST] {object} <s", id="almost special"),
    pytest.param("e\u0301 is not \u00e9, ﬁ is not fi", id="not normalised"),
    pytest.param("nul \x00 and \u200b", id="invisible"),
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_prompt_ids_equal_transformers(source: Source, question: str) -> None:
    before, after = source.prompt_ids(TEMPLATE, question)
    assert before[0] == source.tokenizer.bos_token_id and source.tokenizer.bos_token_id not in after
    with source.open() as model:
        assert model.prompt_ids(question) == (before, after)


@pytest.fixture(scope="module", params=[write_smollm, write_llama_bpe])
def bpe(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Source:
    return Source.write(tmp_path_factory.mktemp("bpe"), write_tokenizer=request.param)


BPE_TEMPLATE = "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def bpe_model(bpe: Source) -> Iterator[LanguageModel]:
    with bpe.open(conversation(BPE_TEMPLATE)) as model:
        yield model


@pytest.mark.parametrize(
    "question",
    [
        *QUESTIONS,
        pytest.param("12345 pieces, 3.3 and 33..3 ½ ٣ ²", id="digits"),
        pytest.param("We'll see it's THE INSPECTOR'S, they'RE 'ſ", id="contractions"),
        pytest.param("\r\n \r\n\n  \u00a0\u3000 x  ", id="white space"),
        pytest.param("under_score(s) != {'a': [1]};;;...", id="punctuation"),
    ],
)
def test_prompt_ids_of_bpe_equal_transformers(bpe: Source, bpe_model: LanguageModel, question: str) -> None:
    assert bpe_model.prompt_ids(question) == bpe.prompt_ids(BPE_TEMPLATE, question)


@settings(max_examples=150, deadline=None)
@given(question=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\r'sSlL09<|_"), min_size=1))
def test_prompt_ids_of_bpe_of_any_text(bpe: Source, bpe_model: LanguageModel, question: str) -> None:
    assume(not any(token in question for token in ("<|", SEG, "<image>")))
    assert bpe_model.prompt_ids(question) == bpe.prompt_ids(BPE_TEMPLATE, question)


def test_short_answer_of_bpe(bpe: Source) -> None:
    """States over the whole prompt, and text out of tokens that are parts of characters."""
    short_answer = "Yes é 😀 ok"
    best, worst = (int(i) for i in bpe.run([])[1][-1].topk(2).indices)
    ids = bpe.tokenizer(short_answer, add_special_tokens=False).input_ids
    with bpe.open(conversation(short_answer=short_answer), yes_token_ids=(best,), no_token_ids=(worst,)) as model:
        answer = model.answer(VISUAL, QUESTION, mode="short")
    assert answer.text == short_answer and answer.token_ids == (*ids, bpe.language.seg_token_id)
    assert answer.h_seg is not None
    assert relative_error(answer.h_seg[0], bpe.run(ids)[0][-1]) <= 1e-5


@pytest.fixture(scope="module", params=[TEMPLATE, "<image> {question}", "{question}\n<image> A:"])
def templated(source: Source, request: pytest.FixtureRequest) -> Iterator[tuple[str, LanguageModel]]:
    with source.open(conversation(request.param)) as model:
        yield request.param, model


@settings(max_examples=150, deadline=None)
@given(question=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n▁<>sYeo"), min_size=1))
def test_prompt_ids_of_any_text(source: Source, templated: tuple[str, LanguageModel], question: str) -> None:
    assume(not any(token in question for token in ("<s>", "</s>", "<unk>", SEG, "<image>")))
    template, model = templated
    assert model.prompt_ids(question) == source.prompt_ids(template, question)


IMAGE_ENDS = ["<im_start>", "<im_end>"]
LISA = "A chat. USER: <im_start><image><im_end>\n{question} ASSISTANT:"
TOKENIZERS = {
    # case: (whether <im_start> and <im_end> are special, settings of LlamaTokenizer, where it puts ▁)
    "special": (True, {}, "first"),
    "not special": (False, {}, "first"),
    "legacy": (True, {"legacy": True}, "always"),
    "no prefix": (True, {"add_prefix_space": False}, "never"),
}


def write_lisa(folder: Path, special: bool, settings: dict[str, Any]) -> LlamaTokenizer:
    """LISA adds <im_start> and <im_end> as special tokens."""
    tokenizer = write_sentencepiece(folder)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in IMAGE_ENDS])
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return tokenizer


@pytest.fixture(scope="module", params=TOKENIZERS.values(), ids=TOKENIZERS)
def lisa(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Source:
    special, settings, where = request.param
    write_tokenizer = partial(write_lisa, special=special, settings=settings)
    source = Source.write(tmp_path_factory.mktemp("lisa"), write_tokenizer=write_tokenizer, num_hidden_layers=1)
    assert source.language.space_prefix == where
    return source


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(LISA, id="LISA"),
        pytest.param("<im_start><image><im_end>{question}<im_start>A", id="the question straight behind it"),
        pytest.param("<im_end> a <im_end><im_end>{question}\n<image> <im_start> b<im_end>", id="spaces around them"),
    ],
)
def test_prompt_ids_around_special_tokens(lisa: Source, template: str) -> None:
    with lisa.open(conversation(template)) as model:
        for question in (QUESTION, "", " a", "▁a", "\n", "  a "):
            assert model.prompt_ids(question) == lisa.prompt_ids(template, question), question


@pytest.mark.parametrize("question", ["Is <seg> here?", "</s>", "a<s>b", "<unk>", "<image>", "\udc80"])
def test_question_with_a_special_token_is_refused(source: Source, question: str) -> None:
    with source.open() as model, pytest.raises(VmadError, match="question"):
        model.prompt_ids(question)


def test_full_answer_equals_greedy_decoding(source: Source) -> None:
    eos, seg = source.tokenizer.eos_token_id, source.language.seg_token_id
    assert eos in source.answer(24, banned=[])[0]  # so the ban matters
    ids, states, logits = source.answer(24, banned=[eos])
    yes, no = (int(i) for i in logits[0].topk(2).indices)
    p_yes = float(logits[0, [yes, no]].softmax(0)[0])
    shown: list[str] = []
    with source.open(yes_token_ids=(yes,), no_token_ids=(no,)) as model:
        answer = model.answer(VISUAL, QUESTION, mode="full", on_text=shown.append)
        again = model.answer(VISUAL, QUESTION, mode="full")  # over the kept prompt
    assert ids[-1] == seg and len(ids) > 3
    assert answer.token_ids == tuple(ids)
    assert answer.p_yes == pytest.approx(p_yes, rel=1e-5)
    assert answer.h_seg is not None and answer.h_seg.shape == (1, WIDTH)
    assert relative_error(answer.h_seg[0], states[-1]) <= 1e-5
    assert answer.text == source.tokenizer.decode(ids[:-1]).strip() == "".join(shown)
    assert not answer.seg_forced and answer.stopped is None
    assert again.token_ids == answer.token_ids and again.p_yes == answer.p_yes
    np.testing.assert_array_equal(again.h_seg, answer.h_seg)


@pytest.mark.parametrize("template", [TEMPLATE, "{question} <image>"], ids=["text last", "image last"])
def test_full_answer_after_a_short_one(
    source: Source, sure: Ids, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of a fresh prompt, and decodes one token of it."""
    decoded: list[int] = []
    decode = LanguageModel._decode
    monkeypatch.setattr(
        LanguageModel, "_decode", lambda *args, **kwargs: decoded.append(len(args[1])) or decode(*args, **kwargs)
    )
    with source.open(conversation(template), **vars(sure)) as model:
        fresh = model.answer(VISUAL, QUESTION, mode="full")
        model.answer(VISUAL[::-1], QUESTION, mode="full")
        short = model.answer(VISUAL, QUESTION, mode="short")
        decoded.clear()
        full = model.answer(VISUAL, QUESTION, mode="full")
    assert decoded == [1] * len(full.token_ids)  # the prompt's last, and all of the answer but <seg>
    assert (full.token_ids, full.p_yes) == (fresh.token_ids, fresh.p_yes) and full.p_yes == short.p_yes
    np.testing.assert_array_equal(full.h_seg, fresh.h_seg)


def test_p_yes_sums_over_ids(source: Source) -> None:
    probabilities = source.run([])[1][-1].softmax(0)
    yes, no = (310, 311, 312), (320, 321)
    expected = float(probabilities[list(yes)].sum() / probabilities[[*yes, *no]].sum())
    with source.open(yes_token_ids=yes, no_token_ids=no) as model:
        assert model.answer(VISUAL, QUESTION, mode="short").p_yes == pytest.approx(expected, rel=1e-5)


@dataclass(frozen=True)
class Ids:
    """yes and no ids that make P(yes) fall on one side."""

    yes_token_ids: tuple[int, ...]
    no_token_ids: tuple[int, ...]


@pytest.fixture(scope="module")
def sure(source: Source) -> Ids:
    best, worst = (int(i) for i in source.run([])[1][-1].topk(2).indices)
    return Ids((best,), (worst,))


def test_h_seg_of_the_token_itself(source: Source, sure: Ids) -> None:
    ids, _, _ = source.answer(24, banned=[source.tokenizer.eos_token_id])
    with source.open(seg_state="token", **vars(sure)) as model:
        answer = model.answer(VISUAL, QUESTION, mode="full")
    assert answer.h_seg is not None
    assert relative_error(answer.h_seg[0], source.run(ids)[0][-1]) <= 1e-5


def test_seg_is_forced_at_the_limit(source: Source, sure: Ids) -> None:
    ids, states, _ = source.answer(4, banned=[source.tokenizer.eos_token_id])
    with source.open(max_new_tokens=4, **vars(sure)) as model:
        answer = model.answer(VISUAL, QUESTION, mode="full")
    assert answer.token_ids == (*ids[:-1], source.language.seg_token_id)
    assert answer.seg_forced and answer.h_seg is not None
    assert relative_error(answer.h_seg[0], states[-1]) <= 1e-5


@pytest.mark.parametrize("mode", ["full", "short"])
def test_no_mask_below_one_half(source: Source, sure: Ids, mode: Literal["full", "short"]) -> None:
    with source.open(yes_token_ids=sure.no_token_ids, no_token_ids=sure.yes_token_ids) as model:
        answer = model.answer(VISUAL, QUESTION, mode=mode)
    assert answer.p_yes < 0.5 and answer.h_seg is None
    assert bool(answer.text) == (mode == "full")


@pytest.mark.parametrize("state", ["emitting", "token"])
@pytest.mark.parametrize("short_answer", ["Yes", "Yes. There is a scratch."])
def test_short_answer(source: Source, sure: Ids, short_answer: str, state: str) -> None:
    seg = source.language.seg_token_id
    ids = source.tokenizer(short_answer, add_special_tokens=False).input_ids
    with source.open(conversation(short_answer=short_answer), seg_state=state, **vars(sure)) as model:
        answer = model.answer(VISUAL, QUESTION, mode="short")
    assert answer.text == short_answer and answer.token_ids == (*ids, seg)
    assert answer.h_seg is not None and not answer.seg_forced
    assert relative_error(answer.h_seg[0], source.run(ids if state == "emitting" else [*ids, seg])[0][-1]) <= 1e-5


def test_text_comes_in_whole_characters(source: Source, sure: Ids) -> None:
    """é and the emoji are byte tokens here, two and four of them."""
    shown: list[str] = []
    with source.open(conversation(short_answer="Yes é 😀 ok"), **vars(sure)) as model:
        text = model.answer(VISUAL, QUESTION, mode="short", on_text=shown.append).text
    assert text == "".join(shown) == "Yes é 😀 ok"
    assert len(shown) > 3 and "�" not in text


def test_stop_is_asked_before_every_step(source: Source, sure: Ids) -> None:
    """Three batches of the prompt, then each token; before P(yes) is known there is no answer."""
    whole, _, _ = source.answer(24, banned=[source.tokenizer.eos_token_id])
    for steps in range(6):
        reasons = iter([None] * steps + ["deadline"])
        with source.open(**vars(sure)) as model:
            if steps < 3:
                with pytest.raises(Stopped, match="deadline"):
                    model.answer(VISUAL, QUESTION, mode="full", stop=lambda: next(reasons))  # noqa: B023
                again = model.answer(VISUAL, QUESTION, mode="full")
                assert again.token_ids[:5] == tuple(whole[:5])  # the half of a prompt is no prompt
                continue
            answer = model.answer(VISUAL, QUESTION, mode="full", stop=lambda: next(reasons))  # noqa: B023
        assert answer.stopped == "deadline" and answer.h_seg is None and not answer.seg_forced
        assert answer.token_ids == tuple(whole[: steps - 3]) and answer.p_yes > 0.5


def test_f16_cache_stays_near(source: Source, sure: Ids) -> None:
    """The default on a device: llama.cpp's own choice of KV type and flash attention."""
    ids = source.tokenizer("Yes", add_special_tokens=False).input_ids
    with source.open(exact=False, **vars(sure)) as model:
        answer = model.answer(VISUAL, QUESTION, mode="short")
    assert answer.h_seg is not None
    assert 0 < relative_error(answer.h_seg[0], source.run(ids)[0][-1]) < 1e-2


def test_cache_is_of_the_manifests_type(source: Source) -> None:
    """By the bytes of one sequence that llama.cpp would save: 4, 2 and 34/32 a value."""
    sizes = []
    for settings_ in (Llama(kv_type="f32"), Llama(), Llama(kv_type="q8_0", flash_attention=True)):
        with source.open(exact=False, llama=settings_) as model:
            model.answer(VISUAL, QUESTION, mode="short")
            sizes.append(llama.llama_state_seq_get_size(model._context, 1))
    assert [size / sizes[0] for size in sizes] == pytest.approx([1, 1 / 2, 34 / 128], rel=0.05)


def test_q8_0_cache_needs_flash_attention() -> None:
    with pytest.raises(ValueError, match="needs flash_attention"):
        Llama(kv_type="q8_0")


def test_a_file_larger_than_memory_is_not_loaded(source: Source, tmp_path: Path) -> None:
    large = tmp_path / "llm.gguf"
    shutil.copy(source.gguf, large)
    os.truncate(large, 2**43)  # 8 TiB, all but the first of them a hole
    with pytest.raises(VmadError, match=r"8192\.0 GiB and this machine .* --llm q4_k_m"):
        replace(source, gguf=large).open()


@pytest.mark.parametrize(
    "call,said,says",
    [
        # CUDA's word while the weights are loaded
        (
            "llama_model_load_from_file",
            "cudaMalloc failed: out of memory",
            r"no memory left .*out of memory.*gpu_layers",
        ),
        # and while the KV cache is made
        ("llama_init_from_model", "failed to allocate compute buffers", r"context of \d+ tokens .*compute.*kv_type"),
    ],
)
def test_a_gpu_without_room_says_what_to_shrink(
    call: str, said: str, says: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        language._messages.append(said)

    monkeypatch.setattr(llama, call, refuse)
    with pytest.raises(VmadError, match=says):
        source.open()


@pytest.mark.parametrize(
    "settings_,gpu,says",
    [
        (Llama(), False, "llama.cpp, CPU"),
        (Llama(gpu_layers=0), True, "llama.cpp, CPU"),
        (Llama(gpu_layers=8), True, "llama.cpp, 8 layers on the GPU"),
        (Llama(), True, "llama.cpp, all layers on the GPU"),
    ],
)
def test_placement(settings_: Llama, gpu: bool, says: str, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    language = source.language.model_copy(update={"llama": settings_})
    monkeypatch.setattr(llama, "llama_supports_gpu_offload", lambda: True)
    assert placement(language, gpu) == says
    monkeypatch.setattr(llama, "llama_supports_gpu_offload", lambda: False)
    assert placement(language, gpu).startswith("llama.cpp, CPU")  # built without CUDA: said, not hidden


def test_context_is_used_up_by_no_answer(source: Source, sure: Ids) -> None:
    """A context with room for exactly one answer gives any number of them, whatever the prompt."""
    template = "{question} <image> A:"
    length = sum(map(len, source.prompt_ids(template, QUESTION))) + len(VISUAL) + source.language.max_new_tokens
    with source.open(conversation(template), context_length=length, **vars(sure)) as model:
        first = model.answer(VISUAL, QUESTION, mode="full")
        for question in (QUESTION.upper()[:20], "Good?", QUESTION, "Good?"):
            model.answer(VISUAL[::-1], question, mode="full")
            model.hidden_states(VISUAL, question)
        last = model.answer(VISUAL, QUESTION, mode="full")
        assert (last.token_ids, last.p_yes) == (first.token_ids, first.p_yes)
        with pytest.raises(VmadError, match=f"holds {length}"):
            model.answer(VISUAL, QUESTION + "?", mode="full")


@pytest.mark.parametrize(
    "visual",
    [VISUAL[1:], VISUAL[:, 1:], VISUAL[None], np.full_like(VISUAL, np.nan)],
    ids=["too few", "too narrow", "a batch", "NaN"],
)
def test_wrong_visual_tokens(source: Source, visual: np.ndarray) -> None:
    with source.open() as model, pytest.raises(ValueError, match="visual_tokens"):
        model.answer(visual, QUESTION, mode="full")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary": 1000},
        {"width": 512},
        {"context_length": 1024},
        {"seg_token_id": 5},
        {"seg_token": "<other>"},
    ],
    ids=str,
)
def test_manifest_that_does_not_fit_the_file(source: Source, changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"llm\.gguf"):
        source.open(**changes)


def _rewrite(source: Path, target: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Copy a GGUF file with other tokens; scores and types are cut to their number."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    tokens = change(reader.fields["tokenizer.ggml.tokens"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = tokens if key == "tokenizer.ggml.tokens" else field.contents()
        is_list = field.types[0] == GGUFValueType.ARRAY
        value = value[: len(tokens)] if is_list else value
        writer.add_key_value(key, value, field.types[0], field.types[-1] if is_list else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_rewritten_file_of_the_same_tokens(source: Source, tmp_path: Path) -> None:
    """So that the refusals below are the tokens' fault."""
    _rewrite(source.gguf, tmp_path / "llm.gguf", lambda tokens: tokens)
    with replace(source, gguf=tmp_path / "llm.gguf").open() as model:
        assert model.prompt_ids(QUESTION) == source.prompt_ids(TEMPLATE, QUESTION)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(lambda tokens: ["<sag>" if t == SEG else t for t in tokens], SEG, id="no <seg>"),
        pytest.param(lambda tokens: tokens[:-1], "cannot load it", id="one token short of the embedding"),
        pytest.param(lambda tokens: tokens[:-4], "cannot load it", id="as short as without <seg>"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    source: Source, change: Callable[[list[str]], list[str]], names: str, tmp_path: Path
) -> None:
    _rewrite(source.gguf, tmp_path / "llm.gguf", change)
    with pytest.raises(BundleError, match=names):
        replace(source, gguf=tmp_path / "llm.gguf").open()


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a model" * 100, 200_000], ids=str)
def test_file_that_llama_cpp_cannot_load(
    source: Source, content: bytes | int | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "llm.gguf"
    if content is not None:
        broken.write_bytes(source.gguf.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(BundleError, match="cannot load it"):
        replace(source, gguf=broken).open()
    assert capfd.readouterr().err == ""


def test_nothing_on_the_terminal(source: Source, capfd: pytest.CaptureFixture[str]) -> None:
    with source.open() as model:
        model.answer(VISUAL, QUESTION, mode="full")
    assert capfd.readouterr() == ("", "")


def test_closed(source: Source) -> None:
    with source.open() as model:
        pass
    with pytest.raises(ValueError, match="closed"):
        model.answer(VISUAL, QUESTION, mode="full")
    model.close()


def test_models_are_loaded_with_the_same_params(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp as pip builds it crashes with the repacked weights of AMX, which this processor may not have."""
    loaded = []
    load = llama.llama_model_load_from_file

    def spy(path: bytes, params: Any) -> Any:
        loaded.append((params.vocab_only, params.use_extra_bufts))
        return load(path, params)

    monkeypatch.setattr(llama, "llama_model_load_from_file", spy)
    with source.open():
        asked = source.language.model_dump_json(), conversation().model_dump_json()
        language._print_prompt_lengths(str(source.gguf), *asked, "screw")
    assert loaded == [(False, False), (True, False)]


def test_one_place_makes_params_and_one_file_loads() -> None:
    root = Path(__file__).parents[2]
    files = [f for wing in ("runtime", "export", "kernels") for f in (root / wing).rglob("*.py")]
    makes, loads = (
        [f.relative_to(root).as_posix() for f in files for _ in range(f.read_text("utf-8").count(name))]
        for name in ("llama_model_default_params", "llama_model_load_from")
    )
    assert makes == ["runtime/stages/language.py"]
    assert set(loads) == {"runtime/stages/language.py"}
    assert not [f for f in files if "Llama(model_path" in f.read_text("utf-8")]  # llama-cpp-python's own loader
