"""Maps of frames whose labels a benchmark's server keeps, as that of MVTec AD 2 takes them (benchmark.mvtec.com).

FOLDER/
  anomaly_images/OBJECT/test_private/NAME.tiff               [h,w] float16
  anomaly_images_thresholded/OBJECT/test_private/NAME.png    [h,w] 0 or 255
and test_private_mixed beside test_private, each named as its frame: what `check_and_prepare_data_for_upload.py` of the
benchmark's own code asks for. That packs it; the server wants all objects.
"""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vmad_edge.runtime.files import write_whole

_SHORT, _LONG = 3, 4


def is_there(folder: Path, object: str, frame: Path) -> bool:
    return all(path.is_file() for path in _places(folder, object, frame))


def write(folder: Path, object: str, frame: Path, heat: NDArray[np.float32], threshold: float) -> None:
    """Both files of one frame.

    Args:
        heat: [h,w]; where it is NaN, not inspected, the lowest value of the others is written: it raises no alarm.
        threshold: what is at least this is 255 in the second file.
    """
    known = np.where(np.isnan(heat), np.nanmin(heat), heat)
    continuous, thresholded = _places(folder, object, frame)
    _, png = cv2.imencode(".png", np.where(known >= threshold, np.uint8(255), np.uint8(0)))
    for path, data in ((continuous, _tiff(known.astype(np.float16))), (thresholded, png.tobytes())):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)


def _places(folder: Path, object: str, frame: Path) -> tuple[Path, Path]:
    name = Path(object, frame.parent.name, frame.name)
    return (
        folder / "anomaly_images" / name.with_suffix(".tiff"),
        folder / "anomaly_images_thresholded" / name.with_suffix(".png"),
    )


def _tiff(values: NDArray[np.float16]) -> bytes:
    """One uncompressed strip: neither Pillow nor OpenCV writes 16-bit floats."""
    height, width = values.shape
    data = values.astype("<f2").tobytes()
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(data), 339: 3}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the strip begins, after header and directory
    short = (258, 259, 262, 277, 339)
    entries = (struct.pack("<HHII", tag, _SHORT if tag in short else _LONG, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4) + data
