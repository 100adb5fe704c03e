"""The demo bundle's engines on this machine's GPU; what cannot be had is skipped with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.engines.gpu import gpu
from vmad_edge.runtime.engines.plans import Plans
from vmad_edge.runtime.engines.tensorrt import build_plans
from vmad_edge.runtime.errors import VmadError

DEMO = Path(__file__).parents[2] / "demo/bundle"


@pytest.fixture(scope="module", params=["tensorrt", "cuda"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    device: Device = request.param
    bundle, plans = Bundle.open(DEMO), Plans(tmp_path_factory.mktemp("station") / "engines")
    try:
        if device == "tensorrt":
            build_plans(bundle, plans, gpu())
        return Engines.choose(bundle, device, plans)
    except VmadError as error:
        pytest.skip(f"{device} was not run: {error}")
