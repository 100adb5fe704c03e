"""Every parser of what comes from outside: valid seeds, how they are altered, and what a call of it may do.

`tests/runtime/test_fuzz.py` runs each a few hundred times; `benchmarks/fuzz.py` a million times in all.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from examples import CALIBRATION, MANIFEST
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save

from vmad_edge.export.checkpoint import Config, _clip_input
from vmad_edge.export.reading import read_json, read_shapes, validated
from vmad_edge.runtime.bundle import Bundle, Manifest, ScreenManifest, Thresholds
from vmad_edge.runtime.costs import LanguageCost, graph_cost
from vmad_edge.runtime.dataset import read_dataset
from vmad_edge.runtime.errors import BundleError, CheckpointError, FrameError, VmadError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.headers import read_gguf
from vmad_edge.runtime.masks import read_mask
from vmad_edge.runtime.release import Release, Shown
from vmad_edge.runtime.review import _receive
from vmad_edge.runtime.rows import flat, read_rows, take_up
from vmad_edge.runtime.stages.preprocess import View
from vmad_edge.runtime.stages.similarity import EnrolledFrame, NormalFeatures, References
from vmad_edge.runtime.stages.tiles import Layout, Tiles
from vmad_edge.runtime.station import CalibrationFrame, Station

INSIDE = re.compile(
    r"0x[0-9a-f]{5,}|object at |<class |Traceback|site-packages|(?<!llama)\.cpp\b|\.rs\b|\.py\b|pydantic|Errno"
    r"|Assertion|std::"
)
"""Of a library, or of memory: nothing that a sentence for people has in it."""


@dataclass(frozen=True)
class Parser:
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]
    """Gets what came from outside, and an empty folder that is its own."""
    raises: type[Exception]
    """What its docstring says; all else is a fault of it, and so is too little memory for inputs as small as these."""
    text: bool = False
    """JSON, of which whole values are exchanged."""

    def run(self, data: bytes, folder: Path) -> None:
        """Raises what is a fault of the parser."""
        try:
            self.read(data, folder)
        except MemoryError:
            raise
        except self.raises as error:
            said = str(error)
            inside = INSIDE.search(said)
            if isinstance(error, VmadError) and (not said or (inside and inside[0].encode() not in data)):
                raise AssertionError(f"no sentence for people: {said!r}") from None


# ------------------------------------------------------------------------------------------------ the runtime's


def _manifests() -> list[bytes]:
    digest = hashlib.sha256(b"graph").hexdigest()
    whole = Manifest.model_validate({**MANIFEST, "files": dict.fromkeys(Manifest.needed, digest)})
    screen = {name: value for name, value in MANIFEST.items() if name not in ("sam", "conversation", "language")}
    return [
        whole.model_dump_json().encode(),
        ScreenManifest.model_validate({**screen, "files": {"clip_encoder.onnx": digest}}).model_dump_json().encode(),
    ]


def _open_bundle(data: bytes, folder: Path) -> None:
    needed = Manifest.needed if b'"language"' in data else ScreenManifest.needed
    for name in {*Manifest.needed, *ScreenManifest.needed}:
        (folder / name).write_bytes(b"graph") if name in needed else (folder / name).unlink(missing_ok=True)
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest())
    bundle = Bundle.open(folder)
    assert bundle.file("clip_encoder.onnx").is_file()


@cache
def station_bundle() -> Bundle:
    return Bundle(Path("/bundle"), "ab" * 32, Manifest.model_validate({**MANIFEST, "files": {}}))


def _calibrations() -> list[bytes]:
    frame = CalibrationFrame(path="a.png", sha256="cd" * 32, defective=True, score=0.3)
    return [CALIBRATION.model_copy(update={"object": "part", "frames": (frame,)}).model_dump_json().encode()]


def _load_calibration(data: bytes, folder: Path) -> None:
    station = Station(folder, station_bundle())
    _put(station.path / "calibrations/part.calibration", data)
    station.load_calibration("part", None)


def _releases() -> list[bytes]:
    named = {"bundle": "ab" * 32, "object": "part", "bank": None, "calibration": "cd" * 32, "by": "me", "when": "now"}
    shown = Shown(defects=29, missed=0, bound=0.1, confidence=0.95, allowed=0.5, needed=5)
    made = Release(**named, released=True, shown=shown), Release(**named, released=False, why="a claim")
    return [release.model_dump_json().encode() for release in made]


def _load_release(data: bytes, folder: Path) -> None:
    station = Station(folder, station_bundle())
    _put(station.path / "releases/part.release", data)
    station.standing("part", None, None, "cpu")


def _put(path: Path, data: bytes) -> None:
    """As the station writes it: the hash first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"{hashlib.sha256(data).hexdigest()}\n".encode() + data)


def references() -> References:
    frames = (
        EnrolledFrame("one.png", 0, 2, (View(0, 0, 8, 8),), (8, 8), (b"first picture",), "a1"),
        EnrolledFrame("two.png", 2, 5, (View(-1, 0.5, 8, 8),), (8, 7), (b"second",), "b2"),
    )
    features = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    patch = np.array([0, 3, 0, 1, 2], np.int32)
    return References(features, patch, frames, Thresholds(good_below=0.1, defect_above=0.2))


def in_tiles() -> References:
    """A frame of two tiles, part of it ignored."""
    views, pictures = (View(0, 0, 9, 9), View(7, 0, 16, 9)), (b"left", b"right")
    frames = (EnrolledFrame("wide.png", 0, 4, views, (9, 16), pictures, "c3"),)
    features = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    layout = Layout((0, 0, 16, 9), np.arange(9 * 16).reshape(9, 16) % 5 == 0, Tiles(count=2))
    return References(features, np.array([0, 3, 4, 7], np.int32), frames, None, layout=layout)


def _banks() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        station = Station(Path(folder), station_bundle())
        both = references(), in_tiles()
        return [station.save_references("part", made).read_bytes().partition(b"\n")[2] for made in both]


def _load_references(data: bytes, folder: Path) -> None:
    station = Station(folder, station_bundle())
    _put(station.path / "banks/part.bank", data)
    station.load_references("part")


def _onnx_graphs() -> list[bytes]:
    floats = TensorProto.FLOAT
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("Gemm", ["d", "w"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", floats, ["batch", 3])],
        [helper.make_tensor_value_info("y", floats, ["batch", 2])],
        [helper.make_tensor("w", floats, [2, 3], [1.0] * 6), helper.make_tensor("s", floats, [], [0.5])],
        value_info=[helper.make_tensor_value_info("open", floats, ["4*batch", None])],
    )
    return [helper.make_model(graph).SerializeToString()]


def _ggufs() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "a.gguf", "llama")
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_embedding_length(8)
        writer.add_rope_freq_base(1e4)
        writer.add_add_bos_token(True)
        writer.add_token_list(["<s>", "a", "é"])
        writer.add_token_scores([0.0, -1.0, -2.0])
        writer.add_token_types([3, 1, 1])
        writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [(Path(folder) / "a.gguf").read_bytes()]


def _count_gguf(path: Path) -> None:
    LanguageCost.of(read_gguf(path), "f16")


def _features() -> list[bytes]:
    rows = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    return [save({"visual_normal": rows[:4], "visual_abnormal": rows[4:]}), save({"visual_normal": rows})]


def _read_features(data: bytes, folder: Path) -> None:
    (folder / "similarity.safetensors").write_bytes(data)
    features = NormalFeatures(folder / "similarity.safetensors", station_bundle().manifest.similarity)
    features.compare(np.ones((2, features.normal.width), np.float32))


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    """A noisy picture of 12 × 12 pixels."""
    target = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(target, form, **options)
    return target.getvalue()


@cache
def pictures() -> list[bytes]:
    forms = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("TIFF", "RGB")]
    forms += [("TIFF", "I;16"), ("BMP", "RGB"), ("WEBP", "RGB"), ("GIF", "P"), ("TGA", "RGB"), ("PPM", "RGB")]
    forms += [("PPM", "I;16"), ("JPEG2000", "RGB"), ("DIB", "L")]
    made = [encoded(*form) for form in forms]
    made.append(encoded("TIFF", compression="tiff_lzw"))
    turned = Image.Exif()
    turned[0x0112] = 6
    made.append(encoded("JPEG", progressive=True, exif=turned))
    if "AVIF" in Image.SAVE:
        made.append(encoded("AVIF"))
    return made


def _read_frame(data: bytes, folder: Path) -> None:
    frame = Frame.read(data, bit_depth=16)
    assert frame.pixels.dtype == np.uint8 and frame.pixels.ndim == 3 and frame.pixels.shape[2] == 3


def _masks() -> list[bytes]:
    forms = [("PNG", "L"), ("PNG", "1"), ("PNG", "P"), ("PNG", "RGBA"), ("BMP", "L"), ("TIFF", "L"), ("JPEG", "L")]
    return [encoded(form, mode) for form, mode in forms]


def _read_mask(data: bytes, folder: Path) -> None:
    (folder / "mask.png").write_bytes(data)
    mask, _ = read_mask(folder / "mask.png", (12, 12), numbered=len(data) % 2 == 0)
    assert mask.shape == (12, 12) and mask.dtype == np.bool_


def _messages() -> list[bytes]:
    def message(head: dict[str, Any], **arrays: np.ndarray[Any, Any]) -> bytes:
        described = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
        return (
            json.dumps({**head, "arrays": described}).encode() + b"\n" + b"".join(a.tobytes() for a in arrays.values())
        )

    pixels, patches = np.zeros((4, 5, 3), np.uint8), np.ones((4, 8), np.float32)
    review = {"kind": "review", "id": 1, "question": "?", "mode": "full", "deadline": 1.5, "view": [0, 0, 4.5, 5]}
    finding = {"kind": "finding", "id": 1, "p_yes": 0.5, "text": "Yes", "seg_forced": False, "stopped": None}
    return [
        message(review, pixels=pixels, patches=patches, patches_multi=patches[None]),
        message({"kind": "cancel", "id": 1}) + message({"kind": "alive", "loaded": True, "steps": 3}),
        message({"kind": "p_yes", "id": 1, "p_yes": 0.5}) + message({"kind": "text", "id": 1, "text": "Yes"}),
        message({**finding, "timings_ms": {"review": 1.0}}, token_scores=patches[0], mask=pixels[:, :, 0]),
        message({"kind": "fault", "id": 1, "reason": "deadline"}) + message({"kind": "broken", "reason": "no"}),
    ]


def _receive_all(data: bytes, folder: Path) -> None:
    stream = io.BytesIO(data)
    while _receive(stream) is not None:
        pass


def _runs() -> list[bytes]:
    row = {
        "path": "a.png",
        "verdict": "DEFECT",
        "score": 0.3,
        "regions": [{"box": [1, 2, 3, 4], "area": 4, "peak": 0.5, "centroid": [1.5, 2.5]}],
        "timings_ms": {"screen": 3.0, "map": 1.0},
        "size": 3,
        "sha256": "ab" * 32,
        "settings": {"bundle": "b"},
    }
    return [(json.dumps(row) + "\n").encode(), b"".join((json.dumps({**row, "path": p}) + "\n").encode() for p in "ab")]


def _take_up(data: bytes, folder: Path) -> None:
    run = folder / "run.jsonl"
    run.write_bytes(data)
    for row in read_rows(run):
        flat(row)
    take_up(run, ["a.png", "b"], {"bundle": "b"}, 1)


def _tables() -> list[bytes]:
    head = b"object,split,label,image,mask\n"
    table = head + b"cap,train,normal,cap/a.png,\ncap,test,anomaly,cap/a.png,cap/a.png\n"
    return [table, table.replace(b",", b";")]


def _read_visa(data: bytes, folder: Path) -> None:
    for name in ("cap", "split_csv"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "cap/a.png").touch()
    (folder / "split_csv/1cls.csv").write_bytes(data)
    read_dataset(folder)


def _real_iads() -> list[bytes]:
    row = {"category": "cap", "anomaly_class": "OK", "image_path": "a.png", "mask_path": None}
    bad = {**row, "anomaly_class": "AK", "mask_path": "a.png"}
    whole = {"meta": {"normal_class": "OK", "prefix": "cap/"}, "train": [row], "test": [row, bad]}
    return [json.dumps(whole).encode()]


def _read_real_iad(data: bytes, folder: Path) -> None:
    for name in ("cap", "realiad_jsons"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "cap/a.png").touch()
    (folder / "realiad_jsons/cap.json").write_bytes(data)
    read_dataset(folder)


def _from_file(read: Callable[[Path], object], name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        (folder / name).write_bytes(data)
        read(folder / name)

    return run


# -------------------------------------------------------------------------------------------------- the export's


def _configs() -> list[bytes]:
    whole = {
        "model_type": "vmad",
        "weights": {"origin": "random", "licence": "none"},
        "levels": [-1, -2],
        "ltc": {"scale_factor": 2, "heads": 4},
        "conversation": MANIFEST["conversation"],
        "yes_token_ids": [1],
        "no_token_ids": [2],
        "similarity": {"thresholds": {"good_below": 0.1, "defect_above": 0.2}},
    }
    return [json.dumps(whole).encode()]


def _read_config(path: Path) -> None:
    validated(Config, path, read_json(path))


def _indices() -> list[bytes]:
    return [json.dumps({"metadata": {}, "weight_map": {"visual_normal": "model.safetensors"}}).encode()]


def _read_index(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(_features()[1])
    (folder / "model.safetensors.index.json").write_bytes(data)
    read_shapes(folder)


def _adapters() -> list[bytes]:
    whole = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": False,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["norm"],
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "trainable_token_indices": [1],
        "lora_dropout": 0.0,
    }
    return [json.dumps(whole).encode()]


def _read_adapter(path: Path) -> None:
    from vmad_edge.export.language import _read_lora_config  # imports torch, which the other parsers can do without

    _read_lora_config(path.parent)


def _processors() -> list[bytes]:
    size = {"height": 28, "width": 28}
    steps = {"do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True, "resample": 3}
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "crop_size": size}
    return [json.dumps({"image_processor_type": "CLIPImageProcessor", "size": size, **steps, **numbers}).encode()]


@cache
def _config() -> Config:
    return Config.model_validate_json(_configs()[0])


PARSERS = {
    "manifest": Parser(_manifests, _open_bundle, BundleError, text=True),
    "calibration": Parser(_calibrations, _load_calibration, BundleError, text=True),
    "release": Parser(_releases, _load_release, BundleError, text=True),
    "reference bank": Parser(_banks, _load_references, BundleError),
    "normal features": Parser(_features, _read_features, BundleError),
    "ONNX header": Parser(_onnx_graphs, _from_file(graph_cost, "a.onnx"), BundleError),
    "GGUF header": Parser(_ggufs, _from_file(_count_gguf, "a.gguf"), BundleError),
    "safetensors header": Parser(_features, _from_file(read_shapes, "a.safetensors"), CheckpointError),
    "frame": Parser(pictures, _read_frame, FrameError),
    "mask": Parser(_masks, _read_mask, FrameError),
    "message": Parser(_messages, _receive_all, Exception),
    "rows": Parser(_runs, _take_up, VmadError, text=True),
    "VisA table": Parser(_tables, _read_visa, FrameError),
    "Real-IAD table": Parser(_real_iads, _read_real_iad, FrameError, text=True),
    "checkpoint config": Parser(_configs, _from_file(_read_config, "config.json"), CheckpointError, text=True),
    "checkpoint index": Parser(_indices, _read_index, CheckpointError, text=True),
    "adapter config": Parser(_adapters, _from_file(_read_adapter, "adapter_config.json"), CheckpointError, True),
    "preprocessor config": Parser(
        _processors,
        _from_file(lambda path: _clip_input(path, _config(), 28), "preprocessor_config.json"),
        CheckpointError,
        text=True,
    ),
}


# ------------------------------------------------------------------------------------------------ faults of the past


def _gguf_of(name: str, kind: int, value: bytes) -> bytes:
    """A GGUF file with one entry of metadata and no tensor."""
    head = b"GGUF\3\0\0\0" + struct.pack("<QQQ", 0, 1, len(name)) + name.encode()
    return head + struct.pack("<I", kind) + value


def _row_with(**changed: Any) -> bytes:
    return (json.dumps({**json.loads(_runs()[0]), **changed}) + "\n").encode()


def _real_iad_with(**changed: Any) -> bytes:
    whole = json.loads(_real_iads()[0])
    whole["test"][1] |= changed
    return json.dumps(whole).encode()


def _adapter_with(**changed: Any) -> bytes:
    return json.dumps({**json.loads(_adapters()[0]), **changed}).encode()


def _index_of(shard: Any) -> bytes:
    return json.dumps({"weight_map": {"visual_normal": shard}}).encode()


def _message_of(dtype: str, shape: Any) -> bytes:
    return json.dumps({"kind": "review", "arrays": {"pixels": [dtype, shape]}}).encode() + b"\n"


PAST: dict[str, tuple[str, bytes]] = {
    # what came of it: (parser, input)
    "RecursionError of arrays in arrays": ("GGUF header", _gguf_of("a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "ZeroDivisionError of an alignment of 0": ("GGUF header", _gguf_of("general.alignment", 4, bytes(4))),
    "a text beyond the end was an empty one": ("GGUF header", _gguf_of("a", 8, struct.pack("<Q", 2**63))),
    "quadratic time for a number of megabytes": ("ONNX header", b"\x08" + b"\xff" * 3_000_000),
    "a library's words for a damaged header": ("safetensors header", struct.pack("<Q", 9) + b'{"a":{}, '),
    "TypeError of abnormal features of integers": (
        "normal features",
        save({"visual_normal": np.ones((2, 8), np.float32), "visual_abnormal": np.ones((2, 8), np.int32)}),
    ),
    "ValueError of features of two widths": (
        "normal features",
        save({"visual_normal": np.ones((2, 8), np.float32), "visual_abnormal": np.ones((2, 4), np.float32)}),
    ),
    "RecursionError of a line of brackets": ("rows", b"[" * 100_000 + b"\n"),
    "TypeError of a path that is a list": ("rows", _row_with(path=[])),
    "AttributeError of times that are a number": ("rows", _row_with(timings_ms=1.5)),
    "TypeError of regions that are a number": ("rows", _row_with(regions=0.5)),
    "AttributeError of a region that is a number": ("rows", _row_with(regions=[0.5])),
    "ValueError of a box with three sides": ("rows", _row_with(regions=[{"box": [1, 2, 3]}])),
    "RecursionError of lists in lists": ("Real-IAD table", b"[" * 100_000),
    "Python's words for a file that is no JSON": ("Real-IAD table", b"\xff{"),
    "TypeError of a mask that is a number": ("Real-IAD table", _real_iad_with(mask_path=3)),
    "csv.Error of a long field": ("VisA table", _tables()[0] + b"x" * 200_000),
    "a category called ..": ("VisA table", _tables()[0].replace(b"cap,t", b"..,t")),
    "RecursionError of an index that names itself": ("checkpoint index", _index_of(".")),
    "weights of another folder": ("checkpoint index", _index_of("../model.safetensors")),
    "OSError of a shard's long name": ("checkpoint index", _index_of("x" * 10_000)),
    "AttributeError of a list of shards": ("checkpoint index", b'{"weight_map": ["model.safetensors"]}'),
    "re.error of target modules": ("adapter config", _adapter_with(target_modules="(")),
    "AttributeError of a list of patterns": ("adapter config", _adapter_with(rank_pattern=[1])),
    "TypeError of alpha in words": ("adapter config", _adapter_with(lora_alpha="much")),
    "OverflowError of an array's size": ("message", _message_of("|u1", [2**63])),
    "memory for an array that is only announced": ("message", _message_of("<f4", [2**31, 2**10])),
    "SyntaxError of an array's type": ("message", _message_of("(01)i4", [1])),
}
"""Inputs that were faults once; `tests/runtime/test_fuzz.py` sees that they are none."""


# --------------------------------------------------------------------------------------------------- alterations

NUMBERS = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)]
TOKENS = [b"\xff" * 11, b"\x80" * 600, b"NaN", b"1e999", b"null", b"[" * 2000, b"{}", b'"\\ud800"', b"\0", b"..", b"\n"]
TOKENS += [b"9" * 5000, b'"', b",", b"-1", b"\xef\xbb\xbf", b'{"a":1,"a":2}']
_pieces = st.sampled_from(NUMBERS) | st.sampled_from(TOKENS) | st.binary(max_size=8)
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), _pieces, st.integers(0, 12)), max_size=6)
RAW = ["1e999", "-1e999", "NaN", "1e-320", "-0.0", "9" * 5000, "[" * 100_000, '{"a":' * 5000, '{"a":1,"a":2}']
"""What Python's json does not write."""
_names = st.sampled_from(
    ["", ".", "..", "/", "../a", "/etc/passwd", "a\0b", "\ud800", "x" * 10_000, "(", "(?i)", "a/b"]
)
_numbers = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | _names | _numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | _names, inner, max_size=3),
    max_leaves=6,
) | st.integers(0, len(RAW) - 1).map(lambda which: f"@RAW {which}@")


def damaged(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """Some bytes replaced, inserted or cut out."""
    for place, new, cut in changes:
        start = int(place * (len(data) + 1))
        data = data[:start] + new + data[start + cut :]
    return data


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree of JSON, with each key."""
    for key, inner in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(inner, dict | list):
            yield from places(inner)


@st.composite
def _other_values(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Lines of JSON with one to three values exchanged, or left out, and sometimes one more."""
    lines = [json.loads(line) for line in draw(st.sampled_from(seeds)).splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        found = [place for line in lines for place in places(line)]
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        match draw(st.integers(0, 5)):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[draw(st.text(max_size=8) | _names)] = draw(_values)
            case _:
                container[key] = draw(_values)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return re.sub(r'"@RAW (\d)@"', lambda match: RAW[int(match[1])], text).encode("utf-8", "surrogatepass")


def altered(parser: Parser) -> st.SearchStrategy[bytes]:
    """Inputs that are near the seeds, as an attacker or a dying disk would send them."""
    seeds = parser.seeds()
    cut = st.builds(damaged, st.sampled_from(seeds), edits)
    return _other_values(seeds) | cut if parser.text else cut
