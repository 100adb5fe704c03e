"""The kernels and their definition, each against a float64 oracle written here and against scikit-learn."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from vmad_edge.kernels import ReferenceBank, max_cosine, reference, segmented_max_cosine
from vmad_edge.kernels.processors import processors

NAN, INF = np.nan, np.inf
E1, E2, E3, ZERO = [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]
NAN_ROW, INF_ROW = [1, NAN, 0], [1, -INF, 0]
TOLERANCE = 1e-6


def rows(*values):
    return np.array(values, np.float32)


def draw_rows(seed, count, width, special=True):
    """Random rows, some of them all zero, NaN, infinite, repeated, tiny or huge."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)).astype(np.float32)
    if special:
        kind = rng.choice(7, count, p=[0.4, *[0.1] * 6])
        x[kind == 1] = 0
        x[kind == 2, 0] = NAN
        x[kind == 3, -1] = INF
        x[kind == 4] = rng.standard_normal(width)
        x[kind == 5] *= np.float32(1e-38)  # squares vanish in float32
        x[kind == 6] *= np.float32(1e30)  # squares overflow in float32
    return x


def exact_cosine(query, bank):
    """[Q,M] in float64, NaN where a row is not finite."""
    query, bank = query.astype(np.float64), bank.astype(np.float64)
    with np.errstate(invalid="ignore"):
        lengths = np.outer(np.sqrt(np.sum(query**2, axis=1)), np.sqrt(np.sum(bank**2, axis=1)))
        cosine = query @ bank.T / np.where(lengths == 0, 1, lengths)
    cosine[~np.isfinite(query).all(axis=1)] = NAN
    cosine[:, ~np.isfinite(bank).all(axis=1)] = NAN
    return cosine


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


sizes = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 70), st.integers(1, 40))
operators = pytest.mark.parametrize("operator", ["kernel", "definition"])


def call_max_cosine(operator, query, bank, k=1):
    return max_cosine(query, bank, k) if operator == "kernel" else reference.max_cosine(query, bank, k)


def call_segmented(operator, query, bank, offsets):
    run = segmented_max_cosine if operator == "kernel" else reference.segmented_max_cosine
    return run(query, bank, np.array(offsets))


@operators
@given(sizes=sizes, k=st.integers(1, 5), special=st.booleans())
@settings(deadline=None, max_examples=150)
def test_max_cosine_is_the_kth_best(operator, sizes, k, special):
    seed, q, m, d = sizes
    query, bank = draw_rows(seed, q, d, special), draw_rows(seed + 1, m, d, special)
    score, index = call_max_cosine(operator, query, bank, k)
    assert score.dtype == np.float32 and score.shape == (q,)
    assert index.dtype == np.int64 and index.shape == (q,)
    for i, cosines in enumerate(exact_cosine(query, bank)):
        ranked = np.sort(cosines[~np.isnan(cosines)])[::-1]
        if len(ranked) < k:
            assert np.isnan(score[i]) and index[i] == -1
        else:
            assert abs(score[i] - ranked[k - 1]) <= TOLERANCE
            assert abs(cosines[index[i]] - ranked[k - 1]) <= TOLERANCE


@operators
@given(sizes=sizes, special=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_segmented_max_cosine_is_the_best_of_each_segment(operator, sizes, special, data):
    seed, q, m, d = sizes
    inner = data.draw(st.sets(st.integers(1, m - 1))) if m > 1 else set()
    offsets = [0, *sorted(inner), m]
    query, bank = draw_rows(seed, q, d, special), draw_rows(seed + 1, m, d, special)
    score = call_segmented(operator, query, bank, offsets)
    assert score.dtype == np.float32 and score.shape == (q, len(offsets) - 1)
    cosine = np.nan_to_num(exact_cosine(query, bank), nan=-INF)
    expected = np.stack([cosine[:, start:end].max(axis=1) for start, end in pairwise(offsets)], axis=1)
    expected[expected == -INF] = NAN
    np.testing.assert_allclose(score, expected, rtol=0, atol=TOLERANCE)


@operators
@pytest.mark.parametrize(
    ("query", "bank", "k", "score", "index"),
    [
        pytest.param(E1, [E2, E1, E3], 1, 1, 1, id="best"),
        pytest.param(E1, [[-1, 0, 0]], 1, -1, 0, id="opposite, the only row"),
        pytest.param([3, 0, 0], [[0, 2, 0], [0.5, 0, 0]], 1, 1, 1, id="lengths do not count"),
        pytest.param([3e38] * 3, [[1e-45] * 3], 1, 1, 0, id="lengths at both ends of float32"),
        pytest.param(ZERO, [E1, E2], 1, 0, 0, id="zero query scores 0, all tie"),
        pytest.param(E1, [ZERO, [-1, 0, 0]], 1, 0, 0, id="zero bank row scores 0"),
        pytest.param(ZERO, [NAN_ROW, ZERO], 1, 0, 1, id="zero against NaN is NaN"),
        pytest.param(E1, [NAN_ROW, E2], 1, 0, 1, id="NaN bank row never wins"),
        pytest.param(E1, [INF_ROW, E2], 1, 0, 1, id="infinite bank row counts as NaN"),
        pytest.param(E1, [NAN_ROW, INF_ROW], 1, NAN, -1, id="only NaN rows"),
        pytest.param(NAN_ROW, [E1], 1, NAN, -1, id="NaN query"),
        pytest.param(INF_ROW, [E1], 1, NAN, -1, id="infinite query"),
        pytest.param(E1, [E2, E1, E1], 1, 1, 1, id="tie: lowest index"),
        pytest.param(E1, [E2, E1, E1], 2, 1, 2, id="equal rows have ranks of their own"),
        pytest.param(E1, [E2, E1, E1], 3, 0, 0, id="third best"),
        pytest.param(E1, [[1, 1, 0], E1, E3, E2], 4, 0, 3, id="last rank, tie: lowest index first"),
        pytest.param(E1, [E1], 2, NAN, -1, id="k beyond the bank"),
        pytest.param(E1, [E1], 2**70, NAN, -1, id="k beyond any bank"),
        pytest.param(E1, [NAN_ROW, E1, E2], 3, NAN, -1, id="k beyond the rows that are not NaN"),
    ],
)
def test_max_cosine_edges(operator, query, bank, k, score, index):
    got_score, got_index = call_max_cosine(operator, rows(query), rows(*bank), k)
    np.testing.assert_allclose(got_score, [score], rtol=0, atol=TOLERANCE)
    assert got_index == [index]


@operators
@pytest.mark.parametrize(
    ("bank", "offsets", "score"),
    [
        pytest.param([E2, E1], [0, 2], [1], id="one segment"),
        pytest.param([E2, E1, [-1, 0, 0]], [0, 1, 2, 3], [0, 1, -1], id="a row a segment"),
        pytest.param([NAN_ROW, INF_ROW, E1], [0, 2, 3], [NAN, 1], id="a segment of NaN rows"),
        pytest.param([NAN_ROW, E2, E1], [0, 2, 3], [0, 1], id="NaN row beside another"),
        pytest.param([ZERO, [-1, 0, 0], E1], [0, 2, 3], [0, 1], id="zero row scores 0"),
    ],
)
def test_segmented_max_cosine_edges(operator, bank, offsets, score):
    got = call_segmented(operator, rows(E1, NAN_ROW), rows(*bank), offsets)
    np.testing.assert_allclose(got, [score, [NAN] * len(score)], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("width", [1, 15, 256, 257, 1024, 4096], ids="D={}".format)
def test_cosines_are_those_of_scikit_learn(width):
    query, bank = draw_rows(1, 50, width, special=False), np.abs(draw_rows(2, 90, width, special=False))
    bank[:50] = query  # cosine 1 rounds worst
    query[3] = 0
    got = segmented_max_cosine(query, bank, range(91))
    expected = cosine_similarity(query.astype(np.float64), bank.astype(np.float64))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_scores_stay_within_one():
    x = np.abs(draw_rows(0, 400, 384, special=False))
    score, index = max_cosine(x, x)
    assert score.max() == 1  # some of the dot products round to more
    assert (index == np.arange(400)).all()


@given(sizes=sizes, threads=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_bits_depend_on_the_two_rows_alone(sizes, threads):
    """One pair at a time, and all together in any order, from an array and from a ReferenceBank."""
    seed, q, m, d = sizes
    rng = np.random.default_rng(seed)
    query, bank = draw_rows(seed, q, d * 9), draw_rows(seed + 1, m, d * 9)
    matrix = segmented_max_cosine(query, bank, range(m + 1), threads=1)
    for i, j in zip(rng.integers(q, size=5 if q else 0), rng.integers(m, size=5), strict=False):
        alone, _ = max_cosine(query[i : i + 1], bank[j : j + 1])
        assert bits(alone) == bits(matrix[i, j])
    to_query, to_bank = rng.permutation(q), rng.permutation(m)
    moved = ReferenceBank.from_array(bank[to_bank])
    again = segmented_max_cosine(query[to_query], moved, range(m + 1), threads=threads)
    assert (bits(again) == bits(matrix[to_query][:, to_bank])).all()


@operators
@pytest.mark.parametrize("k", [1, 2, 3])
def test_equal_rows_tie_whatever_their_place(operator, k):
    """One row at three places of a bank of many blocks: the k-th best is its k-th place, for every query."""
    bank = draw_rows(0, 301, 100, special=False)
    places = [7, 130, 300]
    query = bank[7] + draw_rows(1, 333, 100, special=False) * np.float32(0.01)
    bank[places] = bank[7]
    score, index = call_max_cosine(operator, query, bank, k)
    assert (index == places[k - 1]).all()
    assert (bits(score) == bits(call_max_cosine(operator, query, bank)[0])).all()


@pytest.mark.parametrize("threads", [2, 3, 7, 64])
def test_threads_change_no_bit(threads):
    query, bank = draw_rows(3, 500, 130), draw_rows(4, 777, 130)
    offsets = [0, 1, 40, 333, 777]
    for rank in (1, 3):
        one, many = max_cosine(query, bank, rank, threads=1), max_cosine(query, bank, rank, threads=threads)
        assert (bits(one[0]) == bits(many[0])).all() and (one[1] == many[1]).all()
    one_thread = segmented_max_cosine(query, bank, offsets, threads=1)
    assert (bits(one_thread) == bits(segmented_max_cosine(query, bank, offsets, threads=threads))).all()


def test_callers_may_share_a_bank_between_threads():
    bank = ReferenceBank.from_array(draw_rows(5, 600, 64))
    queries = [draw_rows(seed, 200, 64) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: max_cosine(query, bank), queries))
    for query, (score, index) in zip(queries, together, strict=True):
        expected = max_cosine(query, bank)
        assert (bits(score) == bits(expected[0])).all() and (index == expected[1]).all()


UNALIGNED = np.zeros(1 + 4 * 60, np.uint8)[1:].view(np.float32).reshape(10, 6)


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda x: x.astype(np.float16), id="float16"),
        pytest.param(lambda x: x.astype(np.float64), id="float64"),
        pytest.param(lambda x: x.astype(">f4"), id="other byte order"),
        pytest.param(np.asfortranarray, id="column by column"),
        pytest.param(lambda x: np.repeat(x, 2, axis=0)[::2], id="every second row"),
        pytest.param(lambda x: x[::-1, ::-1].copy()[::-1, ::-1], id="negative strides"),
        pytest.param(lambda x: np.add(x, 0, out=UNALIGNED), id="unaligned"),
        pytest.param(lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape), id="read-only"),
    ],
)
def test_other_arrays_are_converted(convert):
    x = draw_rows(6, 10, 6, special=False).astype(np.float16).astype(np.float32)  # exact in every dtype here
    query = draw_rows(7, 10, 6, special=False).astype(np.float16).astype(np.float32)
    expected, expected_index = max_cosine(query, x)
    for bank in (convert(x), ReferenceBank.from_array(convert(x))):
        score, index = max_cosine(query, bank)
        assert (bits(score) == bits(expected)).all() and (index == expected_index).all()
    expected, expected_index = max_cosine(x, query)
    score, index = max_cosine(convert(x), query)
    assert (bits(score) == bits(expected)).all() and (index == expected_index).all()


def test_float64_beyond_float32_counts_as_infinite():
    score, index = max_cosine(np.array([[1.0, 0]]), np.array([[1e300, 0], [1, 1]]))
    assert index == [1] and score == pytest.approx(2**-0.5)


def test_no_query_rows():
    empty = np.zeros((0, 3), np.float32)
    score, index = max_cosine(empty, rows(E1))
    assert score.shape == index.shape == (0,)
    assert segmented_max_cosine(empty, rows(E1, E2), [0, 1, 2]).shape == (0, 2)


def test_reference_bank_is_a_copy_of_known_size():
    features = rows(E1, E2)
    bank = ReferenceBank.from_array(features)
    features[:] = rows(E3, E3)
    assert (len(bank), bank.width) == (2, 3)
    assert max_cosine(rows(E2), bank)[1] == [1]


ONE = rows(E1)
FLAT, CUBE, NO_ROWS, NO_WIDTH = np.zeros(3, "f"), np.zeros((1, 1, 3), "f"), np.zeros((0, 3), "f"), np.zeros((1, 0), "f")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: max_cosine(FLAT, ONE), ValueError, r"query: expected shape \[rows, width\].*got \[3\]"),
        (lambda: max_cosine(ONE, CUBE), ValueError, r"bank: expected shape \[rows, width\].*got \[1, 1, 3\]"),
        (lambda: max_cosine(NO_WIDTH, NO_WIDTH), ValueError, r"width ≥ 1, got \[1, 0\]"),
        (lambda: max_cosine(ONE[:, :2], ONE), ValueError, "query: expected the bank's width 3, got 2"),
        (lambda: max_cosine(ONE, NO_ROWS), ValueError, r"bank: expected at least 1 row, got shape \[0, 3\]"),
        (lambda: ReferenceBank.from_array(NO_ROWS), ValueError, "bank: expected at least 1 row"),
        (lambda: max_cosine(ONE, ReferenceBank(3)), ValueError, r"bank: expected at least 1 row, got shape \[0, 3\]"),
        (lambda: max_cosine(ONE.astype(int), ONE), TypeError, "query: expected .*float32.* got int64"),
        (lambda: max_cosine(ONE, ONE.astype(complex)), TypeError, "bank: expected .*float32.* got complex128"),
        (lambda: max_cosine([E1], ONE), TypeError, "query: expected an array .* got list"),
        (lambda: max_cosine(ReferenceBank.from_array(ONE), ONE), TypeError, "query: .* got ReferenceBank"),
        (lambda: max_cosine(ONE, ONE, 0), ValueError, "k: expected at least 1, got 0"),
        (lambda: max_cosine(ONE, ONE, 1.0), TypeError, "k: expected an integer, got float"),
        (lambda: max_cosine(ONE, ONE, True), TypeError, "k: expected an integer, got bool"),
        (lambda: max_cosine(ONE, ONE, threads=0), ValueError, "threads: expected at least 1, got 0"),
        (lambda: segmented_max_cosine(ONE, NO_ROWS, [0]), ValueError, "bank: expected at least 1 row"),
        (lambda: segmented_max_cosine(ONE, ONE, [0.0, 1.0]), TypeError, "offsets: expected integers, got float64"),
        (lambda: segmented_max_cosine(ONE, ONE, [0]), ValueError, r"offsets: expected shape .* got \[1\]"),
        (lambda: segmented_max_cosine(ONE, ONE, [[0, 1]]), ValueError, r"offsets: expected shape .* got \[1, 2\]"),
        (lambda: segmented_max_cosine(ONE, ONE, [1, 1]), ValueError, "start at 0 and end at 1.* got 1 and 1"),
        (lambda: segmented_max_cosine(ONE, ONE, [0, 2]), ValueError, "start at 0 and end at 1.* got 0 and 2"),
        (lambda: segmented_max_cosine(ONE, ONE, [0, 1, 1]), ValueError, "segment 1 from 1 to 1"),
        (lambda: segmented_max_cosine(ONE, ONE, [0, 2, 1]), ValueError, "segment 1 from 2 to 1"),
        # The difference of these two wraps around to a positive number.
        (lambda: segmented_max_cosine(ONE, ONE, [0, 2**63 - 1, -(2**63), 1]), ValueError, "segment 1 from"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        pytest.param("3", 3, id="OMP_NUM_THREADS"),
        pytest.param("5,2", 5, id="OpenMP's list: its first level"),
        pytest.param("007", 7, id="zeros before"),
        pytest.param("99999999999999", 512, id="beyond reason"),
        pytest.param("9" * 5000, 512, id="longer than int() reads"),
        pytest.param("", None, id="empty is unset"),
        pytest.param(None, None, id="unset: the processors allowed"),
    ],
)
def test_default_threads(monkeypatch, setting, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    asked = []
    monkeypatch.setattr("vmad_edge.kernels._cpu.max_cosine", lambda *arguments: asked.append(arguments[4]))
    max_cosine(ONE, ONE)
    assert asked == [expected or processors()]


@pytest.mark.parametrize("threads", [511, 512, 513, 10**9, 99999999999999, 2**62, 2**63, 10**30])
def test_threads_beyond_reason_are_a_few_hundred(monkeypatch, threads):
    assert max_cosine(ONE, ONE, threads=threads)[1] == [0]
    asked = []
    monkeypatch.setattr("vmad_edge.kernels._cpu.max_cosine", lambda *arguments: asked.append(arguments[4]))
    max_cosine(ONE, ONE, threads=threads)
    assert asked == [min(threads, 512)]


# In a process of its own: what divides by zero takes the tests with it.
NATIVE = """
import sys
import numpy as np
from vmad_edge.kernels import _cpu
query, bank = np.eye(40, 7, dtype=np.float32), np.eye(3000, 7, dtype=np.float32)
score, index, best = np.empty(40, np.float32), np.empty(40, np.int64), np.empty((40, 2), np.float32)
native = _cpu.Bank(0, 7, 0, 3000, None, bank)
for threads in map(int, sys.argv[1:]):
    _cpu.max_cosine(0, query, native, 1, threads, score, index)
    _cpu.segmented_max_cosine(0, query, native, np.array([0, 5, 3000]), threads, best)
    assert index.tolist() == [*range(7), *[0] * 33] and (best.max(1) == score).all(), threads
"""


def test_compiled_operators_heed_no_thread_count_beyond_reason():
    counts = [0, -1, 1, 10**9, 2**61, 2**62, 2**63 - 1, -(2**63)]
    done = subprocess.run([sys.executable, "-c", NATIVE, *map(str, counts)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("setting", ["0", "-1", "many", "2.5", "000", "٣", "1e3", ","])
def test_bad_omp_num_threads(monkeypatch, setting):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    with pytest.raises(ValueError, match=f"OMP_NUM_THREADS: expected an integer of at least 1, got '{setting}'"):
        max_cosine(ONE, ONE)
