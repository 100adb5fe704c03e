"""Files are whole or absent, and leave nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmad_edge.runtime.files import write_whole


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "picture.png"
    write_whole(file, b"earlier")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as half:
            half.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"earlier"
