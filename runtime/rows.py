"""The rows of a run: one JSON object a frame and line, as `vmad inspect --jsonl` writes them, and what is read of them.

A row is `Inspection.to_json()` and `size` and `sha256` of the file's bytes (null: it could not be read) and `settings`,
which say what verdicts hang on. So a row tells by itself whether it would come out the same again.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmad_edge.runtime.console import printable
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.files import sha256, whole_file

Row = dict[str, Any]


class Appended:
    """A file that grows by whole pieces: each is written to the system at once, or not at all."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self._path, self._file = path, file

    def write(self, text: str) -> None:
        """Raises: OSError: it could not be written; nothing of it stays (in a regular file)."""
        start = self._file.tell() if self._file.seekable() else None
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            if start is not None:
                with suppress(OSError):
                    self._file.truncate(start)
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        self._file.close()


class JsonLines:
    """One JSON object a line, each written through as it comes; None: to standard output."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else Appended(path, path.open("ab", buffering=0))

    def add(self, row: Row) -> None:
        line = json.dumps(row, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(line)
        else:
            sys.stdout.write(line)
            sys.stdout.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Csv:
    """`flat` rows with their names in the first line, each written through as it comes."""

    def __init__(self, path: Path) -> None:
        self._file = Appended(path, path.open("wb", buffering=0))
        self._columns: list[str] | None = None

    def add(self, row: Row) -> None:
        values = flat(row)
        text = io.StringIO()
        if self._columns is None:
            self._columns = list(values)
            csv.writer(text, lineterminator="\n").writerow(self._columns)
        csv.DictWriter(text, self._columns, extrasaction="ignore", lineterminator="\n").writerow(values)
        self._file.write(text.getvalue())

    def close(self) -> None:
        self._file.close()


class JsonArray:
    """One JSON array on standard output, object by object; `close` makes it whole."""

    def __init__(self) -> None:
        self._empty = True

    def add(self, row: Row) -> None:
        told = {name: value for name, value in row.items() if name != "settings"}  # the same in all
        text = json.dumps(told, indent=2, allow_nan=False).replace("\n", "\n  ")
        sys.stdout.write(f"{'[' if self._empty else ','}\n  {text}")
        self._empty = False

    def close(self) -> None:
        print("[]" if self._empty else "\n]", flush=True)


def flat(row: Row) -> Row:
    """A row of a table, with the same names for every frame: the values that are no lists or objects, milliseconds of
    screen and review, how many regions there are, and the largest one's box, area, peak and centroid."""
    plain: Row = {
        name: printable(value) if name in ("path", "frame_id") and isinstance(value, str) else value
        for name, value in row.items()
        if not isinstance(value, dict | list)
    }
    timings, regions = row.get("timings_ms") or {}, row.get("regions") or []
    plain |= {f"{whole}_ms": timings.get(whole) for whole in ("screen", "review")}
    largest = regions[0] if regions else {}
    plain |= {"regions": len(regions), "area": largest.get("area"), "peak": largest.get("peak")}
    plain |= dict(zip(("left", "top", "right", "bottom"), largest.get("box") or [None] * 4, strict=True))
    return plain | dict(zip(("centroid_x", "centroid_y"), largest.get("centroid") or [None] * 2, strict=True))


def read_rows(path: Path, dropped: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """The rows of a file that `vmad inspect --jsonl` wrote. A last line that is not whole goes to `dropped`.

    Raises:
        VmadError: it cannot be read, or another line is no row.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            row = _parsed(line)
            if row is not None:
                yield row
            elif next(file, None) is None:
                dropped(f"{path}: its last line is not whole")
            elif line.strip():
                raise VmadError(
                    f"{path}, line {number}: expected a row of `vmad inspect --jsonl`, found something else"
                )


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise VmadError(f"{path}: cannot be read ({why}); expected a file of `vmad inspect --jsonl`") from None


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if line.endswith(b"\n") and _is_row(row) else None


def _is_row(row: Any) -> bool:
    """Whether it has what `flat` and `take_up` read of it, as they read it."""
    if not isinstance(row, dict) or not isinstance(row.get("path"), str) or "verdict" not in row:
        return False
    timings, regions = row.get("timings_ms") or {}, row.get("regions") or [{}]
    if not isinstance(timings, dict) or not isinstance(regions, list) or not isinstance(largest := regions[0], dict):
        return False
    lists = (largest.get("box") or [None] * 4, 4), (largest.get("centroid") or [None] * 2, 2)
    return all(isinstance(found, list) and len(found) == expected for found, expected in lists)


def file_facts(path: str) -> Row:
    """`size` and `sha256` of the file's bytes; None for what is no regular file or cannot be read."""
    try:
        if Path(path).is_file():
            return {"size": os.stat(path).st_size, "sha256": sha256(Path(path))}  # noqa: PTH116
    except OSError:
        pass
    return {"size": None, "sha256": None}


def take_up(path: Path, frames: Iterable[str], settings: Mapping[str, Any], threads: int) -> set[str]:
    """Make an earlier run's file ready to go on with; which of `frames` are in it.

    A half-written last line goes, and so do rows of `frames` whose files changed since then or could not be read. Rows
    of other frames stay.

    Raises:
        VmadError: it was made with other settings, or is no such file.
    """
    last: dict[str, tuple[int, Row]] = {}
    for number, row in enumerate(read_rows(path)):
        if (earlier := row.get("settings")) != settings:
            raise VmadError(f"{path} {_difference(earlier, settings)}; name another file, or inspect as before")
        last[row["path"]] = number, {name: row.get(name) for name in ("size", "sha256")}
    there = [frame for frame in dict.fromkeys(frames) if frame in last]
    with ThreadPoolExecutor(threads) as pool:
        same = pool.map(lambda frame: _same(frame, last[frame][1]), there)
        kept = {frame for frame, is_same in zip(there, same, strict=True) if is_same}
    for frame in there:
        if frame not in kept:
            del last[frame]
    stays = {number for number, _ in last.values()}
    with whole_file(path.resolve()) as new, path.open("rb") as old, new.open("wb") as file:
        file.writelines(line for number, line in enumerate(filter(_parsed, old)) if number in stays)
    return kept


def _same(frame: str, before: Row) -> bool:
    try:
        if Path(frame).stat().st_size != before["size"]:
            return False
    except OSError:
        return False
    return before["sha256"] is not None and file_facts(frame) == before


def _difference(earlier: object, settings: Mapping[str, Any]) -> str:
    if not isinstance(earlier, dict):
        return "does not say what it was made with"
    names = [name for name in {**settings, **earlier} if earlier.get(name) != settings.get(name)]
    return "was made otherwise: " + ", ".join(
        f"{name} {_said(earlier.get(name))}, now {_said(settings.get(name))}" for name in names
    )


def _said(value: object) -> str:
    return "none" if value is None else str(value)[:60]
