"""Whether an object is released: somebody showed that this bundle sees its defects, or answers for it by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vmad_edge.runtime.bundle import Record
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.objects import Text


class Shown(Record):
    """What a calibration's real defects say. It releases its object where `bound` is at most `allowed`."""

    defects: PositiveInt
    missed: NonNegativeInt
    """Of them, called GOOD."""
    bound: Annotated[float, Field(ge=0, le=1)]
    """With `confidence` no larger share of all its defects is missed (Clopper and Pearson)."""
    confidence: Annotated[float, Field(gt=0, lt=1)]
    allowed: Annotated[float, Field(gt=0, lt=1)]
    needed: PositiveInt
    """So many defects, no more of them missed, would be enough."""

    @property
    def is_enough(self) -> bool:
        return self.bound <= self.allowed

    @property
    def told(self) -> str:
        said = (
            f"{self.defects} defect{'s'[self.defects == 1 :]}, {self.missed or 'none'} missed: at most "
            f"{math.ceil(100 * self.bound - 1e-6)}% missed at {100 * self.confidence:g}%"
        )
        if self.is_enough:
            return said
        return f"{said}, where {100 * self.allowed:g}% are allowed; {self.needed} defects and no more missed are enough"


class Release(Record):
    """That an object is released as it was compared then, or is not (any more)."""

    schema_version: Literal[1] = 1
    bundle: str
    object: Text
    bank: str | None
    """Hash of the reference bank that its frames are compared with; None: the bundle's normal features."""
    calibration: str | None
    """Hash of the calibration that gave the thresholds; None: they are the bundle's, or the bank's."""
    released: bool
    by: Text
    when: str
    why: Text | None = None
    """A person's reason; None: `shown`."""
    shown: Shown | None = None

    @model_validator(mode="after")
    def _rests_on_something(self) -> Release:
        if (self.why is None) == (self.shown is None):
            raise ValueError("expected why or shown, found both or neither")
        if self.shown is not None and self.released != self.shown.is_enough:
            raise ValueError("expected to be released by what was shown if it is enough, found otherwise")
        return self

    @property
    def is_withdrawal(self) -> bool:
        return not self.released and self.why is not None

    @property
    def did(self) -> str:
        if self.released:
            return "released"
        return "withdrawn" if self.is_withdrawal else "not released"

    @property
    def told(self) -> str:
        reason = self.why if self.shown is None else self.shown.told
        if self.is_withdrawal:
            return f"not released: withdrawn by {self.by}, {self.when}: {reason}"
        return f"{self.did}: {reason} (by {self.by}, {self.when})"


@dataclass(frozen=True)
class Standing:
    """How it stands with an object as it is compared now."""

    released: bool
    told: str
    """For people; begins with "released" or "not released"."""


UNLABELLED = Standing(False, "not released: of unlabelled frames nobody said that any is normal")
THIS_RUN_ALONE = Standing(
    False, "not released: its references are of this run alone; `vmad enroll` keeps them, so that they can be released"
)


def check_answered(by: str, why: str) -> None:
    """That a person gave a name and a reason.

    Raises:
        VmadError: one is empty.
    """
    for option, given, expected in (("--by", by, "the name of who answers for it"), ("--why", why, "the reason")):
        if not given.strip():
            raise VmadError(f"{option}: expected {expected}, got nothing")
