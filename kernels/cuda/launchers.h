// What the library offers. Every launcher queues its kernels on `stream` and returns what CUDA says of that: it neither
// allocates nor waits. Pointers are the device's unless they say host. kernels/cuda.py checks the arguments.
#pragma once

#include "rows.cuh"

// A library of C names: opened by ctypes, which needs no Python headers and no CUDA at import.
#define VMAD_API extern "C" __attribute__((visibility("default")))

namespace vmad {

/// How the parts of the similarity operators' workspace lie. `agreements` come first, whatever the sizes: they are
/// zero before the first call, and every call leaves them so.
struct Workspace {
  static constexpr Index kAgreementBytes = 1 << 16;

  Index keys, rows, scale, scores, bytes;

  Workspace(Index query_count, Index pitch, Index rank, Index score_columns) {
    const auto after = [](Index place, Index size) { return ceil_div(place + size, 256) * 256; };
    keys = kAgreementBytes;
    rows = after(keys, query_count * rank * Index(sizeof(Key)));
    scale = after(rows, query_count * pitch);
    scores = after(scale, query_count * Index(sizeof(float)));
    bytes = after(scores, query_count * score_columns * Index(sizeof(float)));
  }

  Rows query_rows(void* start, Index query_count, Index pitch, bool int8) const {
    auto* const place = static_cast<unsigned char*>(start);
    return {place + rows, int8 ? reinterpret_cast<float*>(place + scale) : nullptr, query_count, pitch};
  }
};

/// How an operator works. `kAuto` leaves it to the operator's rule.
enum Path { kAuto = 0, kFused = 1, kSplit = 2 };

constexpr Index kChunk = 4096;  // bank rows of the split path's buffer: 9.4 MB with 576 query rows, which L2 may keep

cudaError_t normalise(Features features, Rows unit, bool int8, cudaStream_t stream);

/// scores [Q, kChunk] of bank rows first_bank to first_bank + count, count ≤ kChunk; what lies beyond is undefined.
cudaError_t product(Rows query, Rows bank, bool int8, Index first_bank, Index count, float* scores,
                    cudaStream_t stream);

}  // namespace vmad
