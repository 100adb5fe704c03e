from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from vmad_edge.runtime import folders
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.folders import find_images, list_images, walk
from vmad_edge.runtime.frame import Frame


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def below(folder: Path) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in find_images([folder]).paths]


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_folders_are_walked_in_order_and_files_are_taken_as_given(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.JPG", "notes.txt", "deep/er/c.tiff", "deep/a.Png")
    assert below(tmp_path) == ["a.JPG", "b.png", "deep/a.Png", "deep/er/c.tiff"]
    notes = str(tmp_path / "notes.txt")
    assert find_images([notes, tmp_path]).paths == [notes, *map(str, find_images([tmp_path]).paths)]


def test_paths_stay_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "line/a.png")
    monkeypatch.chdir(tmp_path)
    for given in (".", "line", "line/", "./line"):
        assert find_images([given]).paths == ["line/a.png"]


@pytest.mark.parametrize(
    "ending,form",
    [
        *[(ending, "PPM") for ending in ("pgm", "ppm", "pnm", "PGM")],
        *[(ending, "JPEG") for ending in ("jpg", "jpeg", "jpe", "jfif", "JPE", "JFIF", "Jpg")],
        *[(ending, "TIFF") for ending in ("tif", "tiff", "TIF")],
        *[("jp2", "JPEG2000"), ("j2k", "JPEG2000"), ("tga", "TGA"), ("bmp", "BMP"), ("gif", "GIF"), ("webp", "WEBP")],
        *[("PNG", "PNG"), ("avif", "AVIF"), ("dib", "DIB")],
    ],
)
def test_what_is_listed_can_be_read(ending: str, form: str, tmp_path: Path) -> None:
    if form not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow has no {form}")
    Image.new("RGB", (32, 24), (10, 200, 30)).save(tmp_path / f"a.{ending}", form)
    assert below(tmp_path) == [f"a.{ending}"]
    assert Frame.read(find_images([tmp_path]).paths[0]).pixels.shape == (24, 32, 3)


def test_links_are_followed_and_each_file_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "store/batch2/cracked.jpg", "line/ok.jpg")
    line = tmp_path / "line"
    (line / "batch2").symlink_to(tmp_path / "store/batch2")
    (line / "again.jpg").symlink_to("ok.jpg")
    (line / "loop").symlink_to(line)
    (line / "self").symlink_to("self")
    found = find_images([line, line / "ok.jpg", tmp_path / "store"])
    assert [Path(path).relative_to(tmp_path).as_posix() for path in found.paths] == [
        "line/again.jpg",
        "line/batch2/cracked.jpg",
        "line/self",
    ]
    assert names(list(found.left_out)) == ["loop", "ok.jpg", "batch2"]
    assert not found.missed
    with pytest.raises(FrameError, match=r"self: cannot be read \(a link to self: Too many levels"):
        Frame.read(found.paths[2])


HIDDEN = [".hidden.jpg", "._a.jpg", ".ipynb_checkpoints/a.jpg", ".git/x/a.jpg", "@eaDir/a.jpg", "#recycle/a.jpg"]
OF_SYSTEMS = ["__MACOSX/a.jpg", "$RECYCLE.BIN/a.jpg", "System Volume Information/a.jpg", "lost+found/a.jpg"]


@pytest.mark.parametrize("name", HIDDEN + OF_SYSTEMS)
def test_hidden_things_are_named_but_not_missed(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", name)
    found = find_images([tmp_path])
    assert below(tmp_path) == ["a.jpg"]
    assert names(list(found.left_out)) == [name.split("/")[0]]
    assert not found.missed


def test_a_hidden_folder_that_was_given_is_walked(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/a.jpg")
    assert below(tmp_path / ".cache") == ["a.jpg"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "table.CSV", "boxes.json", "Thumbs.db", "desktop.ini", "README", "a.xml", "a.png.vmad.jpg"]
)
def test_plain_other_files_are_named_but_not_missed(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", name)
    found = find_images([tmp_path])
    assert (names(list(found.left_out)), found.missed) == ([name], [])


@pytest.mark.parametrize("name", ["a.heic", "a.cr2", "a.mp4", "a.zip", "a.jpg.part", "0001", "a.raw"])
def test_what_may_be_an_image_is_missed(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", name)
    found = find_images([tmp_path])
    assert names(found.paths) == ["a.jpg"]
    assert names(found.missed) == [name] == names(list(found.left_out))


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "camera.jpg")
    found = find_images([tmp_path])
    assert (names(found.paths), names(found.missed)) == (["a.jpg"], ["camera.jpg"])


@pytest.mark.parametrize("name", ["0001.jpg", "batch.7", "batch"])
def test_a_link_to_nothing_is_an_unreadable_frame(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / name).symlink_to("/mnt/not_mounted/there")
    assert below(tmp_path) == sorted(["a.jpg", name])
    with pytest.raises(FrameError, match=r"cannot be read \(a link to /mnt/not_mounted/there: No such file"):
        Frame.read(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_an_unreadable_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")

    def refuse(path: str) -> os.ScandirIterator[str]:  # also where the tests run as root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    assert below(tmp_path) == ["a.jpg", "locked"]
    with pytest.raises(FrameError, match=r"locked: cannot be read \(a folder that cannot be listed: Permission denied"):
        Frame.read(tmp_path / "locked")


def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.jpg", *(f"{n}.txt" for n in range(5)), "b.heic", ".DS_Store", "odd\nname.txt")
    (tmp_path / os.fsdecode(b"M\xfcller.txt")).touch()
    assert names(list_images([tmp_path])) == ["a.jpg"]
    (line,) = caplog.messages
    assert "7 no images by their endings (0.txt, 1.txt, 2.txt, …)" in line
    assert "1 perhaps images, in a format that is not read (b.heic)" in line
    assert "1 hidden, or a folder of the system (.DS_Store)" in line
    assert line.isprintable()


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="nothing does not exist; expected an image file or a folder"):
        walk([tmp_path / "nothing"])
    touch(tmp_path, "photo.heic")
    with pytest.raises(FrameError, match=r"no images in .*; looked for \.apng, .*left out: 1 perhaps .*photo\.heic"):
        find_images([tmp_path])
    assert not walk([tmp_path]).paths


def test_a_given_link_to_nothing_is_an_unreadable_frame(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    assert names(find_images([tmp_path / "a.jpg"]).paths) == ["a.jpg"]


def test_agrees_with_find(tmp_path: Path) -> None:
    """GNU find with -L is the oracle for what lies below, links and all."""
    touch(tmp_path, *(f"line/{lot}/{part}.png" for lot in ("a", "b-1", "b") for part in range(12)))
    (tmp_path / "line/c").symlink_to("../other")
    touch(tmp_path, *(f"other/{part}.PNG" for part in range(5)))
    oracle = subprocess.run(
        ["find", "-L", str(tmp_path / "line"), "-iname", "*.png"], capture_output=True, text=True, check=True
    )
    assert find_images([tmp_path / "line"]).paths == sorted(oracle.stdout.splitlines())


def test_every_format_that_is_read_has_an_ending() -> None:
    assert folders.suffixes() >= {".png", ".jpg", ".tif", ".pgm", ".mpo", ".webp", ".tga", ".jp2"}
    assert not folders.suffixes() & {".eps", ".pdf", ".mpg", ".h5"}
