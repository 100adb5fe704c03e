"""Many screens and reviews leave memory, handles and threads as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmad_edge.runtime.inspector import Inspector

ROOT = Path(__file__).parents[1]


def test_2000_screens_and_100_reviews_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since the first quarter of each. benchmarks/results/soak_*.md: 75 to 78 MiB over 100,000 screens."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from soak import soak  # type: ignore[import-not-found]

    frames = sorted((ROOT / "demo/parts/defective").iterdir())
    with Inspector.open(ROOT / "demo/bundle", tmp_path, "cpu") as inspector:
        for lane, count in (("screens", 2000), ("reviews", 100)):
            warm, *_, last = soak(inspector, frames, lane, count, 4)
            assert last.done == count
            for before, after in ((warm.inspector, last.inspector), (warm.review, last.review)):
                assert (after.files, after.threads) == (before.files, before.threads), lane
                assert after.mib - before.mib < 2, lane
