"""What comes from outside at its edges: each function does what its docstring says of it, or raises what that says.

Whatever a sentence for people holds, it is no address in memory and no inside of a library.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from parsers import INSIDE, PARSERS, RAW, encoded, places, references, station_bundle
from PIL import Image

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.folder import refuse_other_folder
from vmad_edge.export.reading import read_json, read_shapes, weight_files
from vmad_edge.runtime.bundle import Bundle, Similarity
from vmad_edge.runtime.costs import graph_cost
from vmad_edge.runtime.dataset import read_dataset
from vmad_edge.runtime.errors import FrameError, VmadError
from vmad_edge.runtime.folders import find_images, list_images, walk
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.headers import read_gguf, read_onnx
from vmad_edge.runtime.masks import read_mask, turned
from vmad_edge.runtime.names import Names, in_folders, joined
from vmad_edge.runtime.objects import alike, folder_name, listed, object_name
from vmad_edge.runtime.rows import file_facts, read_rows, take_up
from vmad_edge.runtime.stages.similarity import NormalFeatures
from vmad_edge.runtime.station import Station

BINARY = [name for name, parser in PARSERS.items() if not parser.text]
TEXT = [name for name, parser in PARSERS.items() if parser.text]


# -------------------------------------------------------------------------------------------- files of each kind


@pytest.mark.parametrize("name", PARSERS)
def test_seeds_are_good(name: str, tmp_path: Path) -> None:
    """Else all that is made of them would be refused for one and the same reason."""
    for data in PARSERS[name].seeds():
        PARSERS[name].read(data, tmp_path)


@pytest.mark.parametrize("name", BINARY)
def test_files_cut_off_anywhere(name: str, tmp_path: Path) -> None:
    for data in PARSERS[name].seeds()[:3]:
        for length in range(0, len(data), max(1, len(data) // 100)):
            PARSERS[name].run(data[:length], tmp_path)


@pytest.mark.parametrize("name", BINARY)
def test_counts_and_lengths_without_reason(name: str, tmp_path: Path) -> None:
    for data in PARSERS[name].seeds()[:3]:
        for count in (2**63, 2**64 - 1, 2**32 - 1, 0):
            for start in range(0, len(data) - 8, max(1, len(data) // 40)):
                PARSERS[name].run(data[:start] + struct.pack("<Q", count) + data[start + 8 :], tmp_path)


VALUES = [
    "null",
    "true",
    "-1",
    "0",
    "0.5",
    '""',
    '"x"',
    '"\\ud800"',
    '"a\\u0000b"',
    '"' + "x" * 10_000 + '"',
    "[]",
    "{}",
]
VALUES += ["[[]]", "[null]", "18446744073709551616", *RAW]


@pytest.mark.parametrize("name", TEXT)
def test_json_of_other_values(name: str, tmp_path: Path) -> None:
    """Each value in turn is another, or missing; in large files each is only some of the others."""
    (line, *_) = PARSERS[name].seeds()[0].splitlines()
    count = len(list(places(json.loads(line))))
    step = 1 + count // 12
    for index in range(count):
        for value in VALUES[index % step :: step]:
            tree = json.loads(line)
            container, key = list(places(tree))[index]
            container[key] = "@"
            PARSERS[name].run(json.dumps(tree).replace('"@"', value).encode() + b"\n", tmp_path)
        tree = json.loads(line)
        container, key = list(places(tree))[index]
        del container[key]
        PARSERS[name].run(json.dumps(tree).encode() + b"\n", tmp_path)


@pytest.mark.parametrize("name", PARSERS)
def test_files_of_another_kind(name: str, tmp_path: Path) -> None:
    odd = [b"", b"\0", b"\n", b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0" * 4096, b"\xff" * 4096]
    for data in (*odd, *(value.encode() for value in VALUES)):
        PARSERS[name].run(data, tmp_path)


def test_gguf_lists_in_lists(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 5000
    head = b"GGUF\3\0\0\0" + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    PARSERS["GGUF header"].run(head + nested, tmp_path)


@pytest.mark.parametrize(("kind", "value"), [("<I", 0), ("<i", -1), ("<f", 32.5), ("<?", False)])
def test_gguf_alignment(kind: str, value: Any, tmp_path: Path) -> None:
    """0 divides nothing."""
    number = {"<I": 4, "<i": 5, "<f": 6, "<?": 7}[kind]
    name = b"general.alignment"
    head = b"GGUF\3\0\0\0" + struct.pack("<QQQ", 0, 1, len(name)) + name + struct.pack("<I", number)
    (tmp_path / "a.gguf").write_bytes(head + struct.pack(kind, value))
    with pytest.raises(VmadError, match="expected an alignment of at least 1"):
        read_gguf(tmp_path / "a.gguf")


def test_onnx_numbers_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08" + b"\xff" * 3_000_000)
    with pytest.raises(VmadError, match="more than 64 bits"):
        read_onnx(tmp_path / "a.onnx")


# ---------------------------------------------------------------------------------------------------------- paths


def _links(folder: Path) -> dict[str, Path]:
    """Paths that lead to no file."""
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nothing").symlink_to(folder / "nowhere")
    (folder / "folder").mkdir()
    (folder / "file").write_bytes(b"nothing\nof it\n")
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    named = {name: folder / name for name in ("loop", "nothing", "folder", "missing", "file", "pipe", "device")}
    below = {"below a file": folder / "file/a", "NUL": folder / "a\0b", "surrogate": folder / "\ud800"}
    return {**named, **below, "long": folder / ("x" * 300), "deep": Path(folder, *["x" * 200] * 30)}


READERS: dict[str, Callable[[Path], object]] = {
    "Bundle.open": Bundle.open,
    "read_onnx": read_onnx,
    "read_gguf": read_gguf,
    "graph_cost": graph_cost,
    "NormalFeatures": lambda path: NormalFeatures(path, Similarity()),
    "Frame.read": Frame.read,
    "read_mask": lambda path: read_mask(path, (12, 12)),
    "read_dataset": read_dataset,
    "read_rows": lambda path: list(read_rows(path)),
    "take_up": lambda path: take_up(path, [], {}, 1),
    "Checkpoint.open": Checkpoint.open,
    "read_shapes": read_shapes,
    "read_json": read_json,
}


@pytest.mark.parametrize("reader", READERS)
def test_paths_that_lead_to_nothing(reader: str, tmp_path: Path) -> None:
    for kind, path in _links(tmp_path).items():
        if kind in ("pipe", "device") and reader in ("read_rows", "take_up"):  # `vmad table <(grep …)` is good
            continue
        with pytest.raises(VmadError) as raised:
            READERS[reader](path)
            pytest.fail(f"{reader} took {kind}")
        assert not INSIDE.search(str(raised.value)), kind


def test_a_checkpoint_lies_at_a_path_in_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"l\xe4nder")
    folder.mkdir()
    with pytest.raises(VmadError, match="expected a path in UTF-8"):
        Checkpoint.open(folder)


def _quietly(read: Callable[..., object], *arguments: object) -> object:
    """What it gives; None for an error whose sentence is for people."""
    try:
        return read(*arguments)
    except VmadError as error:
        assert str(error) and not INSIDE.search(str(error)), str(error)
        return None


def test_paths_that_need_not_exist(tmp_path: Path) -> None:
    for path in _links(tmp_path).values():
        assert file_facts(str(path)).keys() == {"size", "sha256"}
        assert turned(path) is False
        for look in (find_images, list_images, walk):
            _quietly(look, [path])
        _quietly(refuse_other_folder, path)


@pytest.mark.parametrize(
    "shard", ["", ".", "..", "/etc/passwd", "../model.safetensors", "a/b", "a\0b", "\ud800", "x" * 9999]
)
def test_shards_outside_of_the_folder(shard: str, tmp_path: Path) -> None:
    """Also of an index that names its own folder, which would be read again for ever."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(VmadError, match=r"expected names of files in|is missing"):
        read_shapes(tmp_path)
    if "/" in shard or shard in ("", ".", ".."):
        with pytest.raises(VmadError, match="expected names of files in"):
            weight_files(tmp_path)


# ---------------------------------------------------------------------------------------------------------- names

NAMES = [
    "",
    " ",
    "a",
    "A",
    "a ",
    "a/b",
    "a_2f_b",
    "../a",
    "..",
    ".",
    "/",
    "-",
    "_",
    "__",
    "a\0b",
    "a\nb",
    "CON",
    "nul.txt",
]
NAMES += [
    "é",
    "e\u0301",
    "ﬁ",
    "fi",
    "İ",
    "ı",
    "שלום",
    "\u202ea\u202c",
    "👩\u200d🔧",
    "👩🔧",
    "\ud800",
    "\udce4",
    "\U0010ffff",
]


def test_objects_of_any_script_have_places_of_their_own(tmp_path: Path) -> None:
    """Also those that differ in case or normal form alone, which some file systems take for one."""
    station = Station(tmp_path / "station", station_bundle())
    folders = [folder_name(name) for name in NAMES]
    assert len({folder.casefold() for folder in folders}) == len(NAMES)
    assert [object_name(folder) for folder in folders] == NAMES
    for name in NAMES[::4]:
        station.save_references(name, references())
        assert station.knows(name) and station.load_references(name) is not None
    assert station.enrolled() == sorted(NAMES[::4])
    assert [path.name for path in tmp_path.iterdir()] == ["station"]
    for name in NAMES:
        assert alike(name, name) and repr(name) in listed([*NAMES[-1:], name], name)
        _quietly(station.check_known, name)
        _quietly(station.enrolled_with, name, "a")


@pytest.mark.parametrize("name", ["x" * 10_000, "é" * 61, "\0" * 10_000, "👩" * 10_000])
@pytest.mark.parametrize(
    "call", ["load_references", "knows", "check_known", "left_behind", "bank_hash", "load_calibration", "load_release"]
)
def test_objects_whose_names_are_too_long(name: str, call: str, tmp_path: Path) -> None:
    with pytest.raises(VmadError, match="too long to name a folder") as raised:
        getattr(Station(tmp_path, station_bundle()), call)(name, *([None] if call == "load_calibration" else []))
    assert len(str(raised.value)) < 500


PATHS = [
    "..png",
    "...png",
    "a/..png",
    "a/...png",
    ".",
    "..",
    "",
    "/",
    "a\0.png",
    "\ud800.png",
    "\udce4.png",
    "x" * 10_000,
]


@pytest.mark.parametrize("place", [joined, in_folders])
@pytest.mark.parametrize("path", PATHS + NAMES)
def test_what_is_written_about_any_path_stays_below(place: Callable[[str], Path], path: str) -> None:
    found = Names([path], place, (".png",)).of(path)
    assert found.parts and not found.is_absolute() and ".." not in found.parts
    assert len(found.name.encode()) < 250


# --------------------------------------------------------------------------------------------------------- frames


def _pixels(shape: tuple[int, ...] = (12, 16, 3), dtype: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def _read_only() -> NDArray[Any]:
    array = _pixels()
    array.setflags(write=False)
    return array


class Subclass(np.ndarray[Any, Any]):
    pass


ARRAYS: dict[str, Callable[[], Any]] = {
    "not contiguous": lambda: _pixels((24, 48, 3))[::2, ::3],
    "backwards": lambda: _pixels()[::-1, ::-1, ::-1],
    "Fortran's order": lambda: np.asfortranarray(_pixels()),
    "read-only": _read_only,
    "one row again and again": lambda: as_strided(_pixels((1, 16, 3)), (12, 16, 3), (0, 3, 1)),
    "a subclass": lambda: _pixels().view(Subclass),
    "masked": lambda: np.ma.masked_array(_pixels(), _pixels() > 128),
    "grey, strided": lambda: _pixels()[..., 1],
    "RGBA, strided": lambda: _pixels((12, 16, 8))[..., ::2],
    "one channel": lambda: _pixels((12, 16, 1)),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_any_layout_are_copied(kind: str) -> None:
    array = ARRAYS[kind]()
    frame = Frame.read(array)
    plain = np.array(array, order="C", copy=True).reshape(12, 16, -1)
    expected = plain if plain.shape[2] == 3 else plain[..., :3] if plain.shape[2] == 4 else np.repeat(plain, 3, 2)
    np.testing.assert_array_equal(frame.pixels, expected)
    assert type(frame.pixels) is np.ndarray and frame.pixels.flags.c_contiguous and frame.pixels.flags.writeable
    assert not np.shares_memory(frame.pixels, array)
    assert len(frame.pixel_hash) == 64


@pytest.mark.parametrize("order", "<>=")
def test_arrays_of_either_byte_order(order: str) -> None:
    values = _pixels((12, 16)).astype(np.uint16) << 2
    frame = Frame.read(values.astype(f"{order}u2"), bit_depth=10)
    np.testing.assert_array_equal(frame.pixels[..., 0], values >> 2)


NO_FRAMES: dict[str, Callable[[], Any]] = {
    "objects": lambda: _pixels().astype(object),
    "floats": lambda: _pixels().astype(np.float32),
    "signed": lambda: _pixels().astype(np.int16),
    "booleans": lambda: _pixels() > 128,
    "texts": lambda: np.full((12, 16, 3), "x"),
    "dates": lambda: np.zeros((12, 16), "M8[s]"),
    "fields": lambda: np.zeros((12, 16), [("r", "u1"), ("g", "u1"), ("b", "u1")]),
    "a number": lambda: np.ones((), np.uint8),
    "a row": lambda: _pixels((300,)),
    "a stack": lambda: _pixels((2, 12, 16, 3)),
    "two channels": lambda: _pixels((12, 16, 2)),
    "channels first": lambda: _pixels((3, 12, 16)),
    "nothing": lambda: np.zeros((0, 0, 3), np.uint8),
    "no columns": lambda: np.zeros((12, 0, 3), np.uint8),
    "no channels": lambda: np.zeros((12, 16, 0), np.uint8),
    "larger than memory": lambda: as_strided(_pixels(), (10**6, 10**6, 3), (0, 0, 0)),
    "16 bits without depth": lambda: _pixels(dtype=np.uint16),
    "no bytes": lambda: b"",
    "bytes of pixels": lambda: _pixels().tobytes(),
    "a view of pixels": lambda: memoryview(_pixels()),
    "every second byte": lambda: memoryview(encoded("PNG"))[::2],
    "an empty path": lambda: "",
    "a folder": lambda: "/",
    "a name with NUL": lambda: "a\0.png",
    "half a character": lambda: "\ud800.png",
    "a long name": lambda: "x" * 10_000,
    "a file cut off": lambda: io.BytesIO(encoded("PNG")[:300]),
    "a file at its end": lambda: _at_its_end(),
    "an image cut off": lambda: Image.open(io.BytesIO(encoded("JPEG")[:-40])),
    "an image of 16 bits": lambda: Image.open(io.BytesIO(encoded("PNG", "I;16"))),
}


def _at_its_end() -> io.BytesIO:
    file = io.BytesIO(encoded("PNG"))
    file.seek(0, os.SEEK_END)
    return file


@pytest.mark.parametrize("kind", NO_FRAMES)
def test_what_is_no_frame(kind: str) -> None:
    with pytest.raises(FrameError) as raised:
        Frame.read(NO_FRAMES[kind]())
    assert not INSIDE.search(str(raised.value))


class BytesPath:
    def __init__(self, path: Path) -> None:
        self.path = os.fsencode(path)

    def __fspath__(self) -> bytes:
        return self.path


def test_a_path_may_be_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    assert Frame.read(BytesPath(tmp_path / "a.png")).path == str(tmp_path / "a.png")  # type: ignore[arg-type]


def _closed() -> io.BytesIO:
    file = io.BytesIO(encoded("PNG"))
    file.close()
    return file


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: 3,
        lambda: [[1, 2], [3, 4]],
        lambda: object(),
        lambda: io.StringIO("text"),
        _closed,
        lambda: np.uint8(3),
    ],
    ids=["None", "int", "list", "object", "text file", "closed file", "NumPy's number"],
)
def test_what_is_no_source_at_all(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError) as raised:
        Frame.read(make())
    assert not INSIDE.search(str(raised.value).replace("builtins.object", ""))


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "La", "RGBa", "RGBX", "PA"]


@pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16B", "I;16L", "I;16N"])
def test_images_of_every_mode(mode: str) -> None:
    image = Image.new(mode, (16, 12))
    frame = _quietly(Frame.read, image, 12)
    assert frame is None or (isinstance(frame, Frame) and frame.pixels.shape == (12, 16, 3))
    assert frame is not None or mode in ("F", "I", "LAB", "La", "RGBa", "I;16N")


@pytest.mark.parametrize("pixels", [*(kind for kind in NO_FRAMES if "byte" not in kind)])
def test_frames_by_hand(pixels: str) -> None:
    """`Frame(…)` takes an array [h,w,3] of uint8 as it is, and nothing else."""
    given = NO_FRAMES[pixels]()
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3:
        assert Frame(given, "by hand").pixels is given
        return
    with pytest.raises((FrameError, TypeError)) as raised:
        Frame(given, "by hand")
    assert not INSIDE.search(str(raised.value))
