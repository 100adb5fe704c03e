"""Names for the files that are written about frames: no two alike, and fit for every file system."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

PICTURE = ".vmad.jpg"
"""How the names of a report's pictures end: no walk through folders takes them for frames."""
_LONGEST = 180
"""Bytes of a name before its ending; most file systems take 255 in all."""
_UNFIT = re.compile(r'[<>:"|?*\\\x00-\x1f]')


class Names:
    """Where to write about each of `paths`.

    A name that two frames would share (small and capital letters count as one), that is too long, or that some file
    system refuses, is told apart by a hash of its path.

    Args:
        place: from a frame's path to a relative one, without an ending.
        endings: of all that is written for one frame.
    """

    def __init__(self, paths: Iterable[str], place: Callable[[str], Path], endings: tuple[str, ...]) -> None:
        self._place, self._endings = place, endings
        taken = Counter(name for path in set(paths) for name in self._taken(path))
        self._shared = {name for name, frames in taken.items() if frames > 1}

    def of(self, path: str) -> Path:
        """Its place, without an ending."""
        place = self._place(path)
        *folders, name = map(_fit, place.parts)
        changed = (*folders, name) != place.parts or not self._shared.isdisjoint(self._taken(path))
        if changed or len(name.encode()) > _LONGEST:
            mark = hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()[:12]
            name = f"{name.encode()[-_LONGEST:].decode(errors='ignore')}-{mark}"
        return Path(*folders, name)

    def _taken(self, path: str) -> list[str]:
        return [f"{self._place(path)}{ending}".casefold() for ending in self._endings]


def joined(path: str) -> Path:
    """One name: the folders joined by `_`."""
    return Path("_".join(_parts(path)) or "frame")


def in_folders(path: str) -> Path:
    """The path as it was given, without its ending, to be put into another folder."""
    *folders, name = _parts(path) or ["frame"]
    stem = Path(name).stem
    return Path(*folders, stem if stem.strip(".") else name)  # of "..png" no folder must be left


def _parts(path: str) -> list[str]:
    return [part for part in Path(path).parts if part not in ("/", "..")]


def _fit(part: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in _UNFIT.sub("_", part))
