"""What the reference model reads and says, and the SentencePiece tokenizer for it.

Ids follow LLaVA's `tokenizer_image_token`: the prompt is split at `<image>`, each chunk is tokenised by itself, BOS
stands before the first only. The answer is tokenised by itself too (so it begins with `▁Yes` or `▁No`, one id each)
and `<seg>`'s id is appended: no space token comes between the last full stop and `<seg>`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import sentencepiece
from transformers import AddedToken, LlamaTokenizer

from vmad_edge.export.reference.parts import FAMILIES, PLACES, UNSEEN_FAMILIES, Kind, Part

TEMPLATE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:"
)
QUESTION = (
    "Would you identify any irregularities present on the surface of the {object}? If so, please output the "
    "segmentation mask and suggest corrective actions."
)
PARAPHRASES = (
    "Is there any defect on the {object}? Please segment it and say what to do.",
    "Please inspect this {object}. Does it show an anomaly, and where?",
    "Can you find something wrong with the {object} in the image?",
)
SEG = "<seg>"
YES, NO = "Yes", "No"

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "scratch": ("It weakens the finish. Polish the surface.", "The coating may fail. Check the handling."),
    "stain": ("It spoils the look. Clean the surface.", "Residue may spread. Clean the line."),
    "pit": ("Stress may gather there. Check the casting.", "It may leak. Fill or reject the part."),
    "crack": ("It may break under load. Reject the part.", "It will grow. Replace the part."),
    "missing feature": ("It cannot be assembled. Check the tool.", "The function is lost. Reject the part."),
    "fibre": ("It contaminates the surface. Blow it off.", "It may block the fit. Remove it."),
    "dent": ("The fit may suffer. Check the transport.", "It shows after coating. Straighten or reject the part."),
    "chipped edge": ("The edge is weakened. Check the tool.", "Chips may come loose. Reject the part."),
}

# Words of the trade beyond the answers, so that a user's own question does not fall apart into bytes.
_TRADE = """
screw bolt nut washer spring bearing shaft pipe valve pump motor wheel bracket flange housing cover plate disc ring
bottle cap can jar box carton label pouch blister capsule tablet pill cookie cable wire fuse chip circuit board solder
transistor resistor capacitor lens glass mirror display wood leather carpet grid hazelnut metal steel copper aluminium
plastic rubber ceramic tile brick textile weave thread zipper toothbrush battery cell product item object component
surface edge corner side top bottom left right front back inside outside around between damage dent bend hole burr chip
rust corrosion bubble wrinkle tear cut fray stain spot mark line misprint deformation contamination discolouration
broken bent loose wrong missing extra rough dirty worn burnt open short small large long thin deep bright dark visible
describe locate detect report explain show tell list check whether there are any what which how many does look normal
good bad quality production inspection image picture photo region area severity cause repair rework scrap stop machine
"""


def question(rng: np.random.Generator) -> str:
    """VMAD's question in half of the cases, else a paraphrase; with `{object}` open."""
    return QUESTION if rng.random() < 0.5 else str(rng.choice(PARAPHRASES))


def what_to_call(part: Part, rng: np.random.Generator) -> str:
    """What a user may call the part: its name, any other thing, or just a part."""
    chance = rng.random()
    return part.object if chance < 0.5 else "part" if chance < 0.75 else str(rng.choice(_TRADE.split()))


def answer(part: Part, name: str, rng: np.random.Generator) -> str:
    """The answer without its `<seg>`; `name` is what the question called the part."""
    if part.kind is None:
        return f"{NO}. The {name} shows no irregularities."
    follow = rng.choice(ANSWERS[part.kind])
    return f"{YES}. There is a {part.kind} at the {part.place} of the {name}. {follow}"


def make_tokenizer(
    folder: Path, vocab_size: int = 1024, more_lines: Iterable[str] = (), special: Sequence[str] = ()
) -> LlamaTokenizer:
    """Train the SentencePiece model, save it as `folder`/tokenizer.model with the HF files beside it, and load it.

    Args:
        vocab_size: of SentencePiece; `special` tokens and `<seg>` are added to that.
        more_lines: to train on, for a vocabulary that the reference model's own texts do not fill.
    """
    names = (*FAMILIES, *UNSEEN_FAMILIES, "part")
    prompts = [TEMPLATE.replace("{question}", q).replace("<image>\n", "") for q in (QUESTION, *PARAPHRASES)]
    lines = [p.replace("{object}", name) for p in prompts for name in names]
    lines += [f"{NO}. The {name} shows no irregularities." for name in names]
    lines += [f"{YES}. There is a {kind}. {follow}" for kind, follows in ANSWERS.items() for follow in follows]
    lines += [f"at the {place} of the {name}." for row in PLACES for place in row for name in names]
    lines += [*(word for word in _TRADE.split() for _ in range(2)), *more_lines]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        character_coverage=1.0, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, add_eos_token=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(SEG, special=False, normalized=False)])
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())  # save_pretrained does not keep it
    (folder / "added_tokens.json").write_text(json.dumps(tokenizer.get_added_vocab()))
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> LlamaTokenizer:
    return cast(LlamaTokenizer, LlamaTokenizer.from_pretrained(folder))


class Reader:
    """Texts to ids."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self.tokenizer = tokenizer
        self.seg_id = cast(int, tokenizer.convert_tokens_to_ids(SEG))
        self.encode = lru_cache(maxsize=4096)(self._encode)
        (self.yes_id,), (self.no_id,) = self.encode(YES), self.encode(NO)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prompt(self, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and after the visual tokens."""
        before, after = TEMPLATE.replace("{question}", question).split("<image>")
        return (self.tokenizer.bos_token_id, *self.encode(before)), self.encode(after)

    def answer(self, text: str) -> tuple[int, ...]:
        return (*self.encode(text), self.seg_id)
