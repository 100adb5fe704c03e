// The AMX instructions that kernels/cpu/amx.cpp uses, in C++ after the pseudocode of Intel's manual, for processors
// without them. Included before it.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace emulated {

inline thread_local unsigned char tile[8][16][64];

inline void load(int t, const void* base, long stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tile[t][row], static_cast<const char*>(base) + row * stride, 64);
}

inline void store(int t, void* base, long stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(base) + row * stride, tile[t][row], 64);
}

template <class T>
T at(int t, int row, int column) {
  T value;
  std::memcpy(&value, tile[t][row] + column * sizeof(T), sizeof value);
  return value;
}

/// c[m][n] += Σ over k and i < group of a[m][group·k + i] · b[k][group·n + i].
template <class Sum, class T, class Value>
void dot(int c, int a, int b, int group, Value value) {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        Sum sum = at<Sum>(c, m, n);
        for (int i = 0; i < group; ++i) sum += value(at<T>(a, m, group * k + i)) * value(at<T>(b, k, group * n + i));
        std::memcpy(tile[c][m] + n * sizeof sum, &sum, sizeof sum);
      }
    }
  }
}

inline float from_bfloat16(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int cpuid(unsigned* d) {
  *d = ~0u;
  return 1;
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(configuration) (void)(configuration)
#define _tile_release()
#define _tile_zero(t) std::memset(emulated::tile[t], 0, sizeof emulated::tile[t])
#define _tile_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated::store(t, base, stride)
#define _tile_dpbssd(c, a, b) emulated::dot<std::int32_t, signed char>(c, a, b, 4, [](int v) { return v; })
#define _tile_dpbf16ps(c, a, b) emulated::dot<float, std::uint16_t>(c, a, b, 2, emulated::from_bfloat16)
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(c) = 0, emulated::cpuid(d))
#define syscall(...) 0
