"""What the CUDA kernels must do, on whatever machine.

tests/kernels/test_cuda_host.py runs these tests on the processor, on the machine of `kernels/cuda_host/host.h`;
tests/gpu/test_cuda.py runs them on a GPU. Each brings its own fixture `operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from examples import clip_input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.interpolate import RegularGridInterpolator

from vmad_edge.kernels import ReferenceBank, cuda, reference
from vmad_edge.runtime.bundle import SamInput
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import clip_pixels, sam_pixels
from vmad_edge.runtime.stages.preprocess_cuda import CudaPreprocess

TOLERANCE = {"float16": 1e-3, "int8": 1e-2}


class Operators:
    """The operators on NumPy arrays.

    Args:
        machine: of which this uses `upload`, `zeros`, `download`, `wait` and `stream`.
        turn: called before each run of an operator, which runs twice.
    """

    def __init__(self, machine: Any, turn: Callable[[], None] = lambda: None) -> None:
        self.upload, self.zeros, self.download, self.wait = (
            machine.upload,
            machine.zeros,
            machine.download,
            machine.wait,
        )
        self.stream, self.turn = machine.stream, turn

    def bank(self, features: Any, dtype: cuda.Dtype) -> cuda.DeviceBank:
        count, width = features.shape
        rows = self.upload(np.full((count, cuda.row_bytes(width, dtype)), 0x77, np.uint8))
        scale = self.upload(np.full(count, 7, np.float32)) if dtype == "int8" else None
        bank = cuda.DeviceBank(rows, scale, width, dtype)
        cuda.normalise(self.upload(features), bank, stream=self.stream)
        return bank

    def workspace(self, size: int) -> Any:
        """Zero where it must be, rubbish elsewhere."""
        return self.upload(np.where(np.arange(size) < cuda.WORKSPACE_ZEROS, 0, 0xEE).astype(np.uint8))

    def used_up(self, workspace: Any) -> bool:
        return bool(self.download(workspace)[: cuda.WORKSPACE_ZEROS].any())

    def max_cosine(self, query: Any, bank: Any, k: int = 1, *, dtype: cuda.Dtype, path: cuda.Path = "auto") -> Any:
        device_bank = self.bank(bank, dtype)
        workspace = self.workspace(cuda.max_cosine_workspace(len(query), device_bank, k, path=path))
        found = []
        for _ in range(2):  # the second call finds the workspace as the first one left it
            score, index = (self.upload(np.full(len(query), -9, kind)) for kind in (np.float32, np.int64))
            self.turn()
            options: Any = {"path": path, "stream": self.stream}
            cuda.max_cosine(self.upload(query), device_bank, score, index, workspace, k, **options)
            found.append((self.download(score), self.download(index)))
        assert not self.used_up(workspace)
        assert (bits(found[0][0]) == bits(found[1][0])).all() and (found[0][1] == found[1][1]).all()
        return found[0]

    def compare(self, query: Any, bank: cuda.DeviceBank) -> Any:
        """max_cosine, once."""
        workspace = self.workspace(cuda.max_cosine_workspace(len(query), bank))
        score, index = self.zeros((len(query),), np.float32), self.zeros((len(query),), np.int64)
        self.turn()
        cuda.max_cosine(self.upload(query), bank, score, index, workspace, stream=self.stream)
        return self.download(score), self.download(index)

    def segmented_max_cosine(
        self, query: Any, bank: Any, offsets: Sequence[int], *, dtype: cuda.Dtype, path: cuda.Path = "auto"
    ) -> Any:
        device_bank = self.bank(bank, dtype)
        host = cuda.DeviceOffsets.check(offsets, len(bank))
        bounds = cuda.DeviceOffsets(host, self.upload(host))
        size = cuda.segmented_max_cosine_workspace(len(query), device_bank, bounds, path=path)
        workspace, found = self.workspace(size), []
        for _ in range(2):
            score = self.upload(np.full((len(query), len(host) - 1), 9, np.float32))
            self.turn()
            options: Any = {"path": path, "stream": self.stream}
            cuda.segmented_max_cosine(self.upload(query), device_bank, bounds, score, workspace, **options)
            found.append(self.download(score))
        assert not self.used_up(workspace)
        assert (bits(found[0]) == bits(found[1])).all()
        return found[0]


def draw_rows(seed: int, count: int, width: int) -> Any:
    """Random rows, some of them all zero, NaN, infinite, repeated, tiny or huge."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)).astype(np.float32)
    kind = rng.choice(7, count, p=[0.64, *[0.06] * 6])
    x[kind == 1] = 0
    x[kind == 2, 0] = np.nan
    x[kind == 3, -1] = -np.inf
    x[kind == 4] = rng.standard_normal(width)
    x[kind == 5] *= np.float32(1e-38)  # squares vanish in float32
    x[kind == 6] *= np.float32(1e30)  # squares overflow in float32
    return x


def each_cosine(query: Any, bank: Any) -> Any:
    """[Q,M] of the definition."""
    return reference.segmented_max_cosine(query, bank, np.arange(len(bank) + 1))


def bits(x: Any) -> Any:
    return np.ascontiguousarray(x).view(np.uint32)


dtypes = pytest.mark.parametrize("dtype", ["float16", "int8"])
paths = pytest.mark.parametrize("path", ["fused", "split"])
few = settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
# Query rows, bank rows, width: up to two large tiles each way, with and without remainders.
sizes = st.tuples(
    st.integers(0, 2**32 - 1),
    st.one_of(st.integers(0, 140), st.sampled_from([64, 128])),
    st.one_of(st.integers(1, 270), st.sampled_from([64, 128, 256])),
    st.one_of(st.integers(1, 130), st.sampled_from([32, 64, 128])),
)


@dtypes
@paths
@given(sizes=sizes)
@few
def test_max_cosine_finds_the_best(operators: Operators, dtype: cuda.Dtype, path: cuda.Path, sizes: Any) -> None:
    seed, q, m, d = sizes
    query, bank = draw_rows(seed, q, d), draw_rows(seed + 1, m, d)
    score, index = operators.max_cosine(query, bank, dtype=dtype, path=path)
    expected, _ = reference.max_cosine(query, bank)
    np.testing.assert_allclose(score, expected, rtol=0, atol=TOLERANCE[dtype])
    assert ((index == -1) == np.isnan(expected)).all()
    found = np.flatnonzero(index >= 0)
    own = each_cosine(query, bank)[found, index[found]]  # NaN if a NaN row won
    np.testing.assert_allclose(own, expected[found], rtol=0, atol=2 * TOLERANCE[dtype])


@dtypes
@given(sizes=sizes, k=st.integers(2, 6))
@few
def test_max_cosine_finds_any_rank(operators: Operators, dtype: cuda.Dtype, sizes: Any, k: int) -> None:
    seed, q, m, d = sizes
    query, bank = draw_rows(seed, q, d), draw_rows(seed + 1, m, d)
    score, index = operators.max_cosine(query, bank, k, dtype=dtype)
    expected, _ = reference.max_cosine(query, bank, k)
    np.testing.assert_allclose(score, expected, rtol=0, atol=TOLERANCE[dtype])
    assert ((index == -1) == np.isnan(expected)).all()
    above = operators.max_cosine(query, bank, k - 1, dtype=dtype)
    assert (above[1] != index)[index >= 0].all() and (above[0] >= score)[index >= 0].all()


@dtypes
@paths
@given(sizes=sizes, cuts=st.sets(st.integers(1, 269)))
@few
def test_segmented_max_cosine(
    operators: Operators, dtype: cuda.Dtype, path: cuda.Path, sizes: Any, cuts: set[int]
) -> None:
    seed, q, m, d = sizes
    query, bank = draw_rows(seed, q, d), draw_rows(seed + 1, m, d)
    offsets = [0, *sorted(cut for cut in cuts if cut < m), m]
    score = operators.segmented_max_cosine(query, bank, offsets, dtype=dtype, path=path)
    expected = reference.segmented_max_cosine(query, bank, np.array(offsets))
    np.testing.assert_allclose(score, expected, rtol=0, atol=TOLERANCE[dtype])


@dtypes
@paths
def test_a_long_bank(operators: Operators, dtype: cuda.Dtype, path: cuda.Path) -> None:
    """Several chunks of the split path; several tiles for each block of the fused one; segments over all of them."""
    query, bank = draw_rows(0, 5, 20), draw_rows(1, 8200, 20)
    score, _ = operators.max_cosine(query, bank, dtype=dtype, path=path)
    np.testing.assert_allclose(score, reference.max_cosine(query, bank)[0], rtol=0, atol=TOLERANCE[dtype])
    offsets = [0, 1, 4095, 4097, 8192, 8200]
    score = operators.segmented_max_cosine(query, bank, offsets, dtype=dtype, path=path)
    expected = reference.segmented_max_cosine(query, bank, np.array(offsets))
    np.testing.assert_allclose(score, expected, rtol=0, atol=TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize(("path", "k"), [("fused", 1), ("split", 1), ("split", 2), ("split", 3)])
def test_equal_rows_tie_whatever_their_place(operators: Operators, dtype: cuda.Dtype, path: cuda.Path, k: int) -> None:
    """One row at three places, the k-th best is its k-th place, for every query: 7 and 15 lie in one tile and lane, 135
    in the same lane of another tile."""
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((301, 100)).astype(np.float32)
    places = [7, 15, 135]
    query = bank[7] + rng.standard_normal((150, 100)).astype(np.float32) * np.float32(0.01)
    bank[places] = bank[7]
    score, index = operators.max_cosine(query, bank, k, dtype=dtype, path=path)
    assert (index == places[k - 1]).all()
    best, _ = operators.max_cosine(query, bank, dtype=dtype)
    assert (bits(score) == bits(best)).all()


@dtypes
def test_bits_depend_on_the_two_rows_alone(operators: Operators, dtype: cuda.Dtype) -> None:
    """Either path, any order of the rows."""
    query, bank = draw_rows(3, 130, 70), draw_rows(4, 260, 70)
    score, _ = operators.max_cosine(query, bank, dtype=dtype, path="fused")
    rng = np.random.default_rng(0)
    moved = rng.permutation(len(query))
    for path in ("fused", "split"):
        again, _ = operators.max_cosine(query[moved], rng.permutation(bank), dtype=dtype, path=path)
        assert (bits(again) == bits(score[moved])).all()
    whole = operators.segmented_max_cosine(query, bank, [0, len(bank)], dtype=dtype)
    assert (bits(whole[:, 0]) == bits(score)).all()


@dtypes
def test_float16_features(operators: Operators, dtype: cuda.Dtype) -> None:
    query, bank = (np.random.default_rng(i).standard_normal((90, 40)).astype(np.float16) for i in range(2))
    score, index = operators.max_cosine(query, bank, dtype=dtype)
    wide, wide_index = operators.max_cosine(query.astype(np.float32), bank.astype(np.float32), dtype=dtype)
    assert (bits(score) == bits(wide)).all() and (index == wide_index).all()


@dtypes
def test_scores_stay_within_one(operators: Operators, dtype: cuda.Dtype) -> None:
    x = np.abs(np.random.default_rng(0).standard_normal((100, 60))).astype(np.float32)
    score, index = operators.max_cosine(x, x, dtype=dtype)
    assert score.max() == 1  # some of the dot products round to more
    assert (index == np.arange(100)).all()


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16", "int8"])
@given(steps=st.lists(st.tuples(st.integers(0, 90), st.floats(0, 1)), min_size=1, max_size=5))
@few
def test_a_mirrored_bank_follows_its_bank(operators: Operators, kept: Any, steps: list[tuple[int, float]]) -> None:
    """Against the definition on the rows that are in the bank; int8 rows arrive as they are."""
    bank, rows, query = ReferenceBank(40, kept), np.zeros((0, 40), np.float32), draw_rows(9, 20, 40)
    mirror = None
    for seed, (count, share) in enumerate(steps):
        added = draw_rows(seed, count + 1, 40)
        bank.extend(added)
        rows = np.concatenate([rows, added])
        gone = min(int(share * len(rows)), len(rows) - 1)
        bank.evict(gone)
        rows = rows[gone:]
        if mirror is None:
            mirror = cuda.MirroredBank(bank, operators)
        else:
            before = mirror.device
            assert mirror.update() == (mirror.device is not before)
        score, index = operators.compare(query, mirror.device)
        expected, _ = reference.max_cosine(query, bank.rows())
        np.testing.assert_allclose(score, expected, rtol=0, atol=TOLERANCE[mirror.device.dtype])
        np.testing.assert_allclose(expected, reference.max_cosine(query, rows)[0], rtol=0, atol=1e-2)
        own = np.where(index < 0, index, index - mirror.first)
        assert ((own == -1) == np.isnan(expected)).all() and (own[own >= 0] < len(rows)).all()
        found = np.flatnonzero(own >= 0)
        np.testing.assert_allclose(each_cosine(query, rows)[found, own[found]], expected[found], rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("rows", "frames", "interval", "own"),
    [
        pytest.param(7, 5, 0.3, None, id="one of five"),
        pytest.param(9, 100, 0.3, None, id="more than a warp"),
        pytest.param(12, 12, 0.3, (0, 1), id="three of eleven, itself left out"),
        pytest.param(8, 70, 1.0, (3, 4), id="all others, four patches a frame"),
    ],
)
def test_interval_mean(operators: Operators, rows: int, frames: int, interval: float, own: Any) -> None:
    rng = np.random.default_rng(frames)
    cosine = np.round(rng.uniform(-1, 1, (rows, frames)), 1).astype(np.float32)  # ties, 1 and −1 among them
    cosine[0, 1:] = np.nan  # fewer than the interval holds, or just one
    cosine[1, ::4] = np.nan
    score = operators.upload(np.zeros(rows, np.float32))
    operators.turn()
    cuda.interval_mean(operators.upload(cosine), score, interval, own=own, stream=operators.stream)
    for row, (values, found) in enumerate(zip(cosine.astype(np.float64), operators.download(score), strict=True)):
        others = np.delete(values, own[0] + row // own[1]) if own else values
        wanted = int(interval * len(others))
        least = np.sort(np.sqrt(2 - 2 * others[~np.isnan(others)]))[:wanted]
        expected = least.mean() if len(least) == wanted else np.nan
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@dtypes
@pytest.mark.parametrize(
    ("frames", "patches", "width", "rows"),
    [
        pytest.param(5, 9, 16, 2304, id="the fewest frames"),
        pytest.param(7, 40, 32, 99, id="two frames at once, one at the end"),
    ],
)
def test_mutual_score(
    operators: Operators,
    dtype: cuda.Dtype,
    frames: int,
    patches: int,
    width: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vmad_edge.kernels.cuda.scores._FRAMES_ROWS", rows)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((patches, width)) + 0.3 * rng.standard_normal((frames, patches, width))
    features[1, 2] = np.nan
    features = features.astype(np.float32)
    unit = operators.zeros((frames * patches, cuda.row_bytes(width, dtype)), np.uint8)
    scale = operators.zeros((frames * patches,), np.float32) if dtype == "int8" else None
    bank = cuda.DeviceBank(unit, scale, width, dtype)
    bounds = np.arange(0, frames * patches + 1, patches)
    offsets = cuda.DeviceOffsets(bounds, operators.upload(bounds))
    score = operators.zeros((frames, patches), np.float32)
    workspace = operators.workspace(cuda.mutual_score_workspace(patches, bank, offsets))
    operators.turn()
    options: Any = {"stream": operators.stream}
    cuda.mutual_score(operators.upload(features), bank, offsets, score, workspace, **options)
    found = operators.download(score)
    assert not operators.used_up(workspace)
    cosine = reference.segmented_max_cosine(*[features.reshape(-1, width)] * 2, bounds).reshape(frames, patches, -1)
    wanted = int(0.3 * (frames - 1))
    for frame in range(frames):
        nearest = np.sort(np.delete(cosine[frame], frame, axis=1), axis=1)[:, ::-1][:, :wanted]
        # √(2 − 2 cosine) turns an error ε of the cosine into ε / distance
        distance = np.sqrt(2 - 2 * np.clip(nearest, -1, 1))
        bound = np.minimum(TOLERANCE[dtype] / np.maximum(distance, 1e-6), np.sqrt(2 * TOLERANCE[dtype])).max(axis=1)
        assert (np.isnan(found[frame]) == np.isnan(distance.mean(axis=1))).all()
        assert (np.nan_to_num(np.abs(found[frame] - distance.mean(axis=1))) <= np.nan_to_num(bound)).all()


@pytest.mark.parametrize(
    ("nearest", "contrast"),
    [
        pytest.param(True, False, id="references alone"),
        pytest.param(False, True, id="normal and abnormal features"),
        pytest.param(True, True, id="both"),
    ],
)
def test_patch_scores(operators: Operators, nearest: bool, contrast: bool) -> None:
    rng = np.random.default_rng(0)
    near, like, unlike = rng.uniform(-1, 1, (3, 300)).astype(np.float32)
    counts = (np.arange(300) % 3 != 0).astype(np.uint8)
    near[4] = like[4] = np.nan  # counts
    near[6] = like[6] = np.nan  # does not
    score, counted = (operators.zeros((300,), np.float32) for _ in range(2))
    cuda.patch_scores(
        *(score, counted, operators.upload(counts)),
        nearest=operators.upload(near) if nearest else None,
        contrast=(operators.upload(like), operators.upload(unlike)) if contrast else None,
        temperature=0.07,
        contrast_weight=0.15,
        distance_weight=1.5,
        stream=operators.stream,
    )
    softmax = np.exp(unlike / 0.07) / (np.exp(like / 0.07) + np.exp(unlike / 0.07))
    expected = nearest * 1.5 * (1 - near) + (contrast * 0.15 * softmax)
    np.testing.assert_allclose(operators.download(score), expected, rtol=1e-5, atol=1e-6)
    expected = np.where(counts == 0, np.nan, np.where(np.isnan(expected), np.inf, expected))
    np.testing.assert_allclose(operators.download(counted), expected, rtol=1e-5, atol=1e-6)


def preprocess(operators: Operators, frame: Any, kind: cuda.Kind, axes: Any, size: int, **placed: Any) -> Any:
    """Bytes as they are, [1,3,size,size]."""
    x, y = (axis.on_device(operators.upload) for axis in axes)
    values = operators.upload(np.tile(np.arange(256, dtype=np.float32), (3, 1)))
    pixels = operators.upload(np.full((1, 3, size, size), np.nan, np.float32))
    workspace = operators.workspace(cuda.preprocess_workspace(x, y))
    operators.turn()
    options = placed | {"stream": operators.stream}
    cuda.preprocess(operators.upload(frame), kind, x, y, values, pixels, workspace, **options)
    return operators.download(pixels)


def photograph(height: int, width: int) -> Any:
    """[h,w,3] uint8 with edges, slopes and noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 120 * np.sin(y / 3 + x / 7), 255.0 * (x // 5 % 2 == y // 4 % 2), 255 * x / width], axis=-1)
    return np.clip(waves + np.random.default_rng(0).normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("height", "width", "target"),
    [
        pytest.param(61, 83, 24, id="smaller: antialiased"),
        pytest.param(19, 13, 40, id="larger"),
        pytest.param(24, 24, 24, id="the same"),
        pytest.param(130, 7, 16, id="smaller one way, larger the other"),
    ],
)
def test_preprocess_resizes_as_pillow(operators: Operators, filter: Any, height: int, width: int, target: int) -> None:
    frame = photograph(height, width)
    axes = cuda.resize_axis(width, target, filter), cuda.resize_axis(height, target, filter)
    pixels = preprocess(operators, frame, "rgb8", axes, target)
    method = getattr(Image.Resampling, filter.upper())
    expected = Image.fromarray(frame).resize((target, height), method).resize((target, target), method)
    np.testing.assert_array_equal(pixels[0].transpose(1, 2, 0), np.asarray(expected))
    if height <= width:  # Pillow 13 takes some tall frames' y first
        at_once = Image.fromarray(frame).resize((target, target), method)
        np.testing.assert_array_equal(np.asarray(at_once), np.asarray(expected))


def test_preprocess_pads_crops_and_leaves_the_rest_zero(operators: Operators) -> None:
    frame, colour = photograph(30, 20), (9, 99, 200)
    axes = cuda.resize_axis(30, 16, "bicubic", 2, 14), cuda.resize_axis(30, 16, "bicubic", 5, 12)
    pixels = preprocess(operators, frame, "rgb8", axes, 13, left=5, colour=colour)
    square = Image.new("RGB", (30, 30), colour)
    square.paste(Image.fromarray(frame), (5, 0))
    expected = np.asarray(square.resize((16, 16), Image.Resampling.BICUBIC))[5:12, 2:14]
    np.testing.assert_array_equal(pixels[0, :, :7, :12].transpose(1, 2, 0), expected)
    assert (pixels[0, :, 7:] == 0).all() and (pixels[0, :, :, 12:] == 0).all()


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        pytest.param("mono8", cv2.COLOR_GRAY2RGB, id="mono8"),
        pytest.param("bgr8", cv2.COLOR_BGR2RGB, id="bgr8"),
        pytest.param("bayer_rg8", cv2.COLOR_BayerRGGB2RGB, id="bayer_rg8"),
    ],
)
@pytest.mark.parametrize("size", [(12, 18), (13, 17), (3, 3)])
def test_preprocess_decodes_as_opencv(operators: Operators, kind: Any, code: int, size: tuple[int, int]) -> None:
    frame = photograph(*size) if kind == "bgr8" else np.ascontiguousarray(photograph(*size)[:, :, 0])
    expected = cv2.cvtColor(frame, code)
    axes = cuda.resize_axis(size[1], size[1], "bilinear"), cuda.resize_axis(size[0], size[0], "bilinear")
    pixels = preprocess(operators, frame, kind, axes, max(size))[0, :, : size[0], : size[1]]
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("resize", "pad"),
    [
        pytest.param("exact", False, id="squeezed"),
        pytest.param("exact", True, id="padded to a square"),
        pytest.param("shortest_edge", False, id="cropped"),
    ],
)
def test_preprocess_makes_clip_pixels(operators: Operators, resize: str, pad: bool) -> None:
    frame, spec = photograph(50, 71), clip_input(resize, pad, size=28)
    pixels = operators.zeros((1, 3, 28, 28), np.float32)
    prepared = CudaPreprocess.clip(operators, "bgr8", 50, 71, spec, pixels)
    prepared.queue(operators.upload(frame[:, :, ::-1]))
    expected, _ = clip_pixels(Frame.read(frame), spec)
    np.testing.assert_array_equal(operators.download(pixels), expected)


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
def test_preprocess_makes_sam_pixels(operators: Operators, size: tuple[int, int]) -> None:
    frame, spec = photograph(*size), SamInput(size=32)
    pixels = operators.zeros((1, 3, 32, 32), np.float32)
    prepared = CudaPreprocess.sam(operators, "rgb8", *size, spec, pixels)
    prepared.queue(operators.upload(frame))
    expected, _ = sam_pixels(Frame.read(frame), spec)
    np.testing.assert_array_equal(operators.download(pixels), expected)


def spread(operators: Operators, scores: Any, y: cuda.Axis, x: cuda.Axis) -> Any:
    target = operators.upload(np.zeros((len(y.first), len(x.first)), np.float32))
    axes = y.on_device(operators.upload), x.on_device(operators.upload)
    operators.turn()
    cuda.anomaly_map(operators.upload(scores), *axes, target, stream=operators.stream)
    return operators.download(target)


@pytest.mark.parametrize(("grid", "fine", "sigma"), [(5, 70, 4), (9, 63, 0), (4, 16, 9.5), (1, 8, 2)])
def test_anomaly_map_enlarges_and_smooths_as_opencv(operators: Operators, grid: int, fine: int, sigma: float) -> None:
    scores = np.random.default_rng(0).random((grid, grid), np.float32)
    axis = cuda.map_axis(grid, fine, sigma, np.arange(fine))
    expected = cv2.resize(scores, (fine, fine), interpolation=cv2.INTER_LINEAR)
    if sigma:
        expected = cv2.GaussianBlur(expected, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    np.testing.assert_allclose(spread(operators, scores, axis, axis), expected, rtol=0, atol=1e-5)


def test_anomaly_map_reads_between_pixels_and_knows_what_was_not_inspected(operators: Operators) -> None:
    scores = np.random.default_rng(0).random((6, 6), np.float32)
    y, x = np.linspace(-2, 49, 90), np.linspace(3.3, 40.1, 31)
    found = spread(operators, scores, cuda.map_axis(6, 48, 2, y), cuda.map_axis(6, 48, 2, x))
    whole = spread(operators, scores, *[cuda.map_axis(6, 48, 2, np.arange(48))] * 2).astype(np.float64)
    outside = (y < -0.5) | (y > 47.5)
    assert np.isnan(found[outside]).all() and outside.any()
    between = RegularGridInterpolator((np.arange(48), np.arange(48)), whole)
    expected = between(np.stack(np.meshgrid(np.clip(y[~outside], 0, 47), x, indexing="ij"), axis=-1))
    np.testing.assert_allclose(found[~outside], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "share"),
    [
        pytest.param(np.random.default_rng(0).normal(size=5000), 50, id="many blocks"),
        pytest.param(np.random.default_rng(1).normal(size=(30, 70)) * 1e-3, 21, id="a map"),
        pytest.param(np.random.default_rng(2).integers(-2, 3, 4321) / 4, 43, id="ties at the edge"),
        pytest.param(np.full(700, -1.5), 7, id="all equal and negative"),
        pytest.param(np.array([2.0, np.nan, -1.0]), 1, id="fewer than a hundred: one; NaN left out"),
        pytest.param(np.where(np.arange(400) % 2, np.nan, np.arange(400)), 2, id="NaN is not counted"),
        pytest.param(np.array([-0.0, 0.0, -1e-40, 1e-40]), 1, id="around zero"),
    ],
)
def test_top_mean(operators: Operators, values: Any, share: int) -> None:
    values = values.astype(np.float32)
    workspace = operators.workspace(cuda.top_mean_workspace(values.size))
    for _ in range(2):
        result = operators.upload(np.zeros(2, np.float32))
        operators.turn()
        cuda.top_mean(operators.upload(values), result, workspace, stream=operators.stream)
    assert not operators.used_up(workspace)
    largest = np.sort(values[~np.isnan(values)].astype(np.float64))[-share:]
    np.testing.assert_allclose(operators.download(result), [largest[-1], largest.mean()], rtol=1e-6)


def test_top_mean_of_nothing_is_nan(operators: Operators) -> None:
    result = operators.upload(np.zeros(2, np.float32))
    workspace = operators.workspace(cuda.top_mean_workspace(3))
    cuda.top_mean(operators.upload(np.full(3, np.nan, np.float32)), result, workspace, stream=operators.stream)
    assert np.isnan(operators.download(result)).all() and not operators.used_up(workspace)
