"""The device's own folder beside a bundle: what it enrolled, calibrated and released. Keyed by the bundle's hash.

station/<first 16 of the bundle's hash>/
  banks/<object>.bank                 safetensors: features, patch numbers, pictures, scope, ignore mask; its metadata
                                      says what
  calibrations/<object>.calibration   JSON: the Calibration below
  releases/<object>.release           JSON: a Release, see release.py
  audit.jsonl                         who made which of them, and when: see audit.py
  engines/<graph>/plan.trt …          a TensorRT plan, see engines/plans.py

The first line of a bank, calibration or release is the SHA-256 of all that follows, which is checked before it is
parsed. So each is one file, which one rename replaces: a reader finds the old one or the new one, and needs no lock.
Writers wait for each other at the `.lock` in their folder. Schema 1 had a folder <object>/ with the content and its
hash in a file each; it is read where there is no newer file, and goes with the next write after the one that replaced
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import platformdirs
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vmad_edge.runtime import audit
from vmad_edge.runtime.bundle import Bundle, Record, ReviewRule, Thresholds, Vision, first_fault
from vmad_edge.runtime.decode import MAX_SIDE
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.errors import BundleError, FrameError, VmadError
from vmad_edge.runtime.files import check_ours, only_writer, open_ours, sync, whole_file
from vmad_edge.runtime.frame import AS_STORED, Frame, Reading
from vmad_edge.runtime.inspection import Verdict
from vmad_edge.runtime.objects import Text, alike, folder_name, listed, object_name, text_of
from vmad_edge.runtime.release import Release, Standing, check_answered
from vmad_edge.runtime.stages.fitness import FitnessLimits
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.scope import Scope, ScopeLimit
from vmad_edge.runtime.stages.similarity import EnrolledFrame, NormalFeatures, References
from vmad_edge.runtime.stages.tiles import MOST_TILES, Layout, Tiles

Fallback = Literal["bundle"]
"""What an object is compared with that the station does not know, though it knows others: the bundle's own features."""


Kind = Literal["banks", "calibrations", "releases"]
_SUFFIX: dict[Kind, str] = {"banks": ".bank", "calibrations": ".calibration", "releases": ".release"}
_SCHEMA_1: dict[Kind, str] = {"banks": "bank.safetensors", "calibrations": "calibration.json"}
"""The content's file in the folder of an object; the hash's differs by its suffix. It had no releases."""
_IS: dict[Kind, str] = {"banks": "reference bank", "calibrations": "calibration", "releases": "release"}
_MADE: tuple[Kind, ...] = ("banks", "calibrations")
"""What makes an object known."""
_HASH_LINE = 65


_View = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class _FrameRecord(Record):
    id: Text
    path: Text | None = None
    start: NonNegativeInt
    stop: NonNegativeInt
    views: Annotated[tuple[_View, ...], Field(min_length=1, max_length=MOST_TILES**2)]
    """Of each tile. An older bank has one, called `view`."""
    size: tuple[PositiveInt, PositiveInt]
    jpeg: tuple[NonNegativeInt, ...]
    """Start of each tile's picture in the array of all pictures' bytes, and the last one's stop."""
    pixel_hash: str

    @model_validator(mode="before")
    @classmethod
    def _lifted(cls, given: Any) -> Any:
        if isinstance(given, dict) and "view" in given and "views" not in given:
            return {"views": [given["view"]], **{name: value for name, value in given.items() if name != "view"}}
        return given

    @model_validator(mode="after")
    def _are_views(self) -> _FrameRecord:
        if not all(left < right and top < bottom for left, top, right, bottom in self.views):
            raise ValueError("expected a view with left < right and top < bottom")
        if len(self.jpeg) != len(self.views) + 1 or list(self.jpeg) != sorted(self.jpeg):
            raise ValueError(f"expected {len(self.views)} pictures, one after the other")
        return self


class _BankRecord(Record):
    schema_version: Literal[2] = 2
    """Those of schema 1 have none."""
    bundle: str
    object: Text
    frames: tuple[_FrameRecord, ...]
    thresholds: Thresholds | None
    fitness: FitnessLimits = FitnessLimits()
    """An older bank has none: those of any frame."""
    scope: ScopeLimit | None = None
    """None: one frame, or enrolled before there was a scope check."""
    region: tuple[NonNegativeInt, NonNegativeInt, PositiveInt, PositiveInt] | None = None
    ignored: Annotated[int, Field(gt=0, le=MAX_SIDE)] | None = None
    """Width of the ignore mask, whose rows are kept in whole bytes; None: nothing is ignored."""
    tiles: Tiles = Tiles()
    """Of the whole frame, as in an older bank, unless these say something else; see `Layout`."""


class CalibrationFrame(Record):
    path: Text
    sha256: str
    defective: bool
    score: FiniteFloat
    scope_distance: FiniteFloat | None = None
    """See `Inspection`."""
    p_yes: FiniteFloat | None = None
    """None: not reviewed."""
    verdict: Verdict | None = None
    """By thresholds that other frames alone set; None: it set them too (good frames alone, an older calibration)."""

    def is_within(self, scope: ScopeLimit | None) -> bool:
        return scope is None or self.scope_distance is None or self.scope_distance <= scope.limit


class Calibration(Record):
    """Thresholds for one object, and what they rest on."""

    schema_version: Literal[2] = 2
    """Those of schema 1 have none."""
    bundle: str
    bank: str | None
    """Hash of the reference bank that the frames were compared with; None: the bundle's normal features."""
    object: Text
    thresholds: Thresholds
    scope: ScopeLimit | None = None
    """Instead of the bank's; None: that one holds."""
    promise: str
    by: Text
    when: str
    frames: tuple[CalibrationFrame, ...]
    fitness: FitnessLimits | None = None
    """Of its good frames; an older one has none."""
    review: ReviewRule | None = None
    """What a review settles; None: nothing, the screen decides alone."""
    device: str | None = None
    """That the frames were inspected on; an older one does not say."""

    @property
    def escaped(self) -> tuple[int, int]:
        """How many defective frames were called GOOD, of how many in scope that set no threshold themselves."""
        verdicts = [
            frame.verdict
            for frame in self.frames
            if frame.defective and frame.verdict is not None and frame.is_within(self.scope)
        ]
        return verdicts.count(Verdict.GOOD), len(verdicts)

    @property
    def hash(self) -> str:
        """SHA-256 of what it says; a later version's is the same, if what it adds has defaults."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


_K = TypeVar("_K", Calibration, Release)


class Station:
    """Everything that a device adds to one bundle."""

    def __init__(self, folder: Path | None, bundle: Bundle) -> None:
        self._root = (folder or platformdirs.user_data_path("vmad-edge")).absolute()
        self._is_default = folder is None
        self.path = self._root / bundle.hash[:16]
        self.plans = Plans(self.path / "engines")
        self._bundle = bundle

    def save_references(self, object: str, references: References) -> Path:
        """Write the bank of `object`, whole or not at all, in place of an earlier one; sets the references' hash.

        Raises:
            OSError: it cannot be written.
            BundleError: others can write to the station, its file system has no locks, no reader would take it, or the
                object's name is too long.
        """
        try:
            record = self._record(object, references)
        except ValidationError as error:
            raise BundleError(f"the references of {object!r} cannot be kept: {': '.join(first_fault(error))}") from None
        jpegs = b"".join(jpeg for frame in references.frames for jpeg in frame.jpegs)
        arrays: dict[str, NDArray[Any]] = {
            "features": references.features,
            "patch": references.patch,
            "jpeg": np.frombuffer(jpegs, np.uint8),
            **({} if references.scope is None else {"scope": references.scope.descriptors}),
            **({} if references.layout.ignored is None else {"ignored": np.packbits(references.layout.ignored, 1)}),
        }
        if fault := _fault(record, arrays, self._bundle.manifest.vision):
            raise BundleError(f"the references of {object!r} cannot be kept: {fault}")
        content = save(arrays, {"bank": record.model_dump_json()})
        told = {"when": now(), "by": audit.account(), "did": "enrolled", "frames": len(record.frames)}
        path, references.hash = self._write("banks", object, content, told)
        return path

    def _record(self, object: str, references: References) -> _BankRecord:
        """Raises: ValidationError: it is no possible one."""
        frames, end = [], 0
        for frame in references.frames:
            jpeg = tuple(accumulate(map(len, frame.jpegs), initial=end))
            frames.append(
                _FrameRecord(
                    id=frame.id,
                    path=frame.path,
                    start=frame.start,
                    stop=frame.stop,
                    views=tuple(map(astuple, frame.views)),
                    size=frame.size,
                    jpeg=jpeg,
                    pixel_hash=frame.pixel_hash,
                )
            )
            end = jpeg[-1]
        layout = references.layout
        return _BankRecord(
            bundle=self._bundle.hash,
            object=object,
            frames=tuple(frames),
            thresholds=references.thresholds,
            fitness=references.fitness,
            scope=None if references.scope is None else references.scope.limit,
            region=layout.region,
            ignored=None if layout.ignored is None else layout.ignored.shape[1],
            tiles=layout.tiles,
        )

    def load_references(self, object: str, beside: NormalFeatures | None = None) -> References | None:
        """The bank of `object`, or None if none was enrolled; `beside` see `References`.

        Raises:
            BundleError: the bank was changed, others can have written it, it cannot be read, is no possible one, or
                belongs to another bundle.
        """
        if (path := _place(self.path, "banks", object)) is None:
            return None
        advice = f"Enroll {object!r} again."
        hash, content = _content(path, advice)
        record, arrays = _bank(path, content, self._bundle.manifest.vision, advice)
        if record.bundle != self._bundle.hash:
            raise BundleError(
                f"{path} was enrolled with bundle {record.bundle[:16]}, this is {self._bundle.hash[:16]}. {advice}"
            )
        if record.object != text_of(object):
            raise BundleError(f"{path} is the reference bank of {record.object!r}. {advice}")
        references = References(
            arrays["features"],
            arrays["patch"],
            _enrolled_frames(record, arrays["jpeg"].tobytes()),
            record.thresholds,
            beside,
            self._bundle.manifest.similarity.bank_dtype,
            record.fitness,
            None if record.scope is None else Scope(arrays["scope"], record.scope),
            _layout(record, arrays),
        )
        references.hash = hash
        return references

    def enrolled(self) -> list[str]:
        """The objects that have banks.

        Raises:
            BundleError: their folder cannot be read.
        """
        return _objects_in(self.path, "banks")

    def knows(self, object: str) -> bool:
        """Whether something is enrolled or calibrated for it.

        Raises:
            BundleError: that cannot be read.
        """
        return any(_place(self.path, kind, object) is not None for kind in _MADE)

    def check_known(self, object: str, also: Iterable[str] = ()) -> None:
        """That `object` is compared with what was meant: an unknown name among known ones is probably another's.

        The bundle's own object is always known.

        Args:
            also: objects that are known, though not to the station.

        Raises:
            BundleError: nothing is enrolled or calibrated for it, but for others; or for it, but with another bundle;
                its bank is gone; or the station cannot be read.
        """
        if object in also:
            return
        self._check_not_lost(object)
        if object == self._bundle.manifest.object or self.knows(object):
            return
        others = {*self.enrolled(), *_objects_in(self.path, "calibrations"), *also}
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

    def _check_not_lost(self, object: str) -> None:
        """That no bank is gone which the audit knows: without it, `object` would be compared with something else."""
        if _place(self.path, "banks", object) is not None:
            return
        last = self._noted(object)
        bank = last.get("sha256") if last.get("did") == "enrolled" else last.get("bank")
        if bank is not None:
            raise BundleError(
                f"the reference bank of {object!r} is gone from {self.path / 'banks'} (SHA-256 {bank}; the audit: "
                f"{last.get('did')} {last.get('when')} by {last.get('by')}): bring it back, or enroll its frames "
                'again. With --fallback bundle (fallback="bundle") it is compared with the bundle\'s own features.'
            )

    def _noted(self, object: str) -> dict[str, Any]:
        """The audit's last line about `object`; empty if there is none."""
        try:
            return audit.last(self.path, text_of(object)) or {}
        except OSError as error:
            raise _unreadable(self.path / audit.NAME, error) from None

    def left_behind(self, object: str) -> str | None:
        """Where `object` (or a name like it) is enrolled with other bundles but not with this one, and what helps.

        None if it is known here, or nowhere.
        """
        if self.knows(object):
            return None
        found = [
            (place.stat().st_mtime, other.name, name, kind)
            for other in self._others()
            for kind in _MADE
            for name in _readable_in(other, kind)
            if alike(name, object) and (place := _place(other, kind, name)) is not None and place.exists()
        ]
        if not found:
            return None
        _, hash, name, kind = max(found, key=lambda one: (one[3] == "banks", one[2] == object, one[0]))
        if kind == "calibrations":
            return f"{name!r} is calibrated with another bundle ({hash}): `vmad calibrate` it with this one."
        again = self._command("enroll", name, f"--from-station {hash}")
        return f"{name!r} is enrolled with another bundle ({hash}): to enroll the same frames with this one, `{again}`."

    def _command(self, name: str, object: str, options: str) -> str:
        """For a shell: a subcommand of `vmad` about an object of this station."""
        bundle, root = shlex.quote(str(self._bundle.path)), shlex.quote(str(self._root))
        station = "" if self._is_default else f" --station {root}"
        return f"vmad {name} {bundle} {options} --object {shlex.quote(object)}{station}"

    def enrolled_elsewhere(self) -> dict[str, list[str]]:
        """By the beginning of another bundle's hash: the objects that are enrolled with it in the same place."""
        found = {folder.name: _readable_in(folder, "banks") for folder in self._others()}
        return {hash: names for hash, names in found.items() if names}

    def enrolled_with(self, other: str, object: str) -> tuple[tuple[EnrolledFrame, ...], Layout]:
        """The frames that were enrolled for `object` with another bundle, and what of them was inspected.

        `same_frames` reads the frames again.

        Args:
            other: the folder that another bundle's station is, or that it lies in; or the beginning of the bundle's
                hash, for one that lies beside this.

        Raises:
            BundleError: there is no such station, or more than one; `object` is not enrolled in it; its bank was
                changed or is incomplete.
        """
        if os.path.isdir(other):  # noqa: PTH112, Path.is_dir raises for names too long
            given = Path(other).absolute()
            stations = [given] if (given / "banks").is_dir() else _stations_in(given)
        else:
            stations = [path for path in self._others() if path.name.startswith(other[:16].lower())]
        holding = {path.name: place for path in stations if (place := _place(path, "banks", object)) is not None}
        if len(holding) == 1:
            (place,) = holding.values()
            advice = "Enroll the frames from their own folder."
            record, arrays = _bank(place, _content(place, advice)[1], None, advice)
            return _enrolled_frames(record, arrays["jpeg"].tobytes()), _layout(record, arrays)
        if holding:
            raise BundleError(
                f"{object!r} is enrolled with several bundles in {other}: say which of {', '.join(holding)}"
            )
        enrolled = {name for path in stations for name in _objects_in(path, "banks")}
        if enrolled:
            raise BundleError(f"{object!r} is not enrolled in {other}; there are: {listed(enrolled, object)}")
        beside = ", ".join(self.enrolled_elsewhere()) or "none"
        raise BundleError(
            f"expected the folder of another bundle's station, or the beginning of that bundle's hash, found "
            f"{other!r}; in {self._root} there are: {beside}"
        )

    def bank_hash(self, object: str) -> str | None:
        """SHA-256 of the bank of `object`, of its content; None if none was enrolled.

        Raises:
            BundleError: it was changed, others can have written it, or it cannot be read.
        """
        path = _place(self.path, "banks", object)
        return None if path is None else _content(path, f"Enroll {object!r} again.")[0]

    def save_calibration(self, calibration: Calibration) -> Path:
        """Write it, whole or not at all, in place of an earlier one of its object.

        Raises: as `save_references`.
        """
        told = calibration.model_dump(include={"when", "by", "bank", "promise"})
        told |= {"did": "calibrated", "calibration": calibration.hash}
        return self._write("calibrations", calibration.object, _json(calibration), told)[0]

    def load_calibration(self, object: str, bank: str | None) -> Calibration | None:
        """The calibration of `object`, or None if there is none.

        Args:
            bank: hash of the references that it is wanted for; None: the bundle's normal features.

        Raises:
            BundleError: it was changed, others can have written it, it cannot be read, or it was made with another
                bundle or reference bank.
        """
        found = self.last_calibration(object)
        if found is None:
            return None
        path = _place(self.path, "calibrations", object)
        for what, then, now in (
            ("bundle", found.bundle, self._bundle.hash),
            ("reference bank", found.bank, bank),
        ):
            if then != now:
                old, new = (hash[:16] if hash else "none" for hash in (then, now))
                mend = "Calibrate" if now else "Enroll"
                raise BundleError(
                    f"the calibration of {found.object!r} ({found.when}, by {found.by}) was made with another {what} "
                    f"({old}, now {new}). {mend} {object!r} again, or remove {path}."
                )
        return found

    def last_calibration(self, object: str) -> Calibration | None:
        """The calibration of `object`, whatever it was made with; None if there is none.

        Raises:
            BundleError: it was changed, others can have written it, or it cannot be read.
        """
        return self._kept(Calibration, "calibrations", object, f"Calibrate {object!r} again, or remove")

    def save_release(self, release: Release) -> Path:
        """Write it, whole or not at all, in place of an earlier one of its object.

        Raises: as `save_references`.
        """
        told = release.model_dump(exclude={"schema_version", "bundle", "object", "released"})
        return self._write("releases", release.object, _json(release), told | {"did": release.did})[0]

    def load_release(self, object: str) -> Release | None:
        """The release of `object`, whatever it was for; None if there is none.

        Raises:
            BundleError: it was changed, others can have written it, or it cannot be read.
        """
        return self._kept(Release, "releases", object, f"{object!r} is not released if you remove")

    def _kept(self, record: type[_K], kind: Kind, object: str, advice: str) -> _K | None:
        """Of an object, what is kept of that kind as JSON; `advice` ends before the file's name."""
        if (path := _place(self.path, kind, object)) is None:
            return None
        advice = f"{advice} {path}."
        found = _parsed(record, _content(path, advice)[1], path, advice)
        if found.object != text_of(object):
            raise BundleError(f"{path} is the {_IS[kind]} of {found.object!r}. {advice}")
        return found

    def answer(self, object: str, by: str, why: str, *, released: bool = True) -> Release:
        """Release `object` as it is compared now, on a person's word; or take that back (`released=False`).

        Raises:
            VmadError: no name or reason, or an object that is neither the bundle's own nor enrolled or calibrated.
            BundleError: its bank or calibration must not be used.
            OSError, BundleError: as `save_references`.
        """
        check_answered(by, why)
        own = self._bundle.manifest.object
        if object != own and not self.knows(object):
            there = {own, *self.enrolled(), *_objects_in(self.path, "calibrations")}
            raise VmadError(
                f"expected an object that is enrolled or calibrated with this bundle (station {self.path}), got "
                f"{object!r}; there are: {listed(there, object)}"
            )
        bank = self.bank_hash(object)
        calibration = self.load_calibration(object, bank)
        release = Release(
            bundle=self._bundle.hash,
            object=object,
            bank=bank,
            calibration=None if calibration is None else calibration.hash,
            released=released,
            by=by.strip(),
            when=now(),
            why=why.strip(),
        )
        self.save_release(release)
        return release

    def standing(self, object: str, bank: str | None, calibration: Calibration | None, device: str) -> Standing:
        """Whether `object` is released as it is compared on `device` with `bank` (see `Release`) and `calibration`.

        A release is for one bank and one calibration, one by defects for the device that saw them: another one makes it
        void. A withdrawal holds until a person releases it again. Without any, a bundle's own thresholds count as its
        maker's release of its own kind of part, compared with the bundle's own features, where it never was compared
        with anything else. Reviews change nothing: what is not calibrated with them, they never call GOOD.

        Raises:
            BundleError: as `load_release`.
        """
        manifest, last = self._bundle.manifest, self.load_release(object)
        void = None if last is None else self._void(last, bank, calibration, device)
        if last is not None and (void is None or last.is_withdrawal):
            return Standing(last.released, last.told)
        makers = bank is None and calibration is None and manifest.similarity.thresholds is not None
        if object == manifest.object and makers and last is None and not self._noted(object):
            return Standing(True, f"released: by the bundle's maker, for its own kind of part ({object!r})")
        if last is not None and last.released:
            why = f"{void} ({last.told})"
        else:
            why = f"nobody has shown yet that this bundle sees the defects of {object!r}"
        calibrate = self._command("calibrate", object, "--good DIR --defects DIR")
        answer = self._command("release", object, "--by NAME --why TEXT")
        return Standing(
            False, f"not released: {why}. Real defects can release it: `{calibrate}`; or a person: `{answer}`"
        )

    def calibrated(self) -> dict[str, Calibration | str]:
        """By object: the calibrations that are there, or why one is refused.

        Raises:
            BundleError: their folder cannot be read.
        """
        names = _objects_in(self.path, "calibrations")
        found = ((name, self._calibration_or_reason(name)) for name in names)
        return {name: calibration for name, calibration in found if calibration is not None}

    def _calibration_or_reason(self, object: str) -> Calibration | str | None:
        try:
            return self.load_calibration(object, self.bank_hash(object))
        except BundleError as error:
            return str(error)

    def _void(self, last: Release, bank: str | None, calibration: Calibration | None, device: str) -> str | None:
        """Why it is not of what is compared now; None: it is."""
        for what, then, here in (
            ("bundle", last.bundle, self._bundle.hash),
            ("bank", last.bank, bank),
            ("calibration", last.calibration, None if calibration is None else calibration.hash),
        ):
            if then != here:
                return f"it was for another {what}"
        if last.shown is not None and calibration is not None and calibration.device not in (None, device):
            return f"its defects were seen by device {calibration.device}, this is {device}"
        return None

    def _write(self, kind: Kind, object: str, content: bytes, told: dict[str, Any]) -> tuple[Path, str]:
        """Replace what is kept of `object` in one step; its path, and the content's SHA-256.

        The audit has it first, with what is `told`: nothing is kept of which it does not know.
        """
        hash = hashlib.sha256(content).hexdigest()
        older = self.path / kind / folder_name(object)
        path = older.with_name(older.name + _SUFFIX[kind])
        for folder in (self._root, self.path, path.parent):
            folder.mkdir(0o755, parents=True, exist_ok=True)
            check_ours(folder, folder.stat())
        with only_writer(path.parent):
            first = {name: told[name] for name in ("when", "by", "did")}  # the same in each line
            always = {"object": text_of(object), "account": audit.account(), "sha256": hash}
            audit.note(self.path, {**first, **always, **told})
            if path.exists():  # so no reader needs the older one any more
                shutil.rmtree(older, ignore_errors=True)
            with whole_file(path, 0o644) as scratch, scratch.open("wb") as file:
                file.write(f"{hash}\n".encode())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            sync(path.parent)
        return path, hash

    def _others(self) -> list[Path]:
        """Other bundles' stations in the same place."""
        return [path for path in _stations_in(self._root) if path != self.path]


def now() -> str:
    """When something is made, for its record."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _json(record: Record) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()


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


def _objects_in(station: Path, kind: Kind) -> list[str]:
    """Of which a bank, or calibration, is there, readable or not.

    Raises:
        BundleError: that cannot be told.
    """
    folder = station / kind
    try:
        found = list(folder.iterdir()) if _is_there(folder) else []
    except OSError as error:
        raise _unreadable(folder, error) from None
    kept = {path.stem for path in found if path.suffix == _SUFFIX[kind]}
    return sorted(map(object_name, kept | {path.name for path in found if "." not in path.name and path.is_dir()}))


def _readable_in(station: Path, kind: Kind) -> list[str]:
    """As `_objects_in`; none of a station that cannot be read, which is another bundle's."""
    try:
        return _objects_in(station, kind)
    except BundleError:
        return []


def _place(station: Path, kind: Kind, object: str) -> Path | None:
    """Where what is kept of `object` lies: a file, or the folder of schema 1; None if there is neither.

    Raises:
        BundleError: that cannot be told, or a version that wrote schema 1 was killed while it replaced the folder.
    """
    older = station / kind / folder_name(object)
    newer = older.with_name(older.name + _SUFFIX[kind])
    places = (newer, older, newer) if kind in _SCHEMA_1 else (newer,)
    for path in places:  # the newer once more: it may have taken the older one's place just now
        if _is_there(path):
            return path
    for left in older.parent.glob(f".{older.name[:40]}.*/old"):
        raise BundleError(
            f"{left.parent} is what an interrupted write left of {object!r}: `mv {shlex.quote(str(left))} "
            f"{shlex.quote(str(older))}` brings back what was there"
        )
    return None


def _is_there(path: Path) -> bool:
    """Whether something lies there, be it a link to nowhere: only what is absent is absent.

    Raises:
        BundleError: that cannot be told.
    """
    try:
        path.lstat()
        return True
    except FileNotFoundError:
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if above.exists():
            return False
        raise BundleError(f"{above} is a link to nowhere: bring back what it leads to, or remove it") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{path} cannot be read ({error.strerror}), so what is enrolled, calibrated or released there is not known: "
        "make it readable for the user who inspects, or name another station"
    )


def _content(path: Path, advice: str) -> tuple[str, bytes]:
    """SHA-256 and content of the bank, calibration or release that lies at `path` (see `_place`).

    Raises:
        BundleError: it was changed, others can have written it, or it cannot be read.
    """
    try:
        for folder in reversed(path.parents[:3]):
            check_ours(folder, folder.stat())
        if path.suffix:
            with open_ours(path) as file:
                stated, content = file.read(_HASH_LINE), file.read()
        else:
            check_ours(path, path.stat())
            name = path / _SCHEMA_1[_kind(path)]
            with open_ours(name.with_suffix(".sha256")) as hash, open_ours(name) as file:
                stated, content = hash.read(_HASH_LINE), file.read()
    except PermissionError as error:
        raise _unreadable(path, error) from None
    except OSError as error:
        raise BundleError(f"{path} is not a complete {_IS[_kind(path)]}: {_what_of(error)}. {advice}") from None
    found = hashlib.sha256(content).hexdigest()
    if stated != f"{found}\n".encode():
        raise BundleError(f"{path} was changed since it was written. {advice}")
    return found, content


def _kind(path: Path) -> Kind:
    return next(kind for kind in _SUFFIX if kind == path.parent.name)


_R = TypeVar("_R", _BankRecord, Calibration, Release)


def _parsed(kind: type[_R], text: bytes | str, path: Path, advice: str) -> _R:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        where, what = first_fault(error)
        given = error.errors()[0]["input"]
        if where == "schema_version" and isinstance(given, int) and given > kind.model_fields[where].default:
            advice = "It needs a newer vmad-edge."
        raise BundleError(f"{path} is not a complete {_IS[_kind(path)]}: {where}: {what}. {advice}") from None


def _bank(
    path: Path, content: bytes, vision: Vision | None, advice: str
) -> tuple[_BankRecord, dict[str, NDArray[Any]]]:
    """What a bank holds.

    Args:
        vision: of the bundle that it was enrolled with; None: that is not at hand.

    Raises:
        BundleError: it is no bank, or no possible one.
    """
    try:
        arrays = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text = header["__metadata__"]["bank"]
        optional = {"scope", "ignored"} & arrays.keys()
        arrays = {name: arrays[name] for name in ("features", "patch", "jpeg", *optional)}
    except (KeyError, ValueError, SafetensorError) as error:
        raise BundleError(f"{path} is not a complete reference bank: {_what_of(error)}. {advice}") from None
    record = _parsed(_BankRecord, text, path, advice)
    if fault := _fault(record, arrays, vision):
        raise BundleError(f"{path} is not a possible reference bank: {fault}. {advice}")
    return record, arrays


def _fault(record: _BankRecord, arrays: dict[str, NDArray[Any]], vision: Vision | None) -> str | None:
    """What of a bank cannot be, in words; None: nothing."""
    features, patch, jpeg = arrays["features"], arrays["patch"], arrays["jpeg"]
    rows = patch.size
    if features.dtype != np.float32 or features.ndim != 2 or len(features) != rows or not features.size:
        return f"expected features of [{rows},D] float32, found {list(features.shape)} {features.dtype}"
    if vision is not None and features.shape[1] != vision.width:
        return f"expected features of width {vision.width}, as the bundle's encoder gives, found {features.shape[1]}"
    if not np.isfinite(features).all():
        return "expected finite features, found others"
    tiles = max((len(frame.views) for frame in record.frames), default=0)
    patches = np.inf if vision is None else tiles * vision.grid**2
    if patch.dtype != np.int32 or patch.ndim != 1 or patch.min() < 0 or patch.max() >= patches:
        return f"expected patch numbers from 0 to below {patches}, found {patch.min()} to {patch.max()}"
    spans = [(frame.start, frame.stop) for frame in record.frames]
    if not _joined(spans, rows) or any(stop - start > patches for start, stop in spans):
        return f"expected frames that share {rows} rows, one after the other, at most {patches} each, found others"
    if vision is not None and not all(_has_its_tiles(frame, patch, vision.grid**2) for frame in record.frames):
        return "expected of each frame, tile by tile, patches of its tiles, found others"
    pictures = [(frame.jpeg[0], frame.jpeg[-1]) for frame in record.frames]
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1 or not _joined(pictures, len(jpeg)):
        return f"expected pictures one after the other in {jpeg.size} bytes, found others"
    if (record.scope is None) != ("scope" not in arrays):
        return "expected a scope and its limit, or neither, found one of them"
    if record.scope is not None:
        scope, shape = arrays["scope"], (len(record.frames), features.shape[1])
        if scope.dtype != np.float32 or scope.shape != shape or not np.isfinite(scope).all():
            return f"expected a scope of {list(shape)} finite float32, found {list(scope.shape)} {scope.dtype}"
    if (record.ignored is None) != ("ignored" not in arrays):
        return "expected an ignore mask and its width, or neither, found one of them"
    if record.ignored is not None:
        mask, width = arrays["ignored"], -(-record.ignored // 8)
        if mask.dtype != np.uint8 or mask.ndim != 2 or mask.shape[1] != width or len(mask) > MAX_SIDE:
            return f"expected an ignore mask of [h,{width}] bytes, found {list(mask.shape)} {mask.dtype}"
    try:
        _layout(record, arrays)
    except VmadError as error:
        return str(error)
    return None


def _has_its_tiles(frame: _FrameRecord, patch: NDArray[np.int32], per_tile: int) -> bool:
    own = patch[frame.start : frame.stop] // per_tile
    return bool((np.diff(own) >= 0).all() and (own < len(frame.views)).all())


def _layout(record: _BankRecord, arrays: dict[str, NDArray[Any]]) -> Layout:
    """Raises: VmadError: it is no possible one."""
    width = record.ignored
    ignored = None if width is None else np.unpackbits(arrays["ignored"], axis=1, count=width).astype(np.bool_)
    return Layout(record.region, ignored, record.tiles)


def _joined(spans: Sequence[tuple[int, int]], end: int) -> bool:
    """Whether each begins where the one before stops, from 0 to `end`."""
    stops = [stop for _, stop in spans]
    return [start for start, _ in spans] == [0, *stops][:-1] and stops == sorted(stops) and stops[-1:] == [end]


def _enrolled_frames(record: _BankRecord, jpeg: bytes) -> tuple[EnrolledFrame, ...]:
    return tuple(
        EnrolledFrame(
            f.id,
            f.start,
            f.stop,
            tuple(View(*view) for view in f.views),
            f.size,
            tuple(jpeg[start:stop] for start, stop in pairwise(f.jpeg)),
            f.pixel_hash,
            f.path,
        )
        for f in record.frames
    )


def _what_of(error: Exception) -> str:
    """What is wrong with a file, in words of ours: a library's speak of its own inside."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return "expected features, patch, jpeg and their record, found something else"
