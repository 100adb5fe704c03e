"""Who did what to a station, and when: a file that only grows, one JSON object a line."""

from __future__ import annotations

import getpass
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmad_edge.runtime.files import check_ours, only_writer, open_ours, sync
from vmad_edge.runtime.rows import Appended

NAME = "audit.jsonl"


def note(folder: Path, facts: Mapping[str, Any]) -> None:
    """Append a line to the audit of the station in `folder`. It is on the disk when this returns.

    Raises:
        OSError: it cannot be written; nothing of it stays.
        BundleError: others can have written to the audit, or the file system has no locks.
    """
    path = folder / NAME
    with (
        only_writer(folder),
        open(path, "a+b", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o644)) as file,
    ):
        check_ours(path, os.fstat(file.fileno()))
        end = file.seek(0, os.SEEK_END)
        is_torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"  # by a power cut: it stays, in its own line
        Appended(path, file).write("\n" * is_torn + json.dumps(facts) + "\n")
        os.fsync(file.fileno())
    sync(folder)


def last(folder: Path, object: str) -> dict[str, Any] | None:
    """The last line about `object`, as `text_of` has it; None if there is none. What was torn is passed over.

    Raises:
        OSError: the audit cannot be read.
        BundleError: others can have written to it.
    """
    try:
        with open_ours(folder / NAME) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            facts = json.loads(line)
            if isinstance(facts, dict) and facts.get("object") == object:
                return facts
    return None


def account() -> str:
    """Who runs this process, and where."""
    try:
        return f"{getpass.getuser()}@{platform.node()}"
    except (KeyError, OSError):  # an account without a name
        return platform.node()
