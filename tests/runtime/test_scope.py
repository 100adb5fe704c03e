"""What is unlike all that was enrolled is UNCERTAIN, whatever its score and its review say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vmad_edge.runtime.calibrate import Targets, calibrate
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.inspection import Reason, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.stages.scope import LEAST, Scope, ScopeLimit, scope_limit

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo/bundle"
DATA = ROOT.parent / "shared/data"


def features(count: int, seed: int, around: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """[count,192]; not far from `around`."""
    noise = np.random.default_rng(seed).normal(size=(count, 192)).astype(np.float32)
    return noise if around is None else around + np.float32(0.3) * noise


def cosine_distances(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    one, other = (
        some / np.linalg.norm(some, axis=1, keepdims=True) for some in (one.astype(float), other.astype(float))
    )
    return np.asarray(1 - one @ other.T)


@pytest.mark.parametrize(
    "distances,limit",
    [
        ([0.03], 0.09),
        ([0.03, 0.05, 0.04], 0.15),  # three times the largest
        ([0.03] * 9 + [0.12], 0.36),
        ([0.03] * 9 + [0.9], 0.36),  # a frame of something else does not let all others in
        ([0.001, 0.0, 0.002], LEAST),  # always photographed alike
        ([0.9, 0.8], 2.0),
        ([0.03, np.nan, np.inf], 0.09),
    ],
)
def test_limit(distances: list[float], limit: float) -> None:
    found = scope_limit(distances)
    assert found is not None and found.limit == pytest.approx(limit)


@pytest.mark.parametrize("distances", [[], [np.nan]])
def test_no_limit(distances: list[float]) -> None:
    assert scope_limit(distances) is None


def test_distances_are_those_to_the_nearest_enrolled_frame() -> None:
    enrolled = features(20, 0, features(1, 1))
    scope = Scope.learned(enrolled)
    among = cosine_distances(enrolled, enrolled)
    np.fill_diagonal(among, np.inf)
    assert scope is not None and scope.limit.limit == pytest.approx(3 * among.min(axis=1).max(), rel=1e-4)
    patches = features(256, 2, features(1, 3))
    expected = cosine_distances(patches.mean(axis=0, keepdims=True), enrolled).min()
    assert scope.distance(patches) == pytest.approx(expected, abs=1e-5)
    assert not scope.distance(np.full_like(patches, np.nan)) <= 2
    assert Scope.learned(enrolled[:1]) is None


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "benchmarks")
        import scope

        yield scope


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inspector]:
    with Inspector.open(DEMO, tmp_path_factory.mktemp("station"), "cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def gears(benchmark: ModuleType, inspector: Inspector) -> list[NDArray[np.uint8]]:
    """Good ones that are not enrolled as `gear`, as 8 others are."""
    product = benchmark.drawn("gear", 8, 4, 1)
    inspector.enroll(product.enrolled, object="gear")
    inspector.enroll(product.enrolled[:1], object="one gear")
    return [frame.pixels for frame in product.good]


@pytest.fixture
def stranger(benchmark: ModuleType) -> NDArray[np.uint8]:
    return np.asarray(benchmark.drawn("plate", 1, 0, 0).enrolled[0].pixels)


def test_a_stranger_is_uncertain_and_a_review_cannot_make_it_good(
    inspector: Inspector, gears: list[NDArray[np.uint8]], stranger: NDArray[np.uint8]
) -> None:
    own = inspector.inspect(gears[0], object="gear", review=False)
    assert own.reason is None and own.scope_distance is not None and own.scope_distance < LEAST
    found = inspector.inspect(stranger, object="gear", review=False)
    assert (found.verdict, found.reason_code) == (Verdict.UNCERTAIN, Reason.OUT_OF_SCOPE)
    assert found.scope_distance is not None and f"{found.scope_distance:.3f} from the nearest" in (found.reason or "")
    assert found.score is not None and found.map is not None and found.features is not None
    after = inspector.review(found).wait()
    assert after.p_yes is not None and after.verdict is Verdict.UNCERTAIN  # enrolled, and not calibrated
    assert (after.reason, after.reason_code) == (found.reason, found.reason_code)
    late = inspector.review(found, deadline_ms=0).wait()
    assert late.verdict is Verdict.UNCERTAIN and late.reason_code is Reason.OUT_OF_SCOPE
    assert (late.reason or "").startswith(f"{found.reason}; ")


def test_without_a_scope_nothing_is_out_of_it(
    inspector: Inspector, gears: list[NDArray[np.uint8]], stranger: NDArray[np.uint8]
) -> None:
    """One enrolled frame, and the bundle's own features."""
    for name in ("one gear", inspector.bundle.manifest.object):
        found = inspector.inspect(stranger, object=name, review=False)
        assert found.scope_distance is None and found.reason is None
        assert inspector.compared_with(name)["scope_limit"] is None
        assert "; no scope check; " in inspector.told(name)


def test_it_is_kept_and_calibrated(
    inspector: Inspector, gears: list[NDArray[np.uint8]], stranger: NDArray[np.uint8], tmp_path: Path
) -> None:
    """A calibration takes the limit from its good frames but the farthest, even from those that were out of scope."""
    station = inspector.station.path.parent
    kept, own = inspector.station.load_references("gear"), inspector.references("gear")
    assert kept is not None and own is not None and kept.scope is not None and own.scope is not None
    assert kept.scope.limit == own.scope.limit
    np.testing.assert_array_equal(kept.scope.descriptors, own.scope.descriptors)
    good = [tmp_path / f"{number}.png" for number in range(4)]
    for path, pixels in zip(good, [*gears[:1], *[np.roll(stranger, 3 * n, 0) for n in range(3)]], strict=True):
        Image.fromarray(pixels).save(path)
    with Inspector.open(DEMO, station, "cpu", calibrated=False) as anew:
        made = calibrate(
            anew, map(str, good), object="gear", targets=Targets(overkill=0.6, suspects=0.6, confidence=0.9)
        )
    distances = sorted(frame.scope_distance for frame in made.frames if frame.scope_distance is not None)
    assert len(distances) == 4 and made.scope == scope_limit(distances[:3])
    assert made.scope is not None and made.scope.limit > kept.scope.limit.limit
    with Inspector.open(DEMO, station, "cpu") as calibrated:
        assert calibrated.inspect(stranger, object="gear", review=False).reason_code is None


def test_commands_say_it(
    stranger: NDArray[np.uint8], benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, station = tmp_path / "good", ["--station", str(tmp_path / "station"), "--device", "cpu", "--json"]
    good.mkdir()
    for number, frame in enumerate(benchmark.drawn("gear", 3, 0, 0).enrolled):
        Image.fromarray(frame.pixels).save(good / f"{number}.png")
    Image.fromarray(stranger).save(tmp_path / "stranger.png")

    def told(*command: str) -> dict[str, object]:
        assert main([*command, *station]) == (3 if command[0] == "inspect" else 0)
        found = json.loads(capsys.readouterr().out)
        return dict(found[0] if isinstance(found, list) else found)

    scope = told("enroll", str(DEMO), str(good), "--object", "gear")["scope"]
    assert told("info", str(DEMO))["scope"] == {"gear": scope} and str(scope).startswith("in scope up to 0.")
    found = told("inspect", str(DEMO), str(tmp_path / "stranger.png"), "--object", "gear", "--no-review")
    assert (found["verdict"], found["reason_code"]) == ("UNCERTAIN", "out_of_scope")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data: photographs of cookies and magnetic tiles")
def test_cookies_tiles_and_drawn_parts_are_no_part_of_each_other(benchmark: ModuleType, inspector: Inspector) -> None:
    products = [
        *(benchmark.photographed(DATA / name, 30) for name in ("cookies", "magnetic_tile")),
        benchmark.drawn("plate"),
    ]
    describe = benchmark.Describe(inspector.bundle)
    found = {product.name: benchmark.described(describe, product) for product in products}
    for name, own in found.items():
        scope = benchmark.learned(own.enrolled["mean"])
        assert benchmark.out(scope, own.good["mean"]) <= 0.01
        assert benchmark.out(scope, own.defective["mean"]) <= 0.01
        for other in found.keys() - {name}:
            assert benchmark.out(scope, found[other].all("mean")) >= 0.95


def test_another_limit_is_another_setting(inspector: Inspector, gears: list[NDArray[np.uint8]]) -> None:
    """So that --resume does not take verdicts over that would be others."""
    references, before = inspector.references("one gear"), inspector.compared_with("one gear")
    whole = inspector.references("gear")
    assert references is not None and whole is not None and whole.scope is not None
    references.scope = replace(whole.scope, limit=ScopeLimit(limit=0.125))
    assert inspector.compared_with("one gear") == before | {"scope_limit": 0.125}
