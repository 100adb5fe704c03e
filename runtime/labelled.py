"""What a labelled data set is made of: its categories, and their frames with what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmad_edge.runtime.folders import walk
from vmad_edge.runtime.masks import read_mask, turned


@dataclass(frozen=True)
class LabelledFrame:
    name: str
    """Its path below the data set's category (VisA: below the data set), with `/`."""
    path: Path
    defective: bool
    mask: Path | None
    """A file, or a folder of several (MVTec LOCO). None for what is good, and for a defect that nobody marked."""
    numbered: bool = False
    """Its mask's values are numbers of kinds of defects (VisA), see `masks.read_mask`."""

    @property
    def mask_files(self) -> tuple[Path, ...]:
        if self.mask is None or not self.mask.is_dir():
            return () if self.mask is None else (self.mask,)
        return tuple(map(Path, walk([self.mask]).paths))

    def read_mask(
        self, size: tuple[int, int], doubt: Callable[[str], None] = lambda _: None
    ) -> NDArray[np.bool_] | None:
        """[h,w], True on the defect; all False for what is good. None if the defect was not marked.

        What several files mark is united; how much of a mask would have to be found (MVTec LOCO's saturation
        thresholds) is not known here.

        Args:
            size: (height, width) of the frame.
            doubt: called with a sentence if the mask may mean something else than it is taken for.

        Raises:
            FrameError: a mask that cannot be read, or of another size than the frame.
        """
        mask = np.zeros(size, np.bool_)
        if not self.defective:
            return mask
        doubts = []
        for file in self.mask_files:
            marked, why = read_mask(file, size, self.numbered)
            mask |= marked
            if why is not None:
                doubts.append(f"{file.name}: {why}")
        if not mask.any():
            return None
        if turned(self.path):
            doubts.append("the frame is turned by its EXIF orientation; the mask is taken as drawn on the turned frame")
        if doubts:
            doubt(doubts[0])
        return mask


@dataclass(frozen=True)
class Category:
    name: str
    train: tuple[Path, ...]
    """Normal frames to enroll."""
    test: tuple[LabelledFrame, ...]
    unlabelled: tuple[Path, ...] = ()
    """Frames to test whose labels only the benchmark's server knows (MVTec AD 2)."""
    left_out: str = ""
    """What lies there and is not read, in words; empty if nothing."""
