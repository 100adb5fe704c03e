"""Where the benchmarks leave what they measured: results/NAME.json, `run` (machine, versions, date) and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.machine import Run

RESULTS = Path(__file__).with_name("results")


def save(name: str, run: Run, figures: dict[str, Any]) -> None:
    """Replace results/`name`.json."""
    write_whole(RESULTS / f"{name}.json", json.dumps({"run": run.model_dump(), **figures}, indent=2) + "\n")
    print(f"written: {RESULTS.name}/{name}.json")


def load(name: str) -> dict[str, Any] | None:
    """None where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None
