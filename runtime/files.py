"""Files that are whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KEPT = 40
"""Characters of a name that its temporary neighbour keeps: with all of them it could be too long."""


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Hex SHA-256 of what is left to read in an open file, in 1 MiB blocks."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write or replace a file (text in UTF-8), never leaving half of it."""
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write its new content to, which takes its place when the block ends well."""
    scratch = path.with_name(f".{path.name[:_KEPT]}.{secrets.token_hex(8)}.part")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place, synced to disk, when the block ends well.

    Whatever was at `target` before is replaced; on any error it stays as it was and the temporary folder goes.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:_KEPT]}.", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        for path in [*new.rglob("*"), new]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
