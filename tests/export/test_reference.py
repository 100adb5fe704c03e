"""The reference model's parts, texts, losses and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import safe_open
from torch import nn

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.reference import train
from vmad_edge.export.reference.evaluate import Evaluation, auroc
from vmad_edge.export.reference.model import TEXT_SHARE, Batch, ReferenceModel
from vmad_edge.export.reference.muon import Muon
from vmad_edge.export.reference.parts import KINDS, Kind, draw
from vmad_edge.export.reference.text import (
    ANSWERS,
    PARAPHRASES,
    QUESTION,
    TEMPLATE,
    Reader,
    answer,
    load_tokenizer,
    make_tokenizer,
)

# --- texts


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_every_kind_has_its_advice() -> None:
    assert set(KINDS) <= set(ANSWERS)


@pytest.mark.parametrize("question", [QUESTION, *PARAPHRASES])
def test_prompt_ids_are_sentencepieces_own(reader: Reader, question: str) -> None:
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(Path(reader.tokenizer.name_or_path) / "tokenizer.model")
    )
    question = question.replace("{object}", "gear")
    before, after = TEMPLATE.replace("{question}", question).split("<image>")
    assert reader.prompt(question) == ((1, *pieces.encode(before)), tuple(pieces.encode(after)))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_answers_begin_with_one_decision_and_end_with_seg(reader: Reader, kind: Kind | None) -> None:
    rng = np.random.default_rng(0)
    part = draw(rng, "connector", [kind] if kind else [], 96)
    ids = reader.answer(text := answer(part, "connector", rng))
    assert ids[0] == (reader.no_id if kind is None else reader.yes_id)
    assert ids[-1] == reader.seg_id and ids.count(reader.seg_id) == 1
    assert len(ids) <= 32
    assert reader.tokenizer.decode(ids) == text + "<seg>"
    if kind:
        assert f"a {kind} at the {part.place} of the connector" in text


def test_tokenizer_survives_saving(reader: Reader, tmp_path: Path) -> None:
    reader.tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "Yes. There is a scratch <seg>at the lower right; é 日本 100%."
    assert again(text).input_ids == reader.tokenizer(text).input_ids
    assert len(again) == len(reader.tokenizer) == reader.seg_id + 1 == 1025


# --- model


@pytest.fixture(scope="module")
def model(reader: Reader) -> ReferenceModel:
    return ReferenceModel(reader, seed=0).eval()


@pytest.fixture(scope="module")
def batch(reader: Reader) -> Batch:
    """Two defective parts and a good one; the answers differ in length."""
    rng = np.random.default_rng(3)
    parts = [draw(rng, "gear", ["crack"]), draw(rng, "tile", ["pit"], 352), draw(rng, "plate")]
    return train.collate("mask", parts, reader, rng)


@torch.no_grad()
def test_text_loss_is_transformers_own(model: ReferenceModel, batch: Batch) -> None:
    _, visual_tokens = model.see(batch.clip_pixels)
    embed = model.language.get_input_embeddings()
    inputs = torch.cat([embed(batch.before), visual_tokens, embed(batch.after)], 1)
    labels = torch.full(inputs.shape[:2], -100)
    labels[:, -batch.after.shape[1] :][batch.answer] = batch.after[batch.answer]
    expected = model.language(inputs_embeds=inputs, labels=labels).loss
    torch.testing.assert_close(model.losses_read(batch)["text"] / 6, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_patch_probability_is_the_softmax_between_nearest_features(model: ReferenceModel, batch: Batch) -> None:
    patches, _ = model.see(batch.clip_pixels)

    def nearest(bank: torch.Tensor) -> np.ndarray:
        a, b = (x.numpy().astype(np.float64) for x in (patches, bank))
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        return np.asarray((a @ b.T).max(-1))

    odds = np.exp(np.stack([nearest(model.visual_normal), nearest(model.visual_abnormal)]) / 0.07)
    np.testing.assert_allclose(model.patch_logits(patches).sigmoid(), odds[1] / odds.sum(0), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("short", [False, True])
def test_h_seg_is_the_state_that_the_answer_mode_reads(
    model: ReferenceModel, batch: Batch, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a prompt cut off where the runtime stops: before `<seg>`, or after the forced `Yes`."""
    read: list[torch.Tensor] = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda features, h: (read.append(h), decode(features, h))[1])
    model.losses_mask(batch, torch.full((3,), short))
    _, visual_tokens = model.see(batch.clip_pixels)
    embed = model.language.get_input_embeddings()
    for row in range(2):
        columns = batch.answer[row].nonzero()[:, 0]
        stop = columns[0] + 1 if short else columns[-1]
        inputs = torch.cat([embed(batch.before[row]), visual_tokens[row], embed(batch.after[row, :stop])])
        state = model.language.model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]
        torch.testing.assert_close(read[0][row], state, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_alignment_is_the_divergence_of_the_two_similarity_distributions(model: ReferenceModel, batch: Batch) -> None:
    patches, visual_tokens = model.see(batch.clip_pixels)
    odds = model.patch_logits(patches)
    cells = odds.reshape(3, 8, 2, 8, 2).amax((2, 4)).flatten(1)
    unit = torch.nn.functional.normalize(visual_tokens, dim=-1)
    spoken = -(unit @ torch.nn.functional.normalize(model.semantic_normal, dim=-1)[0]) / 0.07
    kinds = [torch.distributions.Categorical(logits=logits) for logits in (cells, spoken)]
    expected = torch.distributions.kl_divergence(*kinds).mean()
    found = model._cells(batch, visual_tokens, odds)["align"] / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_screens_loss_is_of_every_good_part_beside_every_bad_one(model: ReferenceModel, batch: Batch) -> None:
    """By hand: gear and tile are bad, the plate is good; a part's score is the mean of its two highest odds."""
    patches, _ = model.see(batch.clip_pixels)
    crack, pit, plate = (float(np.sort(row)[-2:].mean()) for row in model.patch_logits(patches).numpy())
    expected = np.mean([np.logaddexp(0, plate - bad) for bad in (crack, pit)])
    assert float(model.losses_see(batch, None)["image"]) == pytest.approx(0.5 * expected, rel=1e-4)


def test_the_queue_takes_normal_cells_alone(reader: Reader, batch: Batch) -> None:
    model = ReferenceModel(reader, seed=2)
    before = model.queue
    patches = torch.randn(3, 256, 192)
    normal = torch.zeros(3, 64, dtype=torch.bool)
    model._remember(patches, normal)
    assert torch.equal(model.queue, before)
    normal[1, 9] = True  # row 1, column 1 of the cells: rows and columns 2 and 3 of the patches
    model._remember(patches, normal)
    pooled = patches[1].reshape(16, 16, 192)[2:4, 2:4].mean((0, 1))
    torch.testing.assert_close(model.queue[0], pooled / pooled.norm())
    assert torch.equal(model.queue[1:], before[:-1])


@pytest.mark.parametrize("dssl", [True, False])
def test_without_dssl_similarity_moves_neither_vision_nor_tokens(reader: Reader, batch: Batch, dssl: bool) -> None:
    model = ReferenceModel(reader, seed=2, dssl=dssl)
    losses = model.losses_see(batch, None)
    (losses["patch"] + losses["semantic"] + losses["align"]).backward()  # type: ignore[no-untyped-call]
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    features = {"visual_normal", "visual_abnormal", "semantic_normal"}
    assert moved == (features | {"vision", "projector"} if dssl else features)


@torch.no_grad()
def test_a_visual_token_says_where_in_its_cell_the_defect_is(reader: Reader, batch: Batch) -> None:
    """Tokens that say it of each cell's 4×4 fields, read off the mask by hand, leave no loss; of another part, much."""
    model = ReferenceModel(reader, seed=2)
    _, visual_tokens = model.see(batch.clip_pixels)
    there = batch.kinds.numpy().reshape(3, 32, 8, 32, 8).astype(bool).mean((2, 4)) > 0.1  # 8×8 pixels a field
    cells = [there[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(3, 16) for r in range(8) for c in range(8)]
    told = torch.zeros_like(visual_tokens)
    told[..., :16] = torch.from_numpy(np.stack(cells, 1) * 40.0 - 20)
    model.fine_head.weight.copy_(torch.eye(16, 256))
    model.fine_head.bias.zero_()
    odds = model.patch_logits(torch.randn(3, 256, 192))
    assert float(model._cells(batch, told, odds)["fine"]) < 1e-6
    assert float(model._cells(batch, told.roll(1, 0), odds)["fine"]) > 0.1


@torch.no_grad()
def test_the_answer_knows_the_defects_centroid(reader: Reader, batch: Batch) -> None:
    """Of the two bad parts; by hand: the Huber loss of both coordinates, linear beyond a twentieth of the frame."""
    model = ReferenceModel(reader, seed=2)
    nn.init.zeros_(model.centre_head.weight)
    model.centre_head.bias.copy_(torch.tensor([0.3, 0.6]))
    per_part, tokens = [], batch.answer.sum(1).tolist()
    for row in range(2):
        rows, columns = np.nonzero(batch.kinds[row].numpy())
        off = np.abs([columns.mean() / 255 - 0.3, rows.mean() / 255 - 0.6])
        per_part.append(2 * np.where(off < 0.05, 10 * off**2, off - 0.025).sum())
    expected = np.average(per_part, weights=tokens[:2])
    assert float(model.losses_read(batch)["centre"]) == pytest.approx(expected, rel=1e-4)


def test_joined_text_teaches_vision_and_only_the_first_parts_are_told(reader: Reader) -> None:
    batch = next(iter(train.Stream("join", reader, 0, range(1))))
    assert len(batch.clip_pixels) == 16 and len(batch.after) == len(batch.before) == len(batch.answer) == 9
    model = ReferenceModel(reader, seed=2)
    text = model.losses_join(batch, None)["text"]
    told = Batch(batch.clip_pixels[:9], batch.sam_pixels, batch.kinds[:9], batch.before, batch.after, batch.answer)
    torch.testing.assert_close(text, model.losses_read(told)["text"])
    gradients: list[dict[str, torch.Tensor]] = []
    for loss in (text, model._text(told, model.read(told, model.see(told.clip_pixels)[1]))["text"]):
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parts = {
            part: [p.grad.flatten() for p in m.parameters() if p.grad is not None] for part, m in model.named_children()
        }
        gradients.append({part: torch.cat(found) for part, found in parts.items() if found})
    mine, whole = gradients
    assert set(mine) == {"vision", "projector", "language"}
    for part, gradient in mine.items():
        expected = whole[part] * (1 if part == "language" else TEXT_SHARE)
        assert (gradient - expected).norm() < 1e-3 * expected.norm(), part


@torch.no_grad()
def test_sam_starts_with_what_clip_sees(reader: Reader, batch: Batch) -> None:
    model = ReferenceModel(reader, seed=2)
    model.lend_vision(batch.clip_pixels)
    hidden = model.vision(pixel_values=batch.clip_pixels, output_hidden_states=True).hidden_states[4][:, 1:]
    encoder = model.segmenter.vision_encoder
    seen = []
    encoder.neck.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1, 2)))
    encoder(batch.sam_pixels)
    likeness = torch.nn.functional.cosine_similarity(hidden, seen[0], dim=-1).mean()
    assert likeness > 0.9


def test_checkpoint_opens_and_gives_the_same_answers(reader: Reader, batch: Batch, tmp_path: Path) -> None:
    model = ReferenceModel(reader, seed=1)
    model.adapt()
    with torch.no_grad():
        for name, parameter in model.language.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model.save(tmp_path / "checkpoint")
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert checkpoint.language_width == 256 and checkpoint.seg_token_id == reader.seg_id
    for file in (tmp_path / "checkpoint").rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
        assert kinds == {torch.float16}
    model.eval()
    evaluation = Evaluation(checkpoint)
    with torch.no_grad():
        _, visual_tokens = model.see(batch.clip_pixels)
        before, after = reader.prompt(QUESTION.replace("{object}", "gear"))
        embed = model.language.get_input_embeddings()
        row = [embed(torch.tensor([ids])).expand(3, -1, -1) for ids in (before, after)]
        logits = model.language(inputs_embeds=torch.cat([row[0], visual_tokens, row[1]], 1)).logits[:, -1]
        expected = logits[:, [reader.yes_id, reader.no_id]].softmax(-1)[:, 0]
        p_yes, _, _, _ = evaluation.answer(visual_tokens, "gear")
    np.testing.assert_allclose(p_yes, expected, atol=2e-3)
    again = ReferenceModel(reader, seed=3).eval()
    again.begin_from(checkpoint)
    with torch.no_grad():
        patches, visual_tokens = again.see(batch.clip_pixels)
        states = again.read(batch, visual_tokens)
        first, tokens = model.see(batch.clip_pixels)
        for mine, theirs in (
            (patches, first),
            (again.language.lm_head(states), model.language.lm_head(model.read(batch, tokens))),
            (again.patch_logits(patches), model.patch_logits(first)),
            (
                again.decode(torch.ones(1, 256, 16, 16), states[:1, -1])[0],
                model.decode(torch.ones(1, 256, 16, 16), states[:1, -1])[0],
            ),
        ):
            torch.testing.assert_close(mine, theirs, rtol=0.01, atol=0.01)  # the checkpoint is FP16


# --- training


def test_training_goes_on_where_it_stopped_and_ends_with_the_mean(tmp_path: Path) -> None:
    passed: list[torch.Tensor] = []

    def step(model: nn.Linear, optimizers: list[torch.optim.Optimizer], i: int) -> None:
        model.zero_grad()
        model(torch.full((1, 4), float(i))).pow(2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        passed.append(model.weight.detach().clone())
        train._average_weights(optimizers, i + 1, ends=i == 3)

    def fresh() -> tuple[nn.Linear, list[torch.optim.Optimizer], dict[str, nn.Parameter]]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizers = [torch.optim.AdamW([model.bias], lr=0.1), Muon([model.weight], 0.1, 0.05, torch.float32)]
        return model, optimizers, dict(model.named_parameters())

    model, optimizers, named = fresh()
    for i in range(3):
        step(model, optimizers, i)
    train._save(tmp_path / "read.safetensors", 3, model, optimizers, named)
    step(model, optimizers, 3)
    again, others, names = fresh()
    assert train._resume(tmp_path / "read.safetensors", again, others, names) == 3
    step(again, others, 3)
    for parameter in ("weight", "bias"):
        torch.testing.assert_close(getattr(again, parameter), getattr(model, parameter), rtol=0, atol=0)
    torch.testing.assert_close(model.weight.detach(), torch.stack(passed[:4]).mean(0))


@pytest.mark.parametrize(
    ("steps", "taken"), [(4, [4]), (200, [200]), (450, [300, 400, 450]), (1000, [600, 700, 800, 900, 1000])]
)
def test_the_mean_is_of_the_second_half(steps: int, taken: list[int]) -> None:
    counts = [train.averaged(step, steps) for step in range(steps)]
    assert [step + 1 for step, count in enumerate(counts) if count] == taken
    assert [count for count in counts if count] == list(range(1, len(taken) + 1))


def test_half_the_way_back_but_for_scaffolds() -> None:
    model = nn.ModuleDict({"vision": nn.Linear(2, 2), "kind_head": nn.Linear(2, 2)})
    begun = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    reached = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train.go_half_back(model, begun)
    for name, parameter in model.named_parameters():
        share = 1.0 if "head" in name else 0.5
        torch.testing.assert_close(parameter.detach(), share * reached[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torchs(dtype: torch.dtype) -> None:
    """Tall, wide and square matrices, two of one shape, of which one has no gradient in the second step."""
    shapes = [(24, 8), (8, 24), (16, 16), (24, 8), (1, 5)]

    def moved(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        first = [torch.randn(shape, generator=random) for shape in shapes]
        parameters = [nn.Parameter(matrix.clone()) for matrix in first]
        optimizer = make(parameters)
        for step in range(3):
            for i, parameter in enumerate(parameters):
                gradient = torch.randn(parameter.shape, generator=random)
                parameter.grad = None if (step, i) == (1, 0) else gradient
            optimizer.step()
        return [parameter.detach() - matrix for parameter, matrix in zip(parameters, first, strict=True)]

    expected = moved(lambda ps: torch.optim.Muon(ps, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"))
    for mine, theirs in zip(moved(lambda ps: Muon(ps, 0.1, 0.5, dtype)), expected, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()  # bf16's own error


def test_batches_depend_on_their_number_alone(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BATCH", 2)
    straight = list(train.Stream("mask", reader, 0, range(3)))
    resumed = next(iter(train.Stream("mask", reader, 0, range(2, 3))))
    torch.testing.assert_close(straight[2].sam_pixels, resumed.sam_pixels, rtol=0, atol=0)
    assert torch.equal(straight[2].after, resumed.after)
    assert [batch.kinds.amax((1, 2)).gt(0).tolist() for batch in straight] == [[False, True]] * 3


def test_learning_rate_rises_then_falls_or_stays() -> None:
    rates = [train.rate(step, 1000, falls=True) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=0.02) and max(rates) == max(rates[95:105])
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert [train.rate(step, 1000, falls=False) for step in (0, 49, 99, 999)] == [0.01, 0.5, 1, 1]


def test_auroc_is_scikit_learns() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 9, 200).astype(float), rng.random(200) < 0.3
    assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
