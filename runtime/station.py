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
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vmad_edge.runtime.bundle import Bundle, Record, Thresholds
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.files import sha256, whole_folder
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.similarity import EnrolledFrame, NormalFeatures, References


class _FrameRecord(Record):
    id: str
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


class Station:
    """Everything that a device adds to one bundle."""

    def __init__(self, folder: Path | None, bundle: Bundle) -> None:
        root = folder or platformdirs.user_data_path("vmad-edge")
        self.path = root / bundle.hash[:16]
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
            bundle=self._bundle.hash, object=object, frames=tuple(frames), thresholds=references.thresholds
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
        path = folder / "bank.safetensors"
        advice = f"Enroll {object!r} again."
        try:
            if sha256(path) != (folder / "bank.sha256").read_text().strip():
                raise BundleError(f"{path} was changed since it was enrolled. {advice}")
            with safe_open(path, "numpy") as file:
                record = _BankRecord.model_validate_json(file.metadata()["bank"])
                arrays = {name: file.get_tensor(name) for name in ("features", "patch", "jpeg")}
        except (OSError, KeyError, SafetensorError, ValidationError) as error:
            raise BundleError(f"{path} is not a complete reference bank ({error}). {advice}") from None
        if record.bundle != self._bundle.hash:
            raise BundleError(
                f"{path} was enrolled with bundle {record.bundle[:16]}, this is {self._bundle.hash[:16]}. {advice}"
            )
        jpeg = arrays["jpeg"].tobytes()
        frames = tuple(
            EnrolledFrame(f.id, f.start, f.stop, View(*f.view), f.size, jpeg[f.jpeg[0] : f.jpeg[1]], f.pixel_hash)
            for f in record.frames
        )
        dtype = self._bundle.manifest.similarity.bank_dtype
        return References(arrays["features"], arrays["patch"], frames, record.thresholds, beside, dtype)

    def enrolled(self) -> list[str]:
        """Folder names of the banks that are there."""
        return sorted(path.name for path in (self.path / "banks").glob("[!.]*"))

    def bank_hash(self, object: str) -> str | None:
        """Hash of the bank of `object`, or None if none was enrolled."""
        path = self._bank(object) / "bank.sha256"
        return path.read_text().strip() if path.exists() else None

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
        """By folder name: the calibrations that are there, or why one is refused."""
        folders = sorted((self.path / "calibrations").glob("[!.]*"))
        return {folder.name: self._calibration_or_reason(folder) for folder in folders}

    def _calibration_or_reason(self, folder: Path) -> Calibration | str:
        try:
            return self._read_calibration(folder, folder.name)
        except BundleError as error:
            return str(error)

    def _read_calibration(self, folder: Path, object: str) -> Calibration:
        path = folder / "calibration.json"
        advice = f"Calibrate {object!r} again, or remove {folder}."
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != (folder / "calibration.sha256").read_text().strip():
                raise BundleError(f"{path} was changed since it was calibrated. {advice}")
            found = Calibration.model_validate_json(data)
        except (OSError, ValidationError) as error:
            raise BundleError(f"{path} is not a complete calibration ({error}). {advice}") from None
        if _folder_name(found.object) != folder.name:
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
        return self.path / "banks" / _folder_name(object)

    def _calibration(self, object: str) -> Path:
        return self.path / "calibrations" / _folder_name(object)


def _folder_name(object: str) -> str:
    """Two objects never share a folder: what a file name should not hold is written as its code point."""
    return re.sub(r"[^a-z0-9-]", lambda match: f"_{ord(match[0]):x}_", object) or "_"
