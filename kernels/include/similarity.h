// Patch similarity on the processor. What the operators compute is defined in kernels/reference.py.
#pragma once

#include <cstdint>

namespace vmad {

/// Features [count, width], row after row. `normalised`: the rows come from `normalise`.
struct Rows {
  const float* data;
  std::int64_t count;
  std::int64_t width;
  bool normalised;
};

/// Rows of length 1 into `unit` [count, width]. A zero row stays zero, a NaN stays one, an infinity becomes one.
void normalise(Rows rows, float* unit);

/// For each query row its k-th best bank row: `score` [Q], `index` [Q]. NaN and −1 where there is none.
/// Memory: O(Q·k) and a block a thread.
void max_cosine(Rows query, Rows bank, std::int64_t k, std::int64_t threads, float* score, std::int64_t* index);

/// For each query row its best cosine in each segment [offsets[s], offsets[s + 1]) of the bank: `score` [Q, S].
/// The segments cover the bank, none is empty. Memory: a block a thread.
void segmented_max_cosine(Rows query, Rows bank, const std::int64_t* offsets, std::int64_t segments,
                          std::int64_t threads, float* score);

}  // namespace vmad
