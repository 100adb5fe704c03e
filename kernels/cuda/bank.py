"""A ReferenceBank on the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels import ReferenceBank
from vmad_edge.kernels.cuda.library import Memory
from vmad_edge.kernels.cuda.similarity import DeviceBank, Dtype, normalise, row_bytes

_AT_ONCE = 1 << 14  # rows uploaded as float32 at a time


class MirroredBank:
    """The rows of a ReferenceBank on the device, which follow its growth and eviction.

    `device` is what the operators take. It has room for more rows than the bank may have: the free ones are NaN rows,
    which never win, so a graph that was captured with it stays right. Bank row i is row `first` + i there.

    Args:
        bank: float32, bfloat16 and float16 rows are kept as float16 here, int8 ones as they are.
        memory: used in whatever thread calls.

    Raises:
        ValueError: an empty bank.
        RuntimeError: no library in this build, or CUDA refuses.
    """

    def __init__(self, bank: ReferenceBank, memory: Memory) -> None:
        self._bank, self._memory = bank, memory
        # In rows counted from the bank's making: that in slot 0, and those that are here.
        self._base = self._start = self._stop = bank.evicted
        self._load(len(bank))

    @property
    def first(self) -> int:
        """The row in `device` of the bank's first row."""
        return self._start - self._base

    def update(self) -> bool:
        """Brings what the bank gained and drops what it lost since.

        Returns:
            Whether `device` is other memory now, for want of room: then what was captured must be captured again.

        Raises:
            ValueError, RuntimeError: as the constructor.
        """
        start, stop = self._bank.evicted, self._bank.evicted + len(self._bank)
        if (start, stop) == (self._start, self._stop):
            return False
        if stop - self._base > len(self.device) or start == stop:
            self._load(2 * len(self._bank))
            return True
        gone = np.full((min(start, self._stop) - self._start, self._bank.width), np.nan, np.float32)
        self._write(self._start - self._base, gone)
        self._fill(max(start, self._stop), stop)
        self._start = start
        return False

    def _load(self, capacity: int) -> None:
        if len(self._bank) == 0:
            raise ValueError("bank: expected at least 1 row, got none")
        dtype: Dtype = "int8" if self._bank.dtype == "int8" else "float16"
        width = self._bank.width
        scale = self._memory.zeros((capacity,), np.float32) if dtype == "int8" else None
        self.device = DeviceBank(self._memory.zeros((capacity, row_bytes(width, dtype)), np.uint8), scale, width, dtype)
        self._base = self._start = self._bank.evicted
        self._fill(self._base, self._base + len(self._bank))
        for slot in range(len(self._bank), capacity, _AT_ONCE):
            self._write(slot, np.full((min(_AT_ONCE, capacity - slot), width), np.nan, np.float32))

    def _fill(self, start: int, stop: int) -> None:
        """Rows `start` to `stop` − 1, counted from the bank's making."""
        for row in range(start, stop, _AT_ONCE):
            end = min(row + _AT_ONCE, stop)
            self._write(row - self._base, self._bank.rows(row - self._bank.evicted, end - self._bank.evicted))
        self._stop = stop

    def _write(self, slot: int, rows: NDArray[np.float32]) -> None:
        features = self._memory.upload(rows)
        normalise(features, self.device.part(slot, len(rows)), stream=self._memory.stream)
        self._memory.wait()  # for the features, which are freed now
