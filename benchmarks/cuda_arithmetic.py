"""What the CUDA kernels cost on paper: operations and bytes counted from their tiles, against what each GPU can do.

    python benchmarks/cuda_arithmetic.py        # the tables at the end of docs/measured/cuda.md

Arithmetic, not measurement. The floor is the longer of the operator's operations at the tensor cores' dense peak and
its bytes at the memory's bandwidth. The share is the floor over what the kernel's own tiles ask for at most: padded
operations, reads from L2, reads of shared memory, and the blocks of the last, incomplete wave. Latency, launches and
clocks that fall under load come on top.
"""

from __future__ import annotations

from math import ceil

from vmad_edge.runtime.hardware import HARDWARE, Hardware

GPUS = [HARDWARE[name] for name in ("orin-agx", "orin-nano", "thor", "rtx4090", "h200")]
"""Thor's peak is that of its own matrix instructions, which mma.sync does not reach."""
SIZES = ((256, 256), (256, 2560), (256, 51200), (576, 115200), (1369, 273800))
WIDTH = 1024
L2_BYTES, SHARED_BYTES = 64, 128  # a clock and multiprocessor
ABOUT = """\
No GPU was at hand (2026-11-20; nvcc 13.0, AMD EPYC, 2 cores). The kernels compile for SM 87, 89, 90, 110, 120 and PTX
of 80 without a spilled register, and the same sources pass their contract on the processor, on a machine that runs
their threads, barriers, asynchronous copies and matrix instructions (`tests/kernels/cuda_host`). On that machine the
whole screen gives the processor's map and score within 2e-3 on the demo's parts (`tests/runtime/test_screen_cuda.py`).
Nothing of it has run on a GPU, and its speed is unknown: `tests/gpu/run.sh` is to be run on one. What follows is
arithmetic, made by `python benchmarks/cuda_arithmetic.py`.
"""
BESIDE = """
A share of 1.00 says that the memory's floor rules, not that latency is hidden. Thor's peak is that of its own matrix
instructions; mma.sync through shared memory stays far below it on large banks. segmented_max_cosine adds 4·Q·S bytes
and a pass over a tile's sums for each segment in it. The split path adds 8·Q·M bytes, which stay in L2 where its chunk
of 4·Q·4,096 bytes fits, and Q·M comparisons a rank.
"""
FRAME, CLIP, SAM, GRID = (1080, 1440), 336, 1024, 24


def main() -> None:
    print("# CUDA kernels: compiled and host-tested, not run\n")
    print(ABOUT)
    print(f"## max_cosine, D={WIDTH}: floor and share of it that the tiles leave, at most\n")
    print("| Q×M | type | operations | bytes | " + " | ".join(gpu.name for gpu in GPUS) + " |")
    print("|---|---|---|---|" + "---|" * len(GPUS))
    for q, m in SIZES:
        for kind, size in (("float16", 2), ("int8", 1)):
            operations, moved = 2 * q * m * WIDTH, (q * 4 + m * size) * WIDTH + q * 12
            least = (1e6 * floor(gpu, operations, moved, size) for gpu in GPUS)
            cells = (f"{us:.1f} µs, {share(gpu, q, m, size):.2f}" for gpu, us in zip(GPUS, least, strict=True))
            print(f"| {q}×{m} | {kind} | {operations / 1e9:.2f} G | {moved / 1e6:.1f} MB | " + " | ".join(cells) + " |")
    print(BESIDE)
    print(f"## The rest of the screen, frame of {FRAME[1]}×{FRAME[0]}, float32 out\n")
    print("| operator | operations | bytes | " + " | ".join(gpu.name for gpu in GPUS) + " |")
    print("|---|---|---|" + "---|" * len(GPUS))
    for name, operations, moved in images():
        cells = (f"{1e6 * moved / gpu.gigabytes / 1e9:.1f} µs" for gpu in GPUS)
        print(f"| {name} | {operations / 1e6:.1f} M | {moved / 1e6:.2f} MB | " + " | ".join(cells) + " |")
    print("\nBytes at the memory's bandwidth; a launch costs some microseconds where it is not in a graph.")


def floor(gpu: Hardware, operations: float, moved: float, size: int) -> float:
    """Seconds."""
    return max(operations / (peak(gpu, size) * 1e12), moved / (gpu.gigabytes * 1e9))


def peak(gpu: Hardware, size: int) -> float:
    """Of products of float16 or int8, by their size in bytes."""
    return gpu.tflops[{2: "fp16", 1: "int8"}[size]]


def share(gpu: Hardware, q: int, m: int, size: int) -> float:
    """Of the floor, by the rules of kernels/cuda/product.cuh."""
    rows = 128 if ceil(q / 128) * ceil(m / 128) >= gpu.processors else 64
    query_tiles, bank_tiles = ceil(q / rows), ceil(m / rows)
    blocks, each = min(
        (
            shares_of(query_tiles, bank_tiles, rounds * gpu.processors * (2 if rows == 128 else 4))
            for rounds in range(1, 5)
        ),
        key=lambda found: ceil(found[0] / gpu.processors) * (4 * found[1] + 1),
    )
    pitch = WIDTH * size
    tile_operations, tile_l2 = 2 * rows * rows * WIDTH, 2 * rows * pitch
    # Each of four warps reads its half of the tile's query rows and of its bank rows; each byte is written once.
    tile_shared = 4 * rows * pitch + tile_l2
    clocks = gpu.gigahertz * 1e9
    tile = max(
        tile_operations / (peak(gpu, size) * 1e12 / gpu.processors),
        tile_l2 / (L2_BYTES * clocks),
        tile_shared / (SHARED_BYTES * clocks),
    )
    longest = ceil(blocks / gpu.processors) * each * tile  # of the multiprocessor with most blocks
    moved = (q * 4 + m * size) * WIDTH + q * 12
    return floor(gpu, 2 * q * m * WIDTH, moved, size) / max(longest, moved / (gpu.gigabytes * 1e9))


def shares_of(query_tiles: int, bank_tiles: int, at_once: int) -> tuple[int, int]:
    """Blocks, and the bank tiles of each."""
    each = ceil(bank_tiles / max(at_once // query_tiles, 1))
    return query_tiles * ceil(bank_tiles / each), each


def images() -> list[tuple[str, float, float]]:
    """Name, operations, bytes."""
    height, width = FRAME
    out = []
    for name, rows, columns, side, reach in (
        ("preprocess to clip_pixels (bicubic)", CLIP, CLIP, CLIP, 2),
        ("preprocess to sam_pixels (bilinear)", SAM * height // width, SAM, SAM, 1),
    ):
        taps_x, taps_y = 2 * reach * max(width / columns, 1), 2 * reach * max(height / rows, 1)
        operations = 2 * 3 * (height * columns * taps_x + rows * columns * taps_y)
        out.append((name, operations, 3 * height * width + 2 * 3 * height * columns + 4 * 3 * side * side))
    taps = ceil(8 * 4 / (CLIP / GRID)) + 2
    out.append(("anomaly_map", 2 * height * width * taps * (taps + 1), 4 * height * width + 4 * GRID * GRID))
    out.append(("top_mean", 4 * height * width, 4 * 4 * height * width))
    return out


if __name__ == "__main__":
    main()
