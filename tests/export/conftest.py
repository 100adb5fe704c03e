"""llama.cpp's own converter, an oracle of the export."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import platformdirs
import pytest


@pytest.fixture(scope="session")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's convert_hf_to_gguf.py out of llama-cpp-python's source distribution, kept in the user's cache."""
    version = importlib.metadata.version("llama-cpp-python")
    cache = platformdirs.user_cache_path("vmad-edge", ensure_exists=True) / f"llama.cpp-{version}"
    if not cache.is_dir():
        name, scratch = f"llama_cpp_python-{version}", tmp_path_factory.mktemp("sdist")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        done = subprocess.run(
            [*pip, f"llama-cpp-python=={version}", "--dest", scratch], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"no source distribution of llama-cpp-python {version}: {done.stderr.strip()[-200:]}")
        with tarfile.open(scratch / f"{name}.tar.gz") as archive:
            archive.extractall(scratch, filter="data")
        shutil.move(scratch / name / "vendor" / "llama.cpp", cache)
    return cache / "convert_hf_to_gguf.py"
