"""Labelled test sets on disk; `layouts` says which of them are known, and where they come from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.labelled import Category, LabelledFrame
from vmad_edge.runtime.layouts import read_kinds, read_real_iad, read_sides, read_visa

__all__ = ["Category", "LabelledFrame", "read_dataset"]


def read_dataset(folder: Path, only: Iterable[str] = ()) -> list[Category]:
    """The categories of a data set, or the one that `folder` is, sorted by name; those named in `only` if any are.

    Raises:
        FrameError: no known layout, a category that is not there or has no frames to test, a frame that is missing.
    """
    try:
        found = _found(folder)
        lost = [path.name for path in sorted(folder.iterdir()) if path.name[0] != "." and not path.exists()]
    except OSError as error:
        raise FrameError(f"{error.filename}: cannot be read ({error.strerror})") from None
    wanted = set(only)
    if lost and not wanted:
        raise FrameError(f"{folder}: {', '.join(lost)} leads nowhere: mount it, remove the link or choose --categories")
    if not found:
        raise FrameError(
            f"{folder}: expected MVTec AD's layout (CATEGORY/train/good, CATEGORY/test/KIND, "
            "CATEGORY/ground_truth/KIND), that of MVTec AD 2, MVTec LOCO, BTAD, MPDD, WFDD, "
            "VisA (split_csv/1cls.csv) or Real-IAD (realiad_jsons), or CATEGORY/normal beside CATEGORY/abnormal; "
            "found none of them"
        )
    if missing := wanted - {category.name for category in found}:
        names = ", ".join(sorted(category.name for category in found))
        raise FrameError(f"{folder} has no category {', '.join(sorted(missing))}; it has {names}")
    chosen = [category for category in found if not wanted or category.name in wanted]
    for category in chosen:
        if not category.test:
            left_out = f"; left out: {category.left_out}" if category.left_out else ""
            raise FrameError(f"{folder}: category {category.name} has no frames to test{left_out}")
    return sorted(chosen, key=lambda category: category.name)


def _found(folder: Path) -> list[Category]:
    if not folder.is_dir():
        raise FrameError(f"{folder}: expected a data set's folder, found none")
    readers = (read_visa, read_kinds, read_real_iad, read_sides)  # Real-IAD has OK beside NG as well
    return next((categories for read in readers if (categories := read(folder)) is not None), [])
