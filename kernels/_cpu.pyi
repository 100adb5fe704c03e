from numpy import float32, int64, uint32, uint64
from numpy.typing import NDArray

BLOCK_ROWS: int
MAX_INT8_WIDTH: int

def paths() -> list[str]: ...
def panel_lines(type: int, width: int) -> int: ...
def pack(path: int, type: int, rows: NDArray[float32], block: NDArray[uint32], start: int) -> None: ...

class Bank:
    def __init__(
        self,
        type: int,
        width: int,
        first: int,
        count: int,
        addresses: NDArray[uint64] | None,
        rows: NDArray[float32] | None,
    ) -> None: ...

def max_cosine(
    path: int,
    query: NDArray[float32],
    bank: Bank,
    k: int,
    threads: int,
    score: NDArray[float32],
    index: NDArray[int64],
) -> None: ...
def segmented_max_cosine(
    path: int,
    query: NDArray[float32],
    bank: Bank,
    offsets: NDArray[int64],
    threads: int,
    score: NDArray[float32],
) -> None: ...
