"""What is made of the best cosines on CUDA: MuSc's interval among frames, and one score of several banks."""

from __future__ import annotations

from vmad_edge.kernels import _FRAMES_ROWS, _check_interval
from vmad_edge.kernels.cuda.library import DeviceArray, call, describe, pointer, view, workspace_pointer
from vmad_edge.kernels.cuda.similarity import (
    DeviceBank,
    DeviceOffsets,
    Path,
    normalise,
    segmented_max_cosine,
    segmented_max_cosine_workspace,
)


def interval_mean(
    cosine: DeviceArray,
    score: DeviceArray,
    interval: float = 0.3,
    *,
    own: tuple[int, int] | None = None,
    stream: int = 0,
) -> None:
    """Best cosines to each of S frames, [R,S] float32, to `mutual_score`'s scores, `score` [R] float32.

    Args:
        own: (first, each): row r is a patch of frame first + r // each, which is left out and not counted in S.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape; the interval holds none of the frames.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    (rows, frames), _ = describe("cosine", cosine, 2, "<f4")
    wanted = int(interval * (frames - (own is not None)))
    if not 0 < wanted <= frames:
        raise ValueError(f"cosine: expected more than {frames} frames for an interval of {interval}")
    source, target = pointer("cosine", cosine, (rows, frames), "<f4"), pointer("score", score, (rows,), "<f4")
    if rows:
        call("vmad_interval_mean", source, rows, frames, wanted, *(own or (0, 0)), target, stream)


def mutual_score_workspace(patches: int, bank: DeviceBank, offsets: DeviceOffsets, *, path: Path = "auto") -> int:
    """Bytes that `mutual_score` needs as its workspace."""
    rows, _, cosines_at = _at_once(patches, bank, offsets, path)
    return cosines_at + 4 * rows * (len(offsets.host) - 1)


def mutual_score(
    features: DeviceArray,
    bank: DeviceBank,
    offsets: DeviceOffsets,
    score: DeviceArray,
    workspace: DeviceArray,
    interval: float = 0.3,
    *,
    path: Path = "auto",
    stream: int = 0,
) -> None:
    """How far each patch of unlabelled frames is from the frames that it is nearest to, see `vmad_edge.kernels`.

    Args:
        features: [n,N,D] float32 or float16: n frames of N patches.
        bank: n·N rows of width D, written.
        offsets: 0, N, … n·N.
        score: [n,N] float32, written.
        workspace: [bytes] uint8, at least `mutual_score_workspace(N, bank, offsets)`, its first WORKSPACE_ZEROS zero.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape; so few frames that the interval holds none.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    (frames, patches, width), _ = describe("features", features, 3, "<f4", "<f2")
    _check_interval(interval, frames)
    if patches == 0:
        raise ValueError(f"features: expected shape [frames, patches, width], got {[frames, patches, width]}")
    if offsets.host.tolist() != list(range(0, frames * patches + 1, patches)):
        raise ValueError(f"offsets: expected {frames} segments of {patches} rows each, got {offsets.host.tolist()}")
    pointer("score", score, (frames, patches), "<f4")
    workspace_pointer(workspace, mutual_score_workspace(patches, bank, offsets, path=path))
    normalise(view(features, (frames * patches, width)), bank, stream=stream)
    together, needed, cosines_at = _at_once(patches, bank, offsets, path)
    space = view(workspace, (needed,))
    for first in range(0, frames * patches, together):
        rows = min(together, frames * patches - first)
        query = view(features, (rows, width), first * width)
        cosine = view(workspace, (rows, frames), cosines_at // 4, "<f4")
        segmented_max_cosine(query, bank, offsets, cosine, space, path=path, stream=stream)
        own = first // patches, patches
        interval_mean(cosine, view(score, (rows,), first), interval, own=own, stream=stream)


def _at_once(patches: int, bank: DeviceBank, offsets: DeviceOffsets, path: Path) -> tuple[int, int, int]:
    """Query rows of one step: whole frames; the workspace of their cosines, and where in it they lie."""
    rows = min(len(bank), max(1, _FRAMES_ROWS // patches) * patches)
    needed = segmented_max_cosine_workspace(rows, bank, offsets, path=path)
    return rows, needed, -(-needed // 256) * 256


def patch_scores(
    score: DeviceArray,
    counted: DeviceArray,
    counts: DeviceArray,
    *,
    nearest: DeviceArray | None = None,
    contrast: tuple[DeviceArray, DeviceArray] | None = None,
    temperature: float = 1.0,
    contrast_weight: float = 1.0,
    distance_weight: float = 1.0,
    stream: int = 0,
) -> None:
    """One score [N] of a patch's best cosines to several banks.

    The sum of `contrast_weight` · softmax(contrast / temperature)[1] and `distance_weight` · (1 − nearest), without the
    part that is None.

    Args:
        score: [N] float32, written.
        counted: [N] float32, written: the score where `counts` is not 0, elsewhere NaN, which `top_mean` leaves out. A
            score that is NaN is +∞ here, so that it is not left out.
        counts: [N] uint8.
        nearest: [N] float32.
        contrast: two of [N] float32.

    Raises:
        TypeError, ValueError: memory of the wrong type or shape.
        RuntimeError: no library in this build, or CUDA refuses.
    """
    (count,), _ = describe("score", score, 1, "<f4")
    given = {"nearest": nearest, "contrast[0]": contrast and contrast[0], "contrast[1]": contrast and contrast[1]}
    sources = [None if array is None else pointer(name, array, (count,), "<f4") for name, array in given.items()]
    targets = [pointer(name, array, (count,), "<f4") for name, array in (("score", score), ("counted", counted))]
    weights = temperature, contrast_weight, distance_weight
    call("vmad_patch_scores", *sources, pointer("counts", counts, (count,), "|u1"), count, *weights, *targets, stream)
