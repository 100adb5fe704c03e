// anomaly_map on CUDA: patch scores to a smoothed map at the frame's size. Enlarging, Gaussian and the way back through
// the preprocessing are linear along each axis, so kernels/cuda/images.py folds them into one band of weights an axis.
#include "launchers.h"

namespace vmad {
namespace {

/// Output i is the sum of weights[i, t] times input first[i] + t; first[i] is −1 where nothing was inspected.
struct Band {
  const int* first;
  const float* weights;
  int count, taps;
};

__global__ __launch_bounds__(kThreads) void spread(const float* scores, int grid, Band y, Band x, float* map) {
  const int column = int(blockIdx.x * kThreads + threadIdx.x), row = int(blockIdx.y);
  if (column >= x.count) return;
  const int from_row = y.first[row], from_column = x.first[column];
  float value = NAN;
  if (from_row >= 0 && from_column >= 0) {
    value = 0;
    for (int i = 0; i < y.taps; ++i) {
      float along_row = 0;
      for (int j = 0; j < x.taps; ++j) {
        along_row += x.weights[column * x.taps + j] * scores[(from_row + i) * grid + from_column + j];
      }
      value += y.weights[row * y.taps + i] * along_row;
    }
  }
  map[Index(row) * x.count + column] = value;
}

}  // namespace
}  // namespace vmad

VMAD_API int vmad_anomaly_map(const float* scores, int grid, const int* y_first, const float* y_weights, int y_count,
                              int y_taps, const int* x_first, const float* x_weights, int x_count, int x_taps,
                              float* map, cudaStream_t stream) {
  using namespace vmad;
  const Band y{y_first, y_weights, y_count, y_taps}, x{x_first, x_weights, x_count, x_taps};
  const dim3 blocks(unsigned(ceil_div(x_count, kThreads)), unsigned(y_count));
  return launch(spread, blocks, kThreads, 0, stream, scores, grid, y, x, map);
}
