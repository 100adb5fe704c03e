"""Files of a checkpoint as they are read before anything is made of them: JSON, and what weights are where."""

# os.path answers False where pathlib raises: a name that is too long, or that no file can have.
# ruff: noqa: PTH112, PTH113

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from vmad_edge.runtime.bundle import first_fault
from vmad_edge.runtime.errors import CheckpointError
from vmad_edge.runtime.files import open_file

Shapes = dict[str, tuple[int, ...]]
Settings = TypeVar("Settings", bound=BaseModel)


def read_json(path: Path) -> dict[str, Any]:
    """A file of settings.

    Raises:
        CheckpointError: no such file, or no JSON object.
    """
    try:
        with open_file(path) as file:
            data = json.loads(file.read().decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected a JSON file there") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise CheckpointError(f"{path}: expected a JSON object of settings, found lists nested too deeply") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}, line {error.lineno}: expected JSON, found something else") from None
    except ValueError:  # no UTF-8, a number of thousands of digits, or a name that no file can have
        raise CheckpointError(f"{path}: expected JSON, found something else") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def validated(kind: type[Settings], path: Path, data: Mapping[str, Any]) -> Settings:
    """The settings that `data` of the file at `path` are.

    Raises:
        CheckpointError: they are not.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {': '.join(first_fault(error))}") from None


def in_words(error: BaseException) -> str:
    """What a library says, in a short line and without its classes."""
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(str(error).split()))[:200]


def weight_files(folder: Path) -> list[Path]:
    """A folder's `model.safetensors`, or the shards that its index names, sorted.

    Raises:
        CheckpointError: an index that does not name files of this folder.
    """
    index = folder / "model.safetensors.index.json"
    if not os.path.lexists(index):
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    # Without a folder in it, or the way to another's.
    if wrong := [name for name in sorted(names) if name in ("", "..") or Path(name).name != name]:
        raise CheckpointError(f"{index}: weight_map: expected names of files in {folder}, found {wrong[0]!r:.80}")
    if not names:
        raise CheckpointError(f"{index}: weight_map: expected the file of each tensor, found {shards!r:.80}")
    return [folder / name for name in sorted(names)]


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of the tensors in a safetensors file, or in a folder's `weight_files`.

    Raises:
        CheckpointError: no such file, or not safetensors.
    """
    if os.path.isdir(path):
        return {name: shape for file in weight_files(path) for name, shape in _shapes(file).items()}
    return _shapes(path)


def _shapes(path: Path) -> Shapes:
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path} is missing: expected weights in safetensors there (a pickle is executable code). Save them with "
            "save_file."
        )
    try:
        with safe_open(path, "numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        raise CheckpointError(
            f"{path}: expected a safetensors file, found something else (damaged, cut off, or of another format). "
            "Save it again."
        ) from None
