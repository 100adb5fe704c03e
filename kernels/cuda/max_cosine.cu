// max_cosine on CUDA; kernels/cuda.py documents the contract, kernels/reference.py defines it.
//
// fused: one launch. Each block keeps the best score of its query rows in registers over its run of bank tiles; the
// blocks of a query tile meet in one key a row. Rank 1 only.
// split: a product tile by tile into a buffer of kChunk bank rows, and a reduction that keeps each row's k best. The
// product is computed once whatever the rank.
#include "launchers.h"
#include "product.cuh"

namespace vmad {
namespace {

__device__ void write_best(Key best, const float* query_scale, Index row, float* score, Index* index) {
  score[row] = cosine_of(unsigned(best >> 32), query_scale == nullptr ? 1 : query_scale[row]);
  index[row] = score[row] == score[row] ? Index(~unsigned(best)) : -1;
}

template <class Number, class Tile>
__global__ __launch_bounds__(kThreads) void fused(Features features, Rows query, Rows bank, Index bank_tiles,
                                                  Agreement* agreements, Key* keys, float* score, Index* index) {
  const Index first_query = Index(blockIdx.x) * Tile::kQueryRows;
  Agreement& agreement = agreements[blockIdx.x];
  scale_query_rows<Number>(features, query, first_query, Tile::kQueryRows, agreement, [&](Index row) {
    if (threadIdx.x % kWarp == 0) keys[row] = 0;
  });

  float best[Tile::kAcross][2];
  unsigned best_row[Tile::kAcross][2];
#pragma unroll
  for (int i = 0; i < Tile::kAcross; ++i) {
    for (int h = 0; h < 2; ++h) best[i][h] = kNone, best_row[i][h] = 0;
  }
  const Index all_tiles = ceil_div(bank.count, Tile::kBankRows), first_tile = blockIdx.y * bank_tiles;
  const Index tiles = all_tiles - first_tile < bank_tiles ? all_tiles - first_tile : bank_tiles;
  for_each_tile<Number, Tile>(
      query, first_query, bank, first_tile * Tile::kBankRows, tiles,
      [&](Index first_bank, const Sums<Number, Tile>& sums) {
#pragma unroll
        for (int j = 0; j < Tile::kDown; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Index row = first_bank + Tile::bank_row(j, e);
            if (row >= bank.count) continue;
#pragma unroll
            for (int i = 0; i < Tile::kAcross; ++i) {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const float value = scored(sums[i][j][h * 2 + e], bank, row);
                if (value > best[i][h]) best[i][h] = value, best_row[i][h] = unsigned(row);  // rows rise: ties stay
              }
            }
          }
        }
      });

#pragma unroll
  for (int i = 0; i < Tile::kAcross; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Key key = best[i][h] == kNone ? 0 : key_of(best[i][h], best_row[i][h]);
      for (unsigned step = 1; step < 4; step *= 2) {
        const Key other = __shfl_xor_sync(kAll, key, step);
        if (other > key) key = other;
      }
      const Index row = first_query + Tile::query_row(i, h);
      if (threadIdx.x % 4 == 0 && row < query.count && key != 0) atomicMax(&keys[row], key);
    }
  }

  if (!last_to_finish(agreement, gridDim.y)) return;
  for (Index row = first_query + threadIdx.x; row < first_query + Tile::kQueryRows && row < query.count;
       row += kThreads) {
    write_best(load_shared_by_all(&keys[row]), query.scale, row, score, index);
  }
}

/// One warp a query row puts the best of a chunk into the row's list of k falling keys.
__global__ __launch_bounds__(kThreads) void keep_best(const float* scores, Rows query, Index first_bank, Index count, int k,
                                                 bool last, Key* lists, float* score, Index* index) {
  const Index row = Index(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= query.count) return;
  const unsigned lane = threadIdx.x % kWarp;
  Key* const list = lists + row * k;
  if (first_bank == 0) {
    for (int place = lane; place < k; place += kWarp) list[place] = 0;
    __syncwarp();
  }
  for (Key limit = ~Key(0);;) {
    Key best = 0;
    for (Index column = lane; column < count; column += kWarp) {
      const float value = scores[row * kChunk + column];
      const Key key = value == value ? key_of(value, first_bank + column) : 0;
      if (key < limit && key > best) best = key;
    }
    best = warp_max(best);
    if (best <= list[k - 1]) break;
    __syncwarp();  // all have read the list before it changes
    if (lane == 0) {
      int place = k - 1;
      for (; place > 0 && best > list[place - 1]; --place) list[place] = list[place - 1];
      list[place] = best;
    }
    __syncwarp();
    limit = best;
  }
  if (last && lane == 0) write_best(list[k - 1], query.scale, row, score, index);
}

template <class Number, class Tile>
cudaError_t launch_fused(const Features& features, const Rows& query, const Rows& bank, const TileChoice& pick,
                         Agreement* agreements, Key* keys, float* score, Index* index, cudaStream_t stream) {
  const Index query_tiles = ceil_div(query.count, Tile::kQueryRows);
  const Index bank_tiles = ceil_div(bank.count, Tile::kBankRows);
  const Shares shares = share_out(query_tiles, bank_tiles, pick.processors, pick.blocks_each);
  return launch(fused<Number, Tile>, dim3(unsigned(query_tiles), unsigned(shares.count)), kThreads,
                kStages * Tile::kStageBytes, stream, features, query, bank, shares.tiles, agreements, keys, score,
                index);
}

/// One launch and nothing written is best, but it finds the first rank alone.
Path choose(int rank) { return rank == 1 ? kFused : kSplit; }

Workspace workspace_of(Index query_count, Index pitch, Index rank, Path path) {
  return Workspace(query_count, pitch, rank, path == kSplit ? kChunk : 0);
}

cudaError_t max_cosine(const Features& features, const Rows& bank, bool int8, int rank, Path path, void* workspace,
                       float* score, Index* index, cudaStream_t stream) {
  const Workspace parts = workspace_of(features.count, bank.pitch, rank, path);
  const Rows query = parts.query_rows(workspace, features.count, bank.pitch, int8);
  auto* const start = static_cast<unsigned char*>(workspace);
  auto* const keys = reinterpret_cast<Key*>(start + parts.keys);

  if (path == kFused) {
    const auto pick = tile_for(query.count, bank.count);
    auto* const agreements = reinterpret_cast<Agreement*>(workspace);
    const auto run = int8 ? (pick.large ? launch_fused<Int8, LargeTile> : launch_fused<Int8, SmallTile>)
                          : (pick.large ? launch_fused<Half, LargeTile> : launch_fused<Half, SmallTile>);
    return pick.error ? pick.error : run(features, query, bank, pick, agreements, keys, score, index, stream);
  }

  auto* const scores = reinterpret_cast<float*>(start + parts.scores);
  cudaError_t error = normalise(features, query, int8, stream);
  const dim3 grid(unsigned(ceil_div(query.count, kWarps)));
  for (Index first = 0; error == cudaSuccess && first < bank.count; first += kChunk) {
    const Index count = bank.count - first < kChunk ? bank.count - first : kChunk;
    error = product(query, bank, int8, first, count, scores, stream);
    if (error != cudaSuccess) break;
    error = launch(keep_best, grid, kThreads, 0, stream, scores, query, first, count, rank, first + count == bank.count,
                   keys, score, index);
  }
  return error;
}

}  // namespace
}  // namespace vmad

VMAD_API vmad::Index vmad_max_cosine_workspace(vmad::Index query_count, vmad::Index width, int int8, int rank,
                                               int path) {
  using namespace vmad;
  return workspace_of(query_count, row_bytes(width, int8), rank, path == kAuto ? choose(rank) : Path(path)).bytes;
}

VMAD_API int vmad_max_cosine(const void* query, int query_half, vmad::Index query_count, void* bank_rows,
                             float* bank_scale, vmad::Index bank_count, vmad::Index width, int int8, int rank, int path,
                             void* workspace, float* score, vmad::Index* index, cudaStream_t stream) {
  using namespace vmad;
  const Rows bank{static_cast<unsigned char*>(bank_rows), bank_scale, bank_count, row_bytes(width, int8)};
  return max_cosine({query, query_half != 0, query_count, width}, bank, int8, rank,
                    path == kAuto ? choose(rank) : Path(path), workspace, score, index, stream);
}
