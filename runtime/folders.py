"""The images in given files and folders: the one walker, and what it left out."""

# os.path answers False where pathlib raises: a folder that may not be entered, a loop of links.
# ruff: noqa: PTH110, PTH112, PTH113

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from vmad_edge.runtime.decode import FORMATS
from vmad_edge.runtime.errors import FrameError
from vmad_edge.runtime.names import PICTURE

_NO_IMAGES = frozenset(
    ".cfg .conf .csv .db .doc .docx .htm .html .ini .json .jsonl .log .md .md5 .ods .odt .pdf .py .rst .sha256 .sh "  # noqa: SIM905
    ".tsv .toml .txt .url .xls .xlsx .xml .xmp .yaml .yml".split()
)
_NO_IMAGE_NAMES = frozenset({"license", "makefile", "md5sums", "readme", "sha256sums"})
_OF_NAS = frozenset({"@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"})
_SKIPPED = _OF_NAS | {
    *("$recycle.bin", "recycler", "system volume information", "found.000", "lost+found", "__macosx", "__pycache__")
}

_HIDDEN = "hidden, or a folder of the system"
_SIDECAR = "no images by their endings"
_TWICE = "reached twice"
_OURS = "pictures of a report"
_DOUBTFUL = "perhaps images, in a format that is not read"
_SPECIAL = "no files: a device, pipe or socket"


@dataclass(frozen=True)
class Images:
    """What was found: `paths` to read, in order, and `left_out`, with why, by path."""

    paths: list[str] = field(default_factory=list)
    """Each file once. A link to nothing and a folder that cannot be listed are among them: `Frame.read` says why."""
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """Those left out that may have been meant: neither hidden, nor there twice, nor ours, nor plainly no
        images."""
        return [path for path, why in self.left_out.items() if why in (_DOUBTFUL, _SPECIAL)]

    @property
    def said(self) -> str:
        """One line that counts and names what was left out; empty if nothing was."""
        kinds: dict[str, list[str]] = {}
        for path, why in self.left_out.items():
            kinds.setdefault(why, []).append(Path(path).name)
        parts = (f"{len(names)} {why} ({_first(names)})" for why, names in kinds.items())
        return f"left out: {'; '.join(parts)}" if kinds else ""


def find_images(paths: Iterable[str | os.PathLike[str]]) -> Images:
    """The given files as they are, and the images below the given folders; `walk` says which.

    Raises:
        FrameError: a path that does not exist, or nothing to read at all.
    """
    paths = list(paths)
    found = walk(paths)
    if not found.paths:
        looked = ", ".join(sorted(suffixes()))
        note = f"; {found.said}" if found.left_out else ""
        raise FrameError(f"no images in {', '.join(map(str, paths))}; looked for {looked}{note}")
    return found


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The paths of `find_images`; what it left out is a warning in the log (by default on standard error)."""
    found = find_images(paths)
    if found.left_out:
        logging.getLogger(__name__).warning("%s", found.said)
    return found.paths


def walk(paths: Iterable[str | os.PathLike[str]]) -> Images:
    """The given files as they are, and below each given folder the files with an image's ending, sorted.

    Links are followed; a file or folder that two paths lead to counts once. Names that begin with a dot and the folders
    of NAS systems, file systems and notebooks are not entered.

    Raises:
        FrameError: a given path that does not exist.
    """
    found, seen = Images(), set[str]()
    for given in (os.fspath(path) for path in paths):
        if not os.path.lexists(given):
            raise FrameError(f"{given} does not exist; expected an image file or a folder of images")
        if os.path.isdir(given):
            _walk(given, found, seen)
        elif _first_time(given, found, seen):
            found.paths.append(given)
    return found


def _walk(top: str, found: Images, seen: set[str]) -> None:
    below: list[str] = []
    if not _first_time(top, found, seen):
        return
    for folder, folders, files in os.walk(top, onerror=lambda error: below.append(error.filename), followlinks=True):
        inside = {name: str(Path(folder, name)) for name in sorted(folders)}
        folders[:] = [name for name, path in inside.items() if _entered(name, path, found, seen)]
        for name in sorted(files):
            path = str(Path(folder, name))
            why = _why_left_out(name, path)
            if why is not None:
                found.left_out[path] = why
            elif _first_time(path, found, seen):
                below.append(path)
    found.paths.extend(sorted(below))


def _entered(name: str, path: str, found: Images, seen: set[str]) -> bool:
    if _hidden(name):
        found.left_out[path] = _HIDDEN
        return False
    return _first_time(path, found, seen)


def _first_time(path: str, found: Images, seen: set[str]) -> bool:
    real = os.path.realpath(path)
    if real in seen:
        found.left_out.setdefault(path, _TWICE)
        return False
    seen.add(real)
    return True


def _why_left_out(name: str, path: str) -> str | None:
    if _hidden(name):
        return _HIDDEN
    if name.endswith(PICTURE):
        return _OURS
    suffix = Path(name).suffix.lower()
    if suffix in _NO_IMAGES or name.lower() in _NO_IMAGE_NAMES:
        return _SIDECAR
    if not os.path.exists(path):  # a link to nothing, or to a folder that is not there now
        return None
    if not os.path.isfile(path):
        return _SPECIAL
    return None if suffix in suffixes() else _DOUBTFUL


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SKIPPED


def _first(names: list[str], most: int = 3) -> str:
    shown = (name if name.isprintable() else repr(name) for name in names[:most])
    return ", ".join(shown) + (", …" if len(names) > most else "")


@cache
def suffixes() -> frozenset[str]:
    """The endings, in small letters, of the formats that `Frame.read` reads."""
    return frozenset(ending for ending, form in Image.registered_extensions().items() if form in FORMATS)
