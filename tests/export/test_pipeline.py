"""`vmad export` from a checkpoint to a bundle, and what it says of the difference."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs import clip_encoder, ltc_projector, mask_decoder, sam_encoder
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.files import whole_folder


def test_bundle_holds_the_whole_checkpoint(tiny: Path, bundle: Bundle) -> None:
    source, manifest = Checkpoint.open(tiny), bundle.manifest
    assert set(manifest.files) == {
        "clip_encoder.onnx",
        "llm.gguf",
        "ltc_projector.onnx",
        "mask_decoder.onnx",
        "parity.html",
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
    assert language.context_length == 512  # all that the model was trained on: less than 4 + 8 + 512
    assert {"torch", "transformers", "llama-cpp-python", "vmad-edge"} <= manifest.made_with.keys()
    before, after = (load_file(folder / "similarity.safetensors") for folder in (tiny, bundle.path))
    assert all(np.array_equal(after[name], before[name]) for name in ("visual_normal", "semantic_normal"))


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
    what_to_do = "in vmad-edge's checkout run pip install -e '.[cpu,export]'"
    assert result.stderr.strip() == f"vmad: vmad export needs torch: {what_to_do}"


CHILD = """
import resource, sys, time
from pathlib import Path
from vmad_edge.export import pipeline
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.files import whole_folder

checkpoint, bundle, started, room = sys.argv[1:]
for graph in (pipeline.clip_encoder, pipeline.ltc_projector, pipeline.sam_encoder, pipeline.mask_decoder):
    graph.export = lambda checkpoint, path, **options: path.write_bytes(b"a graph")

def measure(*arguments, **options):
    Path(started).touch()
    time.sleep(600)

pipeline.measure = measure
if int(room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
sys.exit(main(["export", checkpoint, bundle, "--llm", "f32"]))
"""


def start_export(checkpoint: Path, target: Path, room: int = 0) -> subprocess.Popen[str]:
    """An export that stops, with all files but the manifest written, once `started` beside `target` is there.

    Args:
        room: the largest file it may write, in bytes; 0: any.
    """
    arguments = [str(checkpoint), str(target), str(target.with_name("started")), str(room)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.PIPE, text=True)


KILLS = {
    # case: (signal, whether a bundle is there already, what may be left beside the target)
    "killed": (signal.SIGKILL, False, {"started", "scratch"}),
    "killed over an older bundle": (signal.SIGKILL, True, {"started", "bundle", "scratch"}),
    "asked to end": (signal.SIGTERM, True, {"started", "bundle"}),
}


@pytest.mark.parametrize(("how", "older", "left"), KILLS.values(), ids=KILLS)
def test_killed_export(
    tiny: Path, tiny_bundle: Path, tmp_path: Path, how: signal.Signals, older: bool, left: set[str]
) -> None:
    target = tmp_path / "bundle"
    if older:
        shutil.copytree(tiny_bundle, target)
    with start_export(tiny, target) as child:
        while not (tmp_path / "started").exists():
            assert child.poll() is None, child.stderr and child.stderr.read()
            time.sleep(0.05)
        child.send_signal(how)
    found = {"scratch" if path.name.startswith(".bundle.") else path.name for path in tmp_path.iterdir()}
    assert found == left
    if older:
        assert Bundle.open(target).hash == Bundle.open(tiny_bundle).hash


def test_a_folder_stopped_between_its_renames_is_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot exchange two names."""
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").touch()
    monkeypatch.setattr("vmad_edge.runtime.files._exchange", lambda one, other: False)
    rename = Path.rename

    def stop(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise SystemExit(143)  # what SIGTERM raises
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(SystemExit), whole_folder(target) as folder:
        (folder / "new").touch()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("bundle"), Path("bundle/old")]


def test_export_on_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for it."""
    target = tmp_path / "bundle"
    with start_export(tiny, target, room=100_000) as child:
        assert child.stderr is not None
        lines = child.stderr.read().strip().splitlines()
    assert child.returncode == 2
    *steps, line = lines
    assert steps[0] == "export: checkpoint" and all(step.startswith("export: ") for step in steps)
    assert line.startswith(f"vmad: {target} was not written: ")
    assert line.endswith(". Make room there, or name another place.")
    assert list(tmp_path.iterdir()) == []
