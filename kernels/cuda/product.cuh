// The product of a tile of query rows with a run of bank tiles, slice by slice, and what each operator makes of it.
//
// Both sides stream through a ring of shared-memory stages by asynchronous copies; slices of one bank tile follow on
// those of the last without a pause. A dot product is summed slice by slice in an order that depends on the width
// alone, so that equal rows give equal bits in every path. Rows past the end repeat the last row: every operator
// leaves them out by their number.
#pragma once

#include "rows.cuh"

namespace vmad {

constexpr int kStages = 3;  // 48 KB with large tiles: two blocks on each multiprocessor of every target

template <class Number, class Tile>
using Sums = typename Number::Sum[Tile::kAcross][Tile::kDown][4];

template <class Tile>
__device__ inline void load_slice(unsigned char* stage, const Rows& query, Index first_query, const Rows& bank,
                                  Index first_bank, Index slice) {
#pragma unroll
  for (int c = threadIdx.x; c < (Tile::kQueryRows + Tile::kBankRows) * 4; c += kThreads) {
    const int row = c / 4, chunk = c % 4;
    const bool is_query = row < Tile::kQueryRows;
    const unsigned char* const rows = is_query ? query.data : bank.data;
    const Index count = is_query ? query.count : bank.count;
    const Index wanted = is_query ? first_query + row : first_bank + row - Tile::kQueryRows;
    const Index exists = wanted < count ? wanted : count - 1;
    copy_async(stage + chunk_place(row, chunk), rows + exists * bank.pitch + slice * kSlice + chunk * 16);
  }
}

template <class Number, class Tile>
__device__ inline void multiply_slice(const unsigned char* stage, Sums<Number, Tile>& sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int query_row = warp / 2 * 16 * Tile::kAcross + lane % 16;
  const int bank_row = Tile::kQueryRows + warp % 2 * 8 * Tile::kDown + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    std::uint32_t query[Tile::kAcross][4], bank[Tile::kDown / 2][4];
#pragma unroll
    for (int i = 0; i < Tile::kAcross; ++i) {
      load_matrices(query[i], stage + chunk_place(query_row + i * 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Tile::kDown / 2; ++j) {
      load_matrices(bank[j], stage + chunk_place(bank_row + j * 16, step * 2 + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < Tile::kAcross; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kDown; ++j) multiply(sums[i][j], query[i], bank[j / 2][j % 2 * 2], bank[j / 2][j % 2 * 2 + 1]);
    }
  }
}

/// Calls take(first_bank, sums) for `tiles` bank tiles from first_bank on, in rising order.
template <class Number, class Tile, class Take>
__device__ inline void for_each_tile(const Rows& query, Index first_query, const Rows& bank, Index first_bank,
                                     Index tiles, Take take) {
  unsigned char* const ring = dynamic_shared();
  const Index slices = bank.pitch / kSlice;

  Index load_bank = first_bank, load_slice_number = 0, loads = tiles * slices;
  int load_stage = 0;
  const auto load_next = [&] {
    if (loads > 0) {
      load_slice<Tile>(ring + load_stage * Tile::kStageBytes, query, first_query, bank, load_bank, load_slice_number);
      if (++load_slice_number == slices) load_slice_number = 0, load_bank += Tile::kBankRows;
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
      --loads;
    }
    commit_copies();  // an empty one keeps the count that wait_copies goes by
  };
  for (int i = 0; i < kStages - 1; ++i) load_next();

  int stage = 0;
  for (; tiles > 0; --tiles, first_bank += Tile::kBankRows) {
    Sums<Number, Tile> sums = {};
    for (Index slice = 0; slice < slices; ++slice) {
      wait_copies<kStages - 2>();
      __syncthreads();  // everybody's copies have landed, and everybody is done with the stage that is loaded next
      load_next();
      multiply_slice<Number, Tile>(ring + stage * Tile::kStageBytes, sums);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    take(first_bank, sums);
  }
}

/// A sum as a score; the bank's scale with bytes, whose NaN rows live in it.
__device__ inline float scored(float sum, const Rows&, Index) { return sum; }
__device__ inline float scored(int sum, const Rows& bank, Index row) {
  return float(sum) * bank.scale[row < bank.count ? row : bank.count - 1];
}

/// How the blocks that share a tile of query rows agree; zero between launches.
struct Agreement {
  unsigned taken, done, finished;
};

/// The blocks that share a tile of query rows scale these rows between them, once, and go on when all are there.
/// Nobody waits for a block that has not begun: rows are taken by whoever runs. `clear(row)` is called once a row.
template <class Number, class Clear>
__device__ inline void scale_query_rows(const Features& features, const Rows& unit, Index first, Index rows,
                                        Agreement& agreement, Clear clear) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned count = unsigned(features.count - first < rows ? features.count - first : rows);
  for (;;) {
    unsigned row = lane == 0 ? atomicAdd(&agreement.taken, 1u) : 0;
    row = __shfl_sync(kAll, row, 0);
    if (row >= count) break;
    normalise_row<Number>(features, unit, first + row);
    clear(first + row);
    __threadfence();
    __syncwarp();
    if (lane == 0) atomicAdd(&agreement.done, 1u);
  }
  if (threadIdx.x == 0) {
    while (atomicAdd(&agreement.done, 0u) < count) pause();
    __threadfence();
  }
  __syncthreads();
}

/// The tile for a problem, the device's multiprocessors, and how many blocks each holds at once.
struct TileChoice {
  bool large;
  Index processors, blocks_each;
  cudaError_t error;
};

/// Large tiles read half as much for each product; small ones where large ones would leave multiprocessors idle.
inline TileChoice tile_for(Index query_count, Index bank_count) {
  int count = 1;
  const cudaError_t error = processors(count);
  const Index tiles = ceil_div(query_count, LargeTile::kQueryRows) * ceil_div(bank_count, LargeTile::kBankRows);
  const bool large = tiles >= count;
  return {large, count, large ? 2 : 4, error};
}

/// True in the last of `blocks` blocks to come here; it then sees what all of them wrote.
__device__ inline bool last_to_finish(Agreement& agreement, unsigned blocks) {
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = atomicAdd(&agreement.finished, 1u) == blocks - 1;
    if (last) agreement.taken = agreement.done = agreement.finished = 0;
    __threadfence();
  }
  return __syncthreads_or(last);
}

}  // namespace vmad
