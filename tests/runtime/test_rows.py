"""What a run leaves, read again: by Python's csv and json, and by pyarrow."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vmad_edge.runtime.cli import main
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.rows import Csv, JsonLines, file_facts, read_rows, take_up

SETTINGS = {"bundle": "b" * 64, "good_below": 0.1, "question": None}


def row(path: str, **changed: Any) -> dict[str, Any]:
    return {
        "path": path,
        "time": 1.5,
        "object": "part",
        "verdict": "DEFECT",
        "score": 0.1 + 0.2,
        "p_yes": None,
        "regions": [{"box": [1, 2, 3, 4], "area": 4, "peak": 0.5, "centroid": [1.5, 2.5]}],
        "explanation": 'Yes, "a" pit;\nänd a scratch',
        "reason": None,
        "timings_ms": {"screen": 3.0, "map": 1.0},
        "deadline_met": None,
        "size": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
        "settings": SETTINGS,
        **changed,
    }


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = JsonLines(path)
    for one in rows:
        lines.add(one)
    lines.close()
    return path


NAMES = ["a.png", "\udce4 latin-1.png", 'ä, "b".png', "\x1b[31mred.png", "two\nlines.png"]


def test_parquet_and_csv_have_the_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    good = row("z.png", verdict="GOOD", regions=[], score=None, timings_ms={"screen": 2.0, "review": 7.5})
    run = written(tmp_path / "run.jsonl", [*map(row, NAMES), good])
    assert main(["table", str(run), str(tmp_path / "run.parquet")]) == 0
    assert main(["table", str(run), str(tmp_path / "run.csv")]) == 0
    found = parquet.read_table(tmp_path / "run.parquet").to_pylist()
    assert [one["path"] for one in found[:3]] == ["a.png", "\\xe4 latin-1.png", NAMES[2]]
    assert (
        found[0]["score"] == 0.1 + 0.2
        and found[0]["p_yes"] is None
        and found[0]["explanation"] == row("")["explanation"]
    )
    assert (found[0]["left"], found[0]["bottom"], found[0]["centroid_y"], found[0]["regions"]) == (1, 4, 2.5, 1)
    assert (found[-1]["regions"], found[-1]["area"], found[-1]["review_ms"]) == (0, None, 7.5)
    with (tmp_path / "run.csv").open(newline="", encoding="utf-8") as file:
        told = list(csv.DictReader(file))
    assert [{k: v or None for k, v in one.items()} for one in told] == [
        {k: None if v is None or v == "" else str(v) for k, v in one.items()} for one in found
    ]


def test_a_column_without_a_value_has_its_type(tmp_path: Path) -> None:
    """So that the tables of two runs can be put together."""
    parquet = pytest.importorskip("pyarrow.parquet")
    run = written(tmp_path / "run.jsonl", [row("a", score=None, regions=[])])
    assert main(["table", str(run), str(tmp_path / "run.parquet")]) == 0
    kinds = {field.name: str(field.type) for field in parquet.read_schema(tmp_path / "run.parquet")}
    assert (kinds["score"], kinds["p_yes"], kinds["left"], kinds["deadline_met"]) == (
        "double",
        "double",
        "int64",
        "bool",
    )
    assert kinds["reason"] == "string"


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    run = written(tmp_path / "run.jsonl", [row("a")])
    assert main(["table", str(run), str(tmp_path / "out.parquet")]) == 2
    assert "extra `parquet`" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize("end", ['{"path": "c"', json.dumps(row("c")), "\0\0\0\0", '{"path": "c", "verdict": \n'])
def test_a_half_written_last_line_is_dropped(end: str, tmp_path: Path) -> None:
    run = written(tmp_path / "run.jsonl", [row("a"), row("b")])
    with run.open("a") as file:
        file.write(end)
    said: list[str] = []
    assert [one["path"] for one in read_rows(run, said.append)] == ["a", "b"]
    assert len(said) == 1
    take_up(run, [], SETTINGS, 1)
    written(run, [row("c")])
    assert [one["path"] for one in read_rows(run, said.append)] == ["a", "b", "c"] and len(said) == 1


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    run.write_text(json.dumps(row("a")) + "\nhello\n" + json.dumps(row("b")) + "\n")
    with pytest.raises(VmadError, match="line 2"):
        list(read_rows(run))


def test_what_changed_is_inspected_again(tmp_path: Path) -> None:
    frames = {name: str(tmp_path / name) for name in ("same", "other bytes", "longer", "gone", "unread", "\udce4")}
    for path in frames.values():
        Path(path).write_bytes(b"abc")
    rows = [
        row(path, **(file_facts(path) if name != "unread" else {"size": None, "sha256": None}))
        for name, path in frames.items()
    ]
    run = written(tmp_path / "run.jsonl", [*rows, row("of another folder")])
    Path(frames["other bytes"]).write_bytes(b"abd")
    Path(frames["longer"]).write_bytes(b"abcd")
    Path(frames["gone"]).unlink()
    assert take_up(run, [*frames.values(), "new"], SETTINGS, 2) == {frames["same"], frames["\udce4"]}
    assert [one["path"] for one in read_rows(run)] == [frames["same"], frames["\udce4"], "of another folder"]


@pytest.mark.parametrize(
    "changed,says",
    [
        ({"good_below": 0.2}, "good_below 0.1, now 0.2"),
        ({"question": "Any rust?"}, "question none, now Any rust?"),
        ({"bundle": "c" * 64}, "bundle bbb"),
        ({"new": 1}, "new none, now 1"),
    ],
)
def test_other_settings_are_refused(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    run = written(tmp_path / "run.jsonl", [row("a")])
    before = run.read_bytes()
    with pytest.raises(VmadError, match="was made otherwise") as refused:
        take_up(run, ["a"], {**SETTINGS, **changed}, 1)
    assert says in str(refused.value) and run.read_bytes() == before


def test_each_row_is_there_when_it_was_added(tmp_path: Path) -> None:
    lines, table = JsonLines(tmp_path / "a.jsonl"), Csv(tmp_path / "a.csv")
    for count in range(1, 4):
        lines.add(row(str(count)))
        table.add(row(str(count)))
        assert (tmp_path / "a.jsonl").read_text().count("\n") == count
        with (tmp_path / "a.csv").open(newline="") as file:
            assert [one["path"] for one in csv.DictReader(file)] == [str(n + 1) for n in range(count)]
