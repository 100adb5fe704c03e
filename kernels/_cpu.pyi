from numpy import float32, int64
from numpy.typing import NDArray

def normalise(rows: NDArray[float32], unit: NDArray[float32]) -> None: ...
def max_cosine(
    query: NDArray[float32],
    bank: NDArray[float32],
    bank_normalised: bool,
    k: int,
    threads: int,
    score: NDArray[float32],
    index: NDArray[int64],
) -> None: ...
def segmented_max_cosine(
    query: NDArray[float32],
    bank: NDArray[float32],
    bank_normalised: bool,
    offsets: NDArray[int64],
    threads: int,
    score: NDArray[float32],
) -> None: ...
