from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import cv2
import efficientnet_lite0
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from plain_parts import plain_part
from torch.nn.functional import avg_pool2d, interpolate

from vmad_edge.export.reference.teacher import installed
from vmad_edge.runtime.bundle import Bundle, Manifest
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.stages.similarity import coreset

SIZE = 28


def write_graph(path: Path, batch: int | str = "B", size: int | str = SIZE, opset: int = 20, kind: int = 1) -> Path:
    """`image` → `fine` [B,5,12,12], `patches` [B,6,7,7], `tokens` [B,16,4], `class_too` [B,17,4], `mean` [B,1,4]."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def convolution(name: str, width: int, kernel: int, stride: int) -> None:
        weight = rng.normal(size=(width, 3, kernel, kernel)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        nodes.append(
            helper.make_node("Conv", ["image", f"{name}.weight"], [name], strides=[stride] * 2, name=f"conv_{name}")
        )

    for name, width, kernel, stride in (("fine", 5, 6, 2), ("patches", 6, 4, 4), ("coarse", 4, 7, 7)):
        convolution(name, width, kernel, stride)
    weights.append(numpy_helper.from_array(np.array([0, 4, -1]), "flat"))
    nodes += [
        helper.make_node("Reshape", ["coarse", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("GlobalAveragePool", ["rows"], ["mean_rows"]),
        helper.make_node("Transpose", ["mean_rows"], ["mean"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["mean", "tokens"], ["class_too"], axis=1),
    ]
    names = ["fine", "patches", "tokens", "class_too", "mean"]
    graph = helper.make_graph(
        nodes,
        "features",
        [helper.make_tensor_value_info("image", kind, [batch, 3, size, size])],
        [helper.make_tensor_value_info(name, kind, None) for name in names],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def export(graph: Path, bundle: Path, *options: str) -> int:
    return main(["export-features", str(graph), str(bundle), *options])


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("graph") / "features.onnx")


@pytest.fixture(scope="module")
def bundle(graph: Path) -> Bundle:
    folder = graph.parent / "bundle"
    assert export(graph, folder, "--levels", "patches,fine", "--coreset", "0.5", "--licence", "none") == 0
    return Bundle.open(folder)


def patchcore(levels: list[np.ndarray]) -> np.ndarray:
    """anomalib's embedding: pooled, resized to the finest, joined; here as [B,N,D]."""
    maps = [torch.from_numpy(level) for level in levels]
    finest = max(level.shape[-1] for level in maps)
    pooled = [avg_pool2d(level, 3, 1, 1) for level in maps]
    resized = [interpolate(level, size=(finest, finest), mode="bilinear") for level in pooled]
    return torch.cat(resized, 1).flatten(2).transpose(1, 2).numpy()


@pytest.mark.parametrize(
    "levels,options",
    [
        (["fine"], {}),
        (["patches", "fine"], {}),  # 7 → 12 places, the finest last, an output of the same name as ours
        (["fine", "tokens"], {}),  # tokens, 4 → 12
        (["tokens", "patches", "fine"], {"batch": 1}),
        (["fine", "patches"], {"opset": 13}),
    ],
)
def test_patches_are_patchcores(levels: list[str], options: dict[str, int], tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "features.onnx", **options)
    assert export(graph, tmp_path / "bundle", "--levels", ",".join(levels)) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    onnx.checker.check_model(onnx.load(bundle.file("clip_encoder.onnx")), full_check=True)
    batch = options.get("batch", 3)
    pixels = np.random.default_rng(1).normal(size=(batch, 3, SIZE, SIZE)).astype(np.float32)
    outputs = ["fine", "patches", "tokens"]
    source = dict(zip(outputs, ort.InferenceSession(graph).run(outputs, {"image": pixels}), strict=True))
    source["tokens"] = source["tokens"].transpose(0, 2, 1).reshape(batch, 4, 4, 4)
    found = OnnxRuntimeEngine(bundle.file("clip_encoder.onnx")).run({"clip_pixels": pixels})
    assert found.keys() == {"patches"}
    np.testing.assert_allclose(found["patches"], patchcore([source[name] for name in levels]), atol=1e-5)
    assert (bundle.manifest.vision.grid, bundle.manifest.vision.levels) == (12, tuple(levels))
    assert bundle.manifest.vision.width == found["patches"].shape[2]


@pytest.mark.skipif(not installed(), reason="the packages of EfficientNet-lite0 are not installed")
def test_efficientnet_lite0(tmp_path: Path) -> None:
    """A real network with real weights: against torch."""
    size = 96
    network = efficientnet_lite0.write_graph(tmp_path / "features.onnx", size)
    assert export(tmp_path / "features.onnx", tmp_path / "bundle", "--levels", "reduction_3,reduction_4") == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert (bundle.manifest.clip.size, bundle.manifest.vision.grid, bundle.manifest.vision.width) == (size, 12, 152)
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32))
    with torch.no_grad():
        _, fine, coarse, _ = network(pixels)
    found = OnnxRuntimeEngine(bundle.file("clip_encoder.onnx")).run({"clip_pixels": pixels.numpy()})["patches"]
    np.testing.assert_allclose(found, patchcore([fine.numpy(), coarse.numpy()]), atol=2e-4)


@pytest.mark.parametrize(
    "options,graph_options,says",
    [
        pytest.param(["--levels", "fine,blob"], {}, "expected names of its outputs as levels", id="no such output"),
        pytest.param(["--levels", "mean"], {}, "level mean: expected a float32 feature map", id="no map"),
        pytest.param(["--levels", "class_too"], {}, "without class token", id="class token"),
        pytest.param(["--levels", "fine"], {"batch": 4}, "Export it again with an open batch", id="batch of four"),
        pytest.param(["--levels", "fine", "--size", "32"], {}, r"takes \[1, 3, 32, 32\]", id="another size"),
        pytest.param(["--levels", "fine"], {"size": "S"}, "say it with --size", id="size unknown"),
        pytest.param(["--levels", "fine,fine"], {}, "expected each of levels once, found 'fine' twice", id="twice"),
        pytest.param(["--levels", "fine", "--coreset", "0"], {}, "--coreset: Input should be greater", id="coreset"),
        pytest.param(["--levels", "fine", "--std", "1", "0", "1"], {}, "--std: Input should be greater", id="std"),
    ],
)
def test_refuses(
    options: list[str],
    graph_options: dict[str, int | str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    graph = write_graph(tmp_path / "features.onnx", **graph_options)  # type: ignore[arg-type]
    assert export(graph, tmp_path / "bundle", *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(says, said)
    assert [path.name for path in tmp_path.iterdir()] == ["features.onnx"]


def test_refuses_what_is_no_graph_and_what_is_no_bundle(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04K\x01.")
    assert export(tmp_path / "weights.pth", tmp_path / "bundle", "--levels", "fine") == 2
    assert "cannot load" in capsys.readouterr().err and not (tmp_path / "bundle").exists()
    (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for size in ([], ["--size", "28"]):
        assert export(tmp_path / "pointer.onnx", tmp_path / "bundle", "--levels", "fine", *size) == 2
        assert "git-LFS pointer" in capsys.readouterr().err
    assert export(graph, tmp_path, "--levels", "fine") == 2
    assert "exists and is no bundle" in capsys.readouterr().err and (tmp_path / "weights.pth").exists()


def picture(folder: Path, seed: int, spot: bool = False) -> Path:
    pixels = plain_part(np.random.default_rng(seed), 4, 40, 40).clip(0, 255).astype(np.uint8)
    if spot:
        pixels[24:32, 8:16] = (255, 0, 0)
    path = folder / f"{seed}.png"
    assert cv2.imwrite(str(path), pixels)
    return path


def test_screens_against_references_alone(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not isinstance(bundle.manifest, Manifest) and bundle.manifest.similarity.coreset == 0.5
    good, station = tmp_path / "good", str(tmp_path / "station")
    good.mkdir()
    for seed in range(6):
        picture(good, seed)
    spotted = picture(tmp_path, 99, spot=True)

    inspect = ["inspect", str(bundle.path), str(spotted), "--station", station, "--json"]
    assert main(inspect) == 2
    assert "'part' is not enrolled: `vmad enroll` normal parts" in capsys.readouterr().err
    assert main([*inspect, "--references", str(good)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "DEFECT" and found["p_yes"] is None and "review" not in found["timings_ms"]

    assert main(["enroll", str(bundle.path), str(good), "--station", station, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patches"] == 6 * 144 // 2
    with Inspector.open(bundle.path, station) as inspector:
        inspection = inspector.inspect(spotted)
        assert inspection.verdict is Verdict.DEFECT and inspection.map is not None
        top, left = np.unravel_index(np.nanargmax(inspection.map), inspection.map.shape)
        assert 22 <= top < 34 and 6 <= left < 18
        assert inspection.nearest_normal is not None and inspection.nearest_normal.frame.endswith(".png")
        with pytest.raises(BundleError, match="screens only: it has no language model"):
            inspector.review(inspection)
    assert main(["info", str(bundle.path), "--station", station, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["review"] == "none: this bundle screens only" and facts["enrolled"] == ["part"]


def test_frame_becomes_the_graphs_input(bundle: Bundle, tmp_path: Path) -> None:
    """Exactly resized, antialiased and normalised as torchvision's usual pipeline would: against torch."""
    from vmad_edge.runtime.stages.preprocess import clip_pixels

    frame = Frame.read(picture(tmp_path, 7))
    pixels, _ = clip_pixels(frame, bundle.manifest.clip)
    whole = torch.from_numpy(frame.pixels.copy()).permute(2, 0, 1)[None]
    resized = interpolate(whole.float(), size=(SIZE, SIZE), mode="bilinear", antialias=True).round() / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(pixels, ((resized - mean) / std).numpy(), atol=1.01 / 255 / 0.224)


@pytest.mark.parametrize("seed", range(4))
def test_coreset_is_within_twice_the_best_radius(seed: int) -> None:
    """Gonzalez's bound (1985) for greedy k-center, against the best of all subsets."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(12, 3)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    best = min(distance[:, list(rows)].min(1).max() for rows in combinations(range(12), 4))
    rows = coreset(features, 4 / 12)
    assert len(rows) == 4 and (np.diff(rows) > 0).all()
    assert distance[:, rows].min(1).max() <= 2 * best + 1e-6


def test_coreset_leaves_out_what_is_no_feature() -> None:
    features = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    features[[2, 5]], features[7] = np.nan, 0
    assert set(coreset(features, 1.0)) == {0, 1, 3, 4, 6, 8, 9}
