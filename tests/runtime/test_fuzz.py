"""A short run of every parser on inputs as an attacker or a dying disk would send them; `benchmarks/fuzz.py` is long.

VMAD_FUZZ_EXAMPLES=100000 runs as many of each, other ones each time.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsers import PARSERS, PAST, altered

EXAMPLES = int(os.environ.get("VMAD_FUZZ_EXAMPLES", "100"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", PARSERS)
def test_altered_input(name: str, tmp_path: Path) -> None:
    @fuzzed
    @given(altered(PARSERS[name]))
    def run(data: bytes) -> None:
        PARSERS[name].run(data, tmp_path)

    run()


@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes(name: str, tmp_path: Path) -> None:
    @fuzzed
    @given(st.binary(max_size=200))
    def run(data: bytes) -> None:
        PARSERS[name].run(data, tmp_path)

    run()


@pytest.mark.parametrize("what", PAST)
def test_faults_of_the_past(what: str, tmp_path: Path) -> None:
    name, data = PAST[what]
    PARSERS[name].run(data, tmp_path)
