// preprocess on CUDA: a camera's bytes to a model's pixels, by the integer arithmetic of Pillow's resize, so that the
// result is the processor's to the last bit. kernels/cuda/images.py makes the weights and documents the contract.
#include "launchers.h"

namespace vmad {
namespace {

enum Format { kMono8, kRgb8, kBgr8, kBayerRg8 };

/// A frame [height, width] or [height, width, 3] that lies at (left, top) of a larger canvas of one colour.
struct Frame {
  const unsigned char* data;
  int format, height, width, top, left;
  unsigned char colour[3];

  __device__ int at(int y, int x) const { return data[Index(y) * width + x]; }

  /// Red, green and blue of a mosaic whose first row is red, green, and second green, blue; the mean of the nearest
  /// where the mosaic has another colour. The outermost pixels repeat their neighbours inside.
  __device__ void demosaic(int y, int x, int (&rgb)[3]) const {
    y = y < 1 ? 1 : y > height - 2 ? height - 2 : y;
    x = x < 1 ? 1 : x > width - 2 ? width - 2 : x;
    const int own = at(y, x), beside = at(y, x - 1) + at(y, x + 1), above = at(y - 1, x) + at(y + 1, x);
    if (y % 2 != x % 2) {  // green; a red row has its reds beside
      rgb[1] = own;
      rgb[y % 2 * 2] = (beside + 1) / 2;
      rgb[2 - y % 2 * 2] = (above + 1) / 2;
    } else {
      const int corners = at(y - 1, x - 1) + at(y - 1, x + 1) + at(y + 1, x - 1) + at(y + 1, x + 1);
      rgb[y % 2 * 2] = own;
      rgb[1] = (beside + above + 2) / 4;
      rgb[2 - y % 2 * 2] = (corners + 2) / 4;
    }
  }

  /// The canvas's pixel.
  __device__ void pixel(int y, int x, int (&rgb)[3]) const {
    y -= top, x -= left;
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    if (inside && format == kBayerRg8) return demosaic(y, x, rgb);
    for (int c = 0; c < 3; ++c) {
      rgb[c] = !inside              ? colour[c]
               : format == kMono8   ? at(y, x)
               : data[(Index(y) * width + x) * 3 + (format == kBgr8 ? 2 - c : c)];
    }
  }
};

/// One axis of a resize: output i is the sum of weights[i, t] times input first[i] + t. Weights are in 2⁻²².
struct Axis {
  const int* first;
  const int* weights;
  int count, taps;
};

__device__ inline unsigned char rounded(int sum) {
  sum = (sum + (1 << 21)) >> 22;
  return static_cast<unsigned char>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/// rows [3, count, x.count]: the canvas's rows from first_row on, resized along x.
__global__ __launch_bounds__(kThreads) void resize_rows(Frame frame, Axis x, int first_row, int count,
                                                        unsigned char* rows) {
  const int column = int(blockIdx.x * kThreads + threadIdx.x), row = int(blockIdx.y);
  if (column >= x.count) return;
  int sums[3] = {};
  for (int t = 0; t < x.taps; ++t) {
    const int weight = x.weights[column * x.taps + t];
    int rgb[3];
    frame.pixel(first_row + row, x.first[column] + t, rgb);
    for (int c = 0; c < 3; ++c) sums[c] += weight * rgb[c];
  }
  for (int c = 0; c < 3; ++c) rows[(Index(c) * count + row) * x.count + column] = rounded(sums[c]);
}

/// pixels [3, height, width]: the rows resized along y, each value as `values` [3, 256] has it; 0 past both axes.
__global__ __launch_bounds__(kThreads) void resize_columns(const unsigned char* rows, int first_row, int count, Axis y,
                                                           int row_length, const float* values, int height, int width,
                                                           float* pixels) {
  const int column = int(blockIdx.x * kThreads + threadIdx.x), row = int(blockIdx.y);
  if (column >= width) return;
  for (int c = 0; c < 3; ++c) {
    float value = 0;
    if (row < y.count && column < row_length) {
      int sum = 0;
      for (int t = 0; t < y.taps; ++t) {
        const int from = y.first[row] - first_row + t;
        const int exists = from < count ? from : count - 1;  // its weight is 0
        sum += y.weights[row * y.taps + t] * rows[(Index(c) * count + exists) * row_length + column];
      }
      value = values[c * 256 + rounded(sum)];
    }
    pixels[(Index(c) * height + row) * width + column] = value;
  }
}

}  // namespace
}  // namespace vmad

VMAD_API int vmad_preprocess(const void* frame, int format, int frame_height, int frame_width, int top, int left,
                             const unsigned char* host_colour, const int* x_first, const int* x_weights, int x_count,
                             int x_taps, const int* y_first, const int* y_weights, int y_count, int y_taps,
                             int first_row, int rows, const float* values, unsigned char* workspace, float* pixels,
                             int height, int width, cudaStream_t stream) {
  using namespace vmad;
  const Frame source{static_cast<const unsigned char*>(frame), format,           frame_height,     frame_width, top, left,
                     {host_colour[0], host_colour[1], host_colour[2]}};
  const Axis x{x_first, x_weights, x_count, x_taps}, y{y_first, y_weights, y_count, y_taps};
  const dim3 row_grid(unsigned(ceil_div(x_count, kThreads)), unsigned(rows));
  const cudaError_t error = launch(resize_rows, row_grid, kThreads, 0, stream, source, x, first_row, rows, workspace);
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(ceil_div(width, kThreads)), unsigned(height));
  return launch(resize_columns, grid, kThreads, 0, stream, workspace, first_row, rows, y, x_count, values, height,
                width, pixels);
}
