// A CUDA machine on the processor, for tests: machine.cuh's instructions and the few CUDA words that the kernels use.
//
// Each thread of a block runs as a fiber until it waits for others; two blocks are resident at a time. The machine is
// unkind where the real one may be: shared memory starts as NaN, an asynchronous copy lands no sooner than its wait
// makes it, and threads take their turns in an order that the test chooses, some warps slower than others, so that a
// missing barrier or wait is likely to show.
// Fragment layouts are those of the PTX ISA's tables for mma.m16n8k16, mma.m16n8k32 and ldmatrix.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <ucontext.h>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace vmad {

constexpr unsigned kWarp = 32;
constexpr unsigned kAll = 0xffffffff;

namespace host {

struct Meeting {
  unsigned arrived = 0, round = 0;
};

struct Slot {
  unsigned char bytes[24];
};

struct Warp {
  Meeting meeting;
  Slot slots[2][kWarp];
};

struct Block {
  dim3 index;
  Meeting meeting;
  bool any[2] = {};
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  Block* block;
  dim3 index;
  unsigned exchanges = 0, votes = 0;
  std::vector<std::vector<Copy>> copies{1};  // by commit; the last one is open
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool started = false, ended = false;
};

inline Thread* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline unsigned turn_order = 0;  // 0 forwards, 1 backwards, else shuffled by this seed, some warps slow
inline int multiprocessors = 4;
inline unsigned launches = 0;

inline void yield() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

inline void meet(Meeting& meeting, unsigned size) {
  const unsigned round = meeting.round;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    while (meeting.round == round) yield();
  }
}

/// What each lane of the warp gave; valid until the warp's next exchange but one.
template <class T>
const Slot* exchange(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Warp& warp = current->block->warps[threadIdx.x / kWarp];
  Slot* slots = warp.slots[current->exchanges++ % 2];
  std::memcpy(slots[threadIdx.x % kWarp].bytes, &mine, sizeof mine);
  meet(warp.meeting, kWarp);
  return slots;
}

template <class T>
T read(const Slot& slot, std::size_t place = 0) {
  T value;
  std::memcpy(&value, slot.bytes + place * sizeof value, sizeof value);
  return value;
}

inline void run_thread() {
  body();
  current->ended = true;
  _longjmp(scheduler, 1);
}

inline void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline std::unique_ptr<Thread> make_thread(Block& block, unsigned number) {
  constexpr std::size_t kStack = 1 << 16;
  auto thread = std::make_unique<Thread>();
  thread->block = &block;
  thread->index = dim3(number, 0, 0);
  thread->stack.reset(new unsigned char[kStack]);
  getcontext(&thread->start);
  thread->start.uc_stack.ss_sp = thread->stack.get();
  thread->start.uc_stack.ss_size = kStack;
  thread->start.uc_link = nullptr;
  makecontext(&thread->start, run_thread, 0);
  return thread;
}

inline void run_blocks(std::vector<Block>& blocks) {
  std::vector<std::unique_ptr<Thread>> threads;
  for (Block& block : blocks) {
    for (unsigned i = 0; i < blockDim.x; ++i) threads.push_back(make_thread(block, i));
  }
  std::vector<std::size_t> order(threads.size());
  std::iota(order.begin(), order.end(), 0);
  if (turn_order == 1) std::reverse(order.begin(), order.end());
  std::vector<unsigned> slowness(threads.size() / kWarp, 1);  // by warp: it runs in every so many rounds
  if (turn_order > 1) {
    std::mt19937 random(turn_order);
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned& slow : slowness) slow = random() % 2 ? 1 : 5;
  }
  bool running = true;
  for (unsigned round = 0; running; ++round) {
    running = false;
    for (std::size_t i : order) {
      if (threads[i]->ended) continue;
      running = true;
      if (round % slowness[i / kWarp] == 0) resume(*threads[i]);
    }
  }
}

}  // namespace host

inline unsigned char* dynamic_shared() { return host::current->block->shared.data(); }

inline void copy_async(void* shared, const void* global) { host::current->copies.back().push_back({shared, global}); }
inline void commit_copies() { host::current->copies.emplace_back(); }

template <int pending>
void wait_copies() {
  auto& copies = host::current->copies;
  while (copies.size() > pending + 1) {
    for (const host::Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, 16);
    copies.erase(copies.begin());
  }
}

inline void load_matrices(std::uint32_t (&part)[4], const void* shared_row) {
  const host::Slot* rows = host::exchange(shared_row);
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    const auto* row = host::read<const unsigned char*>(rows[i * 8 + lane / 4]);
    std::memcpy(&part[i], row + lane % 4 * 4, 4);
  }
}

inline float half_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -size : size;
}

inline std::uint16_t float_to_half(float value) {
  const std::uint16_t sign = __float_as_uint(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (std::isnan(size)) return sign | 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  if (size < std::ldexp(1.0f, -14)) return sign | std::uint16_t(std::lrint(std::ldexp(size, 24)));
  const unsigned bits = __float_as_uint(size);
  return sign | (bits + 0xfff + (bits >> 13 & 1) - (112 << 23)) >> 13;
}

struct Parts {
  std::uint32_t a[4], b[2];
};

/// Element k of row `row` of a: 32 bytes a row, two pieces of 16.
template <class T>
T element_of_a(const host::Slot* lanes, unsigned row, unsigned k) {
  constexpr unsigned kInPiece = 16 / sizeof(T), kInWord = 4 / sizeof(T);
  const unsigned word = row / 8 + k / kInPiece * 2;
  return host::read<T>(lanes[row % 8 * 4 + k % kInPiece / kInWord], word * kInWord + k % kInWord);
}

template <class T>
T element_of_b(const host::Slot* lanes, unsigned row, unsigned k) {
  constexpr unsigned kInPiece = 16 / sizeof(T), kInWord = 4 / sizeof(T);
  return host::read<T>(lanes[row * 4 + k % kInPiece / kInWord], (4 + k / kInPiece) * kInWord + k % kInWord);
}

inline float number(std::uint16_t half) {
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (unsigned bits = 0; bits < all.size(); ++bits) all[bits] = half_to_float(bits);
    return all;
  }();
  return table[half];
}
inline int number(std::int8_t byte) { return byte; }

template <class T, class Sum>
void multiply_as(Sum (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const host::Slot* lanes = host::exchange(Parts{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 32 / sizeof(T); ++k) {
      c[i] += number(element_of_a<T>(lanes, row, k)) * number(element_of_b<T>(lanes, column, k));
    }
  }
}

inline void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  multiply_as<std::uint16_t>(c, a, b0, b1);
}
inline void multiply(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  multiply_as<std::int8_t>(c, a, b0, b1);
}

template <class T>
T load_shared_by_all(const T* global) {
  return *global;
}

inline void pause() { host::yield(); }

inline cudaError_t processors(int& count) {
  count = host::multiprocessors;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || shared_bytes > 48 * 1024) return cudaErrorInvalidValue;
  ++host::launches;
  gridDim = grid;
  blockDim = dim3(threads);
  host::body = [=] { kernel(arguments...); };
  const unsigned count = grid.x * grid.y;
  for (unsigned first = 0; first < count; first += 2) {
    std::vector<host::Block> blocks(first + 1 < count ? 2 : 1);
    for (unsigned i = 0; i < blocks.size(); ++i) {
      blocks[i].index = dim3((first + i) % grid.x, (first + i) / grid.x, 0);
      blocks[i].warps.resize(threads / kWarp);
      blocks[i].shared.assign(shared_bytes, 0xff);
    }
    host::run_blocks(blocks);
  }
  return cudaSuccess;
}

}  // namespace vmad

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned step) {
  return vmad::host::read<T>(vmad::host::exchange(value)[threadIdx.x % vmad::kWarp ^ step]);
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return vmad::host::read<T>(vmad::host::exchange(value)[lane]);
}
inline void __syncwarp() { vmad::host::exchange(0); }
inline void __syncthreads() { vmad::host::meet(vmad::host::current->block->meeting, blockDim.x); }
inline int __syncthreads_or(int vote) {
  vmad::host::Block& block = *vmad::host::current->block;
  const unsigned turn = vmad::host::current->votes++ % 2;
  block.any[turn] |= vote != 0;
  __syncthreads();
  const bool any = block.any[turn];
  __syncthreads();
  block.any[turn] = false;
  return any;
}
inline void __threadfence() {}

template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  return before;
}
template <class T>
T atomicMax(T* place, T value) {
  const T before = *place;
  if (value > before) *place = value;
  return before;
}
