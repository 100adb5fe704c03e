// segmented_max_cosine on CUDA; kernels/cuda.py documents the contract, kernels/reference.py defines it.
//
// Until a row's score in a segment is whole, its place in `score` holds the order of the best so far (tile.cuh).
// fused: one launch; a block keeps the best of the segment that its bank tiles are in and hands it on where it ends.
// split: a product tile by tile into a buffer, and a warp for each row and segment of it.
#include "launchers.h"
#include "product.cuh"

namespace vmad {
namespace {

/// The segment that holds a bank row.
__device__ Index segment_of(const Index* offsets, Index segments, Index row) {
  Index low = 0, high = segments;
  while (high - low > 1) {
    const Index middle = (low + high) / 2;
    (offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}

template <class Number, class Tile>
__global__ __launch_bounds__(kThreads) void fused(Features features, Rows query, Rows bank, const Index* offsets,
                                                  Index segments, Index bank_tiles, Agreement* agreements,
                                                  float* score) {
  auto* const orders = reinterpret_cast<unsigned*>(score);
  const Index first_query = Index(blockIdx.x) * Tile::kQueryRows;
  Agreement& agreement = agreements[blockIdx.x];
  scale_query_rows<Number>(features, query, first_query, Tile::kQueryRows, agreement, [&](Index row) {
    for (Index s = threadIdx.x % kWarp; s < segments; s += kWarp) orders[row * segments + s] = 0;
  });

  const Index all_tiles = ceil_div(bank.count, Tile::kBankRows), first_tile = blockIdx.y * bank_tiles;
  const Index tiles = all_tiles - first_tile < bank_tiles ? all_tiles - first_tile : bank_tiles;
  Index segment = segment_of(offsets, segments, first_tile * Tile::kBankRows);
  float best[Tile::kAcross][2];
  const auto clear = [&] {
#pragma unroll
    for (int i = 0; i < Tile::kAcross; ++i) best[i][0] = best[i][1] = kNone;
  };
  const auto hand_on = [&] {
#pragma unroll
    for (int i = 0; i < Tile::kAcross; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float value = best[i][h];
        for (unsigned step = 1; step < 4; step *= 2) {
          const float other = __shfl_xor_sync(kAll, value, step);
          if (other > value) value = other;
        }
        const Index row = first_query + Tile::query_row(i, h);
        if (threadIdx.x % 4 == 0 && row < query.count && value != kNone) {
          atomicMax(&orders[row * segments + segment], order_of(value));
        }
      }
    }
  };

  clear();
  for_each_tile<Number, Tile>(
      query, first_query, bank, first_tile * Tile::kBankRows, tiles,
      [&](Index first_bank, const Sums<Number, Tile>& sums) {
        const Index end = first_bank + Tile::kBankRows < bank.count ? first_bank + Tile::kBankRows : bank.count;
        for (Index from = first_bank; from < end;) {
          const Index segment_end = offsets[segment + 1], to = segment_end < end ? segment_end : end;
#pragma unroll
          for (int j = 0; j < Tile::kDown; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const Index row = first_bank + Tile::bank_row(j, e);
              if (row < from || row >= to) continue;
#pragma unroll
              for (int i = 0; i < Tile::kAcross; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                  const float value = scored(sums[i][j][h * 2 + e], bank, row);
                  if (value > best[i][h]) best[i][h] = value;
                }
              }
            }
          }
          if (to == segment_end) {
            hand_on();
            clear();
            ++segment;
          }
          from = to;
        }
      });
  if (segment < segments) hand_on();  // what this block has of a segment that the next one goes on with

  if (!last_to_finish(agreement, gridDim.y)) return;
  const Index rows = query.count - first_query < Tile::kQueryRows ? query.count - first_query : Tile::kQueryRows;
  for (Index place = first_query * segments + threadIdx.x; place < (first_query + rows) * segments; place += kThreads) {
    const float scale = query.scale == nullptr ? 1 : query.scale[place / segments];
    score[place] = cosine_of(load_shared_by_all(&orders[place]), scale);
  }
}

/// blockIdx.y counts the segments that touch the chunk, from first_segment on.
__global__ __launch_bounds__(kThreads) void best_of_segment(const float* scores, Rows query, const Index* offsets,
                                                            Index segments, Index first_segment, Index first_bank,
                                                            Index count, float* score) {
  const Index row = Index(blockIdx.x) * kWarps + threadIdx.x / kWarp, segment = first_segment + blockIdx.y;
  if (row >= query.count) return;
  const Index begin = offsets[segment], end = offsets[segment + 1], chunk_end = first_bank + count;
  unsigned best = 0;
  for (Index column = (begin > first_bank ? begin : first_bank) + threadIdx.x % kWarp;
       column < (end < chunk_end ? end : chunk_end); column += kWarp) {
    const float value = scores[row * kChunk + column - first_bank];
    const unsigned order = value == value ? order_of(value) : 0;
    best = order > best ? order : best;
  }
  best = warp_max(best);
  if (threadIdx.x % kWarp != 0) return;
  float& place = score[row * segments + segment];
  const unsigned before = begin < first_bank ? __float_as_uint(place) : 0;
  best = before > best ? before : best;
  place = end > chunk_end ? __uint_as_float(best) : cosine_of(best, query.scale == nullptr ? 1 : query.scale[row]);
}

template <class Number, class Tile>
cudaError_t launch_fused(const Features& features, const Rows& query, const Rows& bank, const Index* offsets,
                         Index segments, const TileChoice& pick, Agreement* agreements, float* score, cudaStream_t stream) {
  const Index query_tiles = ceil_div(query.count, Tile::kQueryRows);
  const Index bank_tiles = ceil_div(bank.count, Tile::kBankRows);
  const Shares shares = share_out(query_tiles, bank_tiles, pick.processors, pick.blocks_each);
  return launch(fused<Number, Tile>, dim3(unsigned(query_tiles), unsigned(shares.count)), kThreads,
                kStages * Tile::kStageBytes, stream, features, query, bank, offsets, segments, shares.tiles, agreements,
                score);
}

/// Every segment in a tile costs the fused path a pass over its sums, as much as eight slices' worth of products.
Path choose(Index bank_count, Index segments) {
  return bank_count / segments >= LargeTile::kBankRows / 4 ? kFused : kSplit;
}

Workspace workspace_of(Index query_count, Index pitch, Path path) {
  return Workspace(query_count, pitch, 0, path == kSplit ? kChunk : 0);
}

cudaError_t segmented_max_cosine(const Features& features, const Rows& bank, bool int8, const Index* host_offsets,
                                 const Index* offsets, Index segments, Path path, void* workspace, float* score,
                                 cudaStream_t stream) {
  const Workspace parts = workspace_of(features.count, bank.pitch, path);
  const Rows query = parts.query_rows(workspace, features.count, bank.pitch, int8);
  if (path == kFused) {
    const auto pick = tile_for(query.count, bank.count);
    auto* const agreements = reinterpret_cast<Agreement*>(workspace);
    const auto run = int8 ? (pick.large ? launch_fused<Int8, LargeTile> : launch_fused<Int8, SmallTile>)
                          : (pick.large ? launch_fused<Half, LargeTile> : launch_fused<Half, SmallTile>);
    if (pick.error != cudaSuccess) return pick.error;
    return run(features, query, bank, offsets, segments, pick, agreements, score, stream);
  }

  auto* const scores = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + parts.scores);
  cudaError_t error = normalise(features, query, int8, stream);
  Index segment = 0;
  for (Index first = 0; error == cudaSuccess && first < bank.count; first += kChunk) {
    const Index count = bank.count - first < kChunk ? bank.count - first : kChunk;
    error = product(query, bank, int8, first, count, scores, stream);
    if (error != cudaSuccess) break;
    Index end = segment;
    while (end < segments && host_offsets[end] < first + count) ++end;
    const dim3 grid(unsigned(ceil_div(query.count, kWarps)), unsigned(end - segment));
    error = launch(best_of_segment, grid, kThreads, 0, stream, scores, query, offsets, segments, segment, first, count,
                   score);
    segment = host_offsets[end] == first + count ? end : end - 1;
  }
  return error;
}

}  // namespace
}  // namespace vmad

VMAD_API vmad::Index vmad_segmented_max_cosine_workspace(vmad::Index query_count, vmad::Index bank_count,
                                                         vmad::Index width, int int8, vmad::Index segments, int path) {
  using namespace vmad;
  return workspace_of(query_count, row_bytes(width, int8), path == kAuto ? choose(bank_count, segments) : Path(path))
      .bytes;
}

VMAD_API int vmad_segmented_max_cosine(const void* query, int query_half, vmad::Index query_count, void* bank_rows,
                                       float* bank_scale, vmad::Index bank_count, vmad::Index width, int int8,
                                       const vmad::Index* host_offsets, const vmad::Index* offsets,
                                       vmad::Index segments, int path, void* workspace, float* score,
                                       cudaStream_t stream) {
  using namespace vmad;
  const Rows bank{static_cast<unsigned char*>(bank_rows), bank_scale, bank_count, row_bytes(width, int8)};
  return segmented_max_cosine({query, query_half != 0, query_count, width}, bank, int8, host_offsets, offsets, segments,
                              path == kAuto ? choose(bank_count, segments) : Path(path), workspace, score, stream);
}
