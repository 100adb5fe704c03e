"""`vmad release`: a named person answers for an object, or takes that back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vmad_edge.runtime import audit
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.cli import Subcommands
from vmad_edge.runtime.console import printable
from vmad_edge.runtime.station import Station


def add_release(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "release",
        help="answer for an object by name, so that its GOOD counts; or take that back",
        description="Somebody says that this bundle sees this object's defects, and on what that rests. It holds for "
        "the object as it is enrolled and calibrated now: anew, it is to be released anew. Better than a word are real "
        "defects: `vmad calibrate --defects` releases by what they show. Who, when and why goes into the station's "
        "audit, which is never rewritten.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by `vmad export`")
    parser.add_argument("--station", metavar="DIR", help="the device's own folder (default: your user data folder)")
    parser.add_argument("--object", metavar="NAME", help="the part's name, as it was enrolled")
    parser.add_argument("--by", metavar="NAME", required=True, help="who answers for it")
    parser.add_argument("--why", metavar="TEXT", required=True, help="what it rests on: a trial, a report, a standard")
    parser.add_argument("--withdraw", action="store_true", help="from now on it is not released, whatever released it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_release)


def _release(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    station = Station(None if args.station is None else Path(args.station), bundle)
    name = bundle.manifest.object if args.object is None else args.object
    release = station.answer(name, args.by, args.why, released=not args.withdraw)
    if args.json:
        print(json.dumps({**release.model_dump(mode="json"), "audit": str(station.path / audit.NAME)}, indent=2))
    else:
        print(printable(f"{name!r} is {release.told}; audit: {station.path / audit.NAME}"))
    return 0
