"""The folder that a bundle is written to."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vmad_edge.runtime.bundle import MANIFEST, ScreenManifest
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.files import sha256, whole_folder

_M = TypeVar("_M", bound=ScreenManifest)


def refuse_other_folder(bundle: Path) -> None:
    """Only a new path, an empty folder or a bundle may be written over.

    Raises:
        BundleError: something else is there, or what is there cannot be read.
    """
    try:
        replaceable = bundle.is_dir() and ((bundle / MANIFEST).is_file() or not any(bundle.iterdir()))
        there = os.path.lexists(bundle)
    except OSError as error:
        raise BundleError(f"{bundle} cannot be read ({error.strerror}): expected a new path") from None
    if there and not replaceable:
        raise BundleError(f"{bundle} exists and is no bundle: expected a new path, or a bundle to replace")


@contextmanager
def new_bundle(bundle: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `bundle` when the block ends well.

    Raises:
        BundleError: there is no room.
        OSError: nothing can be written there for another reason.
    """
    try:
        with whole_folder(bundle) as folder:
            yield folder
    except OSError as error:
        by_numpy = error.errno is None and str(error).endswith(" written")  # ndarray.tofile, of fewer bytes than asked
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not by_numpy:
            raise
        raise BundleError(
            f"{bundle} was not written: {error.strerror or error}. Make room there, or name another place."
        ) from None


def with_files(manifest: _M, folder: Path) -> _M:
    """With every file in `folder`, hashed unless it is listed already."""
    hashed = {path.name: manifest.files.get(path.name) or sha256(path) for path in sorted(folder.iterdir())}
    return manifest.model_copy(update={"files": hashed})
