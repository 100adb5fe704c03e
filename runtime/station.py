"""The device's own folder beside a bundle: what it enrolled and calibrated. Keyed by the bundle's hash.

station/<first 16 of the bundle's hash>/banks/<object>/
  bank.safetensors   features, patch numbers, pictures; what they are in the file's metadata
  bank.sha256        checked before bank.safetensors is parsed
station/<the same>/calibrations/<object>/
  calibration.json   the Calibration below
  calibration.sha256
station/<the same>/engines/<graph>/
  plan.trt …         a TensorRT plan, see engines/plans.py
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import platformdirs
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vmad_edge.runtime.bundle import Bundle, Record, Thresholds, first_fault
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.errors import BundleError, FrameError
from vmad_edge.runtime.files import sha256, whole_folder
from vmad_edge.runtime.frame import AS_STORED, Frame, Reading
from vmad_edge.runtime.objects import alike, folder_name, listed, object_name
from vmad_edge.runtime.stages.fitness import FitnessLimits
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.similarity import EnrolledFrame, NormalFeatures, References

Fallback = Literal["bundle"]
"""What an object is compared with that the station does not know, though it knows others: the bundle's own features."""


class _FrameRecord(Record):
    id: str
    path: str | None = None
    start: int
    stop: int
    view: tuple[float, float, float, float]
    size: tuple[int, int]
    jpeg: tuple[int, int]
    """Start and stop in the array of all pictures' bytes."""
    pixel_hash: str


class _BankRecord(Record):
    bundle: str
    object: str
    frames: tuple[_FrameRecord, ...]
    thresholds: Thresholds | None
    fitness: FitnessLimits = FitnessLimits()
    """An older bank has none: those of any frame."""


class CalibrationFrame(Record):
    path: str
    sha256: str
    defective: bool
    score: float


class Calibration(Record):
    """Thresholds for one object, and what they rest on."""

    bundle: str
    bank: str | None
    """Hash of the reference bank that the frames were compared with; None: the bundle's normal features."""
    object: str
    thresholds: Thresholds
    promise: str
    by: str
    when: str
    frames: tuple[CalibrationFrame, ...]
    fitness: FitnessLimits | None = None
    """Of its good frames; an older one has none."""


class Station:
    """Everything that a device adds to one bundle."""

    def __init__(self, folder: Path | None, bundle: Bundle) -> None:
        self._root = (folder or platformdirs.user_data_path("vmad-edge")).absolute()
        self._is_default = folder is None
        self.path = self._root / bundle.hash[:16]
        self.plans = Plans(self.path / "engines")
        self._bundle = bundle

    def save_references(self, object: str, references: References) -> Path:
        """Write the bank of `object`, whole or not at all, in place of an earlier one."""
        frames, jpegs, end = [], [], 0
        for frame in references.frames:
            view = (frame.view.left, frame.view.top, frame.view.right, frame.view.bottom)
            frames.append(
                _FrameRecord(
                    id=frame.id,
                    path=frame.path,
                    start=frame.start,
                    stop=frame.stop,
                    view=view,
                    size=frame.size,
                    jpeg=(end, end + len(frame.jpeg)),
                    pixel_hash=frame.pixel_hash,
                )
            )
            jpegs.append(frame.jpeg)
            end += len(frame.jpeg)
        record = _BankRecord(
            bundle=self._bundle.hash,
            object=object,
            frames=tuple(frames),
            thresholds=references.thresholds,
            fitness=references.fitness,
        )
        arrays: dict[str, NDArray[Any]] = {
            "features": references.features,
            "patch": references.patch,
            "jpeg": np.frombuffer(b"".join(jpegs), np.uint8),
        }
        target = self._bank(object)
        with whole_folder(target) as folder:
            # save_file's error on a full disk is no OSError.
            (folder / "bank.safetensors").write_bytes(save(arrays, {"bank": record.model_dump_json()}))
            (folder / "bank.sha256").write_text(sha256(folder / "bank.safetensors") + "\n")
        return target

    def load_references(self, object: str, beside: NormalFeatures | None = None) -> References | None:
        """The bank of `object`, or None if none was enrolled; `beside` see `References`.

        Raises:
            BundleError: the bank was changed, is incomplete, or belongs to another bundle.
        """
        folder = self._bank(object)
        if not folder.exists():
            return None
        advice = f"Enroll {object!r} again."
        record, arrays = _read_bank(folder, advice)
        if record.bundle != self._bundle.hash:
            raise BundleError(
                f"{folder} was enrolled with bundle {record.bundle[:16]}, this is {self._bundle.hash[:16]}. {advice}"
            )
        return References(
            arrays["features"],
            arrays["patch"],
            _enrolled_frames(record, arrays["jpeg"].tobytes()),
            record.thresholds,
            beside,
            self._bundle.manifest.similarity.bank_dtype,
            record.fitness,
        )

    def enrolled(self) -> list[str]:
        """The objects that have banks."""
        return _objects_in(self.path / "banks")

    def knows(self, object: str) -> bool:
        """Whether something is enrolled or calibrated for it."""
        return self._bank(object).exists() or self._calibration(object).exists()

    def check_known(self, object: str, also: Iterable[str] = ()) -> None:
        """That `object` is compared with what was meant: an unknown name among known ones is probably another's.

        The bundle's own object is always known.

        Args:
            also: objects that are known, though not to the station.

        Raises:
            BundleError: nothing is enrolled or calibrated for it, but for others; or for it, but with another bundle.
        """
        if object == self._bundle.manifest.object or object in also or self.knows(object):
            return
        others = {*self.enrolled(), *_objects_in(self.path / "calibrations"), *also}
        left_behind = self.left_behind(object)
        if not others and left_behind is None:
            return
        said = [f"nothing is enrolled or calibrated for {object!r} with this bundle (station {self.path})."]
        if others:
            said.append(f"There are: {listed(others, object)}")
        if left_behind is not None:
            said.append(left_behind)
        said.append('With --fallback bundle (fallback="bundle") it is compared with the bundle\'s own features.')
        raise BundleError(" ".join(said))

    def left_behind(self, object: str) -> str | None:
        """Where `object` (or a name like it) is enrolled with other bundles but not with this one, and what helps.

        None if it is known here, or nowhere.
        """
        if self.knows(object):
            return None
        found = [
            (folder.stat().st_mtime, other.name, name, kind)
            for other in self._others()
            for kind in ("banks", "calibrations")
            for name in _objects_in(other / kind)
            if alike(name, object) and (folder := other / kind / folder_name(name)).is_dir()
        ]
        if not found:
            return None
        _, hash, name, kind = max(found, key=lambda one: (one[3] == "banks", one[2] == object, one[0]))
        if kind == "calibrations":
            return f"{name!r} is calibrated with another bundle ({hash}): `vmad calibrate` it with this one."
        root = "" if self._is_default else f" --station {shlex.quote(str(self._root))}"
        bundle = shlex.quote(str(self._bundle.path))
        return (
            f"{name!r} is enrolled with another bundle ({hash}): to enroll the same frames with this one, `vmad enroll "
            f"{bundle} --from-station {hash} --object {shlex.quote(name)}{root}`."
        )

    def enrolled_elsewhere(self) -> dict[str, list[str]]:
        """By the beginning of another bundle's hash: the objects that are enrolled with it in the same place."""
        found = {folder.name: _objects_in(folder / "banks") for folder in self._others()}
        return {hash: names for hash, names in found.items() if names}

    def enrolled_with(self, other: str, object: str) -> tuple[EnrolledFrame, ...]:
        """The frames that were enrolled for `object` with another bundle; `same_frames` reads them again.

        Args:
            other: the folder that another bundle's station is, or that it lies in; or the beginning of the bundle's
                hash, for one that lies beside this.

        Raises:
            BundleError: there is no such station, or more than one; `object` is not enrolled in it; its bank was
                changed or is incomplete.
        """
        given = Path(other)
        if given.is_dir():
            stations = [given] if (given / "banks").is_dir() else _stations_in(given)
        else:
            stations = [path for path in self._others() if path.name.startswith(other[:16].lower())]
        holding = [path for path in stations if (path / "banks" / folder_name(object)).is_dir()]
        if len(holding) == 1:
            folder = holding[0] / "banks" / folder_name(object)
            record, arrays = _read_bank(folder, "Enroll the frames from their own folder.")
            return _enrolled_frames(record, arrays["jpeg"].tobytes())
        if holding:
            names = ", ".join(path.name for path in holding)
            raise BundleError(f"{object!r} is enrolled with several bundles in {other}: say which of {names}")
        enrolled = {name for path in stations for name in _objects_in(path / "banks")}
        if enrolled:
            raise BundleError(f"{object!r} is not enrolled in {other}; there are: {listed(enrolled, object)}")
        beside = ", ".join(self.enrolled_elsewhere()) or "none"
        raise BundleError(
            f"expected the folder of another bundle's station, or the beginning of that bundle's hash, found "
            f"{other!r}; in {self._root} there are: {beside}"
        )

    def bank_hash(self, object: str) -> str | None:
        """Hash of the bank of `object`, or None if none was enrolled."""
        path = self._bank(object) / "bank.sha256"
        return path.read_text(errors="replace").strip() if path.exists() else None

    def save_calibration(self, calibration: Calibration) -> Path:
        """Write it, whole or not at all, in place of an earlier one of its object."""
        target = self._calibration(calibration.object)
        with whole_folder(target) as folder:
            (folder / "calibration.json").write_text(calibration.model_dump_json(indent=2), "utf-8")
            (folder / "calibration.sha256").write_text(sha256(folder / "calibration.json") + "\n")
        return target

    def load_calibration(self, object: str) -> Calibration | None:
        """The calibration of `object`, or None if there is none.

        Raises:
            BundleError: it was changed, is incomplete, or was made with another bundle or reference bank.
        """
        folder = self._calibration(object)
        return self._read_calibration(folder, object) if folder.exists() else None

    def calibrated(self) -> dict[str, Calibration | str]:
        """By object: the calibrations that are there, or why one is refused."""
        names = _objects_in(self.path / "calibrations")
        return {name: self._calibration_or_reason(name) for name in names}

    def _calibration_or_reason(self, object: str) -> Calibration | str:
        try:
            return self._read_calibration(self._calibration(object), object)
        except BundleError as error:
            return str(error)

    def _read_calibration(self, folder: Path, object: str) -> Calibration:
        path = folder / "calibration.json"
        advice = f"Calibrate {object!r} again, or remove {folder}."
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != (folder / "calibration.sha256").read_text(errors="replace").strip():
                raise BundleError(f"{path} was changed since it was calibrated. {advice}")
            found = Calibration.model_validate_json(data)
        except (OSError, ValidationError) as error:
            raise BundleError(f"{path} is not a complete calibration: {_what_of(error)}. {advice}") from None
        if folder_name(found.object) != folder.name:
            raise BundleError(f"{path} is the calibration of {found.object!r}. {advice}")
        for what, then, now in (
            ("bundle", found.bundle, self._bundle.hash),
            ("reference bank", found.bank, self.bank_hash(found.object)),
        ):
            if then != now:
                old, new = (hash[:16] if hash else "none" for hash in (then, now))
                raise BundleError(
                    f"the calibration of {found.object!r} ({found.when}, by {found.by}) was made with another {what} "
                    f"({old}, now {new}). {advice}"
                )
        return found

    def _bank(self, object: str) -> Path:
        return self.path / "banks" / folder_name(object)

    def _calibration(self, object: str) -> Path:
        return self.path / "calibrations" / folder_name(object)

    def _others(self) -> list[Path]:
        """Other bundles' stations in the same place."""
        return [path for path in _stations_in(self._root) if path != self.path]


def same_frames(enrolled: Iterable[EnrolledFrame], reading: Reading = AS_STORED) -> Iterator[Frame]:
    """Read enrolled frames again from where they lay.

    Args:
        reading: as they were read then.

    Raises:
        BundleError: at the end, naming all those that are gone, or show something else than they did.
    """
    lost = []
    for frame in enrolled:
        path = frame.path or frame.id  # an older bank has the id alone: the path as it was given
        try:
            again = Frame.read(path, **reading)
        except FrameError as error:
            lost.append(str(error))
            continue
        if again.pixel_hash != frame.pixel_hash:
            lost.append(f"{path}: its pixels are not those that were enrolled")
        elif not lost:
            yield replace(again, id=frame.id)
    if lost:
        raise BundleError(
            f"{len(lost)} of the enrolled frames are gone or changed, so nothing was enrolled: {'; '.join(lost)}. "
            "Bring them back, or enroll normal parts from a folder"
        )


def _stations_in(root: Path) -> list[Path]:
    """Folders that are named by a bundle's hash, as `Station.path` is."""
    return sorted(path for path in root.glob("[0-9a-f]*") if re.fullmatch(r"[0-9a-f]{16}", path.name) and path.is_dir())


def _objects_in(folder: Path) -> list[str]:
    return sorted(object_name(path.name) for path in folder.glob("[!.]*") if path.is_dir())


def _read_bank(folder: Path, advice: str) -> tuple[_BankRecord, dict[str, NDArray[Any]]]:
    path = folder / "bank.safetensors"
    try:
        if sha256(path) != (folder / "bank.sha256").read_text(errors="replace").strip():
            raise BundleError(f"{path} was changed since it was enrolled. {advice}")
        with safe_open(path, "numpy") as file:
            record = _BankRecord.model_validate_json((file.metadata() or {})["bank"])
            return record, {name: file.get_tensor(name) for name in ("features", "patch", "jpeg")}
    except (OSError, KeyError, SafetensorError, ValidationError) as error:
        raise BundleError(f"{path} is not a complete reference bank: {_what_of(error)}. {advice}") from None


def _enrolled_frames(record: _BankRecord, jpeg: bytes) -> tuple[EnrolledFrame, ...]:
    return tuple(
        EnrolledFrame(f.id, f.start, f.stop, View(*f.view), f.size, jpeg[f.jpeg[0] : f.jpeg[1]], f.pixel_hash, f.path)
        for f in record.frames
    )


def _what_of(error: Exception) -> str:
    """What is wrong with a file, in words of ours: a library's speak of its own inside."""
    if isinstance(error, ValidationError):
        return ": ".join(first_fault(error))
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return "expected features, patch, jpeg and their record, found something else"
