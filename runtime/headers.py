"""What ONNX and GGUF files say of what is in them, read without their libraries and without their weights."""

from __future__ import annotations

import itertools
import math
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.files import open_file

Field = tuple[int, int | memoryview]
"""Number and value of a protobuf message's field: bytes where it has a length, else a number."""
_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes an element, by ONNX's numbers of types (onnx.proto, TensorProto.DataType)."""
INT8, FLOAT16, BFLOAT16 = 3, 10, 16
UNKNOWN = -1


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    """For one frame or prompt: axes that the graph leaves open are 1. What the file does not tell is UNKNOWN."""
    type: int
    """ONNX's number."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.type]


@dataclass(frozen=True)
class Node:
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int | str]
    """Those that are one number or one text."""


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    """Of the values that the file describes, and of quantized ones."""
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class GgufTensor:
    shape: tuple[int, ...]
    """As GGUF has it: the row's length first."""
    type: int
    """ggml's number: 0 is F32, 1 F16, 30 BF16, any other is quantized."""
    bytes: int
    """In the file, up to 31 of them padding."""


@dataclass(frozen=True)
class Gguf:
    metadata: dict[str, int | float | str]
    """Without arrays."""
    tensors: dict[str, GgufTensor]
    tokens: tuple[bytes, ...] = ()
    token_types: tuple[int, ...] = ()
    """llama.cpp's numbers (`llama_token_type`): 1 is normal."""


def read_onnx(path: Path) -> Graph:
    """The graph of an ONNX file.

    Raises:
        BundleError: it cannot be read.
    """
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    weights, inputs, outputs = list[str](), list[str](), list[str]()
    with _mapped(path) as data:
        for number, graph in _fields(data):
            if number != 7:  # ModelProto.graph
                continue
            for field, value in _fields(_bytes(graph)):
                if field == 1:
                    nodes.append(_node(_bytes(value)))
                elif field == 5:
                    name, tensor = _weight(_bytes(value))
                    tensors[name] = tensor
                    weights.append(name)
                elif field in (11, 12, 13):  # input, output, value_info
                    name, tensor = _value(_bytes(value))
                    tensors[name] = tensor
                    if field != 13:
                        (inputs if field == 11 else outputs).append(name)
        for node in nodes:
            if node.kind in ("QuantizeLinear", "DequantizeLinear") and node.outputs[0] not in tensors:
                kind = INT8 if node.kind == "QuantizeLinear" else tensors[node.inputs[1]].type
                tensors[node.outputs[0]] = Tensor(tensors[node.inputs[0]].shape, kind)
    return Graph(tuple(nodes), tensors, tuple(weights), tuple(inputs), tuple(outputs))


def read_gguf(path: Path) -> Gguf:
    """Metadata, tokens and tensors' sizes of a GGUF file (version 3).

    Raises:
        BundleError: it cannot be read.
    """
    with _mapped(path) as data:
        reader = _GgufReader(data)
        if (found := data[:8].tobytes()) != b"GGUF\3\0\0\0":
            raise _Broken(f"expected GGUF version 3, found {found!r}")
        _, count, entries = reader.take("<QQQ")
        metadata: dict[str, int | float | str] = {}
        texts: dict[str, tuple[bytes, ...]] = {}
        numbers: dict[str, tuple[int, ...]] = {}
        for _ in range(entries):
            name, (kind,) = reader.text(), reader.take("<I")
            if kind == _TEXT:
                metadata[name] = reader.text()
            elif kind != _ARRAY:
                metadata[name] = reader.take(f"<{_NUMBERS[kind]}")[0]
            else:
                of, length = reader.take("<IQ")
                if of == _TEXT:
                    texts[name] = reader.texts(length)
                else:
                    numbers[name] = reader.take(f"<{length}{_NUMBERS[of]}")
        tokens, types = texts.get("tokenizer.ggml.tokens", ()), numbers.get("tokenizer.ggml.token_type", ())
        if len(tokens) != len(types):
            raise _Broken(f"expected a type for each of {len(tokens)} tokens, found {len(types)}")
        placed = [_Placed(reader) for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Broken(f"expected an alignment of at least 1, found {alignment!r:.40}")
        start = -(-reader.at // alignment) * alignment
        ends = sorted({tensor.offset for tensor in placed} | {len(data) - start})
        bytes_at = {offset: following - offset for offset, following in itertools.pairwise(ends)}
        tensors = {t.name: GgufTensor(t.shape, t.type, bytes_at[t.offset]) for t in placed}
        return Gguf(metadata, tensors, tokens, types)


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """A file's bytes; what is wrong with them is a BundleError."""
    try:
        with open_file(path) as file:
            yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise BundleError(f"{path}: its shapes cannot be read ({error.strerror}). Export the bundle again.") from None
    except _Broken as error:
        raise BundleError(f"{path}: its shapes cannot be read ({error}). Export the bundle again.") from None
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError, struct.error):
        raise BundleError(
            f"{path}: its shapes cannot be read (damaged, cut off, or another kind of file). Export the bundle again."
        ) from None


class _Broken(Exception):
    """What is wrong with a file, in words of ours."""


# ---------------------------------------------------------------------------------------------- protobuf


def _fields(message: memoryview) -> Iterator[Field]:
    """https://protobuf.dev/programming-guides/encoding"""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        length, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(message):
            raise _Broken("it ends too early")
        if kind == 2:
            yield key >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise _Broken("a number of more than 64 bits")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Broken("expected bytes, found a number")
    return value


def _text(value: int | memoryview) -> str:
    return str(_bytes(value), "utf-8")


def _node(message: memoryview) -> Node:
    inputs, outputs, kind = list[str](), list[str](), ""
    attributes: dict[str, int | str] = {}
    for field, value in _fields(message):
        if field in (1, 2):
            (inputs if field == 1 else outputs).append(_text(value))
        elif field == 4:
            kind = _text(value)
        elif field == 5:
            attribute = dict(_fields(_bytes(value)))
            for found in (3, 4):  # i, s
                if found in attribute:
                    given = attribute[found]
                    attributes[_text(attribute[1])] = given if isinstance(given, int) else _text(given)
    return Node(kind, tuple(inputs), tuple(outputs), attributes)


def _weight(message: memoryview) -> tuple[str, Tensor]:
    """A TensorProto."""
    shape, kind, name = list[int](), 0, ""
    for field, value in _fields(message):
        if field == 1 and isinstance(value, int):
            shape.append(value)
        elif field == 1:  # packed
            at, packed = 0, _bytes(value)
            while at < len(packed):
                size, at = _varint(packed, at)
                shape.append(size)
        elif field == 2 and isinstance(value, int):
            kind = value
        elif field == 8:
            name = _text(value)
    return name, Tensor(tuple(shape), kind)


def _value(message: memoryview) -> tuple[str, Tensor]:
    """A ValueInfoProto."""
    info = dict(_fields(message))
    tensor = dict(_fields(_bytes(dict(_fields(_bytes(info[2])))[1])))
    axes = _fields(_bytes(tensor[2])) if 2 in tensor else ()
    kind = tensor[1]
    if not isinstance(kind, int):
        raise _Broken("expected a type's number")
    return _text(info[1]), Tensor(tuple(_axis(dict(_fields(_bytes(axis)))) for field, axis in axes if field == 1), kind)


def _axis(dim: dict[int, int | memoryview]) -> int:
    """A number, or a product of numbers and names ("64*batch"), whose names are 1 here."""
    size = dim.get(1)
    if isinstance(size, int):
        return size
    factors = [factor.strip() for factor in _text(dim[2]).split("*")] if 2 in dim else [""]
    if not all(re.fullmatch(r"\w+", factor) for factor in factors):
        return UNKNOWN
    return math.prod(int(factor) for factor in factors if factor.isdecimal())


# -------------------------------------------------------------------------------------------------- GGUF

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_TEXTS = 1 << 22


class _GgufReader:
    """https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

    def __init__(self, data: memoryview) -> None:
        self._data, self.at = data, 0

    def take(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.take("<Q")
        self.at += length
        if self.at > len(self._data):
            raise _Broken("it ends too early")
        return str(self._data[self.at - length : self.at], "utf-8", "replace")

    def texts(self, count: int) -> tuple[bytes, ...]:
        """An array of them: tokens, or merges."""
        if count > _MOST_TEXTS:
            raise _Broken(f"expected at most {_MOST_TEXTS} texts in an array, found {count}")
        data, at, length, found = self._data, self.at, struct.Struct("<Q").unpack_from, list[bytes]()
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0]
            found.append(bytes(data[start:at]))
        if at > len(data):
            raise _Broken("it ends too early")
        self.at = at
        return tuple(found)


class _Placed:
    """A tensor's entry in the header."""

    def __init__(self, reader: _GgufReader) -> None:
        self.name = reader.text()
        self.shape = reader.take(f"<{reader.take('<I')[0]}Q")
        self.type, self.offset = reader.take("<IQ")
