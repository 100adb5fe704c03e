"""TensorRT plans on disk: what each was built for, and why one is refused. Nothing here knows TensorRT.

A plan is executable code. It is built on this device, lies in a folder that only its owner can enter, and is read only
if it is whole and was built for exactly what it would run on now.

engines/            0700
  <graph>/
    plan.trt        the plan
    timings.bin     TensorRT's timing cache, which makes the next build quick; empty where there is none
    plan.json       PlanRecord: the key, and both files' SHA-256
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vmad_edge.runtime.bundle import Bundle, Precision, Record
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.files import only_ours, only_writer, whole_folder

PLAN, TIMINGS, RECORD = "plan.trt", "timings.bin", "plan.json"


class PlanKey(Record):
    """All that a plan depends on. A plan fits if every part is equal."""

    graph: str
    """SHA-256 of the ONNX file and of the weights beside it."""
    tensorrt: str
    """Package and version."""
    gpu: str
    driver: str
    precision: Precision
    profile: str
    """Sizes of the dynamic axes."""
    flags: str
    """Builder flags."""


class PlanRecord(Record):
    key: PlanKey
    sha256: dict[str, str]
    """Of the other files, by name."""


@dataclass(frozen=True)
class Plans:
    """The folder of a bundle's plans."""

    folder: Path

    def save(self, graph: str, key: PlanKey, plan: bytes, timings: bytes) -> Path:
        """Write the plan of `graph`, whole or not at all, in place of an earlier one; returns its folder.

        Raises:
            BundleError: the folder cannot be made private.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.folder.is_symlink():
            self.folder.chmod(0o700)
        self._check_private()
        files = {PLAN: plan, TIMINGS: timings}
        record = PlanRecord(key=key, sha256={name: _sha256(data) for name, data in files.items()})
        with only_writer(self.folder), whole_folder(self.folder / graph) as folder:
            for name, data in files.items():
                (folder / name).write_bytes(data)
            (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
        return self.folder / graph

    def load(self, graph: str, key: PlanKey) -> bytes:
        """The plan of `graph`, for where `key` holds.

        Raises:
            BundleError: `refusal` has a reason, or the file is not the one that was written.
        """
        if reason := self.refusal(graph, key):
            raise BundleError(reason)
        return self._read(graph, PLAN)

    def refusal(self, graph: str, key: PlanKey) -> str | None:
        """Why the plan of `graph` must not be loaded where `key` holds; None if its record knows no reason."""
        try:
            found = self._record(graph).key
        except BundleError as error:
            return str(error)
        for part in PlanKey.model_fields:
            then, now = getattr(found, part), getattr(key, part)
            if then != now:
                return f"the plan of {graph} was built for another {part} ({then}, now {now}): `vmad build` it again"
        return None

    def timings(self, graph: str) -> bytes:
        """The timing cache that an earlier build of `graph` left; empty if there is none that can be trusted."""
        try:
            return self._read(graph, TIMINGS)
        except BundleError:
            return b""

    def _record(self, graph: str) -> PlanRecord:
        path = self.folder / graph / RECORD
        if not path.exists():
            raise BundleError(f"there is no plan of {graph}: `vmad build` makes one")
        self._check_private()
        try:
            return PlanRecord.model_validate_json(path.read_bytes())
        except ValidationError:
            raise BundleError(f"{path} is no plan's record: `vmad build` the plan again") from None

    def _check_private(self) -> None:
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or not only_ours(found, 0o077):
            raise BundleError(
                f"{self.folder} holds executable code: expected a folder that user {os.geteuid()} owns and nobody else "
                f"can enter, found owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}. Remove it, and "
                "`vmad build` as the user who inspects"
            )

    def _read(self, graph: str, name: str) -> bytes:
        path = self.folder / graph / name
        expected = self._record(graph).sha256.get(name)
        data = path.read_bytes() if path.exists() else b""
        if _sha256(data) != expected:
            raise BundleError(f"{path} is not what was built here: `vmad build` it again")
        return data


def graph_hash(bundle: Bundle, graph: str) -> str:
    """SHA-256 over the manifest's hashes of the graph's files."""
    names = (f"{graph}.onnx", f"{graph}.onnx.data")
    return _sha256("".join(bundle.manifest.files.get(name, "") for name in names).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
