"""Published data sets as they are distributed: a reader gives the categories of a folder, or None if it is not one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from vmad_edge.runtime import masks
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.files import open_file
from vmad_edge.runtime.folders import Images, walk
from vmad_edge.runtime.labelled import Category, LabelledFrame

NORMAL = frozenset({"good", "normal", "ok"})
"""Names of folders of normal frames, in small letters."""
DEFECTIVE = frozenset(
    ("abnormal", "anomalies", "anomalous", "anomaly", "bad", "defect", "defective", "defects", "ko", "ng", "nok")
)
"""Names of folders of defective frames where no folder is called test."""
_VISA = Path("split_csv/1cls.csv")
_COLUMNS = {"object", "split", "label", "image", "mask"}
_UNLABELLED = ("test_private", "test_private_mixed")


def read_kinds(folder: Path) -> list[Category] | None:
    """A folder a kind of defect, in each category's `test`.

    - MVTec AD (Bergmann et al., CVPR 2019), MPDD (Jezek et al., ICUMT 2021) and WFDD (Chen et al., GLASS, ECCV 2024):
      `train/good`, `test/KIND`, `ground_truth/KIND/NAME_mask.png` or `NAME.png`.
    - MVTec LOCO (Bergmann et al., IJCV 2022): several masks a frame, `ground_truth/KIND/NAME/000.png`.
    - BTAD (Mishra et al., VT-ADL, ISIE 2021): `train/ok`, `test/ok`, `test/ko`, `ground_truth/ko`.
    - MVTec AD 2 (Heckler-Kram et al., arXiv 2503.21622): `test_public` in place of `test`, with `ground_truth` in it;
      the frames of `test_private` and `test_private_mixed` have no labels. `validation` is not read, nor LOCO's.
    """
    return _categories(folder, _with_test)


def read_sides(folder: Path) -> list[Category] | None:
    """`normal` beside `abnormal` in each category, by any names of `NORMAL` and `DEFECTIVE`; masks in `ground_truth` as
    in `read_kinds`. There are no frames to enroll.
    """
    return _categories(folder, _side_by_side)


def _categories(folder: Path, read: Callable[[Path], Category | None]) -> list[Category] | None:
    """That of `folder`, or those of the folders in it."""
    if (one := read(folder)) is not None:
        return [one]
    inside = (path for path in _folders(folder) if not path.name.startswith("."))
    return [found for path in inside if (found := read(path)) is not None] or None


def _with_test(folder: Path) -> Category | None:
    name = next((name for name in ("test", "test_public") if (folder / name).is_dir()), None)
    if name is None:
        return None
    truth = folder / ("ground_truth" if name == "test" else "test_public/ground_truth")
    train = walk(path for path in _folders(folder / "train") if path.name.lower() in NORMAL)
    unlabelled = walk(folder / name for name in _UNLABELLED if (folder / name).is_dir())
    return _category(folder, folder / name, truth, walk([folder / name]), train, unlabelled)


def _side_by_side(folder: Path) -> Category | None:
    inside = [path for path in _folders(folder) if path.name != "ground_truth" and not path.name.startswith(".")]
    sides = [path for path in inside if path.name.lower() in NORMAL | DEFECTIVE]
    if len({path.name.lower() in NORMAL for path in sides}) < 2:
        return None
    found = walk(sides)
    found.left_out.update(
        {str(path): "neither normal nor defective by its name" for path in inside if path not in sides}
    )
    return _category(folder, folder, folder / "ground_truth", found, Images(), Images())


def _category(folder: Path, kinds: Path, truth: Path, found: Images, train: Images, unlabelled: Images) -> Category:
    """What was `found` in the folders of `kinds`, with its masks in `truth`."""
    test = []
    for path in map(Path, found.paths):
        if path == kinds:
            raise FrameError(f"{path}: cannot be listed")
        if truth in path.parents:
            continue
        place = path.relative_to(kinds)
        if len(place.parts) == 1 and path.suffix and not path.is_dir():  # a kind that cannot be read is not loose
            found.left_out[str(path)] = "in no kind's folder"
            continue
        defective = place.parts[0].lower() not in NORMAL
        mask = _mask(truth, place) if defective else None
        test.append(LabelledFrame(path.relative_to(folder).as_posix(), path, defective, mask))
    said = Images(left_out={**train.left_out, **found.left_out, **unlabelled.left_out}).said
    name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    return Category(name, _paths(train), tuple(test), _paths(unlabelled), said.removeprefix("left out: "))


def _mask(truth: Path, place: Path) -> Path | None:
    """Of the frame at `place`, KIND/NAME.png: NAME_mask or NAME with any ending, or the folder NAME."""
    stem = truth / place.with_suffix("")
    for name in (f"{stem.name}_mask", stem.name):
        for ending in masks.SUFFIXES:
            for written in (ending, ending.upper(), ending.title()):
                if (path := stem.with_name(f"{name}{written}")).is_file():
                    return path
    return stem if stem.is_dir() else None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _paths(images: Images) -> tuple[Path, ...]:
    return tuple(map(Path, images.paths))


def read_visa(folder: Path) -> list[Category] | None:
    """VisA (Zou et al., ECCV 2022): `split_csv/1cls.csv` with the columns object, split, label, image and mask, beside
    the objects' folders; `folder` is all of it or one object. Commas, semicolons or tabs. Masks hold kinds' numbers.
    """
    if (folder / _VISA).is_file():
        return _read_csv(folder)
    root = folder.absolute().parent
    if (root / _VISA).is_file() and not (folder / "test").is_dir():
        return [category for category in _read_csv(root) if category.name == folder.absolute().name]
    return None


def _read_csv(folder: Path) -> list[Category]:
    train: dict[str, list[Path]] = {}
    test: dict[str, list[LabelledFrame]] = {}
    for place, row in _rows(folder / _VISA):
        if not row["image"] or row["label"] not in ("normal", "anomaly") or row["split"] not in ("train", "test"):
            raise FrameError(f"{place}: expected an image, normal or anomaly, train or test; found {row}")
        if row["object"] in ("", "..") or PurePosixPath(row["object"]).name != row["object"]:
            raise FrameError(f"{place}: expected an object's name, found {row['object']!r}")
        image, defective = _inside(folder, row["image"], place), row["label"] == "anomaly"
        train.setdefault(row["object"], [])
        if row["split"] == "test":
            mask = _inside(folder, row["mask"], place) if defective and row["mask"] else None
            frame = LabelledFrame(row["image"], image, defective, mask, numbered=True)
            test.setdefault(row["object"], []).append(frame)
        elif not defective:
            train[row["object"]].append(image)
    return [Category(name, tuple(paths), tuple(test.get(name, ()))) for name, paths in train.items()]


def _rows(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a CSV with its place in words."""
    try:
        with io.TextIOWrapper(open_file(table), "utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise FrameError(f"{table}: {error}; save it in UTF-8") from None
    head = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count), restval="")
    if missing := _COLUMNS - set(rows.fieldnames or ()):
        raise FrameError(f"{table}: expected the columns {', '.join(sorted(_COLUMNS))}; {sorted(missing)} missing")
    try:
        for row in rows:
            yield f"{table}, line {rows.line_num}", row
    except csv.Error as error:
        raise FrameError(f"{table}, line {rows.line_num}: expected a row of a CSV file, found none ({error})") from None


def read_real_iad(folder: Path) -> list[Category] | None:
    """Real-IAD (Wang et al., CVPR 2024): `realiad_jsons/OBJECT.json` with meta's prefix and the lists train and test,
    beside the images in OBJECT or `realiad_1024/OBJECT`. Each camera's frame counts by itself.

    `folder` is all of it, one of several resolutions, one object's images, or a folder of JSON files (that of single
    views: `realiad_jsons_sv`). Objects whose images are not there are passed over; of train the normal frames are read.
    """
    folder = folder.absolute()
    if (tables := _tables(folder)) is None:
        return None
    root = next(path for path in tables.parents if not path.name.startswith("realiad_jsons"))
    places = [root, *(path for path in _folders(root) if path.name.startswith("realiad_") and "json" not in path.name)]
    objects = sorted(tables.glob("*.json"))
    if folder in places[1:]:
        places = [folder]
    elif folder != root and not folder.name.startswith("realiad_jsons"):
        places = [place for place in places if place == folder.parent]
        objects = [table for table in objects if table.stem == folder.name]
    return [category for table in objects if (category := _read_json(table, places)) is not None] or None


def _tables(folder: Path) -> Path | None:
    """The folder of JSON files that belongs to `folder`."""
    if folder.name.startswith("realiad_jsons"):
        places = [folder, folder / "realiad_jsons"]
    else:
        roots = (folder, *folder.parents[:2])
        places = [root / name for root in roots for name in ("realiad_jsons/realiad_jsons", "realiad_jsons")]
    return next((path for path in places if any(path.glob("*.json"))), None)


def _read_json(table: Path, places: Iterable[Path]) -> Category | None:
    """One object's frames; None if they are in none of the `places`."""
    try:
        with open_file(table) as file:
            content = json.loads(file.read().decode())
        prefix, normal = str(content["meta"]["prefix"]), content["meta"].get("normal_class", "OK")
        train, test = (
            [
                (str(row["image_path"]), row["anomaly_class"] != normal, str(row.get("mask_path") or ""))
                for row in content[side]
            ]
            for side in ("train", "test")
        )
        first = test[0][0]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise FrameError(
            f"{table}: expected Real-IAD's meta with prefix, train and test (lists with image_path and anomaly_class), "
            "found something else"
        ) from None
    name = table.stem
    inside = ("", name, f"{name}/{name}", _below(prefix, table))
    folders = {place: place / within for place in places for within in inside if (place / within / first).is_file()}
    if len(folders) > 1:
        raise FrameError(f"{name} is in {' and in '.join(map(str, folders))}; name one of them")
    for images in folders.values():
        at = partial(_inside, images, place=str(table))
        frames = (LabelledFrame(path, at(path), bad, at(mask) if bad and mask else None) for path, bad, mask in test)
        return Category(name, tuple(at(path) for path, bad, _ in train if not bad), tuple(frames))
    return None


def _inside(folder: Path, name: str, place: str) -> Path:
    """A file of the data set."""
    if not (folder / _below(name, place)).is_file():
        raise FrameError(f"{place}: {name} does not exist in {folder}")
    return folder / name


def _below(name: str, place: str | Path) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise FrameError(f"{place}: expected a path below the data set, found {name}")
    return name
