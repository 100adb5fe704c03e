"""Files and folders that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmad_edge.runtime.files import whole_file, whole_folder, write_whole


@pytest.mark.parametrize("name", ["a", "x" * 255, "ä" * 127], ids=["short", "longest", "longest in bytes"])
def test_any_name_that_a_file_may_have(tmp_path: Path, name: str) -> None:
    for content in ("old", "new"):
        write_whole(tmp_path / name, content)
    assert (tmp_path / name).read_text() == "new"
    for content in ("old", "new"):
        with whole_folder(tmp_path / "folder" / name) as folder:
            (folder / "content").write_text(content)
    assert (tmp_path / "folder" / name / "content").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "folder"])
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "content").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as scratch:
        scratch.write_text("half")
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "folder") as folder:
        (folder / "content").write_text("half")
        _ = 1 / 0
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/content").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
