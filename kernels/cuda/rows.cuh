// Features scaled to length 1, as the products want them: halves, or signed bytes with a scale a row.
#pragma once

#include "tile.cuh"

namespace vmad {

/// Features as they come: float32, or float16 where `half`.
struct Features {
  const void* data;
  bool half;
  Index count, width;

  __device__ float at(Index row, Index d) const {
    const Index place = row * width + d;
    return half ? half_to_float(static_cast<const std::uint16_t*>(data)[place]) : static_cast<const float*>(data)[place];
  }
};

/// Unit rows, `pitch` bytes each, zeros after the width. `scale` [count] is null for halves.
struct Rows {
  unsigned char* data;
  float* scale;
  Index count, pitch;
};

/// The two ways to hold a unit row. `Sum` is what its dot products are summed in.
struct Half {
  using Sum = float;
  using Value = std::uint16_t;
  __device__ static Value value(float ratio, float length) { return float_to_half(ratio / length); }
  __device__ static Value nan() { return 0x7fff; }
};

struct Int8 {
  using Sum = int;
  using Value = std::int8_t;
  /// The row's largest element is 127: the scale that the row is stored with carries the length.
  __device__ static Value value(float ratio, float) { return static_cast<Value>(rintf(ratio * 127)); }
  __device__ static Value nan() { return 0; }
};

/// One warp scales one row: by its largest element first, so that no square vanishes or overflows. A row with a NaN
/// or an infinity becomes NaN, in its scale where its values cannot say so.
template <class Number>
__device__ void normalise_row(const Features& features, const Rows& unit, Index row) {
  const unsigned lane = threadIdx.x % kWarp;
  float largest = 0;
  for (Index d = lane; d < features.width; d += kWarp) {
    const float size = fabsf(features.at(row, d));
    largest = size < INFINITY ? fmaxf(largest, size) : INFINITY;  // a NaN is not below infinity either
    if (largest == INFINITY) break;
  }
  largest = warp_max(largest);

  float squares = 0;
  if (largest > 0 && largest < INFINITY) {
    for (Index d = lane; d < features.width; d += kWarp) {
      const float ratio = features.at(row, d) / largest;
      squares += ratio * ratio;
    }
    for (unsigned step = kWarp / 2; step > 0; step /= 2) squares += __shfl_xor_sync(kAll, squares, step);
  }
  const float length = sqrtf(squares);

  auto* values = reinterpret_cast<typename Number::Value*>(unit.data + row * unit.pitch);
  for (Index d = lane; d < unit.pitch / Index(sizeof *values); d += kWarp) {
    typename Number::Value value = 0;
    if (largest == INFINITY) {
      value = Number::nan();
    } else if (d < features.width && length > 0) {
      value = Number::value(features.at(row, d) / largest, length);
    }
    values[d] = value;
  }
  if (lane == 0 && unit.scale != nullptr) {
    unit.scale[row] = largest == INFINITY ? NAN : length > 0 ? 1 / (127 * length) : 0;
  }
}

}  // namespace vmad
