// AVX-512, and its dot products of bytes (VNNI) and of bfloat16. Compiled for all three; a path runs what it names.
#include <immintrin.h>

#include "tiles.h"

namespace vmad {
namespace {

struct Integers {
  using Operand = __m512i;
  static constexpr int kLanes = 16;
  static __m512i load(const Word* from) { return _mm512_load_si512(from); }
  static __m512i broadcast(const Word* from) { return _mm512_set1_epi32(int(*from)); }
};

struct Float32 : Integers {
  using Sum = __m512;
  using Product = float;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum step(Sum sum, __m512i query, __m512i bank) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(query), _mm512_castsi512_ps(bank), sum);
  }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Sum load_sum(const Word* from) { return _mm512_load_ps(from); }
  static void store(Word* to, Sum sum) { _mm512_store_ps(to, sum); }
};

struct Bfloat16 : Float32 {
  static Sum step(Sum sum, __m512i query, __m512i bank) {
    return _mm512_dpbf16_ps(sum, __m512bh(query), __m512bh(bank));
  }
};

struct Int8 : Integers {
  using Sum = __m512i;
  using Product = std::int32_t;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum step(Sum sum, __m512i query, __m512i bank) { return _mm512_dpbusd_epi32(sum, query, bank); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static Sum load_sum(const Word* from) { return load(from); }
  static void store(Word* to, Sum sum) { _mm512_store_si512(to, sum); }
};

constexpr Tiles kBfloat16 = tiles<Bfloat16, 12, 2>();
constexpr Tiles kInt8 = tiles<Int8, 12, 2>(0x80808080, -128);

bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool runs_vnni() { return runs() && __builtin_cpu_supports("avx512vnni"); }
bool runs_bf16() { return runs_vnni() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

constexpr Tiles avx512_float32 = tiles<Float32, 12, 2>();
constexpr Path avx512 = {"avx512", runs, &avx512_float32, nullptr, nullptr, encode, widen};
constexpr Path avx512_vnni = {"avx512_vnni", runs_vnni, &avx512_float32, nullptr, &kInt8, encode, widen};
constexpr Path avx512_bf16 = {"avx512_bf16", runs_bf16, &avx512_float32, &kBfloat16, &kInt8, encode, widen};

}  // namespace vmad
