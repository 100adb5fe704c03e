// The arithmetic that every tile of every operator shares: how scores are ordered, which element of a tile a lane
// holds, where a 16-byte chunk lies in shared memory, and how tiles are shared out.
#pragma once

#include "machine.cuh"

namespace vmad {

using Index = std::int64_t;
using Key = unsigned long long;

constexpr unsigned kThreads = 128;
constexpr unsigned kWarps = kThreads / kWarp;

constexpr float kNone = -INFINITY;

__host__ __device__ inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

/// Bytes of a row of unit features: whole slices, so that no product has a remainder.
constexpr int kSlice = 64;
__host__ __device__ inline Index row_bytes(Index width, bool int8) {
  return ceil_div(width * (int8 ? 1 : 2), kSlice) * kSlice;
}

// Scores as numbers that order them. 0 stands for none.

/// Rises with `score`, which is not NaN; −0 equals 0.
__device__ inline unsigned order_of(float score) {
  const unsigned bits = __float_as_uint(score + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
}

__device__ inline float score_of(unsigned order) {
  return __uint_as_float(order ^ (order >> 31 ? 0x80000000 : 0xffffffff));
}

/// A score and its row: of equal scores, the lowest row is the greatest key.
__device__ inline Key key_of(float score, Index row) { return Key(order_of(score)) << 32 | ~unsigned(row); }

/// Rounding may leave the dot product of two unit rows a little outside [−1, 1]. NaN stays.
__device__ inline float cosine_of(unsigned order, float query_scale) {
  const float score = score_of(order) * query_scale;
  return order == 0 ? NAN : score > 1 ? 1.0f : score < -1 ? -1.0f : score;
}

template <class T>
__device__ inline T warp_max(T value) {
  for (unsigned step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, value, step);
    value = other > value ? other : value;
  }
  return value;
}

/// A block's tile is kRows query rows by kRows bank rows; its four warps share it two by two. A warp holds kAcross by
/// kDown products of 16 query rows by 8 bank rows.
template <int kQueryParts, int kBankParts>
struct Tile {
  static constexpr int kAcross = kQueryParts, kDown = kBankParts;
  static constexpr int kQueryRows = 2 * 16 * kQueryParts, kBankRows = 2 * 8 * kBankParts;
  static constexpr int kStageBytes = (kQueryRows + kBankRows) * kSlice;

  /// Of this lane's row h (0, 1) in part i of its warp, in the tile.
  __device__ static int query_row(int i, int h) {
    return threadIdx.x / kWarp / 2 * 16 * kQueryParts + i * 16 + h * 8 + threadIdx.x % kWarp / 4;
  }

  /// Of this lane's column e (0, 1) in part j of its warp.
  __device__ static int bank_row(int j, int e) {
    return threadIdx.x / kWarp % 2 * 8 * kBankParts + j * 8 + threadIdx.x % 4 * 2 + e;
  }
};

using LargeTile = Tile<4, 8>;  // 128 × 128
using SmallTile = Tile<2, 4>;  // 64 × 64, where large ones would leave multiprocessors idle

/// Where chunk (16 bytes) of a row lies in a slice. Turned by the row, so that the eight rows that one matrix load
/// touches lie in eight different groups of banks.
__device__ inline int chunk_place(int row, int chunk) { return row * kSlice + (chunk ^ (row >> 1 & 3)) * 16; }

/// Shares of the bank's tiles: `count` blocks for each tile of query rows, `tiles` bank tiles each.
struct Shares {
  Index count, tiles;
};

/// So that the multiprocessor with most to do has least: of one to four times the blocks that the device holds at
/// once. A block costs a fraction of a tile to begin.
__host__ inline Shares share_out(Index query_tiles, Index bank_tiles, Index processors, Index blocks_each) {
  Shares best = {};
  Index least = 0;
  for (Index rounds = 1; rounds <= 4; ++rounds) {
    const Index wanted = rounds * processors * blocks_each / query_tiles;
    const Index tiles = ceil_div(bank_tiles, wanted < 1 ? 1 : wanted);
    const Index count = ceil_div(bank_tiles, tiles);
    const Index cost = ceil_div(query_tiles * count, processors) * (4 * tiles + 1);
    if (rounds == 1 || cost < least) best = {count, tiles}, least = cost;
  }
  return best;
}

}  // namespace vmad
