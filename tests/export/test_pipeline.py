"""`vmad export` from a checkpoint to a bundle, and what it says of the difference."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs import clip_encoder, ltc_projector, mask_decoder, sam_encoder
from vmad_edge.export.parity import Parity, compare, measure
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import main

STAGES = [
    "clip_pixels",
    "sam_pixels",
    "patches",
    "patches_multi",
    "cls",
    "visual_tokens",
    "image_embeddings",
    "prompt_ids",
    "hidden_states",
    "logits",
    "h_seg",
    "low_res_masks",
]


def test_bundle_holds_the_whole_checkpoint(tiny: Path, bundle: Bundle) -> None:
    source, manifest = Checkpoint.open(tiny), bundle.manifest
    assert set(manifest.files) == {
        "clip_encoder.onnx",
        "llm.gguf",
        "ltc_projector.onnx",
        "mask_decoder.onnx",
        "parity.json",
        "sam_encoder.onnx",
        "similarity.safetensors",
    }
    assert (manifest.clip, manifest.sam) == (source.clip, source.sam)
    assert (manifest.conversation, manifest.similarity) == (source.config.conversation, source.config.similarity)
    assert (manifest.vision.grid, manifest.vision.width, manifest.vision.levels) == (4, 48, (-1, -2, 1))
    language = manifest.language
    assert (language.width, language.visual_tokens, language.quantization) == (256, 4, "f32")
    assert (language.vocabulary, language.seg_token_id) == (source.vocabulary, source.seg_token_id)
    assert {"torch", "transformers", "llama-cpp-python", "vmad-edge"} <= manifest.made_with.keys()
    before, after = (load_file(folder / "similarity.safetensors") for folder in (tiny, bundle.path))
    assert all(np.array_equal(after[name], before[name]) for name in ("visual_normal", "semantic_normal"))


def test_every_stage_equals_its_source_at_full_precision(bundle: Bundle) -> None:
    parity = Parity.model_validate_json(bundle.file("parity.json").read_bytes())
    assert parity.images == ("high.png", "wide.png")
    assert [row.stage for row in parity.stages] == STAGES
    for row in parity.stages:
        exact = row.stage in ("clip_pixels", "prompt_ids")
        assert row.cosine > 1 - 1e-9, row
        assert row.max_relative_error <= (0 if exact else 5e-5), row
    assert parity.stages[-1].iou == 1


def test_parity_shows_where_an_export_went_wrong(tiny: Path, bundle: Bundle) -> None:
    """Other pixels, and nothing from there on agrees; what does not depend on them still does."""
    wrong = bundle.manifest.model_copy(
        update={"clip": bundle.manifest.clip.model_copy(update={"resample": "bilinear"})}
    )
    images = [str(tiny / "parity_images" / "wide.png")]
    parity = measure(Checkpoint.open(tiny), bundle.path, wrong, images)
    agree = {row.stage for row in parity.stages if row.max_relative_error < 1e-3}
    assert agree == {"sam_pixels", "image_embeddings", "prompt_ids"}


ONE = np.array([[3.0, -4.0]], np.float32)
PAIRS = {
    # case: (exported, cosine, max relative error); the source is ONE
    "equal": (ONE, 1, 0),
    "twice as large": (2 * ONE, 1, 1),
    "opposite": (-ONE, -1, 2),
    "half of it gone": (np.array([[3, 0]], np.float32), 0.6, 1),
    "another shape": (ONE[:, :1], 0, np.inf),
    "not a number": (np.full_like(ONE, np.nan), np.nan, np.nan),
}


@pytest.mark.parametrize(("exported", "cosine", "error"), PAIRS.values(), ids=PAIRS)
def test_compare(exported: np.ndarray, cosine: float, error: float) -> None:
    row = compare("patches", ONE, exported)
    assert (row.cosine, row.max_relative_error) == pytest.approx((cosine, error), nan_ok=True)
    assert row.exact == (exported is ONE)


def test_compare_masks_by_iou() -> None:
    source, exported = np.array([1.0, 1, 1, -1]), np.array([2.0, 1, -1, 1])
    assert compare("low_res_masks", source, exported).iou == 0.5
    assert compare("low_res_masks", -abs(source), -abs(exported)).iou == 1  # both empty


def test_check_writes_nothing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tiny.rglob("*"))
    assert main(["export", str(tiny), "--check"]) == 0
    assert "<seg> = 400" in capsys.readouterr().out
    assert sorted(tiny.rglob("*")) == before


def test_failed_export_leaves_what_was_there(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(tiny, tmp_path / "checkpoint")
    features = load_file(broken / "similarity.safetensors")
    features["visual_normal"][0] = np.nan  # found only after the graphs and the GGUF were written
    for graph in (clip_encoder, ltc_projector, sam_encoder, mask_decoder):
        monkeypatch.setattr(graph, "export", lambda checkpoint, path: path.write_bytes(b"a graph"))
    save_file(features, broken / "similarity.safetensors")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("an older bundle")
    assert main(["export", str(broken), str(bundle), "--llm", "f32"]) == 2
    assert "visual_normal: expected finite numbers" in capsys.readouterr().err
    assert [path.name for path in bundle.iterdir()] == ["manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_nothing_but_a_bundle_is_replaced(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["export", str(tiny), str(tmp_path)]) == 2
    assert "is no bundle" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_export_asks_for_parity_images(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = shutil.copytree(tiny, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("parity_images"))
    assert main(["export", str(without), str(tmp_path / "bundle")]) == 2
    assert "--parity-images" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(tiny: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from vmad_edge.runtime.cli import main\n"
        f"sys.exit(main(['export', {str(tiny)!r}, '--check']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == "vmad: vmad export needs torch: pip install 'vmad-edge[cpu,export]'"
