"""What is committed in demo/: the bundle is the checkpoint's export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.parity import Exported, measure
from vmad_edge.export.pipeline import export
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the sixteen, a good part and a defective one: all of them are a minute's work."""
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((DEMO / "checkpoint/parity_images").iterdir())[:2]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_committed_bundle_is_at_parity_with_the_checkpoint(images: Path) -> None:
    checkpoint, bundle = Checkpoint.open(DEMO / "checkpoint"), Bundle.open(DEMO / "bundle")
    assert measure(checkpoint, bundle, list_images([str(images)])).failure is None


def test_exported_again_it_computes_the_same(images: Path, tmp_path: Path) -> None:
    export(DEMO / "checkpoint", tmp_path / "bundle", parity_images=images)
    committed, again = Bundle.open(DEMO / "bundle"), Bundle.open(tmp_path / "bundle")
    for field in ("similarity", "conversation", "clip", "sam", "vision", "language", "precision"):
        assert getattr(again.for_review, field) == getattr(committed.for_review, field)
    question = again.for_review.conversation.question.replace("{object}", "part")
    with Exported(committed, "cpu") as ours, Exported(again, "cpu") as theirs:
        for path in list_images([str(images)]):
            frame, said = Frame.read(path), np.array([again.for_review.language.seg_token_id])
            sides = [dict(side.run(frame, question, said)) for side in (ours, theirs)]
            for stage, array in sides[0].items():
                # Another version of the exporter may order sums otherwise.
                close = 1e-4 * float(np.nanmax(np.abs(array.astype(float))))
                again_array = sides[1][stage].astype(float)
                np.testing.assert_allclose(array.astype(float), again_array, atol=close, err_msg=stage)


def test_size() -> None:
    """Committed once: what everybody who clones pays for."""
    files = [file for folder in ("checkpoint", "bundle") for file in (DEMO / folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 48 * 2**20
