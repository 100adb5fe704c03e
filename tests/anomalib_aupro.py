"""anomalib's AUPRO, without the gigabyte that the rest of anomalib would install.

Its module needs torchmetrics and OpenCV to compute; what it imports only to draw, or to run on a GPU, is stood in for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

NEEDS = ("anomalib", "torchmetrics", "lightning_utilities")
_DRAWING = ("matplotlib", "matplotlib.figure", "kornia", "kornia.contrib", "anomalib.metrics.utils")


class _Base:
    """AnomalibMetric's place: it maps the fields of anomalib's batches."""


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in NEEDS)


def load() -> Any:
    """The class `_AUPRO`, a torchmetrics.Metric: update(scores [B,H,W], masks [B,H,W]), compute()."""
    import anomalib  # its __init__ is light, its metrics' is not
    import torchmetrics  # noqa: F401  before the stand-ins: it looks for what is installed

    package, base = ModuleType("anomalib.metrics"), ModuleType("anomalib.metrics.base")
    package.__path__ = [str(Path(str(anomalib.__file__)).parent / "metrics")]
    for module in (package, base):
        module.AnomalibMetric = _Base  # type: ignore[attr-defined]
    stand_ins = {name: MagicMock() for name in _DRAWING}
    with patch.dict(sys.modules, {**stand_ins, package.__name__: package, base.__name__: base}):
        return importlib.import_module("anomalib.metrics.aupro")._AUPRO
