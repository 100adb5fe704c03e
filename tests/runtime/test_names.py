"""Names of what is written about frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmad_edge.runtime.names import Names, in_folders, joined

PATHS = [
    "a/b_c.png",
    "a_b/c.png",
    "A/B_C.png",
    "/a/b_c.png",
    "../a/b_c.png",
    "odd.png",
    "odd.bmp",
    "odd_language.png",
    "odd_mask.png",
    "x" * 250 + ".png",
    "/".join(["folder of a station" * 5] * 8) + "/1.png",
    "ü" * 120 + ".png",
    "caf\udce9.png",
    "caf_.png",
    "a:b.png",
    "a?b.png",
    "two\nlines.png",
    "\x1b[2J.png",
]


@pytest.mark.parametrize("place", [joined, in_folders])
def test_no_two_frames_write_one_file(place: object, tmp_path: Path) -> None:
    endings = (".tiff", "_language.tiff", "_mask.png")
    names = Names(PATHS, place, endings)  # type: ignore[arg-type]
    files = [f"{names.of(path)}{ending}" for path in PATHS for ending in endings]
    assert len({file.casefold() for file in files}) == len(files)
    for file in files:
        assert not Path(file).is_absolute() and ".." not in Path(file).parts
        assert file.isprintable() and not set(file) & set('<>:"|?*\\')
        target = tmp_path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(f".{target.name}.part").write_bytes(b"")
        target.write_bytes(b"")


def test_plain_names_stay() -> None:
    paths = ["good/0.png", "good/1.png", "bad/0.png"]
    assert [str(Names(paths, joined, (".png",)).of(path)) for path in paths] == [
        "good_0.png",
        "good_1.png",
        "bad_0.png",
    ]
    assert [str(Names(paths, in_folders, (".tiff",)).of(path)) for path in paths] == ["good/0", "good/1", "bad/0"]


def test_names_do_not_hang_on_the_order() -> None:
    there, back = (Names(paths, joined, (".png",)) for paths in (PATHS, PATHS[::-1]))
    assert [there.of(path) for path in PATHS] == [back.of(path) for path in PATHS]
