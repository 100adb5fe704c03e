"""One tiny checkpoint of random weights, and its bundle, for all tests that only read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's folder."""
    from tiny_checkpoint import write_checkpoint  # torch: not for those who test the kernels alone

    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def bundle(tiny: Path) -> Bundle:
    """The bundle of `tiny`, its language model in F32."""
    target = tiny.parent / "bundle"
    assert main(["export", str(tiny), str(target), "--llm", "f32"]) == 0
    return Bundle.open(target)


@pytest.fixture(scope="session")
def tiny_bundle(bundle: Bundle) -> Path:
    """Its folder."""
    return bundle.path
