"""Files that are whole or absent, their hashes, and who can have written them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vmad_edge.runtime.errors import BundleError

_KEPT = 40
"""Characters of a name that its temporary neighbour keeps: with all of them it could be too long."""
_NEW = ".new"
"""How the names of temporary neighbours end; they begin with a dot."""
_LOCK = ".lock"
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def open_file(path: Path | str) -> BinaryIO:
    """Open a regular file to read. No device is touched, and nobody waits for who would write into a pipe.

    Raises:
        OSError: it cannot be opened, or is something else.
        ValueError: no file can have this name.
    """
    _refuse_others(path, Path(path).stat())
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        _refuse_others(path, os.fstat(file.fileno()))  # it may have become something else meanwhile
    except OSError:
        file.close()
        raise
    return file


def _refuse_others(path: Path | str, found: os.stat_result) -> None:
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a folder, `open` refuses
        raise OSError(errno.EINVAL, "a device, pipe or socket", os.fspath(path))


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file.

    Raises: as `open_file`.
    """
    with open_file(path) as file:
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
def whole_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside `path` to write its new content to, which takes its place when the block ends well.

    Args:
        mode: less the umask.
    """
    scratch = path.with_name(f".{path.name[:_KEPT]}.{secrets.token_hex(8)}{_NEW}")
    os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place, synced to disk, when the block ends well.

    Whatever was at `target` before is replaced, in one step where the file system can exchange two names; on any error
    it stays as it was and the temporary folder goes.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:_KEPT]}.", suffix=_NEW, dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        if not target.exists():
            new.rename(target)
        elif not _exchange(new, target):
            target.rename(old)
            new.rename(target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread is in such a block of `folder`, then remove what dead ones left there.

    The lock ends with its process. Who reads needs none: `whole_file` and `whole_folder` replace in one step.

    Raises:
        BundleError: the file system has no locks.
    """
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise BundleError(
                f"{folder} lies on a file system that cannot lock files ({error.strerror}), so two writers could "
                "disturb each other: name a folder on another one (--station)"
            ) from None
        try:
            for left in folder.glob(f".*{_NEW}"):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink(missing_ok=True)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a fork of this process may live on, and hold the lock with it
    finally:
        os.close(lock)


def sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def only_ours(found: os.stat_result, forbidden: int) -> bool:
    """Whether this user or root owns it, and nobody else has one of the `forbidden` permissions (of 0o077)."""
    if found.st_uid == found.st_gid != 0:  # a user's own group (shadow's USERGROUPS_ENAB): nobody else is in it
        forbidden &= ~stat.S_IWGRP
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & forbidden


def check_ours(path: Path, found: os.stat_result) -> None:
    """That nobody but this user and root can have written what `found` is of.

    Raises:
        BundleError: somebody can.
    """
    if only_ours(found, _WRITABLE):
        return
    user = os.geteuid()
    place = shlex.quote(str(path))
    mend = f"chmod -R go-w {place}" if found.st_uid in (user, 0) else f"sudo chown -R {user} {place}"
    raise BundleError(
        f"others can have changed {path}: expected that user {user} or root owns it and nobody else can write to it, "
        f"found owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}. If it is to be trusted: `{mend}`"
    )


def open_ours(path: Path) -> BinaryIO:
    """Open a file to read that nobody but this user and root can have written.

    Raises:
        OSError: it cannot be opened, or is no file.
        BundleError: somebody else can have written it.
    """
    file = open_file(path)
    try:
        check_ours(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot.

    Raises:
        OSError: they may not.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))
