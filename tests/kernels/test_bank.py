"""ReferenceBank: rounding, the ring, what is saved of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from vmad_edge.kernels import ReferenceBank, max_cosine, segmented_max_cosine

DTYPES = ("float32", "bfloat16", "float16", "int8")
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def features(seed, count, width=64):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3), ("float16", 1e-3), ("int8", 1e-2)]
)
def test_error_against_float64(dtype, tolerance):
    """All cosines at D = 1024, and the argmax of queries that have one near neighbour."""
    bank = features(0, 2000, 1024)
    query = np.concatenate([features(1, 100, 1024), bank[:100] + features(2, 100, 1024)])
    kept = ReferenceBank.from_array(bank, dtype)
    found = segmented_max_cosine(query, kept, range(len(bank) + 1))
    assert np.abs(found - unit(query) @ unit(bank).T).max() <= tolerance
    assert (max_cosine(query[100:], kept)[1] == np.arange(100)).all()


@dtypes
def test_equal_rows_have_cosine_one(dtype):
    """Rounded rows are scaled to length 1 again: what is left is the rounding of their direction, squared."""
    rows = np.concatenate([features(0, 50), features(1, 50) ** 9])  # the latter: a few large elements
    score, _ = max_cosine(rows, ReferenceBank.from_array(rows, dtype))
    assert np.abs(score - 1).max() < (1e-6 if dtype == "float32" else 1e-3)


@given(dtype=st.sampled_from(DTYPES), steps=st.lists(st.tuples(st.integers(0, 400), st.floats(0, 1)), max_size=8))
@settings(deadline=None, max_examples=40)
def test_ring_is_the_queue_of_its_rows(dtype, steps):
    """Against a bank that is made anew, bit by bit."""
    ring, rows = ReferenceBank(20, dtype), np.zeros((0, 20), np.float32)
    query = features(99, 7, 20)
    for seed, (count, share) in enumerate(steps):
        added = features(seed, count, 20)
        ring.extend(added)
        rows = np.concatenate([rows, added])
        gone = int(share * len(rows))
        ring.evict(gone)
        rows = rows[gone:]
        assert len(ring) == len(rows)
        if len(rows):
            anew = ReferenceBank.from_array(rows, dtype)
            for a, b in zip(max_cosine(query, ring, 2), max_cosine(query, anew, 2), strict=True):
                np.testing.assert_array_equal(a, b)
            offsets = sorted({0, len(rows) // 3, len(rows)})
            np.testing.assert_array_equal(
                segmented_max_cosine(query, ring, offsets), segmented_max_cosine(query, anew, offsets)
            )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-7), ("bfloat16", 4e-3), ("float16", 5e-4), ("int8", 5e-3)]
)
def test_rows_come_back_as_they_are_kept(dtype, tolerance):
    """Over block borders, with rows of zeros and NaN; what is kept anew from them is kept the same."""
    rows = features(3, 700, 21)
    rows[300], rows[301, 4], rows[302, 5] = 0, np.nan, np.inf
    ring = ReferenceBank.from_array(rows, dtype)
    ring.evict(100)
    assert ring.evicted == 100
    found = ring.rows(150, 450)
    with np.errstate(invalid="ignore"):
        expected = unit(np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, np.nan))[250:550]
    expected[50] = 0
    np.testing.assert_allclose(found[50:51], expected[50:51], rtol=0, atol=0)
    assert np.isnan(found[51:53]).any(axis=1).all()
    np.testing.assert_allclose(np.delete(found, [51, 52], 0), np.delete(expected, [51, 52], 0), rtol=0, atol=tolerance)
    again = ReferenceBank.from_array(np.delete(found, [51, 52], 0), dtype).rows()
    np.testing.assert_allclose(again, np.delete(found, [51, 52], 0), rtol=0, atol=1e-6)
    assert ring.rows(9, 9).shape == (0, 21)
    with pytest.raises(ValueError, match=r"0 ≤ start ≤ stop ≤ 600, got 0 and 601"):
        ring.rows(0, 601)


def test_ring_neither_copies_nor_grows():
    """A line's last 2,560 rows: the blocks stay where they are, and are used again."""
    ring = ReferenceBank.from_array(features(0, 2560))
    places = {block.ctypes.data for block in ring._blocks}
    for seed in range(50):
        ring.extend(features(seed, 100))
        places |= {block.ctypes.data for block in ring._blocks}
        ring.evict(100)
    assert len(places) == 12  # 2,560 + 100 rows from any row of a block on
    assert ring.nbytes == 12 * ReferenceBank.from_array(features(0, 1)).nbytes


@pytest.mark.parametrize(("dtype", "bytes_an_element"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("int8", 1)])
def test_memory(dtype, bytes_an_element):
    bank = ReferenceBank.from_array(features(0, 512, 1024), dtype)
    assert bank.nbytes == 512 * (1024 * bytes_an_element + 8)  # a scale and a sum a row


@dtypes
def test_saved_and_loaded(dtype, tmp_path):
    ring = ReferenceBank.from_array(features(0, 700), dtype)
    ring.evict(300)
    save_file(ring.tensors(), tmp_path / "bank.safetensors", {"bundle": "0123abcd"})
    with safe_open(tmp_path / "bank.safetensors", "numpy") as file:
        assert file.metadata() == {"bundle": "0123abcd"}
        loaded = ReferenceBank.from_tensors({name: file.get_tensor(name) for name in ("bank", "panels")})
    assert (len(loaded), loaded.width, loaded.dtype) == (400, 64, dtype)
    for bank in (ring, loaded):
        bank.extend(features(1, 100))
    query = features(2, 30)
    for a, b in zip(max_cosine(query, ring), max_cosine(query, loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_bank_is_saved_and_loaded():
    loaded = ReferenceBank.from_tensors(ReferenceBank(5, "int8").tensors())
    assert (len(loaded), loaded.width, loaded.dtype) == (0, 5, "int8")


GOOD = ReferenceBank.from_array(np.ones((3, 2), np.float32)).tensors()
ROW = np.ones((1, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ReferenceBank(3, "int4"), ValueError, "dtype: expected one of float32, .*, int8, got 'int4'"),
        (lambda: ReferenceBank(0), ValueError, "width: expected 1 to .* got 0"),
        (lambda: ReferenceBank(65537, "int8"), ValueError, "width: expected 1 to 65536 for int8, got 65537"),
        (lambda: ReferenceBank(2).extend(ROW), ValueError, "features: expected the bank's width 2, got 3"),
        (lambda: ReferenceBank(3).extend(ROW.astype(int)), TypeError, "features: expected .* got int64"),
        (lambda: ReferenceBank.from_array(ROW).evict(2), ValueError, "count: expected 0 to 1, the bank's rows, got 2"),
        (lambda: ReferenceBank.from_array(ROW).evict(-1), ValueError, "count: expected 0 to 1.* got -1"),
        (lambda: ReferenceBank.from_tensors({}), KeyError, "bank"),
        (lambda: ReferenceBank.from_tensors(GOOD | {"bank": np.array([9, 2, 0, 3])}), ValueError, "bank: expected a d"),
        (
            lambda: ReferenceBank.from_tensors(GOOD | {"bank": np.array([0, 2, 0])}),
            ValueError,
            "bank: expected a dtype",
        ),
        (
            lambda: ReferenceBank.from_tensors(GOOD | {"bank": np.array([0, 2, 0, 257])}),
            ValueError,
            "expected 2 blocks",
        ),
        (lambda: ReferenceBank.from_tensors(GOOD | {"bank": np.array([0, 2, -1, 3])}), ValueError, "panels: expected"),
        (lambda: ReferenceBank.from_tensors(GOOD | {"bank": np.array([0, 2**40, 0, 3])}), ValueError, "width: "),
        (
            lambda: ReferenceBank.from_tensors(GOOD | {"panels": GOOD["panels"].view(np.float32)}),
            ValueError,
            "panels: expected uint32, got float32",
        ),
        (lambda: ReferenceBank.from_tensors(GOOD | {"panels": GOOD["panels"][1:]}), ValueError, "panels: expected 1"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
