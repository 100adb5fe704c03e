from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

from vmad_edge.export.pipeline import export


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights, exported once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    export(write_checkpoint(folder / "checkpoint"), folder / "bundle", quantization="f16")
    return folder / "bundle"
