// interval_mean on CUDA: cosines to segments → the mean distance to the nearest of them (MuSc, arXiv 2401.16753);
// kernels/cuda/similarity.py documents the contract.
#include "launchers.h"

namespace vmad {
namespace {

template <class T>
__device__ T warp_sum(T value) {
  for (unsigned step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

/// Between rows of length 1.
__device__ float distance(unsigned order) { return sqrtf(2 - 2 * score_of(order)); }

/// One warp a row. Row r leaves out segment first_own + r / rows_each; none where rows_each is 0.
__global__ __launch_bounds__(kThreads) void interval_mean(const float* cosine, Index rows, Index segments, Index wanted,
                                                          Index first_own, Index rows_each, float* score) {
  const Index row = Index(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const Index own = rows_each > 0 ? first_own + row / rows_each : -1;
  const auto order_at = [&](Index segment) {
    const float value = cosine[row * segments + segment];
    return segment != own && value == value ? order_of(value) : 0;
  };

  // The least of the `wanted` greatest, bit by bit from the highest. It stays 0 where there are fewer.
  unsigned least = 0;
  for (unsigned bit = 1u << 31; bit != 0; bit >>= 1) {
    unsigned count = 0;
    for (Index s = threadIdx.x % kWarp; s < segments; s += kWarp) count += order_at(s) >= (least | bit);
    if (warp_sum(count) >= wanted) least |= bit;
  }
  float sum = 0;
  unsigned above = 0;
  for (Index s = threadIdx.x % kWarp; s < segments; s += kWarp) {
    const unsigned order = order_at(s);
    if (order > least) sum += distance(order), ++above;
  }
  sum = warp_sum(sum);
  above = warp_sum(above);
  if (threadIdx.x % kWarp != 0) return;
  score[row] = least == 0 ? NAN : (sum + float(wanted - above) * distance(least)) / float(wanted);
}

}  // namespace
}  // namespace vmad

VMAD_API int vmad_interval_mean(const float* cosine, vmad::Index rows, vmad::Index segments, vmad::Index wanted,
                                vmad::Index first_own, vmad::Index rows_each, float* score, cudaStream_t stream) {
  using namespace vmad;
  const dim3 grid(unsigned(ceil_div(rows, kWarps)));
  return launch(interval_mean, grid, kThreads, 0, stream, cosine, rows, segments, wanted, first_own, rows_each, score);
}
