"""The arrows between the three wings: export → runtime → kernels, never back, and no torch on the device."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "kernels": ("vmad_edge.runtime", "vmad_edge.export", "torch", "transformers"),
    "runtime": ("vmad_edge.export", "torch", "transformers", "peft", "onnx", "gguf"),
}


def imported(source: str) -> set[str]:
    """Every module that the source names in an import, lazy ones included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("wing", FORBIDDEN)
def test_no_arrow_runs_backwards(wing: str) -> None:
    files = sorted((ROOT / wing).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path.read_text()):
            wrong = [bad for bad in FORBIDDEN[wing] if name == bad or name.startswith(f"{bad}.")]
            assert not wrong, f"{path} imports {name}"


def test_runtime_runs_without_torch() -> None:
    """Importing everything of the runtime succeeds where importing torch is impossible."""
    modules = [
        ".".join(("vmad_edge", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted((ROOT / "runtime").rglob("*.py"))
    ]
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'transformers', 'peft', 'gguf', 'onnx'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
