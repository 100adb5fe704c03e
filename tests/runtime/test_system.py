"""Another system than Linux is refused, in one line."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from vmad_edge.runtime.cli import main
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.inspector import Inspector

pytestmark = pytest.mark.parametrize(
    "system,shown", [("Darwin", "Darwin (some64)"), ("Windows", "Windows (some64)"), ("", "an unknown system (some64)")]
)
SAYS = "vmad-edge runs on Linux (x86-64, aarch64); this is "


@pytest.fixture(autouse=True)
def elsewhere(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: "some64")


def test_inspector_is_refused_at_open(shown: str, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(VmadError) as refused:
        Inspector.open(tiny_bundle, tmp_path, "cpu")
    assert str(refused.value) == SAYS + shown


@pytest.mark.parametrize("command", [["inspect", "bundle", "part.png"], ["info", "bundle"], ["--version"]])
def test_command_is_refused_in_one_line(command: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert capsys.readouterr() == ("", f"vmad: {SAYS}{shown}\n")
