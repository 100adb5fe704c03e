"""The pages' tables come from benchmarks/results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RUN = {
    "command": "measure",
    "date": "2026-01-02",
    "machine": dict.fromkeys(["memory_gib", "accelerator", "power_mode", "clocks"])
    | {"processor": "Abacus", "cores": 3, "system": "Linux"},
    "versions": {},
    "others": 0.4,
}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    return tables


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(f"docs/measured/{name}.md" for name in ("cuda", "photographs", "precision", "scales", "similarity", "speed")),
    ],
)
def test_pages_show_the_results_that_are_there(page: str, tables: ModuleType) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert "<!-- results: " in text
    assert tables.remake(text) == text, "run benchmarks/tables.py"


def test_a_table_is_remade(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    spread = {"p50": 12.34}
    row = {
        "with": "beads",
        "screen": spread,
        "review": spread,
        "times_faster_than_torch_f32": {"screen": 1.5, "review": 1.9},
        "peak_mib": None,
        "agreement": {"p_yes_max_error": 0.0123, "mask_iou_mean": 0.9},
    }
    bars = {
        "screen": {"bar": 1.2, "reached": 1.5, "holds": True},
        "review": {"bar": 2.0, "reached": 1.9, "holds": False},
    }
    figures = {"run": RUN, "frames": 4, "turns": 8, "rows": {"ours": row, "int8": None}, "bars": bars}
    (tmp_path / "chain.json").write_text(json.dumps(figures))
    page = "a\n<!-- results: chain -->\nstale\n<!-- end -->\nb\n<!-- results: bench -->\nkept\n<!-- end -->\n"
    made = tables.remake(page)
    assert "| ours (beads) | 12.3 | 1.50 | 12.3 | 1.90 | – | 0.0123 | 0.900 |" in made
    assert "| int8 |  |  |  |  |  |  |  |" in made
    assert "bar 1.2 ×: holds" in made and "bar 2.0 ×: missed" in made
    assert "`measure`, 2026-01-02, Abacus, 3 cores; other processes took 40%" in made
    assert made.startswith("a\n<!-- results: chain -->\n|") and "stale" not in made and made.endswith(page[-45:])
    assert tables.remake(made) == made
