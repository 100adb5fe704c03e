"""`vmad bench --plan`: what is counted against torch's counter, onnx and gguf; floors by hand. Nothing is measured."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.graphs.clip_encoder import ClipEncoder
from vmad_edge.export.graphs.mask_decoder import MaskDecoder
from vmad_edge.export.graphs.sam_encoder import SamEncoder
from vmad_edge.export.int8 import write_int8
from vmad_edge.export.precision import write_fp16
from vmad_edge.runtime.bundle import Bundle, Manifest
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.costs import Cost, GraphCost, LanguageCost, graph_cost, similarity_cost
from vmad_edge.runtime.engines.choice import Engines
from vmad_edge.runtime.errors import BundleError
from vmad_edge.runtime.floors import Chain, Dialogue, chain_of, floors
from vmad_edge.runtime.hardware import HARDWARE, Hardware
from vmad_edge.runtime.headers import UNKNOWN, read_gguf, read_onnx
from vmad_edge.runtime.stages.language import LanguageModel
from vmad_edge.runtime.stages.vocabulary import prompt_lengths

ROOT = Path(__file__).parents[2]
GRAPHS = ("clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder")


def torch_counts(run: Callable[[], object]) -> int:
    """Operations of the products in `run`, by torch; attention taken apart into its products."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.mark.parametrize("name", GRAPHS)
def test_operations_are_those_that_torch_counts(name: str, checkpoint: Checkpoint, bundle: Bundle) -> None:
    config, sam = checkpoint.config, checkpoint.segmenter()
    n, grid, levels = checkpoint.grid**2, checkpoint.sam.size // 16, len(config.levels)
    module, *inputs = {
        "clip_encoder": (
            ClipEncoder(checkpoint.vision(), config.patches_level, config.levels),
            torch.zeros(1, 3, checkpoint.clip.size, checkpoint.clip.size),
        ),
        "ltc_projector": (
            checkpoint.projector(),
            torch.zeros(1, n, checkpoint.width),
            torch.zeros(1, levels, n, checkpoint.width),
        ),
        "sam_encoder": (SamEncoder(sam.vision_encoder), torch.zeros(1, 3, checkpoint.sam.size, checkpoint.sam.size)),
        "mask_decoder": (
            MaskDecoder(checkpoint.seg_projection(), sam),
            torch.zeros(1, 256, grid, grid),
            torch.zeros(1, checkpoint.language_width),
        ),
    }[name]
    found = graph_cost(bundle.file(f"{name}.onnx")).run.operations
    assert found["fp32"] == torch_counts(lambda: module.eval()(*inputs)) > 1e5
    assert found["fp16"] == found["int8"] == 0


def test_lowered_graphs_take_the_same_operations(bundle: Bundle, tmp_path: Path) -> None:
    """Of FP16 all, of INT8 the products with weights."""
    source = bundle.file("clip_encoder.onnx")
    exact = graph_cost(source)
    write_fp16(source, tmp_path / "fp16.onnx")
    write_int8(source, tmp_path / "int8.onnx", defaultdict(lambda: 1.0))
    half, integer = graph_cost(tmp_path / "fp16.onnx"), graph_cost(tmp_path / "int8.onnx")
    whole = exact.run.operations["fp32"]
    assert half.run.operations == {"fp32": 0, "fp16": whole, "int8": 0}
    assert sum(integer.run.operations.values()) == whole
    assert integer.run.operations["int8"] > integer.run.operations["fp32"] > integer.run.operations["fp16"] == 0
    assert 0.5 * exact.weights <= half.weights < 0.6 * exact.weights and integer.weights < exact.weights


def test_one_token_costs_what_torch_counts(checkpoint: Checkpoint, bundle: Bundle) -> None:
    """The first, and one after seven."""
    cost = LanguageCost.of(read_gguf(bundle.file("llm.gguf")), "f16")
    model, cache = checkpoint.language(), None
    for before in range(8):
        step = torch.tensor([[before]])
        outs = []
        counted = torch_counts(lambda: outs.append(model(input_ids=step, past_key_values=cache, use_cache=True)))  # noqa: B023
        cache = outs[0].past_key_values
        found = cost.decode(1, before, 1).operations
        assert found["fp32"] + found["fp16"] == counted
    together, apart = cost.decode(8, 0, 0), [cost.decode(1, before, 0) for before in range(8)]
    assert together.operations["fp32"] == sum(each.operations["fp32"] for each in apart)
    assert together.operations["fp16"] == sum(each.operations["fp16"] for each in apart)


def test_graphs_are_read_as_onnx_reads_them(bundle: Bundle) -> None:
    for name in GRAPHS:
        path = bundle.file(f"{name}.onnx")
        model = onnx.load(path).graph
        found = read_onnx(path)
        assert [node.kind for node in found.nodes] == [node.op_type for node in model.node]
        assert [node.inputs for node in found.nodes] == [tuple(node.input) for node in model.node]
        assert found.weights == tuple(weight.name for weight in model.initializer)
        assert found.inputs == tuple(value.name for value in model.input)
        for weight in model.initializer:
            assert found.tensors[weight.name].shape == tuple(weight.dims)
            assert found.tensors[weight.name].bytes == onnx.numpy_helper.to_array(weight).nbytes
        for value in (*model.value_info, *model.output):
            axes = value.type.tensor_type.shape.dim
            for axis, size in zip(axes, found.tensors[value.name].shape, strict=True):
                symbolic = int(re.sub(r"\D", "", axis.dim_param) or 1) if axis.dim_param else UNKNOWN
                assert size == (axis.dim_value if axis.HasField("dim_value") else symbolic)


def test_the_gguf_is_read_as_gguf_reads_it(bundle: Bundle) -> None:
    path = bundle.file("llm.gguf")
    found, reader = read_gguf(path), gguf.GGUFReader(path)
    assert found.metadata["llama.block_count"] == reader.fields["llama.block_count"].contents()
    assert found.metadata["tokenizer.ggml.model"] == "llama"
    assert [token.decode() for token in found.tokens] == reader.fields["tokenizer.ggml.tokens"].contents()
    assert list(found.token_types) == reader.fields["tokenizer.ggml.token_type"].contents()
    assert found.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        assert found.tensors[tensor.name].shape == tuple(tensor.shape.tolist())
        assert 0 <= found.tensors[tensor.name].bytes - tensor.n_bytes < 32
    weights = LanguageCost.of(found, "f16").weights
    assert weights == path.stat().st_size - min(int(tensor.data_offset) for tensor in reader.tensors)


@pytest.mark.parametrize(
    "kv_type,expected",
    [("f32", 8.0), ("f16", 4.0), ("q8_0", 2 * 34 / 32)],  # keys and values, a number of each
)
def test_bytes_of_keys_and_values(kv_type: str, expected: float, checkpoint: Checkpoint, bundle: Bundle) -> None:
    config = checkpoint.language().config
    numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cost = LanguageCost.of(read_gguf(bundle.file("llm.gguf")), kv_type)
    assert cost.kv_bytes == round(numbers * expected)
    assert cost.decode(2, 5, 0).bytes == cost.matrix_bytes + 7 * cost.kv_bytes


def test_prompt_lengths_are_those_of_the_model(bundle: Bundle) -> None:
    manifest = bundle.for_review
    path = bundle.file("llm.gguf")
    with LanguageModel(path, manifest.language, manifest.conversation) as model:
        before, after = model.prompt_ids(manifest.conversation.question.replace("{object}", manifest.object))
        short = model._short_ids
    found = prompt_lengths(path, manifest.language, manifest.conversation, manifest.object)
    assert found == (len(before), len(after), len(short))


def product(path: Path, kind: int, shape: list[int | None], node: str = "MatMul", quantized: bool = False) -> Path:
    """a [2,3] · b [3,5], in a graph of its own."""
    weight = helper.make_tensor("w", TensorProto.INT8 if quantized else kind, [3, 5], np.zeros(15).tolist())
    nodes, constants = [helper.make_node(node, ["a", "w"], ["out"])], [weight]
    if quantized:
        scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0])
        constants.append(scale)
        nodes = [
            helper.make_node("QuantizeLinear", ["a", "scale"], ["qa"]),
            helper.make_node("DequantizeLinear", ["qa", "scale"], ["da"]),
            helper.make_node("DequantizeLinear", ["w", "scale"], ["dw"]),
            helper.make_node(node, ["da", "dw"], ["out"]),
        ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("a", kind, [2, 3])],
        [helper.make_tensor_value_info("out", kind, shape)],
        constants,
    )
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.mark.parametrize(
    "kind,quantized,expected,moved",
    [
        (TensorProto.FLOAT, False, "fp32", 4 * (6 + 15 + 10)),
        (TensorProto.FLOAT16, False, "fp16", 2 * (6 + 15 + 10)),
        # the weight stays int8, its scale is a float
        (TensorProto.FLOAT, True, "int8", 4 * (6 + 10) + 15 + 4),
    ],
)
def test_what_is_multiplied(kind: int, quantized: bool, expected: str, moved: int, tmp_path: Path) -> None:
    found = graph_cost(product(tmp_path / "a.onnx", kind, [2, 5], quantized=quantized)).run
    assert {name: count for name, count in found.operations.items() if count} == {expected: 2 * 2 * 3 * 5}
    assert found.bytes == moved


@pytest.mark.parametrize(
    "shape,node,says",
    [
        ([None, None], "Gemm", "does not tell the shapes around out"),
        ([2, 5], "QLinearMatMul", "holds QLinearMatMul, which is not counted"),
    ],
)
def test_graphs_that_cannot_be_counted(shape: list[int | None], node: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=says):
        graph_cost(product(tmp_path / "a.onnx", TensorProto.FLOAT, shape, node))


@pytest.mark.parametrize("read,name", [(read_onnx, "clip_encoder.onnx"), (read_gguf, "llm.gguf")])
def test_broken_files_are_one_error(read: Callable[[Path], object], name: str, bundle: Bundle, tmp_path: Path) -> None:
    data = bundle.file(name).read_bytes()
    for broken in (b"", b"nothing of it", data[: len(data) // 3], b"\xff" * 64, data[:8] + b"\xff" * 64):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(BundleError, match=f"{name}: its shapes cannot be read"):
            read(tmp_path / name)


MADE_UP = Hardware(
    name="Abacus",
    tflops={"fp32": 1, "fp16": 2, "int8": 4},
    gigabytes=10,
    memory_gib=1,
    shared=True,
    processors=1,
    gigahertz=1,
    source="none",
)


def graph(gigaoperations: float, megabytes: float) -> GraphCost:
    return GraphCost(Cost({"fp16": gigaoperations * 1e9}, megabytes * 1e6), round(megabytes * 1e6))


def test_floors_by_hand() -> None:
    """Times in ms: operations / (2 · 10⁹), bytes / 10⁷."""
    model = LanguageCost(
        kind="int8",
        matrices=4 * 10**9,
        matrix_bytes=2 * 10**8,
        head=10**9,
        head_bytes=10**8,
        attention=0,
        kv_bytes=10**5,
        weights=3 * 10**8,
    )
    chain = Chain(
        graphs={
            "clip_encoder": graph(20, 10),
            "ltc_projector": graph(2, 50),
            "sam_encoder": graph(400, 100),
            "mask_decoder": graph(4, 10),
        },
        similarity={"similarity": Cost({"int8": 4e9}, 5e7)},
        dialogue=Dialogue(model, kept=10, visual=20, after=11, short=1, longest=3, context=100),
    )
    found = floors(chain, MADE_UP)
    stages = {stage.stage: stage for stage in found.stages}
    assert stages["clip_encoder"].ms == 10 and stages["clip_encoder"].binds == "compute"
    assert stages["similarity"].ms == 5 and stages["similarity"].binds == "memory"
    # three passes: 20 tokens take 40 ms of products and 20.3 of memory; 10 take 20 and 20.4; one takes 2.5 and 30.41
    assert stages["prefill"].ms == pytest.approx(40 + 20.4 + 30.41)
    assert stages["decode, short answer"].ms == pytest.approx(30.42)
    assert stages["decode, 3 tokens"].ms == pytest.approx(30.42 + 30.43)
    assert found.totals_ms["screen"] == 15
    assert found.totals_ms["P(yes)"] == pytest.approx(5 + 90.81)
    # beside SAM's 200 ms of products: its and the language model's products, one after the other
    assert found.totals_ms["mask"] == pytest.approx(200 + 1 + (40 + 20 + 2.5) + 2.5 + 2)
    assert found.memory_gib["KV cache"] == pytest.approx(100 * 10**5 / 2**30) and found.fits
    assert found.frames_per_second[0.1] == pytest.approx(1000 / (15 + 0.1 * found.totals_ms["mask"]))
    small = MADE_UP.model_copy(update={"memory_gib": 0.4})
    assert not floors(chain, small).fits
    alone = floors(Chain(chain.graphs, chain.similarity, None), MADE_UP)
    assert alone.frames_per_second == {0.0: pytest.approx(1000 / 15)} and set(alone.totals_ms) == {"screen"}


def test_similarity_is_counted_as_its_kernel_reads_it() -> None:
    assert similarity_cost(3, 7, 16, "int8") == Cost({"int8": 2 * 3 * 7 * 16}, 3 * 16 * 4 + 7 * 16 + 3 * 12)


def test_every_hardware_is_whole() -> None:
    """INT8 is twice FP16 on all of these, four times on Ada, where FP16 adds into FP32 at half its rate."""
    for name, hardware in HARDWARE.items():
        assert round(hardware.tflops["int8"] / hardware.tflops["fp16"], 1) == {"rtx4090": 4, "orin-nano": 1.9}.get(
            name, 2
        )
        # FP32: 128 cores a multiprocessor, a multiplication and an addition a clock
        assert hardware.tflops["fp32"] == pytest.approx(0.256 * hardware.processors * hardware.gigahertz, rel=0.02)


@pytest.mark.parametrize("plan", HARDWARE)
def test_the_command_opens_no_engine(
    plan: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engines, "choose", None)
    monkeypatch.setattr(LanguageModel, "__init__", None)
    assert main(["bench", str(tiny_bundle), "--plan", plan, "--banks", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "arithmetic, not measurement"
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert {*GRAPHS, "prefill", "similarity, normal features", "similarity, 3 enrolled"} <= stages.keys()
    peak = HARDWARE[plan].tflops["fp32"]
    assert stages["sam_encoder"]["compute_ms"] == pytest.approx(stages["sam_encoder"]["gigaoperations"] / peak)
    assert main(["bench", str(tiny_bundle), "--plan", plan]) == 0
    assert "arithmetic, not measurement" in (shown := capsys.readouterr().out) and "frames/s" in shown


def test_the_prompt_counts_what_is_kept(bundle: Bundle) -> None:
    dialogue = chain_of(bundle, [1]).dialogue
    assert dialogue is not None and isinstance(bundle.manifest, Manifest)
    assert dialogue.visual == bundle.manifest.language.visual_tokens and dialogue.kept > 0 < dialogue.after


def test_the_papers_counts_are_those_that_others_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAM ViT-H's encoder: 2,973 G multiplications (efficientvit's table); LLaMA-7B, Q4_K_M: 3.80 GiB (llama.cpp's)."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import plans

    chain = plans.paper()
    assert chain.graphs["sam_encoder"].run.operations["fp16"] == pytest.approx(2 * 2973e9, rel=0.01)
    assert chain.dialogue.model.weights == pytest.approx(3.80 * 2**30, rel=0.002)
