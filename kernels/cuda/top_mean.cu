// top_mean on CUDA: the largest value and the mean of the largest share, exactly.
//
// The smallest of the largest values is found digit by digit, a histogram a digit; one more pass sums what is above it.
#include "launchers.h"

namespace vmad {
namespace {

constexpr int kBits = 11, kBins = 1 << kBits, kPasses = 3;  // of the 32 bits that order a value: 11, 11, 10
constexpr Index kMostBlocks = 1024;

/// Zero between calls.
struct State {
  unsigned bins[kBins];
  unsigned finished;
  unsigned prefix;   // the digits found so far
  unsigned wanted;   // of the values that begin with them, how many are among the largest
  unsigned largest;  // order
  unsigned share;    // how many values are among the largest
};
static_assert(sizeof(State) <= Workspace::kAgreementBytes);

/// NaN: 0.
__device__ unsigned order_or_none(float value) { return value == value ? order_of(value) : 0; }

/// The last block to come here returns true and sees what all have added.
__device__ bool last(State& state) {
  __threadfence();
  __syncthreads();
  bool own = false;
  if (threadIdx.x == 0) {
    own = atomicAdd(&state.finished, 1u) == gridDim.x - 1;
    if (own) state.finished = 0;
    __threadfence();
  }
  return __syncthreads_or(own);
}

/// Pass 0 knows no digit yet and counts the values too.
__global__ __launch_bounds__(kThreads) void find_digit(const float* values, Index count, unsigned one_in, int pass,
                                                       State* state) {
  auto* const bins = reinterpret_cast<unsigned*>(dynamic_shared());
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const int below = 32 - kBits * (pass + 1) > 0 ? 32 - kBits * (pass + 1) : 0;  // bits after this digit
  const unsigned here = pass == kPasses - 1 ? (1u << (32 - kBits * pass)) - 1 : kBins - 1;
  unsigned largest = 0;
  for (Index i = Index(blockIdx.x) * kThreads + threadIdx.x; i < count; i += Index(gridDim.x) * kThreads) {
    const unsigned order = order_or_none(values[i]);
    largest = order > largest ? order : largest;
    const bool begins_so = pass == 0 || order >> (32 - kBits * pass) == state->prefix;
    if (order != 0 && begins_so) atomicAdd(&bins[order >> below & here], 1u);
  }
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) atomicMax(&state->largest, largest);
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    if (bins[bin] != 0) atomicAdd(&state->bins[bin], bins[bin]);
  }

  if (!last(*state)) return;
  constexpr int kRun = kBins / kThreads;
  unsigned run = 0;
  for (int i = 0; i < kRun; ++i) {
    const int bin = threadIdx.x * kRun + i;
    bins[bin] = load_shared_by_all(&state->bins[bin]);
    run += bins[bin];
    state->bins[bin] = 0;
  }
  unsigned* const runs = bins + kBins;
  runs[threadIdx.x] = run;
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned wanted = state->wanted;
  if (pass == 0) {
    unsigned all = 0;
    for (unsigned i = 0; i < kThreads; ++i) all += runs[i];
    wanted = all / one_in > 1 ? all / one_in : all > 0 ? 1 : 0;
    state->share = wanted;
  }
  int place = kThreads - 1;
  for (; place > 0 && runs[place] < wanted; --place) wanted -= runs[place];
  int bin = place * kRun + kRun - 1;
  for (; bin > place * kRun && bins[bin] < wanted; --bin) wanted -= bins[bin];
  state->wanted = wanted;
  state->prefix = state->prefix << (pass == kPasses - 1 ? 32 - kBits * pass : kBits) | unsigned(bin);
}

/// result: the largest value, the mean of the largest.
__global__ __launch_bounds__(kThreads) void sum_above(const float* values, Index count, State* state, double* sums,
                                                      float* result) {
  const unsigned least = state->prefix;
  double sum = 0;
  for (Index i = Index(blockIdx.x) * kThreads + threadIdx.x; i < count; i += Index(gridDim.x) * kThreads) {
    if (order_or_none(values[i]) > least) sum += values[i];
  }
  auto* const by_thread = reinterpret_cast<double*>(dynamic_shared());
  by_thread[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned i = 1; i < kThreads; ++i) sum += by_thread[i];
    sums[blockIdx.x] = sum;
  }
  if (!last(*state) || threadIdx.x != 0) return;
  sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += load_shared_by_all(&sums[i]);
  const unsigned share = state->share;
  result[0] = share == 0 ? NAN : score_of(state->largest);
  result[1] = share == 0 ? NAN : float((sum + double(state->wanted) * score_of(least)) / share);
  state->prefix = state->wanted = state->largest = state->share = 0;
}

unsigned blocks_for(Index count) {
  const Index wanted = ceil_div(count, kThreads * 16);
  return unsigned(wanted < kMostBlocks ? wanted : kMostBlocks);
}

}  // namespace
}  // namespace vmad

VMAD_API vmad::Index vmad_top_mean_workspace(vmad::Index count) {
  using namespace vmad;
  return Workspace::kAgreementBytes + blocks_for(count) * Index(sizeof(double));
}

VMAD_API int vmad_top_mean(const float* values, vmad::Index count, int one_in, void* workspace, float* result,
                           cudaStream_t stream) {
  using namespace vmad;
  auto* const state = static_cast<State*>(workspace);
  auto* const sums = reinterpret_cast<double*>(static_cast<unsigned char*>(workspace) + Workspace::kAgreementBytes);
  const dim3 grid(blocks_for(count));
  for (int pass = 0; pass < kPasses; ++pass) {
    const cudaError_t error = launch(find_digit, grid, kThreads, (kBins + kThreads) * sizeof(unsigned), stream, values,
                                     count, unsigned(one_in), pass, state);
    if (error != cudaSuccess) return error;
  }
  return launch(sum_above, grid, kThreads, kThreads * sizeof(double), stream, values, count, state, sums, result);
}
