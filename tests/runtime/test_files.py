"""Files and folders that are whole or absent."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kills import kills

from vmad_edge.runtime import files
from vmad_edge.runtime.files import only_ours, only_writer, whole_file, whole_folder, write_whole


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


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "by two renames"])
def test_a_folder_replaced_by_a_process_that_is_killed(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step leaves the old or the new; two renames have a moment with neither, which the test must find."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target, found = tmp_path / "folder", set()

    def write(text: str) -> None:
        with whole_folder(target) as folder:
            (folder / "content").write_text(text)

    write("old")
    for _ in kills(lambda: write("new")):
        found.add((target / "content").read_text() if target.exists() else "neither")
        write("old")
    assert found == ({"old", "new"} if exchange else {"old", "new", "neither"})


def test_a_link_to_a_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/content").write_text("old")
    (tmp_path / "folder").symlink_to("elsewhere")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "content").write_text("new")
    assert (tmp_path / "folder/content").read_text() == "new" and not (tmp_path / "folder").is_symlink()
    assert (tmp_path / "elsewhere/content").read_text() == "old"


def test_a_scratch_file_is_made_by_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where somebody guessed its name, and made a link of it."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".file.guessed.new").symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file", "content")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "file").exists()


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    """Processes and threads: none reads a number that another is about to write."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count(_: object = None) -> None:
        for _ in range(50):
            with only_writer(tmp_path):
                number = int(counter.read_text())
                os.sched_yield()
                counter.write_text(str(number + 1))

    process = multiprocessing.get_context("fork").Process(target=count)
    process.start()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(count, range(2)))
    process.join()
    assert process.exitcode == 0 and counter.read_text() == "150"


@pytest.mark.parametrize("killed", ["the writer", "neither it nor its fork"])
def test_the_lock_ends_with_its_writer(killed: str, tmp_path: Path) -> None:
    """A fork has the file too, and the lock with it, unless it is given back."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with only_writer(tmp_path):
            (tmp_path / ".file.x.new").touch()
            (tmp_path / ".folder.x.new").mkdir()
            (tmp_path / ".folder.x.new/content").touch()
            if (heir := 0 if killed == "the writer" else os.fork()) == 0:
                os.write(writes, b"%d\n" % os.getpid())
                signal.pause()
        os._exit(0)
    heir = int(os.read(reads, 99))
    try:
        if killed == "the writer":
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        (tmp_path / "kept").touch()
        with (tmp_path / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free: the next writer need not wait
        with only_writer(tmp_path):
            assert {path.name for path in tmp_path.iterdir()} == {".lock", "kept"}
    finally:
        if heir != child:
            os.kill(heir, signal.SIGKILL)


ME, ANOTHER = 1000, 1001


@pytest.mark.parametrize(
    "owner,group,mode,ours",
    [
        (ME, ME, 0o755, True),
        (0, 0, 0o755, True),
        (ANOTHER, ANOTHER, 0o755, False),
        (ME, 100, 0o775, False),
        (ME, ME, 0o775, True),  # a group of its own
        (0, 0, 0o775, False),  # root's has others in it
        (ME, ME, 0o757, False),
        (ANOTHER, ANOTHER, 0o700, False),
        (ME, 100, 0o1777, False),
    ],
)
def test_who_can_have_written_it(
    owner: int, group: int, mode: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    found = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, group, 0, 0, 0, 0))
    assert only_ours(found, 0o022) is ours
