"""Labelled test sets on disk: MVTec AD's folders and VisA's CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.folders import walk

_VISA = Path("split_csv/1cls.csv")
_COLUMNS = {"object", "split", "label", "image", "mask"}


@dataclass(frozen=True)
class LabelledFrame:
    name: str
    """Its path below the data set's category (VisA: below the data set), with `/`."""
    path: Path
    defective: bool
    mask: Path | None
    """None for what is good, and for a defect that nobody marked."""

    def read_mask(self, size: tuple[int, int]) -> NDArray[np.bool_] | None:
        """[h,w], True on the defect; all False for what is good. None if the defect was not marked.

        Args:
            size: (height, width) of the frame.

        Raises:
            FrameError: a mask that cannot be read, or of another size than the frame.
        """
        if self.mask is None:
            return None if self.defective else np.zeros(size, np.bool_)
        try:
            with Image.open(self.mask) as image:
                mask = np.asarray(image) != 0  # a palette's numbers too: VisA's kinds of defects
        except (OSError, ValueError) as error:
            raise FrameError(f"{self.mask}: not a readable mask ({error})") from None
        mask = mask.any(axis=2) if mask.ndim == 3 else mask
        if mask.shape != size:
            raise FrameError(f"{self.mask}: expected a mask of {size[0]}×{size[1]} pixels, found {mask.shape}")
        return mask if mask.any() else None


@dataclass(frozen=True)
class Category:
    name: str
    train: tuple[Path, ...]
    """Normal frames to enroll."""
    test: tuple[LabelledFrame, ...]


def read_dataset(folder: Path, only: Iterable[str] = ()) -> list[Category]:
    """The categories of a data set, or the one that `folder` is, sorted by name; those named in `only` if any are.

    MVTec AD: `train/good`, `test/<kind>`, `ground_truth/<kind>/<name>_mask.png` or `<name>.png` in a category's folder.
    VisA: `split_csv/1cls.csv` with the columns object, split, label, image and mask beside the categories' folders.

    Raises:
        FrameError: neither layout, a category that is not there or has no frames to test, a frame that is missing.
    """
    if (folder / _VISA).is_file():
        found = _read_visa(folder)
    elif (folder.parent / _VISA).is_file() and not (folder / "test").is_dir():
        found = [category for category in _read_visa(folder.parent) if category.name == folder.name]
    else:
        places = [folder] if (folder / "test").is_dir() else sorted(p.parent for p in folder.glob("*/test"))
        found = [_read_mvtec(place) for place in places]
    if not found:
        raise FrameError(
            f"{folder}: expected MVTec AD's layout (CATEGORY/train/good, CATEGORY/test/KIND, "
            f"CATEGORY/ground_truth/KIND) or VisA's ({_VISA}), found neither"
        )
    wanted = set(only)
    if missing := wanted - {category.name for category in found}:
        names = ", ".join(category.name for category in found)
        raise FrameError(f"{folder} has no category {', '.join(sorted(missing))}; it has {names}")
    chosen = [category for category in found if not wanted or category.name in wanted]
    for category in chosen:
        if not category.test:
            raise FrameError(f"{folder}: category {category.name} has no frames to test")
    return sorted(chosen, key=lambda category: category.name)


def _read_mvtec(folder: Path) -> Category:
    test = []
    for path in _images(folder / "test"):
        kind = path.relative_to(folder / "test").parts[0]
        masks = (folder / "ground_truth" / kind / f"{path.stem}{ending}.png" for ending in ("_mask", ""))
        mask = None if kind == "good" else next((mask for mask in masks if mask.is_file()), None)
        test.append(LabelledFrame(path.relative_to(folder).as_posix(), path, kind != "good", mask))
    return Category(folder.resolve().name, tuple(_images(folder / "train/good")), tuple(test))


def _images(folder: Path) -> list[Path]:
    return [Path(path) for path in walk([folder] if folder.is_dir() else []).paths]


def _read_visa(folder: Path) -> list[Category]:
    table = folder / _VISA
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if missing := _COLUMNS - set(rows.fieldnames or ()):
            raise FrameError(f"{table}: expected the columns {', '.join(sorted(_COLUMNS))}; {sorted(missing)} missing")
        train: dict[str, list[Path]] = {}
        test: dict[str, list[LabelledFrame]] = {}
        for row in rows:
            place = f"{table}, line {rows.line_num}"
            image, mask = (_inside(folder, row[column], place) for column in ("image", "mask"))
            if image is None or row["label"] not in ("normal", "anomaly") or row["split"] not in ("train", "test"):
                raise FrameError(f"{place}: expected an image, normal or anomaly, train or test; found {row}")
            if PurePosixPath(row["object"]).name != row["object"]:
                raise FrameError(f"{place}: expected an object's name, found {row['object']!r}")
            train.setdefault(row["object"], [])
            if row["split"] == "train":
                if row["label"] == "normal":
                    train[row["object"]].append(image)
                continue
            defective = row["label"] == "anomaly"
            frame = LabelledFrame(row["image"], image, defective, mask if defective else None)
            test.setdefault(row["object"], []).append(frame)
    return [Category(name, tuple(paths), tuple(test.get(name, ()))) for name, paths in train.items()]


def _inside(folder: Path, name: str | None, place: str) -> Path | None:
    """A file of the data set, or None for an empty cell."""
    if not name:
        return None
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise FrameError(f"{place}: expected a path below {folder}, found {name}")
    if not (folder / name).is_file():
        raise FrameError(f"{place}: {name} does not exist")
    return folder / name
