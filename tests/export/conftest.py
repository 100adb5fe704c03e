"""One tiny checkpoint and its bundle for all tests of the export."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's folder, not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of `tiny`, its language model in F32."""
    target = tmp_path_factory.mktemp("tiny") / "bundle"
    assert main(["export", str(tiny), str(target), "--llm", "f32"]) == 0
    return Bundle.open(target)
