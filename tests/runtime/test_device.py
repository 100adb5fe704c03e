"""The GPU's one file, where no GPU is: what it says of what is missing."""

from __future__ import annotations

import sys

import pytest

from vmad_edge.runtime.device import Device
from vmad_edge.runtime.errors import VmadError


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(VmadError, match=r"vmad-edge\[gpu\].* and an NVIDIA driver: .*pycuda"):
        Device()
