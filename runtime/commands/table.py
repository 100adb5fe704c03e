"""`vmad table`: the rows of a run as a table."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from vmad_edge.runtime.cli import Subcommands
from vmad_edge.runtime.console import printable, warn
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.files import whole_file
from vmad_edge.runtime.rows import Csv, Row, flat, read_rows

_NUMBERS = frozenset({"score", "p_yes", "time", "screen_ms", "review_ms", "peak", "centroid_x", "centroid_y"})
_COUNTS = frozenset({"size", "regions", "area", "left", "top", "right", "bottom"})
_YES_OR_NO = frozenset({"deadline_met", "seg_forced", "released"})
_GROUP = 10_000
"""Rows that are in memory at once."""


def add_table(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "table",
        help="make a table (Parquet or CSV) of what `vmad inspect --jsonl` wrote",
        description="One row a frame, with the columns of --csv: what is no list; times of screen and review; how many "
        "regions, and the largest one's box, area, peak and centroid.",
    )
    parser.add_argument("file", metavar="RUN.jsonl", type=Path, help="written by `vmad inspect --jsonl`")
    parser.add_argument("out", metavar="OUT", type=Path, help="a .parquet file (extra `parquet`) or a .csv file")
    parser.set_defaults(run=_table)


def _table(args: argparse.Namespace) -> int:
    writers = {".parquet": _write_parquet, ".csv": _write_csv}
    if (write := writers.get(args.out.suffix.lower())) is None:
        raise VmadError(f"expected OUT with the ending .parquet or .csv, got {args.out}")
    with whole_file(args.out) as scratch:
        rows = write(args.file, scratch)
    print(f"{printable(str(args.out))}: {rows} rows")
    return 0


def _write_csv(run: Path, target: Path) -> int:
    table, count = Csv(target), 0
    for row in read_rows(run, warn):
        table.add(row)
        count += 1
    table.close()
    return count


def _write_parquet(run: Path, target: Path) -> int:
    """Raises: VmadError: pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise VmadError("Parquet needs the extra `parquet`: pip install pyarrow; a .csv file needs nothing") from None
    kinds = {
        **dict.fromkeys(_NUMBERS, pyarrow.float64()),
        **dict.fromkeys(_COUNTS, pyarrow.int64()),
        **dict.fromkeys(_YES_OR_NO, pyarrow.bool_()),
    }
    names = list(dict.fromkeys(name for row in read_rows(run, warn) for name in flat(row)))
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])
    count, rows = 0, (_fitting(flat(row)) for row in read_rows(run))
    with parquet.ParquetWriter(target, schema) as writer:
        while group := list(islice(rows, _GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
            count += len(group)
    return count


def _fitting(row: Row) -> Row:
    """Text is text: a value of a later version's column too, and surrogates, which Parquet has not."""
    typed = _NUMBERS | _COUNTS | _YES_OR_NO
    return {name: value if name in typed or value is None else _text(value) for name, value in row.items()}


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()
