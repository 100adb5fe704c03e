"""Names of objects: as folders of a station, and which of those that are there was probably meant."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Annotated

from pydantic import AfterValidator

from vmad_edge.runtime.errors import BundleError

_LONGEST = 240
"""Bytes of a folder's name: file systems allow 255, and it is written under a longer one first."""
_MOST = 10


def text_of(name: str) -> str:
    """Names may hold bytes that are no text; JSON cannot."""
    return name.encode("utf-8", "backslashreplace").decode()


Text = Annotated[str, AfterValidator(text_of)]
"""What a record keeps of a name."""


def folder_name(object: str) -> str:
    """Two objects never share a folder: what a file name should not hold is written as its code point.

    Raises:
        BundleError: the name is longer than a file system takes.
    """
    name = re.sub(r"[^a-z0-9-]", lambda match: f"_{ord(match[0]):x}_", object) or "_"
    if len(name) > _LONGEST:
        raise BundleError(
            f"the object's name {object[:20]!r}… is too long to name a folder: {len(object)} characters become "
            f"{len(name)}, expected at most {_LONGEST} (each but a-z, 0-9 and - takes four or more). Take a shorter one"
        )
    return name


def object_name(folder: str) -> str:
    """The object whose folder it is."""
    name = re.sub(r"_([0-9a-f]{1,5}|10[0-9a-f]{4})_", lambda match: chr(int(match[1], 16)), folder)
    return "" if folder == "_" else name


def alike(first: str, second: str) -> bool:
    """Whether two names differ by case and spaces alone."""
    return _spelling(first) == _spelling(second)


def listed(names: Iterable[str], meant: str) -> str:
    """`names` for people, the closest to `meant` first; asks for the first if it may be what was meant."""
    by_closeness = sorted((-_likeness(name, meant), name) for name in names)
    shown = ", ".join(repr(name) for _, name in by_closeness[:_MOST])
    if len(by_closeness) > _MOST:
        shown += f" and {len(by_closeness) - _MOST} more"
    likeness, closest = by_closeness[0]
    return f"{shown}. Did you mean {closest!r}?" if -likeness >= 0.6 else f"{shown}."


def _likeness(first: str, second: str) -> float:
    """1: differing by case and spaces at most; 0: nothing in common."""
    return SequenceMatcher(None, _spelling(first), _spelling(second)).ratio()


def _spelling(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
