from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.labelled import LabelledFrame
from vmad_edge.runtime.masks import read_mask

SIZE = (480, 640)
MARKED = np.zeros(SIZE, bool)
MARKED[101:187, 203:331] = MARKED[400:403, 17] = True
GREY = MARKED.astype(np.uint8) * 255
ALPHA = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


def palette(
    numbers: np.ndarray, colours: list[tuple[int, int, int]], alpha: int | None = None
) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        image = Image.fromarray(numbers.astype(np.uint8), "L").convert("P")
        image.putdata(numbers.ravel().tolist())
        image.putpalette([channel for colour in colours for channel in colour])
        image.save(path, **({} if alpha is None else {"transparency": alpha}))

    return save


def pillow(array: np.ndarray, **options: object) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(array).save(path, **options)


def opencv(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(cv2.imencode(path.suffix, array)[1].tobytes())


def tiff(array: np.ndarray, **options: object) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, array, **options)


RGB = np.dstack([MARKED * 0, MARKED * 90, MARKED * 255]).astype(np.uint8)
DEEP = MARKED.astype(np.uint16)
BLACK, RED, WHITE = (0, 0, 0), (255, 0, 0), (255, 255, 255)

CLEAR: dict[str, tuple[str, Callable[[Path], None]]] = {
    "grey": ("m.png", pillow(GREY)),
    "zeros and ones": ("m.png", pillow(GREY // 255)),
    "1 bit": ("m.png", lambda path: Image.fromarray(GREY).convert("1").save(path)),
    "1 bit, white is zero": ("m.tif", tiff(~MARKED, photometric="miniswhite")),
    "alpha everywhere": ("m.png", pillow(np.dstack([GREY, GREY, GREY, GREY * 0 + 255]))),
    "alpha nowhere": ("m.png", pillow(np.dstack([GREY, GREY, GREY, GREY * 0]))),
    "alpha of its own": ("m.png", pillow(np.dstack([GREY, GREY, GREY, ALPHA]))),
    "grey and alpha": ("m.png", pillow(np.dstack([GREY, GREY * 0 + 255]))),
    "grey and alpha of its own": ("m.png", pillow(np.dstack([GREY, ALPHA]))),
    "colour": ("m.bmp", pillow(RGB)),
    "palette": ("m.png", palette(MARKED * 1, [BLACK, RED])),
    "palette, its black last": ("m.png", palette(~MARKED * 1, [WHITE, BLACK])),
    "palette, two blacks": ("m.png", palette(MARKED * 1 + (ALPHA > 99) * 2, [BLACK, RED, BLACK, WHITE])),
    "palette with alpha": ("m.png", palette(MARKED * 1, [BLACK, RED], alpha=0)),
    "16 bits": ("m.png", opencv(DEEP * 65535)),
    "16 bits, low": ("m.png", opencv(DEEP * 255)),
    "16 bits, one": ("m.tif", tiff(DEEP)),
    "16 bits, big-endian": ("m.tif", tiff(DEEP * 255, byteorder=">")),
    "16 bits, colour, low": ("m.png", opencv(np.dstack([DEEP * 0, DEEP * 255, DEEP]))),
    "16 bits, colour and alpha": ("m.png", opencv(np.dstack([DEEP, DEEP, DEEP, DEEP * 0 + 65535]))),
    "32 bits": ("m.tif", tiff(DEEP.astype(np.int32))),
    "float": ("m.tif", tiff(DEEP.astype(np.float32))),
    "levels that count down from white": ("m.png", pillow(GREY - (ALPHA % 4) * MARKED)),
}


@pytest.mark.parametrize("name,save", CLEAR.values(), ids=list(CLEAR))
def test_what_is_not_black_is_marked(name: str, save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / name)
    marked, doubt = read_mask(tmp_path / name, SIZE)
    np.testing.assert_array_equal(marked, MARKED)
    assert doubt is None


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("array", [GREY, np.dstack([GREY] * 3)], ids=["grey", "colour"])
@pytest.mark.parametrize("as_png", [False, True])
def test_what_jpeg_left_beside_the_marks_is_none_and_said(
    as_png: bool, array: np.ndarray, quality: int, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality)
    path = tmp_path / f"m.{'png' if as_png else 'jpg'}"
    with Image.open(file) as image:
        assert (np.asarray(image) > 0).sum() > (array > 0).sum() + 300
        if as_png:
            image.save(path)
        else:
            path.write_bytes(file.getvalue())
    marked, doubt = read_mask(path, SIZE)
    assert (marked != MARKED).sum() <= 12  # the thin mark's rim, at the lowest quality
    assert doubt is not None and "as JPEG leaves them" in doubt


@pytest.mark.parametrize(
    "values,says",
    [
        (MARKED * (1 + ALPHA % 9), "values from 1 to 9, none of them white: all are taken for marks"),
        (MARKED * (1 + ALPHA % 100), "values from 1 to 100, none of them white"),
        (MARKED | True, "it marks the whole frame"),
    ],
)
def test_doubts_that_change_nothing(values: np.ndarray, says: str, tmp_path: Path) -> None:
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "m.png")
    marked, doubt = read_mask(tmp_path / "m.png", SIZE)
    np.testing.assert_array_equal(marked, values > 0)
    assert doubt is not None and says in doubt


@pytest.mark.parametrize("colours", [[BLACK] * 10, [WHITE] * 10, [(i, i, i) for i in range(10)]])
def test_numbers_of_kinds(colours: list[tuple[int, int, int]], tmp_path: Path) -> None:
    numbers = MARKED * (1 + ALPHA % 9)
    palette(numbers, colours)(tmp_path / "palette.png")
    Image.fromarray(numbers.astype(np.uint8)).save(tmp_path / "grey.png")
    for name in ("palette", "grey"):
        marked, doubt = read_mask(tmp_path / f"{name}.png", SIZE, numbered=True)
        np.testing.assert_array_equal(marked, MARKED)
        assert doubt is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_masks_own_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(GREY).save(tmp_path / "m.png", exif=exif)
    size = SIZE if orientation < 5 else SIZE[::-1]
    marked, _ = read_mask(tmp_path / "m.png", size)
    assert marked.shape == size and marked.sum() == MARKED.sum()
    # where the upper left mark's first corner comes to lie
    at = {1: (101, 203), 2: (101, -204), 3: (-102, -204), 4: (-102, 203)}
    at |= {5: (203, 101), 6: (203, -102), 7: (-204, -102), 8: (-204, 101)}
    assert marked[at[orientation]] and np.argwhere(marked).shape == (MARKED.sum(), 2)


def test_a_frame_that_exif_turns_is_a_doubt(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(GREY).save(tmp_path / "m.png")
    Image.fromarray(RGB).save(tmp_path / "f.jpg", exif=exif)
    doubts: list[str] = []
    LabelledFrame("f", tmp_path / "f.jpg", True, tmp_path / "m.png").read_mask(SIZE, doubts.append)
    assert len(doubts) == 1 and "turned by its EXIF orientation" in doubts[0]
    Image.fromarray(RGB).save(tmp_path / "f.jpg")
    LabelledFrame("f", tmp_path / "f.jpg", True, tmp_path / "m.png").read_mask(SIZE, doubts.append)
    assert len(doubts) == 1


@pytest.mark.parametrize(
    "save,size,says",
    [
        (pillow(GREY), (481, 640), r"m\.png: expected a mask of 481×640 pixels, found 480×640"),
        (pillow(GREY), (640, 480), r"found 480×640; it lies on its side"),
        (lambda path: path.write_bytes(b"no mask"), SIZE, r"m\.png: not a readable mask"),
        (lambda path: path.symlink_to("nowhere"), SIZE, r"m\.png: not a readable mask"),
    ],
)
def test_refuses(save: Callable[[Path], None], size: tuple[int, int], says: str, tmp_path: Path) -> None:
    save(tmp_path / "m.png")
    with pytest.raises(FrameError, match=says):
        read_mask(tmp_path / "m.png", size)


def test_several_masks_are_united(tmp_path: Path) -> None:
    parts = np.zeros((3, *SIZE), np.uint8)
    parts[0, 1:9, 1:9], parts[1, 5:20, 5:20], parts[2, 400:, :3] = 255, 254, 250
    (tmp_path / "masks").mkdir()
    for number, part in enumerate(parts):
        Image.fromarray(part).save(tmp_path / f"masks/{number:03}.png")
    (tmp_path / "masks/.DS_Store").write_bytes(b"x")
    frame = LabelledFrame("f", tmp_path / "f.png", True, tmp_path / "masks")
    np.testing.assert_array_equal(frame.read_mask(SIZE), parts.any(0))
    assert frame.mask_files == tuple(tmp_path / f"masks/00{i}.png" for i in range(3))
