// patch_scores on CUDA: what the best cosines to several banks say together; kernels/cuda/similarity.py documents the
// contract.
#include "launchers.h"

namespace vmad {
namespace {

__global__ __launch_bounds__(kThreads) void patch_scores(const float* nearest, const float* like, const float* unlike,
                                                         const unsigned char* counts, Index count, float temperature,
                                                         float contrast_weight, float distance_weight, float* score,
                                                         float* counted) {
  const Index i = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  float value = 0;
  if (like != nullptr) value += contrast_weight / (1 + expf((like[i] - unlike[i]) / temperature));
  if (nearest != nullptr) value += distance_weight * (1 - nearest[i]);
  score[i] = value;
  counted[i] = !counts[i] ? NAN : value == value ? value : INFINITY;
}

}  // namespace
}  // namespace vmad

VMAD_API int vmad_patch_scores(const float* nearest, const float* like, const float* unlike,
                               const unsigned char* counts, vmad::Index count, float temperature, float contrast_weight,
                               float distance_weight, float* score, float* counted, cudaStream_t stream) {
  using namespace vmad;
  const dim3 grid(unsigned(ceil_div(count, kThreads)));
  return launch(patch_scores, grid, kThreads, 0, stream, nearest, like, unlike, counts, count, temperature,
                contrast_weight, distance_weight, score, counted);
}
