"""docs/plans.md: floors (`vmad bench --plan`) of given bundles and of the paper's shapes, on all hardware it knows.

    python benchmarks/plans.py demo/bundle > docs/plans.md

The paper's networks are counted by torch's FlopCounterMode on modules without weights; tests/runtime/test_floors.py
holds that it counts what `vmad bench --plan` counts in their graphs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, SamConfig, SamModel

from vmad_edge.export.graphs.clip_encoder import ClipEncoder
from vmad_edge.export.graphs.mask_decoder import MaskDecoder
from vmad_edge.export.graphs.sam_encoder import SamEncoder
from vmad_edge.export.models.ltc import LtcProjector
from vmad_edge.export.models.seg_projection import SegProjection
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.costs import Cost, GraphCost, LanguageCost, similarity_cost
from vmad_edge.runtime.floors import Chain, Dialogue, Floors, chain_of, floors, number
from vmad_edge.runtime.hardware import HARDWARE
from vmad_edge.runtime.headers import Gguf, GgufTensor

BANKS = (1, 10, 50, 200)
LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY = 32, 4096, 11008, 32, 32004
"""LLaVA-7B's LLaMA, and tokens added to it."""
TOKENS = {"kept": 40, "visual": 144, "after": 60, "short": 2, "longest": 60}
"""Visual ones: LTC's 2×2 on 24×24 patches. The others are assumed: no tokenizer is at hand."""
Q4_K, Q6_K = (12, 144), (14, 210)
"""ggml's type, and bytes for 256 weights."""


def main() -> None:
    print(ABOUT)
    print("| hardware | FP32 | FP16 | INT8 | GB/s | GiB | from |\n|---|---:|---:|---:|---:|---:|---|")
    for name, gpu in HARDWARE.items():
        peaks = " | ".join(f"{gpu.tflops[kind]:g}" for kind in ("fp32", "fp16", "int8"))
        print(f"| `{name}`: {gpu.name} | {peaks} | {gpu.gigabytes:g} | {gpu.memory_gib:g} | {gpu.source} |")
    print("\nTFLOPS (INT8: TOPS) of products, dense.")
    for path in sys.argv[1:]:
        bundle = Bundle.open(path)
        precision = ", ".join(sorted(set(bundle.manifest.precision.values()) or {"fp32"}))
        write(f"`{path}` ({bundle.hash[:8]}…, graphs in {precision})", chain_of(bundle, BANKS))
    write("The paper's shapes: CLIP ViT-L/14-336, LLaVA-7B in q4_k_m, SAM ViT-H, graphs in fp16", paper())
    print(PAPER.format(**TOKENS))


def write(title: str, chain: Chain) -> None:
    found = [floors(chain, hardware) for hardware in HARDWARE.values()]
    print(f"\n## {title}\n")
    print("| ms, at least | GFLOP | MB | " + " | ".join(HARDWARE) + " |")
    print("|---|---:|---:|" + "---:|" * len(found))
    for stages in zip(*(each.stages for each in found), strict=True):
        cells = (f"{number(stage.ms)} {stage.binds[0]}" for stage in stages)
        counts = f"{number(stages[0].gigaoperations)} | {number(stages[0].megabytes)}"
        print(f"| {stages[0].stage} | {counts} | {' | '.join(cells)} |")
    for name in found[0].totals_ms:
        print(f"| **{name}** | | | {' | '.join(number(each.totals_ms[name]) for each in found)} |")
    for share in found[0].frames_per_second:
        speeds = (number(each.frames_per_second[share]) for each in found)
        print(f"| frames/s at best, {share:.0%} reviewed | | | {' | '.join(speeds)} |")
    print(f"| GiB that stay in memory, at least | | | {' | '.join(map(_memory, found))} |")


def _memory(found: Floors) -> str:
    return f"{sum(found.memory_gib.values()):.2f}{'' if found.fits else ': too large'}"


def paper() -> Chain:
    """Of VMAD's published networks; what the paper leaves open as in docs/design-choices.md."""
    with torch.device("meta"):
        vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            )
        )
        sam = SamModel(
            SamConfig(
                vision_config={
                    "hidden_size": 1280,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 16,
                    "mlp_dim": 5120,
                    "global_attn_indexes": [7, 15, 23, 31],
                }
            )
        )
        graphs = {
            "clip_encoder": graph(ClipEncoder(vision, -2, (-1, -2, -3, -4)), (1, 3, 336, 336)),
            "ltc_projector": graph(LtcProjector(1024, 4, WIDTH, 2, 8), (1, 576, 1024), (1, 4, 576, 1024)),
            "sam_encoder": graph(SamEncoder(sam.vision_encoder), (1, 3, 1024, 1024)),
            "mask_decoder": graph(MaskDecoder(SegProjection(WIDTH, 256), sam), (1, 256, 64, 64), (1, WIDTH)),
        }
    similarity = {f"similarity, {n} enrolled": similarity_cost(576, 576 * n, 1024, "float16") for n in BANKS}
    context = 512 + TOKENS["visual"] + 64
    return Chain(graphs, similarity, Dialogue(LanguageCost.of(llama(), "f16"), **TOKENS, context=context))


def graph(module: nn.Module, *shapes: Sequence[int]) -> GraphCost:
    """Of `module` in FP16, inputs and outputs in FP32."""
    inputs = [torch.zeros(*shape) for shape in shapes]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        out = module.eval()(*inputs)
    moved = [*inputs, *([out] if isinstance(out, Tensor) else out)]
    weights = 2 * sum(weight.numel() for weight in module.parameters())
    operations = float(counter.get_total_flops())
    return GraphCost(Cost({"fp16": operations}, weights + 4 * sum(tensor.numel() for tensor in moved)), weights)


def llama() -> Gguf:
    """As llama.cpp quantizes it to Q4_K_M: the matrices that matter most keep 6 bits (llama_tensor_get_type)."""
    tensors = {"token_embd.weight": _matrix(WIDTH, VOCABULARY, Q4_K), "output.weight": _matrix(WIDTH, VOCABULARY, Q6_K)}
    for layer in range(LAYERS):
        more = layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2
        finer = Q6_K if more else Q4_K
        for name, rows, columns, kind in (
            ("attn_q", WIDTH, WIDTH, Q4_K),
            ("attn_k", WIDTH, WIDTH, Q4_K),
            ("attn_v", WIDTH, WIDTH, finer),
            ("attn_output", WIDTH, WIDTH, Q4_K),
            ("ffn_gate", WIDTH, HIDDEN, Q4_K),
            ("ffn_up", WIDTH, HIDDEN, Q4_K),
            ("ffn_down", HIDDEN, WIDTH, finer),
        ):
            tensors[f"blk.{layer}.{name}.weight"] = _matrix(rows, columns, kind)
    sizes = {"block_count": LAYERS, "embedding_length": WIDTH, "attention.head_count": HEADS}
    metadata: dict[str, int | float | str] = {f"llama.{name}": size for name, size in sizes.items()}
    return Gguf({"general.architecture": "llama", **metadata}, tensors)


def _matrix(rows: int, columns: int, kind: tuple[int, int]) -> GgufTensor:
    shape = (rows, columns)
    return GgufTensor(shape, kind[0], math.prod(shape) // 256 * kind[1])


ABOUT = """\
# Hardware that one has not bought: floors

**Arithmetic, not measurement.** `vmad bench BUNDLE --plan NAME` counts the operations and bytes of a bundle's own
graphs and GGUF and holds them against a data sheet: no pass takes less than its operations at the peak, nor less than
its bytes at the memory's bandwidth. Real times are longer: preprocessing, map, copies and launches are not counted, and
no engine reaches a peak. `c`: compute binds, `m`: memory does. It rules hardware out; it promises no line speed.

- An FP32 graph runs on the CUDA cores: TF32 is off. `--precision fp16` is what these GPUs are made for.
- Reference banks lie on the GPU as float16, or int8.
- P(yes), the mask (short answer) and the last word (longest answer) are counted from a review's beginning.
- Quantized language models multiply INT8 in llama.cpp. A prefill is three decodes (visual tokens, question, last
  token), each of which reads all weights; what stands before the image is there already.
- SAM's encoder and the language model share the GPU: together they take at least the sum of their products, and of
  their bytes.
- Memory: weights and KV cache. Engines' working memory comes on top and, on a Jetson, the system.
- Some of the hardware's figures were read where the named source is quoted, not in it: check them before you buy.

This page is made by `python benchmarks/plans.py demo/bundle > docs/plans.md`.
"""
PAPER = """
VMAD publishes no weights: its networks are counted without them (torch's FlopCounterMode; the tests hold that it agrees
with what is counted in graphs), q4_k_m by llama.cpp's rule of types. Tokens: {kept} before the image, {visual} visual,
{after} after them, {short} of the short answer, {longest} of the longest: all but the visual ones are assumed."""


if __name__ == "__main__":
    main()
