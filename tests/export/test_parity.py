"""Parity: equal sides pass, and each known way to export something else is caught at the stage where it sits."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import gguf
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.stats import beta, spearmanr

from vmad_edge.export import parity, pipeline
from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.language import export_language
from vmad_edge.export.parity import DECISIONS, LADDER, Figures, Parity, Source, StageParity, compare, limits, measure
from vmad_edge.runtime.bundle import Bundle, Manifest, Thresholds, seal
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.frame import Frame, Reading
from vmad_edge.runtime.inspection import Verdict
from vmad_edge.runtime.stages import preprocess
from vmad_edge.runtime.stages.language import LanguageModel, Tokenizer
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.systems import vmad

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: Patch) -> None:
    """llama.cpp's threads wait for each other in a busy loop: on a loaded machine one is faster."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})


@dataclass
class Export:
    """A checkpoint and the files that were made of it, to be doctored."""

    checkpoint: Path
    folder: Path
    manifest: Manifest

    def edit(self, part: str, **changes: object) -> None:
        """Of the manifest's `part`."""
        changed = getattr(self.manifest, part).model_copy(update=changes)
        self.manifest = self.manifest.model_copy(update={part: changed})

    def edit_checkpoint(self, file: str, **changes: object) -> None:
        path = self.checkpoint / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    @property
    def image(self) -> str:
        return str(self.checkpoint / "parity_images" / "wide.png")

    def measure(self, more: Sequence[Callable[[], Frame]] = ()) -> Parity:
        bundle = Bundle(self.folder, "", self.manifest)
        return measure(Checkpoint.open(self.checkpoint), bundle, [self.image], more)


@pytest.fixture
def export(tiny: Path, bundle: Bundle, tmp_path: Path) -> Export:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    return Export(checkpoint, shutil.copytree(bundle.path, tmp_path / "bundle"), bundle.manifest)


def crop(export: Export) -> None:
    """Make the checkpoint one that cuts the middle out of each image, as LLaVA-v1 does."""
    size = export.manifest.clip.size
    changes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, "do_center_crop": True}
    export.edit_checkpoint("vision/preprocessor_config.json", **changes)


def pad(export: Export) -> None:
    export.edit_checkpoint("config.json", image_aspect_ratio="pad")


# ---------------------------------------------------------------------------------------------- equal sides


@pytest.mark.parametrize("geometry", [crop, pad], ids=["crop", "pad"])
def test_equal_sides_pass(export: Export, geometry: Callable[[Export], None]) -> None:
    """The screen's formulas in torch agree with the runtime also where a frame is not shown whole, or with borders."""
    geometry(export)
    export.manifest = export.manifest.model_copy(update={"clip": Checkpoint.open(export.checkpoint).clip})
    found = export.measure()
    assert found.failure is None
    assert [row.stage for row in found.stages] == list(LADDER)


def test_exported_bundle_says_what_was_measured(bundle: Bundle) -> None:
    found = Parity.model_validate_json(bundle.file("parity.json").read_bytes())
    assert found.images == ("high.png", "wide.png")
    assert [row.stage for row in found.stages] == list(LADDER)
    assert all(row.limits and row.worst_image in found.images and row.images == 2 for row in found.stages)
    assert found.tensor_types == {"F32": 21}
    page = bundle.file("parity.html").read_text()
    assert all(f"<th>{stage}</th>" in page for stage in LADDER)
    assert page.count("<img") == 10  # two frames, each with two maps and two masks
    assert not re.search(r"src=\"(?!data:)|href=|url\(", page)


# ---------------------------------------------------------------------------------------------- planted faults


def llm(export: Export) -> Any:
    """The tensors of llm.gguf by name, to be written to."""
    reader = gguf.GGUFReader(export.folder / "llm.gguf", "r+")
    return {tensor.name: tensor.data for tensor in reader.tensors}


def q_proj_not_permuted(export: Export, monkeypatch: Patch) -> None:
    heads = 4
    for name, rows in llm(export).items():
        if name.endswith("attn_q.weight"):
            halves = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2)
            rows[:] = halves.reshape(rows.shape).copy()


def lora_alpha_ignored(export: Export, monkeypatch: Patch) -> None:
    rank = json.loads((export.checkpoint / "adapter/adapter_config.json").read_text())["r"]
    trained = shutil.copytree(export.checkpoint / "adapter", export.folder.parent / "adapter")
    export.edit_checkpoint("adapter/adapter_config.json", lora_alpha=rank)
    export_language(export.checkpoint / "language", export.checkpoint / "adapter", export.folder / "llm.gguf", "f32")
    shutil.copytree(trained, export.checkpoint / "adapter", dirs_exist_ok=True)


def lm_head_not_exported(export: Export, monkeypatch: Patch) -> None:
    base = load_file(export.checkpoint / "language/model.safetensors")
    llm(export)["output.weight"][:] = base["lm_head.weight"]


def space_after_the_image(export: Export, monkeypatch: Patch) -> None:
    """▁ before the text after the image, which begins with a line break."""
    tokenize = Tokenizer.tokenize

    def wrong(self: Tokenizer, text: str, *, first: bool = False) -> list[int]:
        return tokenize(self, f"  {text}" if text.startswith("\n") else text, first=first)

    monkeypatch.setattr(Tokenizer, "tokenize", wrong)


def bos_twice(export: Export, monkeypatch: Patch) -> None:
    """Before each part of the prompt."""
    tokenize = Tokenizer.tokenize

    def wrong(self: Tokenizer, text: str, *, first: bool = False) -> list[int]:
        return tokenize(self, text, first=first or text.startswith("\n"))

    monkeypatch.setattr(Tokenizer, "tokenize", wrong)


def antialias_off(export: Export, monkeypatch: Patch) -> None:
    def wrong(frame: Frame, spec: Any) -> tuple[NDArray[np.float32], View]:
        small = cv2.resize(frame.pixels, (spec.size, spec.size), interpolation=cv2.INTER_CUBIC)
        return preprocess.clip_pixels(Frame(small, ""), spec)[0], preprocess.clip_pixels(frame, spec)[1]

    monkeypatch.setattr(parity, "clip_pixels", wrong)
    monkeypatch.setattr(vmad, "clip_pixels", wrong)


def crop_instead_of_pad(export: Export, monkeypatch: Patch) -> None:
    pad(export)
    export.edit("clip", resize="shortest_edge", pad_to_square=False)


def pad_instead_of_crop(export: Export, monkeypatch: Patch) -> None:
    crop(export)
    export.edit("clip", resize="exact", pad_to_square=True)


def map_not_put_back_where_it_was_cut(export: Export, monkeypatch: Patch) -> None:
    """The map of the middle stretched over the whole frame."""
    crop(export)
    export.edit("clip", resize="shortest_edge")

    def wrong(frame: Frame, spec: Any) -> tuple[NDArray[np.float32], View]:
        height, width = frame.pixels.shape[:2]
        return preprocess.clip_pixels(frame, spec)[0], View(0, 0, width, height)

    monkeypatch.setattr(vmad, "clip_pixels", wrong)


def patches_level_off_by_one(export: Export, monkeypatch: Patch) -> None:
    export.edit_checkpoint("config.json", patches_level=-3)


def levels_off_by_one(export: Export, monkeypatch: Patch) -> None:
    export.edit_checkpoint("config.json", levels=[-2, -3, 0])


def h_seg_one_step_late(export: Export, monkeypatch: Patch) -> None:
    export.edit("language", seg_state="token")


def h_seg_one_step_late_in_the_full_answer(export: Export, monkeypatch: Patch) -> None:
    answer = LanguageModel.answer

    def wrong(self: LanguageModel, *args: Any, mode: str, **options: Any) -> Any:
        right = self._language
        self._language = right.model_copy(update={"seg_state": "token"}) if mode == "full" else right
        found = answer(self, *args, mode=mode, **options)
        self._language = right
        return found

    monkeypatch.setattr(LanguageModel, "answer", wrong)


def masks_with_align_corners(export: Export, monkeypatch: Patch) -> None:
    def wrong(
        low: NDArray[np.float32], covered: tuple[int, int], size: int, frame_size: tuple[int, int]
    ) -> NDArray[np.float32]:
        def resize(image: torch.Tensor, to: tuple[int, int]) -> torch.Tensor:
            return torch.nn.functional.interpolate(image, to, mode="bilinear", align_corners=True)

        full = resize(torch.from_numpy(low)[None, None], (size, size))[:, :, : covered[0], : covered[1]]
        return resize(full, frame_size)[0, 0].numpy()

    monkeypatch.setattr(parity, "mask_logits", wrong)


def softmax_in_fp16_on_large_activations(export: Export, monkeypatch: Patch) -> None:
    """Scores beyond FP16's range: a constant more on each would leave FP32's softmax as it was.

    The range is put in by hand: on the CPU ONNX Runtime computes FP16's softmax in FP32.
    """
    path = export.folder / "clip_encoder.onnx"
    model = onnx.load(path)
    nodes = model.graph.node
    for name, value in {"large": 70_000.0, "half_max": 65_504.0, "infinity": np.inf}.items():
        model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value]))
    places = [place for place, node in enumerate(nodes) if node.op_type == "Softmax"]
    assert places
    for place in reversed(places):
        node = nodes[place]
        scores, name = node.input[0], node.output[0]
        node.input[0] = f"{name}.half"
        nodes.insert(place, onnx.helper.make_node("Where", [f"{name}.over", "infinity", f"{name}.sum"], node.input))
        nodes.insert(place, onnx.helper.make_node("Greater", [f"{name}.sum", "half_max"], [f"{name}.over"]))
        nodes.insert(place, onnx.helper.make_node("Add", [scores, "large"], [f"{name}.sum"]))
    onnx.save(model, path)


def thresholds_not_exported(export: Export, monkeypatch: Patch) -> None:
    """The checkpoint's call the part a DEFECT."""
    thresholds = {"good_below": 0.1, "defect_above": 0.2}
    export.edit_checkpoint("config.json", similarity={"thresholds": thresholds})


def yes_at_another_threshold(export: Export, monkeypatch: Patch) -> None:
    settled = parity.settled
    monkeypatch.setattr(parity, "settled", lambda verdict, p_yes, rule: settled(verdict, p_yes - 0.4, rule))


def review_turns_defect_into_good(export: Export, monkeypatch: Patch) -> None:
    """On a part that the screen calls a DEFECT, and the review a good one."""
    thresholds_not_exported(export, monkeypatch)
    export.edit("similarity", thresholds=Thresholds(good_below=0.1, defect_above=0.2))
    swap_yes_and_no(export)
    monkeypatch.setattr(parity, "settled", lambda _, p_yes, rule: Verdict.DEFECT if p_yes >= 0.5 else Verdict.GOOD)


FAULTS = {
    # the fault: the stage where it sits
    antialias_off: "clip_pixels",
    crop_instead_of_pad: "clip_pixels",
    pad_instead_of_crop: "clip_pixels",
    space_after_the_image: "prompt_ids",
    bos_twice: "prompt_ids",
    patches_level_off_by_one: "patches",
    softmax_in_fp16_on_large_activations: "patches",
    levels_off_by_one: "patches_multi",
    q_proj_not_permuted: "hidden_states",
    lora_alpha_ignored: "hidden_states",
    lm_head_not_exported: "logits",
    h_seg_one_step_late: "h_seg",
    h_seg_one_step_late_in_the_full_answer: "h_seg_full",
    masks_with_align_corners: "mask",
    map_not_put_back_where_it_was_cut: "map",
    yes_at_another_threshold: "review",
    thresholds_not_exported: "screen",
    review_turns_defect_into_good: "verdict",
}


@pytest.mark.parametrize(("plant", "stage"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_planted_fault_is_caught_where_it_sits(
    export: Export, monkeypatch: Patch, plant: Callable[[Export, Patch], None], stage: str
) -> None:
    plant(export, monkeypatch)
    failure = export.measure().failure
    assert failure is not None
    assert failure.startswith(f"{stage} is the first stage that differs: ")


def swap_yes_and_no(export: Export) -> None:
    """On both sides."""
    language = export.manifest.language
    swapped = {"yes_token_ids": language.no_token_ids, "no_token_ids": language.yes_token_ids}
    export.edit("language", **swapped)
    export.edit_checkpoint("config.json", **swapped)


def test_masks_count_where_the_source_says_yes(export: Export, monkeypatch: Patch) -> None:
    masks_with_align_corners(export, monkeypatch)
    swap_yes_and_no(export)
    found = export.measure()
    assert found.failure is None
    assert [row.stage for row in found.stages] == [stage for stage in LADDER if stage != "mask"]


@pytest.mark.parametrize("coarseness", [("fp32", "q4_k_m"), ("fp32", "q8_0"), ("fp16", "f16"), ("int8", "q4_k_m")])
def test_language_model_that_moves_p_yes_by_0_3_is_refused(export: Export, coarseness: tuple[str, str]) -> None:
    """Across the threshold, from 0.68: the row of Yes in its last matrix is turned against the state that answers."""
    precision, quantization = coarseness
    checkpoint = Checkpoint.open(export.checkpoint)
    question = export.manifest.conversation.question.replace("{object}", export.manifest.conversation.object)
    source = Source(checkpoint, checkpoint.language()).run(Frame.read(export.image), question)
    before = float(source["p_yes"])
    assert 0.5 < before < 0.8
    state = source["hidden_states"][-len(source["answer"]) - 1]  # of the prompt's last token
    (yes,) = export.manifest.language.yes_token_ids
    shift = np.log(before / (1 - before)) - np.log((before - 0.3) / (1.3 - before))
    llm(export)["output.weight"][yes] -= shift * state / (state @ state)
    export.edit("language", quantization=quantization)
    thresholds = {"good_below": 0.0, "defect_above": 2.0}  # the screen leaves every frame to the review
    export.edit("similarity", thresholds=Thresholds(**thresholds))
    export.edit_checkpoint("config.json", similarity={"thresholds": thresholds})
    export.manifest = export.manifest.model_copy(
        update={"precision": dict.fromkeys(("clip_encoder", "ltc_projector"), precision)}
    )
    rows = {row.stage: row for row in export.measure().stages}
    assert rows["p_yes"].max_abs_error == pytest.approx(0.3, abs=1e-3)
    assert rows["p_yes"].broken
    assert rows["review"].flips == 1
    # 0.68 is further from 0.5 than P(yes) may move, but for the coarsest of all
    assert bool(rows["review"].broken) == bool(rows["verdict"].broken) == (precision != "int8")


def test_a_decision_that_flips_on_one_of_more_images_is_enough(export: Export, monkeypatch: Patch) -> None:
    more = [partial(Frame.read, str(export.checkpoint / "parity_images" / "high.png"))]
    found = export.measure(more)
    assert found.failure is None and found.more_images == 1
    assert {row.stage for row in found.stages if row.images == 2} == {"score", "p_yes", *DECISIONS}
    settled = parity.settled
    monkeypatch.setattr(parity, "settled", lambda verdict, p_yes, rule: settled(verdict, p_yes - (p_yes > 0.9), rule))
    failure = export.measure(more).failure or ""
    assert failure.startswith("review is the first stage that differs: clear flips 1, expected at most 0")
    assert "high.png" in failure


def test_export_that_fails_on_one_of_more_images_is_refused(export: Export, monkeypatch: Patch) -> None:
    def fails(*args: Any) -> Figures:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(parity.Exported, "figures", fails)
    found = export.measure([partial(Frame.read, export.image)])
    assert "p_yes is the first stage that differs: max abs error RuntimeError: out of memory" in (found.failure or "")
    assert all(row.broken for row in found.stages if row.stage in DECISIONS)


def test_token_list_shorter_than_the_embedding_is_refused(export: Export, monkeypatch: Patch) -> None:
    add = gguf.GGUFWriter.add_token_list
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda writer, tokens: add(writer, tokens[:-1]))
    export_language(export.checkpoint / "language", export.checkpoint / "adapter", export.folder / "llm.gguf", "f32")
    with pytest.raises(BundleError, match=r"llm\.gguf"):
        export.measure()


# ---------------------------------------------------------------------------------------------- the command


def test_past_a_limit_there_is_no_bundle(
    export: Export, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm_head_not_exported(export, monkeypatch)
    for graph in ("clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder"):
        made = export.folder / f"{graph}.onnx"
        monkeypatch.setattr(
            getattr(pipeline, graph), "export", lambda checkpoint, path, made=made: shutil.copy(made, path)
        )
    monkeypatch.setattr(
        pipeline, "export_language", lambda a, b, target, q: shutil.copy(export.folder / "llm.gguf", target)
    )
    target = tmp_path / "target"
    assert main(["export", str(export.checkpoint), str(target), "--llm", "f32"]) == 2
    err = capsys.readouterr().err
    assert f"vmad: {target} was not written. logits is the first stage that differs: max relative error" in err
    assert "expected at most 3e-05" in err
    assert re.search(r"hidden_states .* 3e-05", err)  # the whole table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_flips_are_counted_on_as_many_images_as_asked_for(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint's two and three drawn parts."""
    bundle, checkpoint, page = str(export.folder), str(export.checkpoint), tmp_path / "page.html"
    assert main(["parity", bundle, checkpoint, "--device", "cpu", "--images", "5", "--page", str(page)]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "worst of 2 images; score, P(yes) and decisions of 3 more" in out
    told = "the review’s Yes or No on 0 of 5 (≤ 45.1%), the settled verdict on 0 of 5 (≤ 45.1%)."
    assert told in out and told in page.read_text()

    images = str(export.checkpoint / "parity_images")
    assert main(["parity", bundle, checkpoint, images, "--images", "5"]) == 2
    assert f"expected 5 images in {images}, found 2. Without a folder, parts are drawn" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["parity", bundle, checkpoint, "--images", "0"])
    assert "expected a number of images, found '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "ladder", "more"), [(None, range(40), 0), (40, range(0, 40, 5), 32), (8, range(0, 40, 5), 0), (1, [0], 0)]
)
def test_images_to_compare(
    tiny: Path, tmp_path: Path, monkeypatch: Patch, count: int | None, ladder: Sequence[int], more: int
) -> None:
    """Evenly over a folder of 40 of a 12-bit camera, at most eight of them on all stages."""
    for number in range(40):
        cv2.imwrite(str(tmp_path / f"{number:02}.png"), np.full((8, 8, 3), 16 * number, np.uint16))
    monkeypatch.setattr(pipeline, "_MOST_LADDERS", 8)
    reading: Reading = {"bit_depth": 12, "colour": "rgb"}
    images, others = pipeline.images_to_compare(Checkpoint.open(tiny), tmp_path, count, reading)
    assert [Path(path).stem for path in images] == [f"{number:02}" for number in ladder]
    seen = {*images, *(frame().id for frame in others)}
    assert len(others) == more and len(seen) == len(images) + more


def test_parity_command(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, checkpoint, page = str(export.folder), str(export.checkpoint), tmp_path / "page.html"
    assert main(["parity", bundle, checkpoint, "--device", "cpu", "--page", str(page)]) == 0
    assert "within all limits" in capsys.readouterr().out
    assert "All stages within their limits on 2 images" in page.read_text()
    assert main(["parity", bundle, checkpoint, str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err

    export.edit("language", seg_state="token")
    seal(export.folder, export.manifest)
    assert main(["parity", bundle, checkpoint, "--device", "cpu"]) == 1
    assert "h_seg is the first stage that differs" in capsys.readouterr().out

    (export.folder / "llm.gguf").write_bytes(b"")
    assert main(["parity", bundle, checkpoint]) == 2
    assert "was changed" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- figures


ONE = np.array([[3.0, -4.0]], np.float32)
PAIRS = {
    # case: (exported, cosine, max absolute error, max relative error); the source is ONE
    "equal": (ONE, 1, 0, 0),
    "twice as large": (2 * ONE, 1, 4, 1),
    "opposite": (-ONE, -1, 8, 2),
    "half of it gone": (np.array([[3, 0]], np.float32), 0.6, 4, 1),
    "another shape": (ONE[:, :1], 0, np.inf, np.inf),
    "not a number": (np.full_like(ONE, np.nan), np.nan, np.nan, np.nan),
}


@pytest.mark.parametrize(("exported", "cosine", "absolute", "relative"), PAIRS.values(), ids=PAIRS)
def test_compare(exported: NDArray[Any], cosine: float, absolute: float, relative: float) -> None:
    row = compare("patches", ONE, exported)
    found = (row.cosine, row.max_abs_error, row.max_relative_error)
    assert found == pytest.approx((cosine, absolute, relative), nan_ok=True)
    assert row.equal == (exported is ONE)


def test_compare_masks_by_iou() -> None:
    source, exported = np.array([True, True, True, False]), np.array([True, True, False, True])
    assert compare("mask", source, exported).iou == 0.5
    assert compare("mask", source & False, exported & False).iou == 1  # both empty


def test_a_mask_counts_where_its_logits_are_clear() -> None:
    source = np.array([[5.0, 5.0, 1.0, -1.0, -5.0]])
    for change, doubt, whole, clear in (
        ([0, 0, -2, 2, 0], 2, 0.5, 1),  # what was in doubt is another now
        ([0, 0, -2, 2, 0], 0, 0.5, 0.5),
        ([0, -6, 0, 0, 0], 2, 2 / 3, 0.5),
        ([0, 0, 0, 0, 6], 2, 0.75, 2 / 3),
        ([-6, -6, -6, 0, 0], 2, 0, 0),  # no mask any more
        ([0, 0, 0, 0, 0], 6, 1, None),  # none of it is clear
    ):
        row = compare("mask", source, source + np.array(change), doubt)
        assert (row.iou, row.clear_iou) == (pytest.approx(whole), clear and pytest.approx(clear))


def test_compare_maps_by_rank_where_they_were_inspected() -> None:
    random = np.random.default_rng(0)
    source = random.integers(0, 20, (9, 9)).astype(np.float32)  # with ties
    exported = source + random.normal(size=(9, 9)).astype(np.float32)
    source[:, :2] = exported[:, :2] = np.nan
    row = compare("map", source, exported)
    assert row.rank_correlation == pytest.approx(spearmanr(source[:, 2:].ravel(), exported[:, 2:].ravel()).statistic)
    exported[0, 5] = np.nan  # one side alone
    assert np.isnan(compare("map", source, exported).max_abs_error or 0)


FLIPS = {
    # (flips, images): the bound in words
    (0, 16): "0 of 16 (≤ 17.1%)",
    (0, 300): "0 of 300 (≤ 0.994%)",
    (1, 300): "1 of 300 (≤ 1.57%)",
    (0, 10_000): "0 of 10000 (≤ 0.03%)",
    (2, 2): "2 of 2 (≤ 100%)",
}


@pytest.mark.parametrize(("count", "words"), FLIPS.items(), ids=FLIPS.values())
def test_flips_are_told_with_their_bound(count: tuple[int, int], words: str) -> None:
    flips, images = count
    rows = [
        StageParity(
            stage="review", equal=i >= flips, flips=i < flips, clear=1, clear_flips=i < flips, worst_image=str(i)
        )
        for i in range(images)
    ]
    row = parity._worst(rows, {"clear_flips": 0})
    bound = beta.ppf(0.95, flips + 1, images - flips) if flips < images else 1
    assert row.flips_at_most == pytest.approx(bound, abs=1e-6)
    assert (row.flips, row.clear, row.clear_flips, row.images) == (flips, images, flips, images)
    assert bool(row.broken) == (flips > 0)
    found = Parity(images=("a",), question="", quantization="f32", tensor_types={}, stages=(row,))
    assert f"the review’s Yes or No on {words}." in found.flips_in_words


def test_the_worst_image_is_that_of_the_measure_past_its_limit() -> None:
    rows = [
        compare("score", np.array(source), np.array(exported)).model_copy(update={"worst_image": name})
        for name, source, exported in (("small", 0.01, 0.012), ("large", 0.9, 1.0))
    ]
    assert parity._worst(rows, {"max_relative_error": 0.1, "max_abs_error": 0.05}).worst_image == "small"
    assert parity._worst(rows, {"max_relative_error": 0.3, "max_abs_error": 0.05}).worst_image == "large"


THRESHOLDS = Thresholds(good_below=0.3, defect_above=0.6)
CLEAR = {
    # what: (score, P(yes), thresholds, which decisions are clear while the score moves by 0.1 and P(yes) by 0.05)
    "all": (0.1, 0.1, THRESHOLDS, {"screen", "review", "verdict"}),
    "next to No": (0.45, 0.54, THRESHOLDS, {"screen"}),
    "the screen has settled it": (0.9, 0.54, THRESHOLDS, {"screen", "verdict"}),
    "Yes settles it either way": (0.65, 0.9, THRESHOLDS, {"review", "verdict"}),
    "No does not": (0.65, 0.1, THRESHOLDS, {"review"}),
    "nothing": (0.55, 0.47, THRESHOLDS, set()),
    "no thresholds": (0.3, 0.1, None, {"screen", "review", "verdict"}),
}


@pytest.mark.parametrize(("score", "p_yes", "thresholds", "clear"), CLEAR.values(), ids=CLEAR)
def test_clear_decisions(score: float, p_yes: float, thresholds: Thresholds | None, clear: set[str]) -> None:
    figures = {"score": np.array(score), "p_yes": np.array(p_yes)}
    allowed: dict[str, dict[parity.Measure, float]] = {
        "score": {"max_abs_error": 0.1, "max_relative_error": 9},
        "p_yes": {"max_abs_error": 0.05},
    }
    assert {stage for stage, is_clear in parity._clear(figures, thresholds, allowed).items() if is_clear} == clear


@pytest.mark.parametrize("thresholds", [THRESHOLDS, None], ids=["thresholds", "none"])
def test_both_sides_decide_by_the_same_rules(thresholds: Thresholds | None) -> None:
    """On each side of each threshold, and on it."""
    for score in (0.0, 0.29, 0.3, 0.45, 0.6, 0.61, 1.0):
        for p_yes in (0.0, 0.49, 0.5, 0.51, 1.0):
            figures = Figures(score, p_yes)
            assert parity.decisions(figures, thresholds) == parity.runtime_decisions(figures, thresholds)


def test_score_that_is_no_number_is_not_inspected() -> None:
    found = parity.runtime_decisions(Figures(float("nan"), 0.1), THRESHOLDS)
    assert found["screen"] == found["verdict"] == list(Verdict).index(Verdict.NOT_INSPECTED)


def wrong(stage: str) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Pairs of a stage's arrays of which the second is wrong: no precision excuses it."""
    rng = np.random.default_rng(0)
    if stage == "prompt_ids" or stage == "answer" or stage in DECISIONS:
        return [(np.array([1, 2]), np.array([1, 3]))]
    if stage == "p_yes":  # a decision turned, a sure one gone, chance
        return [
            (np.array(a), np.array(b)) for a, b in ((0.74, 0.26), (0.65, 0.35), (0.26, 0.74), (0.99, 0.7), (0.1, 0.5))
        ]
    if stage == "score":
        return [(np.array(a), np.array(b)) for a, b in ((0.9, 0.1), (0.9, 0.5), (0.1, 0.9), (0.3, 0.0), (0.5, 0.8))]
    if stage == "mask":  # a defect's blob on its background, of a trained decoder's size
        y, x = np.mgrid[:256, :256]

        def blob(at: int) -> NDArray[Any]:
            return 18 * np.exp(-((x - at) ** 2 + (y - at) ** 2) / 600) - 11

        return [(blob(90), other) for other in (blob(150), blob(105), -blob(90), np.full((256, 256), -11.0))]
    right = rng.normal(size=(40, 64))
    others = (
        np.zeros_like(right),
        -right,
        rng.normal(size=right.shape),
        np.roll(right, 1, axis=0),
        np.full_like(right, np.nan),
    )
    if stage == "map":
        right, others = np.abs(right), tuple(np.abs(other) for other in others[2:])
    return [(right, other) for other in others]


@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("stage", LADDER)
def test_every_limit_refuses_what_is_wrong(bundle: Bundle, stage: str, precision: str, quantization: str) -> None:
    """Each of a stage's limits by itself, but for a score's, of which the two together do."""
    language = bundle.manifest.language.model_copy(update={"quantization": quantization})
    graphs = dict.fromkeys(("clip_encoder", "ltc_projector", "sam_encoder"), precision)
    allowed = limits(bundle.manifest.model_copy(update={"language": language, "precision": graphs}))
    if stage == "answer" and (precision, quantization) != ("fp32", "f32"):
        assert not allowed[stage]  # coarser weights may choose another word
        return
    assert allowed[stage]
    doubt = allowed["low_res_masks"]["max_relative_error"] * 11
    for right, other in wrong(stage):
        row = compare(stage, right, other, doubt)
        if stage in DECISIONS:
            row = row.model_copy(update={"flips": 1, "clear": 1, "clear_flips": 1})
        together = [allowed[stage]] if stage == "score" else [{name: limit} for name, limit in allowed[stage].items()]
        for each in together:
            assert row.model_copy(update={"limits": each}).broken, (each, row)
        assert (
            not compare(stage, right, right, doubt)
            .model_copy(update={"limits": allowed[stage], "clear_flips": 0})
            .broken
        )


LIMITS = {
    # case: (a stage's figures, its limits, whether it is past them)
    "small error": ({"max_abs_error": 0.1}, {"max_abs_error": 0.1}, False),
    "large error": ({"max_abs_error": 0.2}, {"max_abs_error": 0.1}, True),
    "high likeness": ({"iou": 0.9}, {"iou": 0.9}, False),
    "low likeness": ({"iou": 0.8}, {"iou": 0.9}, True),
    "not a number": ({"cosine": float("nan")}, {"cosine": 0.1}, True),
    "not measured": ({}, {"cosine": 0.1}, True),
    "second of two": ({"cosine": 1, "max_abs_error": 2}, {"cosine": 1, "max_abs_error": 1}, True),
    "no limit": ({"cosine": 0}, {}, False),
}


@pytest.mark.parametrize(("figures", "allowed", "broken"), LIMITS.values(), ids=LIMITS)
def test_limits(figures: dict[str, float], allowed: dict[str, float], broken: bool) -> None:
    row = StageParity.model_validate({"stage": "s", "equal": 0, **figures, "limits": allowed})
    assert bool(row.broken) == broken
    assert bool(StageParity.model_validate_json(row.model_dump_json()).broken) == broken


def test_only_what_the_language_model_touches_is_looser_when_quantized(bundle: Bundle) -> None:
    language = bundle.manifest.language.model_copy(update={"quantization": "q4_k_m"})
    strict, loose = limits(bundle.manifest), limits(bundle.manifest.model_copy(update={"language": language}))
    changed = {stage for stage in LADDER if strict[stage] != loose[stage]}
    assert changed == {"hidden_states", "logits", "p_yes", "answer", "h_seg", "h_seg_full", "low_res_masks"}


@pytest.mark.parametrize(("precision", "moved", "breaks"), [("fp16", 1, True), ("int8", 1, False), ("int8", 30, True)])
def test_int8_may_move_the_state_of_one_undecided_token(
    bundle: Bundle, precision: str, moved: int, breaks: bool
) -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 64))
    others = states.copy()
    others[60 : 60 + moved] = rng.normal(size=(moved, 64))
    allowed = limits(bundle.manifest.model_copy(update={"precision": {"clip_encoder": precision}}))["hidden_states"]
    row = compare("hidden_states", states, others).model_copy(update={"limits": allowed})
    assert (row.broken is not None) == breaks


def test_limit_of_the_score_is_what_rounding_can_do(bundle: Bundle) -> None:
    """Patches as far off as FP16 may make them, in no direction: their scores stay within it, and fill some of it."""
    vision = bundle.manifest.vision.model_copy(update={"width": 1024})
    manifest = bundle.manifest.model_copy(update={"vision": vision, "precision": {"clip_encoder": "fp16"}})
    allowed = limits(manifest)
    rng = np.random.default_rng(0)
    normal, abnormal, patches, noise = (rng.normal(size=(rows, 1024)) for rows in (60, 60, 576, 576))
    noise *= allowed["patches"]["max_relative_error"] * np.abs(patches).max() / np.abs(noise).max()

    def scores(patches: Any) -> Any:
        def nearest(features: Any) -> Any:
            cosines = patches @ features.T / np.linalg.norm(features, axis=1)
            return cosines.max(1) / np.linalg.norm(patches, axis=1)

        logit = (nearest(normal) - nearest(abnormal)) / manifest.similarity.temperature
        return 1 / (1 + np.exp(logit))

    errors = np.abs(scores(patches + noise) - scores(patches))
    assert errors.max() <= allowed["score"]["max_abs_error"] <= 10 * errors.max()
    assert (errors / scores(patches)).max() <= allowed["score"]["max_relative_error"] < 0.08
