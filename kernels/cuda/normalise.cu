// Features to unit rows: what a bank is made of, and the query of the split path.
#include "launchers.h"
#include "targets.h"

namespace vmad {
namespace {

template <class Number>
__global__ __launch_bounds__(kThreads) void normalise_rows(Features features, Rows unit) {
  const Index row = Index(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row < features.count) normalise_row<Number>(features, unit, row);
}

}  // namespace

cudaError_t normalise(Features features, Rows unit, bool int8, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(features.count, kWarps)));
  return launch(int8 ? normalise_rows<Int8> : normalise_rows<Half>, grid, kThreads, 0, stream, features, unit);
}

}  // namespace vmad

VMAD_API int vmad_normalise(const void* features, int half, vmad::Index count, vmad::Index width, int int8, void* rows,
                            float* scale, cudaStream_t stream) {
  using namespace vmad;
  const Rows unit{static_cast<unsigned char*>(rows), scale, count, row_bytes(width, int8)};
  return normalise({features, half != 0, count, width}, unit, int8, stream);
}

VMAD_API const char* vmad_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

/// Such as "87, 89, 90 and PTX of 80 by nvcc 12.6, which has no 110, 120"; from kernels/cuda/CMakeLists.txt.
VMAD_API const char* vmad_targets() { return VMAD_CUDA_TARGETS; }
