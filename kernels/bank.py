"""ReferenceBank: features scaled to length 1 once and laid out as the kernels read them, for many calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vmad_edge.kernels import _cpu

Features = NDArray[np.floating[Any]]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]
_DTYPES = get_args(Dtype)  # in the order of vmad::Type


class ReferenceBank:
    """A queue of rows [M,D]: `extend` adds at its end, `evict` takes from its front; neither moves the rows between.

    Rows live in blocks of `_cpu.BLOCK_ROWS` slots; a block that was evicted whole is the next to be filled. One bank
    may serve several threads at once, but not while it is extended or evicted from.

    Args:
        width: D.
        dtype: how the rows are kept. float32, or rounded to bfloat16, float16, or 127 steps either way of the row's
            largest element (int8; D up to 65536); a rounded row is scaled to length 1 again. Rows that compare with
            bfloat16 or int8 ones are rounded likewise where the processor multiplies such rows by itself.

    Raises:
        ValueError: a dtype other than those; a width that it cannot have.
    """

    def __init__(self, width: int, dtype: Dtype = "float32") -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        most = _cpu.MAX_INT8_WIDTH if dtype == "int8" else 2**31
        if not 1 <= width <= most:
            raise ValueError(f"width: expected 1 to {most} for {dtype}, got {width}")
        self.width, self.dtype = width, dtype
        self._type = _DTYPES.index(dtype)
        self._words = _cpu.BLOCK_ROWS * _cpu.panel_lines(self._type, width)  # of a block
        self._blocks: list[NDArray[np.uint32]] = []
        self._spare: list[NDArray[np.uint32]] = []
        self._first = self._count = 0
        self.evicted = 0
        """Rows forgotten since the bank was made: the numbers that its rows have counted from there never change."""

    @staticmethod
    def from_array(features: Features, dtype: Dtype = "float32") -> ReferenceBank:
        """A bank of `features` [M,D], float16, float32 or float64; they are copied.

        Raises:
            TypeError: not a float array.
            ValueError: not [M,D] with M and D at least 1; a dtype that there is not.
        """
        rows = rows_of("bank", features)
        if len(rows) == 0:
            raise ValueError(f"bank: expected at least 1 row, got shape {list(rows.shape)}")
        bank = ReferenceBank(rows.shape[1], dtype)
        bank.extend(rows)
        return bank

    def extend(self, features: Features) -> None:
        """Add `features` [n,D] after the last row.

        Raises:
            TypeError: not a float array.
            ValueError: not [n,D].
        """
        rows = rows_of("features", features)
        if rows.shape[1] != self.width:
            raise ValueError(f"features: expected the bank's width {self.width}, got {rows.shape[1]}")
        while len(rows):
            block, start = divmod(self._first + self._count, _cpu.BLOCK_ROWS)
            if block == len(self._blocks):
                self._blocks.append(self._spare.pop() if self._spare else _aligned(self._words))
            now, rows = rows[: _cpu.BLOCK_ROWS - start], rows[_cpu.BLOCK_ROWS - start :]
            _cpu.pack(path_number(), self._type, now, self._blocks[block], start)
            self._count += len(now)

    def evict(self, count: int) -> None:
        """Forget the first `count` rows; the row after them has index 0 from then on.

        Raises:
            ValueError: the bank has fewer rows.
        """
        if not 0 <= count <= self._count:
            raise ValueError(f"count: expected 0 to {self._count}, the bank's rows, got {count}")
        gone, self._first = divmod(self._first + count, _cpu.BLOCK_ROWS)
        self._count -= count
        self.evicted += count
        self._spare += self._blocks[:gone]
        del self._blocks[:gone]

    def rows(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows `start` to `stop` − 1 (None: to the last) [n,D] as they are kept: rounded, scaled to length 1.

        Raises:
            ValueError: the bank has no such rows.
        """
        stop = self._count if stop is None else stop
        if not 0 <= start <= stop <= self._count:
            raise ValueError(f"rows: expected 0 ≤ start ≤ stop ≤ {self._count}, got {start} and {stop}")
        first, last = self._first + start, self._first + stop
        found = [np.empty((0, self.width), np.float32)]
        for number in range(first // _cpu.BLOCK_ROWS, -(-last // _cpu.BLOCK_ROWS)):
            begin = number * _cpu.BLOCK_ROWS
            inside = slice(max(first - begin, 0), last - begin)
            # A panel: lines of 16 words, one of each row; then the rows' scales, and their sums.
            panels = self._blocks[number].reshape(-1, _cpu.panel_lines(self._type, self.width), 16)
            words = np.ascontiguousarray(panels[:, :-2].transpose(0, 2, 1)).reshape(_cpu.BLOCK_ROWS, -1)[inside]
            scale = panels[:, -2].reshape(-1)[inside].view(np.float32)
            found.append(_elements(words, self.dtype)[:, : self.width] * scale[:, None])
        return np.concatenate(found)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory of the blocks, evicted ones included."""
        return 4 * self._words * (len(self._blocks) + len(self._spare))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Everything that `from_tensors` needs, to be saved by safetensors beside whatever else the caller saves."""
        facts = (self._type, self.width, self._first, self._count)
        return {"bank": np.array(facts, np.int64), "panels": np.concatenate([np.zeros(0, np.uint32), *self._blocks])}

    @staticmethod
    def from_tensors(tensors: Mapping[str, NDArray[Any]]) -> ReferenceBank:
        """The bank that gave these `tensors`.

        Raises:
            KeyError, ValueError: they are not those of a bank.
        """
        facts, panels = tensors["bank"], tensors["panels"]
        if facts.shape != (4,) or facts.dtype != np.int64 or not 0 <= facts[0] < len(_DTYPES):
            raise ValueError(f"bank: expected a dtype, a width, a first row and a count, got {facts}")
        kind, width, first, count = (int(fact) for fact in facts)
        bank = ReferenceBank(width, _DTYPES[kind])
        blocks = -(-(first + count) // _cpu.BLOCK_ROWS)
        if not (0 <= first < _cpu.BLOCK_ROWS and count >= 0) or panels.shape != (blocks * bank._words,):
            raise ValueError(f"panels: expected {blocks} blocks of {bank._words} words, got shape {panels.shape}")
        if panels.dtype != np.uint32:
            raise ValueError(f"panels: expected uint32, got {panels.dtype}")
        for stored in panels.reshape(blocks, bank._words):
            bank._blocks.append(_aligned(bank._words))
            bank._blocks[-1][:] = stored
        bank._first, bank._count = first, count
        return bank

    def _native(self) -> _cpu.Bank:
        """What the compiled operators take; it points into the blocks and lives no longer than they do."""
        addresses = np.array([block.ctypes.data for block in self._blocks], np.uint64)
        return _cpu.Bank(self._type, self.width, self._first, self._count, addresses, None)


def rows_of(name: str, features: Features) -> NDArray[np.float32]:
    """`features` [rows,width] as float32 in C order, a copy only where it must be.

    Raises:
        TypeError: not a float array.
        ValueError: another shape, or width 0.
    """
    kinds = (np.float16, np.float32, np.float64)
    if not isinstance(features, np.ndarray) or features.dtype.type not in kinds:
        got = features.dtype if isinstance(features, np.ndarray) else type(features).__name__
        raise TypeError(f"{name}: expected an array of float16, float32 or float64, got {got}")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [rows, width] with width ≥ 1, got {list(features.shape)}")
    with np.errstate(over="ignore"):
        return np.require(features, np.float32, ["C", "ALIGNED", "ENSUREARRAY"])


def _elements(words: NDArray[np.uint32], dtype: Dtype) -> NDArray[np.float32]:
    """What the words [n,w] of n rows hold, as float32."""
    if dtype == "bfloat16":
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return words.view(dtype).astype(np.float32)


def path_number() -> int:
    """Of the path that the kernels take, in `_cpu.paths()`: VMAD_PATH's, else the processor's best.

    Raises:
        ValueError: VMAD_PATH names none that this processor can take.
    """
    names = _cpu.paths()
    wanted = os.environ.get("VMAD_PATH") or names[-1]
    if wanted not in names:
        raise ValueError(f"VMAD_PATH: expected one of {', '.join(names)} on this processor, got {wanted!r}")
    return names.index(wanted)


def _aligned(words: int) -> NDArray[np.uint32]:
    """A block at an address that is a multiple of 64."""
    memory = np.empty(words + 16, np.uint32)
    skip = -memory.ctypes.data % 64 // 4
    return memory[skip : skip + words]
