// The split path's first half: the scores of a chunk of the bank, tile by tile.
#include "launchers.h"
#include "product.cuh"

namespace vmad {
namespace {

using Block = LargeTile;

template <class Number>
__global__ __launch_bounds__(kThreads) void product_tile(Rows query, Rows bank, Index first_bank, float* scores) {
  const Index first_query = Index(blockIdx.x) * Block::kQueryRows;
  const Index first_row = first_bank + Index(blockIdx.y) * Block::kBankRows;
  const auto write = [&](Index, const Sums<Number, Block>& sums) {
#pragma unroll
    for (int i = 0; i < Block::kAcross; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Index row = first_query + Block::query_row(i, h);
        if (row >= query.count) continue;
#pragma unroll
        for (int j = 0; j < Block::kDown; ++j) {
          const Index bank_row = first_row + Block::bank_row(j, 0);
          const float2 pair = make_float2(scored(sums[i][j][h * 2], bank, bank_row),
                                          scored(sums[i][j][h * 2 + 1], bank, bank_row + 1));
          *reinterpret_cast<float2*>(scores + row * kChunk + bank_row - first_bank) = pair;
        }
      }
    }
  };
  for_each_tile<Number, Block>(query, first_query, bank, first_row, 1, write);
}

}  // namespace

cudaError_t product(Rows query, Rows bank, bool int8, Index first_bank, Index count, float* scores,
                    cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(query.count, Block::kQueryRows)), unsigned(ceil_div(count, Block::kBankRows)));
  return launch(int8 ? product_tile<Int8> : product_tile<Half>, grid, kThreads, kStages * Block::kStageBytes, stream,
                query, bank, first_bank, scores);
}

}  // namespace vmad
