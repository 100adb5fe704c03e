// AVX2 and FMA.
#include <immintrin.h>

#include "tiles.h"

namespace vmad {
namespace {

struct Vector {
  using Sum = __m256;
  using Operand = __m256;
  using Product = float;
  static constexpr int kLanes = 8;
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum load(const Word* from) { return _mm256_load_ps(reinterpret_cast<const float*>(from)); }
  static Sum broadcast(const Word* from) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(from)); }
  static Sum step(Sum sum, Sum query, Sum bank) { return _mm256_fmadd_ps(query, bank, sum); }
  static Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
  static Sum load_sum(const Word* from) { return load(from); }
  static void store(Word* to, Sum sum) { _mm256_store_ps(reinterpret_cast<float*>(to), sum); }
};

constexpr Tiles kFloat32 = tiles<Vector, 6, 1>();
bool runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

constexpr Path avx2 = {"avx2", runs, &kFloat32, nullptr, nullptr, encode, widen};

}  // namespace vmad
